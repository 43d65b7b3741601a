"""The real graph: its own Ray, HAProxy, HTTP over sockets, replicas that are killed, and nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest

from recsys.bundle.store import BundleStore
from recsys.models.retrievers.blend import Blend
from recsys.models.retrievers.neighbours.item_knn import ItemKNN
from recsys.models.retrievers.popularity import Popularity
from recsys.models.retrievers.sequences.text_two_tower import TextTwoTower
from recsys.models.retrievers.towers.mind import MIND
from recsys.pipeline.config import PipelineConfig
from recsys.pipeline.recommender import Recommender
from recsys.testing.tiny_bundle import make_bundle
from recsys.training.loop import TrainConfig
from serve.access.keys import SCOPES, add_key, revoke_keys
from serve.observe.metrics import METRICS

ROOT = Path(__file__).resolve().parents[2]
START_S = 150
PATIENT = PipelineConfig.parse(
    {
        "deadline_ms": 20_000,
        "max_deadline_ms": 30_000,
        "budgets_ms": {"retrieval": 5000, "ranking": 1500, "reranking": 5000},
        "breaker": {"open_s": 1},
    },
    where="test",
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundles"), PATIENT)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(bundle, folder, topology):
    """A running ``python -m serve.run`` of a Bundle, or of the store at a path. On leaving it is interrupted, and must
    end well and alone.
    """
    port = free_port()
    command = [sys.executable, "-m", "serve.run", "--bundle", str(getattr(bundle, "path", bundle))]
    command += ["--topology", topology]
    command += ["--port", str(port), "--events", str(folder / "events.sqlite"), "--num-cpus", "2"]
    log = folder / f"{topology}.log"
    keys = folder / "keys.json"
    key = add_key(keys, "caller", SCOPES) if keys.exists() else None
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while "ready: " not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        session = session_of(process.pid)
        if key is None:
            (key,) = re.findall(r"^rk_\S+$", log.read_text(), re.MULTILINE)
        headers = {"authorization": f"Bearer {key}"}
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60) as client:
            yield client, session
        process.send_signal(signal.SIGINT)
        assert process.wait(90) == 0, log.read_text()
        assert members(session) == {}
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def session_of(pid):
    """The mark that the start command puts on the processes it starts, read from the environment of one of them."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"\nPPid:\t{pid}\n" in (folder / "status").read_text():
                found = re.search(rb"RECSYS_SERVE_SESSION=(\w+)", (folder / "environ").read_bytes())
                if found:
                    return found[1].decode()
        except OSError:
            continue
    raise AssertionError(f"process {pid} has no marked child")


def members(session):
    """Command line by process id."""
    mark = f"RECSYS_SERVE_SESSION={session}".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
    return found


def replicas(session, deployment):
    return [
        pid for pid, line in members(session).items() if re.match(rf"ray::ServeReplica:recsys:{deployment}\b", line)
    ]


