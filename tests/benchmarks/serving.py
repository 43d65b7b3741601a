"""Serving under load, written to ``results/serving.json``: ``make bench-serve``, or one figure with ``--only``.

Run it on a quiet machine: it times things.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rows import RESULTS, write_row
from served import ML1M, THREADS, WINDOW_S, System, bodies_of, bundle_of, load, million, some_users, trained
from traffic import COMMAND, traffic, traffic_1m

from recsys.bundle import Bundle
from recsys.index.ivf import IvfIndex
from recsys.testing.tiny_bundle import TINY

# --- a catalogue of a million -----------------------------------------------------------------------------------------


def retrieval(workdir: Path) -> None:
    """Milliseconds per query among a million items, alone and in batches, at a recall@200 of .97 or more."""
    import faiss

    from recsys.index.flat import FlatIndex

    faiss.omp_set_num_threads(os.cpu_count() or 1)
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(2000, 64)).astype(np.float32)
    items = centres[generator.integers(0, 2000, 1_000_000)] + 0.5 * generator.normal(size=(1_000_000, 64))
    items = (items / np.linalg.norm(items, axis=1, keepdims=True)).astype(np.float32)
    users = items[generator.integers(0, len(items), 2000)] + 0.3 * generator.normal(size=(2000, 64)).astype(np.float32)
    users = users.astype(np.float32)
    exact = FlatIndex().build(items).search(users, 200)[1]
    index = IvfIndex().build(items)
    found = index.search(users, 200)[1]
    recall = float(np.mean([len(np.intersect1d(a, b)) / 200 for a, b in zip(exact, found, strict=True)]))

    def ms(batch: int) -> float:
        started = time.perf_counter()
        for first in range(0, 1024, batch):
            index.search(users[first : first + batch], 200)
        return (time.perf_counter() - started) * 1e3 / 1024

    ms(64)
    batched = float(np.median([ms(64) for _ in range(5)]))
    single = float(np.median([ms(1) for _ in range(5)]))
    for name, value, limit in (("batch", batched, 0.4), ("single", single, 1.5)):
        write_row(
            "serving", f"retrieval_1m_ms_{name}", value, unit="ms", bar=f"<= {limit:g}, recall@200 >= .97",
            passes=value <= limit and recall >= 0.97, command=COMMAND, seeds=[0],
            protocol="1,000,000 random clustered vectors of 64 dimensions, index kind ivf with its defaults, top 200, "
            f"{os.cpu_count()} threads, {'64 queries at once' if name == 'batch' else 'one query at a time'}, "
            "median of 5",
            details={"recall@200": recall},
        )  # fmt: skip


# --- swaps ------------------------------------------------------------------------------------------------------------


def _events_of(bundle: Bundle, folder: Path) -> Path:
    """A file with requests of one event each, all of them different."""
    path = folder / "events.jsonl"
    stamp = datetime.now(UTC).isoformat()
    event = {"item_id": bundle.catalogue().id_map.take(np.zeros(1, np.int32))[0], "event": "view", "timestamp": stamp}
    told = [event | {"user_id": user, "event_id": uuid.uuid4().hex} for user in some_users(bundle)]
    path.write_text("".join(json.dumps({"events": [each]}) + "\n" for each in told))
    return path


def swaps(workdir: Path) -> None:
    """Twenty changes of the Bundle under load: failures, degraded answers, the longest stall."""
    from recsys.bundle.store import BundleStore
    from recsys.events.sqlite import SqliteEventStoreConfig
    from serve.config import ServeConfig
    from serve.run import processes_of_session, serving

    bundles = [bundle_of(workdir, f"ml1m-{seed}", ML1M, seed=seed) for seed in range(2)]
    bodies = bodies_of(bundles[0], workdir)
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name:
        store = BundleStore(Path(name) / "bundles")
        for bundle in bundles:
            store.add(bundle)
        ids = [bundle.bundle_id for bundle in bundles]
        store.activate(ids[0], None)
        config = ServeConfig.parse(
            {
                "bundle_uri": str(store),
                "access": {"kind": "open"},
                "topology": "graph",
                "event_store": SqliteEventStoreConfig(path=f"{name}/events.sqlite").model_dump(),
            },
            where="bench",
        )
        with serving(config, port=8023) as url:
            import httpx

            system = System("graph", f"{url}/v1/recommend", processes_of_session)
            load(system, bodies, callers=4, seconds=WINDOW_S)
            still = load(system, bodies, rate=20, seconds=WINDOW_S)
            telling = System("graph", f"{url}/v1/events", processes_of_session)
            done = threading.Event()
            found: dict[str, dict[str, list[Any]]] = {}

            def keep_up(what: str, system: System, bodies: Path, rate: float) -> None:
                parts = []
                while not done.is_set():
                    parts.append(load(system, bodies, rate=rate, seconds=WINDOW_S))
                found[what] = {key: [v for part in parts for v in part[key]] for key in ("latency_ms", "status")}

            callers = [
                threading.Thread(target=keep_up, args=("recommend", system, bodies, 20)),
                threading.Thread(target=keep_up, args=("events", telling, _events_of(bundles[0], Path(name)), 5)),
            ]
            for caller in callers:
                caller.start()
            for turn in range(1, 21):
                store.activate(ids[turn % 2], ids[(turn - 1) % 2])
                while httpx.get(f"{url}/v1/bundle").json()["bundle_id"] != ids[turn % 2]:
                    time.sleep(0.1)
            done.set()
            for caller in callers:
                caller.join()
    longest = max(max(each["latency_ms"]) for each in found.values())
    status = [code for each in found.values() for code in each["status"]]
    failed = sum(code != 200 for code in status)
    write_row(
        "serving", "swap_longest_ms", longest, unit="ms", bar="<= 250, none fails",
        passes=longest <= 250 and not failed, command=COMMAND, seeds=[0],
        protocol="20 changes between two Bundles of the size of MovieLens-1M at 20 recommendations and 5 events per "
        "second, topology graph; the longest time from the moment a request was due to its answer",
        details={
            "num_requests": len(status),
            "num_failed": failed,
            "longest_ms": {what: max(each["latency_ms"]) for what, each in found.items()},
            "p99_ms": {what: float(np.percentile(each["latency_ms"], 99)) for what, each in found.items()},
            "p99_ms_without_changes": float(np.percentile(still["latency_ms"], 99)),
            "longest_ms_without_changes": max(still["latency_ms"]),
        },
    )  # fmt: skip


# --- stages that fail -------------------------------------------------------------------------------------------------


def ladder(workdir: Path) -> None:
    """How late an answer is at most while one stage is slow, hangs or raises."""
    from recsys.pipeline.recommender import Recommender
    from recsys.pipeline.requests import RecommendRequest
    from recsys.pipeline.runner import LocalStage

    bundle = trained(workdir)
    users = some_users(bundle)
    deadline_ms, rate, seconds = 500.0, 50.0, 10.0
    release = threading.Event()

    def raises(*_: Any) -> Any:
        raise RuntimeError("broken")

    failures: dict[str, Callable[..., Any]] = {
        "takes 10 s": lambda *_: release.wait(10),
        "hangs": lambda *_: release.wait(),
        "raises": raises,
    }
    late: dict[str, float] = {}
    for place, stage_name in enumerate(("retrieval", "ranking", "reranking")):
        for how, failure in failures.items():
            recommender = Recommender.load(bundle.path)
            stage = recommender.runner.stages[place]
            assert isinstance(stage, LocalStage)
            stage.stage.run_batch = failure  # type: ignore[method-assign]
            took_ms: list[float] = []

            async def one(
                user_id: str, due: float, recommender: Recommender = recommender, took_ms: list[float] = took_ms
            ) -> None:
                answer = await recommender.arecommend(RecommendRequest(user_id=user_id, deadline_ms=deadline_ms))
                took_ms.append((time.perf_counter() - due) * 1e3)
                assert len(answer.items) == 10 and answer.degraded

            async def all_of_them(one: Callable[[str, float], Any] = one) -> None:
                start = time.perf_counter()
                tasks = []
                for number in range(int(rate * seconds)):
                    due = start + number / rate
                    await asyncio.sleep(max(0.0, due - time.perf_counter()))
                    tasks.append(asyncio.create_task(one(users[number % len(users)], due)))
                await asyncio.gather(*tasks)

            asyncio.run(all_of_them())
            late[f"{stage_name} {how}"] = float(np.percentile(took_ms, 99)) - deadline_ms
            print(f"{stage_name} {how}: p99 {np.percentile(took_ms, 99):.1f} ms", flush=True)
            recommender.close()
    release.set()
    worst = max(late.values())
    write_row(
        "serving", "ladder_p99_beyond_deadline_ms", worst, unit="ms", bar="<= 20", passes=worst <= 20,
        command=COMMAND, seeds=[0],
        protocol=f"{rate:g} requests/s for {seconds:g} s, a deadline of {deadline_ms:g} ms, stages on threads of the "
        "gateway's process, one of them slowed to 10 s, hanging or raising at each call; p99 less the deadline, the "
        "worst case",
        details=late,
    )  # fmt: skip


# --- scaling ----------------------------------------------------------------------------------------------------------


def ramp(workdir: Path) -> None:
    """Replicas follow the load up and down, and no request fails on the way."""
    from recsys.events.sqlite import SqliteEventStoreConfig
    from serve.config import ServeConfig
    from serve.run import processes_of_session, serving

    bundle = trained(workdir)
    bodies = bodies_of(bundle, workdir)
    steps = [(5, 20.0), (40, 40.0), (80, 40.0), (40, 30.0), (5, 60.0)]
    scaling = {
        "min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 1, "upscale_delay_s": 2,
        "downscale_delay_s": 15, "num_cpus": 0.1, "threads": THREADS,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name:
        config = ServeConfig.parse(
            {
                "bundle_uri": str(bundle.path),
                "access": {"kind": "open"},
                "topology": "fused",
                "event_store": SqliteEventStoreConfig(path=f"{name}/events.sqlite").model_dump(),
                "gateway": scaling,
            },
            where="bench",
        )
        with serving(config, port=8025) as url:
            from ray import serve

            started, done = time.monotonic(), threading.Event()
            replicas: list[tuple[float, int]] = []

            def watch() -> None:
                while not done.wait(1.0):
                    states = serve.status().applications["recsys"].deployments["gateway"].replica_states
                    running = sum(number for state, number in states.items() if state == "RUNNING")
                    replicas.append((time.monotonic() - started, running))

            watching = threading.Thread(target=watch)
            watching.start()
            system = System("fused", f"{url}/v1/recommend", processes_of_session)
            windows: list[tuple[float, float, dict[str, Any]]] = []
            for rate, seconds in steps:
                begun = time.monotonic() - started
                windows.append((begun, rate, load(system, bodies, rate=rate, seconds=seconds)))
            done.set()
            watching.join()
    status = np.concatenate([found["status"] for _, _, found in windows])
    failed = int(np.sum((status != 200) & (status != 503)))
    most, last = max(number for _, number in replicas), replicas[-1][1]
    plot_ramp(replicas, windows, RESULTS / "serving" / "ramp.svg")
    write_row(
        "serving", "ramp_failed_requests", failed, unit="requests", bar="0, replicas rise and return",
        passes=not failed and most > 1 and last == 1, command=COMMAND, seeds=[0],
        protocol=f"topology fused, Bundle trained on MovieLens-1M, requests/s and seconds {steps}, 1 to 4 replicas",
        details={"most_replicas": most, "replicas_at_end": last, "refused": int(np.sum(status == 503))},
    )  # fmt: skip


def plot_ramp(
    replicas: list[tuple[float, int]], windows: list[tuple[float, float, dict[str, Any]]], path: Path
) -> None:
    """Load, replicas and latency over time."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 5), sharex=True)
    top.step([moment for moment, _, _ in windows], [rate for _, rate, _ in windows], where="post", label="requests/s")
    top.legend(loc="upper left")
    count = top.twinx()
    count.step(*zip(*replicas, strict=True), where="post", color="tab:orange", label="replicas")
    count.legend(loc="upper right")
    first = min(min(found["at"]) for _, _, found in windows) - windows[0][0]
    for _, _, found in windows:
        bottom.plot(np.array(found["at"]) - first, found["latency_ms"], ".", color="tab:blue", markersize=2)
    bottom.set(xlabel="seconds", ylabel="ms", yscale="log")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path)


# --- memory -----------------------------------------------------------------------------------------------------------


def memory(workdir: Path) -> None:
    """What one more replica costs, of a Bundle of a million items and of one of next to none."""
    big, small = million(workdir), bundle_of(workdir, "tiny", TINY)
    added: dict[str, int] = {}
    for name, bundle in (("million", big), ("tiny", small)):
        one, two = (_resident_bytes(bundle, workdir, number) for number in (1, 2))
        added[name] = two - one
        print(f"{name}: {one / 1e6:.0f} MB in one replica, {two / 1e6:.0f} MB in two", flush=True)
    num_bytes = big.manifest.num_bytes
    share = (added["million"] - added["tiny"]) / num_bytes
    write_row(
        "serving", "replica_mapped_share", share, unit="", bar="<= 0.1", passes=share <= 0.1, command=COMMAND,
        seeds=[0],
        protocol="topology fused, after 300 requests; proportional set size of all replicas, of two less of one, for a "
        "Bundle of 1,000,000 random items less that for one of 300, over the bytes of the first on disk",
        details={"bundle_bytes": num_bytes, "added_bytes": added},
    )  # fmt: skip


def _resident_bytes(bundle: Bundle, workdir: Path, num_replicas: int) -> int:
    """Of all gateways together, what they share counted once; served from a process of its own."""
    command = [sys.executable, __file__, "--resident", str(bundle.path), "--replicas", str(num_replicas)]
    said = subprocess.run([*command, "--workdir", str(workdir)], check=True, stdout=subprocess.PIPE, text=True).stdout
    return int(said.split()[-1])