def listening_addresses(pid):
    """Hexadecimal local addresses that a process listens on."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        if found := re.match(r"socket:\[(\d+)\]", str(descriptor.readlink())):
            inodes.add(found[1])
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                addresses.add(fields[1].split(":")[0])
    return addresses


def event(event_id, user_id, item_id="i7"):
    stamp = datetime.now(UTC).isoformat()
    return {"event_id": event_id, "user_id": user_id, "item_id": item_id, "event": "click", "timestamp": stamp}


PINNED = {"history": [{"item_id": "i1"}, {"item_id": "i2"}], "top_k": 10}


@pytest.mark.timeout(400)
def test_graph(bundle, tmp_path):
    with server(bundle, tmp_path, "graph") as (client, session):
        for deployment in ("gateway", "retrieval", "ranking"):
            assert len(replicas(session, deployment)) == 1
        assert client.get("/readyz").status_code == 200
        assert client.get("/docs").status_code == 200
        assert client.get("/v1/bundle").json()["bundle_id"] == bundle.bundle_id

        answer = client.post("/v1/recommend", json={"user_id": "u1"}).json()
        assert len(answer["items"]) == 10
        assert answer["degraded"] == []
        assert {"retrieval", "ranking"} <= set(answer["items"][0]["stage_scores"])
        in_graph = [item["item_id"] for item in client.post("/v1/recommend", json=PINNED).json()["items"]]

        assert client.post("/v1/events", json={"events": [event("e1", "newcomer")]}).json()["accepted"] == 1
        seen = client.post("/v1/recommend", json={"user_id": "newcomer", "top_k": 300}).json()["items"]
        assert "i7" not in {item["item_id"] for item in seen}
        assert len(seen) == 298  # all but the one seen and the one that is unavailable
        assert len(client.get("/v1/users/newcomer").json()["history"]) == 1

        malformed = client.post("/v1/recommend", content=b"{", headers={"content-type": "application/json"})
        assert malformed.status_code == 400
        assert malformed.headers["content-type"] == "application/problem+json"
        large = client.post("/v1/events", content=b"x" * (2 << 20), headers={"content-type": "application/json"})
        assert large.status_code == 413

        refuses_those_who_do_not_belong(client, tmp_path / "keys.json")
        tells_of_itself(client, tmp_path / "graph.log")

        proxies = [pid for pid, line in members(session).items() if "/haproxy " in line or line.startswith("haproxy")]
        assert proxies
        assert set().union(*map(listening_addresses, proxies)) == {"0100007F"}  # 127.0.0.1
        (file,) = {found[1] for line in members(session).values() if (found := re.search(r"haproxy.* -f (\S+)", line))}
        written = Path(file).read_text()
        for line in (
            r"server SERVE_REPLICA_.* maxconn 100$",
            r"timeout queue \d+ms$",
            r"http-error status 503 ",
            r"set-header x-request-disconnect-disabled \?1$",
            r"set-priority-class ",
        ):
            assert re.search(line, written, re.MULTILINE), f"HAProxy was not told: {line}"

        kill_a_stage_during_calls(client, session)

    with server(bundle, tmp_path, "fused") as (client, session):
        assert not replicas(session, "ranking")
        fused = client.post("/v1/recommend", json=PINNED).json()
        assert [item["item_id"] for item in fused["items"]] == in_graph
        assert len(client.get("/v1/users/newcomer").json()["history"]) == 1
        kill_the_gateway_after_an_acknowledgement(client, session)


TRAIN = TrainConfig(epochs=1, batch_tokens=64)
UNLIKE = {
    "item_knn": ItemKNN(),
    "mind": MIND(dim=16, num_interests=3, max_length=10, num_negatives=32, train=TRAIN),
    "text_two_tower": TextTwoTower(dim=16, hidden_dim=16, text_hidden_dim=16, num_negatives=32, train=TRAIN),
    "blend": Blend.parse(
        {"sources": {"together": {"retriever": ItemKNN()}, "popular": {"retriever": Popularity()}}},
        where="test",
    ),
}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", UNLIKE)
def test_families_that_are_unlike_are_served_alike(kind, tmp_path):
    bundle = make_bundle(tmp_path, PATIENT, retriever=UNLIKE[kind])
    # Of the two layouts of the graph, one has every stage in a process of its own.
    with server(bundle, tmp_path, "graph" if kind == "mind" else "fused") as (client, _):
        answer = client.post("/v1/recommend", json=PINNED | {"explain": True}).json()
        with Recommender.load(bundle.path) as recommender:
            here = recommender.recommend(history=["i1", "i2"], top_k=10)
        assert [item["item_id"] for item in answer["items"]] == [item.item_id for item in here.items]
        assert answer["degraded"] == []
        assert len(answer["items"]) == 10
        names = list(UNLIKE["blend"].sources) if kind == "blend" else [kind]
        assert {source for item in answer["items"] for source in item["sources"]} == set(names)


def refuses_those_who_do_not_belong(client, keys):
    def status(key, method, path):
        return client.request(method, path, headers={"authorization": f"Bearer {key}"}).status_code

    def comes_to(wanted, *request):
        deadline = time.monotonic() + 10
        while status(*request) != wanted:
            assert time.monotonic() < deadline, f"{request} is not answered {wanted}"
            time.sleep(0.1)

    reader = add_key(keys, "reader", ["read"])
    comes_to(200, reader, "GET", "/v1/bundle")
    assert status(reader, "POST", "/v1/events") == 403
    revoke_keys(keys, "reader")
    comes_to(401, reader, "GET", "/v1/bundle")
    for path in ("/v1/users/u1", "/readyz", "/docs", "/no/such/path"):
        assert status("rk_0_none", "GET", path) == 401


@pytest.mark.timeout(400)
@pytest.mark.parametrize("topology", ["graph", "fused"])
def test_bundles_and_rules_change_under_load(topology, tmp_path):
    """No request fails, none is degraded, and none is answered from two Bundles or by two lists of rules."""
    store = BundleStore(tmp_path / "bundles")
    bundles = [make_bundle(tmp_path / "made", PATIENT, seed=seed) for seed in range(3)]
    for each in bundles:
        store.add(each)
    ids = [each.bundle_id for each in bundles]
    store.activate(ids[0], None)
    stop = threading.Event()
    with server(store.root.local, tmp_path, topology) as (client, _):
        known = [client.get(f"/v1/users/u{worker}").json()["history"] for worker in range(3)]
        met = {each["item_id"] for history in known for each in history}
        pinned = next(f"i{row}" for row in range(20, 300) if f"i{row}" not in met)

        def calls(worker):
            answers = []
            while not stop.is_set():
                answers.append(client.post("/v1/recommend", json={"user_id": f"u{worker}", "top_k": 3}))
                if len(answers) % 5 == 0:
                    found = client.get(f"/v1/traces/{answers[-1].json()['request_id']}").json()
                    assert {stage["bundle_id"] for stage in found["stages"]} == {found["bundle_id"]}
            return answers

        def comes_to(bundle_id):
            deadline = time.monotonic() + 60
            while (told := client.get("/v1/bundle").json())["bundle_id"] != bundle_id:
                assert time.monotonic() < deadline, told["refused"]
                time.sleep(0.1)

        with ThreadPoolExecutor(3) as pool:
            running = [pool.submit(calls, worker) for worker in range(3)]
            try:
                for turn in range(1, SWAPS + 1):
                    store.activate(ids[turn % 3], ids[(turn - 1) % 3])
                    comes_to(ids[turn % 3])
                store.rollback()
                comes_to(last := ids[(SWAPS - 1) % 3])
                rules = [{"kind": "pin", "item_ids": [pinned]}]
                assert client.put("/v1/rules", json={"rules": rules, "after": 0}).status_code == 200
                comes_to(f"{last}+0.1")
                assert client.delete("/v1/rules").json()["version"] == 2
                comes_to(f"{last}+0.2")
            finally:
                stop.set()
            answers = [answer for future in running for answer in future.result()]
        assert {answer.status_code for answer in answers} == {200}
        assert {name for answer in answers for name in answer.json()["degraded"]} == set()
        first = {(answer.json()["bundle_id"], answer.json()["items"][0]["item_id"] == pinned) for answer in answers}
        assert first == {*((bundle_id, False) for bundle_id in (*ids, f"{last}+0.2")), (f"{last}+0.1", True)}
        assert all(len(answer.json()["items"]) == 3 for answer in answers)


SWAPS = 5


def tells_of_itself(client, log):
    answer = client.post("/v1/recommend", json=PINNED | {"explain": True}).json()
    trace = client.get(f"/v1/traces/{answer['request_id']}").json()
    assert [item["item_id"] for item in trace["items"]] == [item["item_id"] for item in answer["items"]]
    assert [stage["outcome"] for stage in trace["stages"]] == ["ok"] * 3
    assert client.get("/v1/traces/none").status_code == 404  # after every gateway was asked

    (metrics,) = re.findall(r"^metrics: (\S+)$", log.read_text(), re.MULTILINE)
    deadline = time.monotonic() + 60
    while missing := set(METRICS) - exported(httpx.get(metrics).text.splitlines()):
        assert time.monotonic() < deadline, f"not exported: {missing}"
        time.sleep(1)


def exported(lines):
    """Names of ours that Prometheus finds, for each with the suffix and the prefix that it has there."""
    series = {re.split(r"[{ ]", line)[0] for line in lines if not line.startswith("#")}
    suffix = {"histogram": "_bucket"}
    return {name for name, metric in METRICS.items() if f"ray_{name}{suffix.get(metric.kind, '')}" in series}


def kill_a_stage_during_calls(client, session):
    """Every call is answered in full, with the stage named where it was skipped; then the stage comes back."""
    stop = threading.Event()

    def calls(worker):
        answers = []
        while not stop.is_set():
            answers.append(client.post("/v1/recommend", json={"user_id": f"u{worker}"}))
        return answers

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(calls, worker) for worker in range(4)]
        time.sleep(1)
        (victim,) = replicas(session, "ranking")
        os.kill(victim, signal.SIGKILL)
        time.sleep(6)
        stop.set()
        answers = [answer for future in running for answer in future.result()]
    assert len(answers) > 8
    assert {answer.status_code for answer in answers} == {200}
    for answer in answers:
        body = answer.json()
        assert len(body["items"]) == 10
        assert set(body["degraded"]) <= {"ranking"}
    deadline = time.monotonic() + 60
    while client.post("/v1/recommend", json={"user_id": "u1"}).json()["degraded"]:
        assert time.monotonic() < deadline, "ranking did not come back"
        time.sleep(0.5)
    assert replicas(session, "ranking") != [victim]


def kill_the_gateway_after_an_acknowledgement(client, session):
    """What was acknowledged survives the process that acknowledged it, and counts once when it is sent again."""
    assert client.post("/v1/events", json={"events": [event("e2", "survivor")]}).json()["accepted"] == 1
    (victim,) = replicas(session, "gateway")
    os.kill(victim, signal.SIGKILL)
    deadline = time.monotonic() + 90
    while True:
        try:
            again = client.post("/v1/events", json={"events": [event("e2", "survivor")]}, timeout=10)
            if again.status_code == 200:
                break
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, "the gateway did not come back"
        time.sleep(0.5)
    assert again.json() == {"accepted": 0, "duplicates": 1}
    assert len(client.get("/v1/users/survivor").json()["history"]) == 1