def resident(bundle: Bundle, workdir: Path, num_replicas: int) -> None:
    """Print :func:`_resident_bytes`."""
    from recsys.events.sqlite import SqliteEventStoreConfig
    from serve.config import ServeConfig
    from serve.run import processes_of_session, serving

    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name:
        config = ServeConfig.parse(
            {
                "bundle_uri": str(bundle.path),
                "access": {"kind": "open"},
                "topology": "fused",
                "event_store": SqliteEventStoreConfig(path=f"{name}/events.sqlite").model_dump(),
                "gateway": {"min_replicas": num_replicas, "max_replicas": num_replicas, "num_cpus": 0.1},
            },
            where="bench",
        )
        with serving(config, port=8026) as url:
            system = System("fused", f"{url}/v1/recommend", processes_of_session)
            load(system, bodies_of(bundle, workdir), rate=30, seconds=10 * num_replicas)
            rollups = [
                Path(f"/proc/{pid}/smaps_rollup").read_text()
                for pid in processes_of_session()
                if b"gateway" in Path(f"/proc/{pid}/cmdline").read_bytes()
            ]
    assert len(rollups) == num_replicas, f"{len(rollups)} gateways, not {num_replicas}"
    kib = [int(re.findall(r"^Pss: *([0-9]+) kB", each, re.MULTILINE)[0]) for each in rollups]
    sys.stdout.write(f"{1024 * sum(kib)}\n")


FIGURES = {
    "traffic": traffic,
    "traffic_1m": traffic_1m,
    "retrieval": retrieval,
    "memory": memory,
    "swaps": swaps,
    "ladder": ladder,
    "ramp": ramp,
}


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"figures to measure: {', '.join(FIGURES)}")] = None,
    workdir: Annotated[Path, typer.Option(help="where Bundles are kept")] = Path("runs/bench-serve"),
    bundle: Annotated[Path | None, typer.Option("--resident", help="print what replicas of this Bundle take")] = None,
    replicas: int = 1,
) -> None:
    """Measure how serving stands up to load."""
    workdir.mkdir(parents=True, exist_ok=True)
    if bundle is not None:
        resident(Bundle.open(bundle), workdir, replicas)
        return
    for name in only or FIGURES:
        print(f"== {name}", flush=True)
        if len(only or FIGURES) > 1:
            # Ray must not have been imported before the fast path's environment is set.
            subprocess.run([sys.executable, __file__, "--only", name, "--workdir", str(workdir)], check=True)
            continue
        FIGURES[name](workdir)


if __name__ == "__main__":
    typer.run(main)
