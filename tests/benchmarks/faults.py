"""What becomes of requests while parts of a served graph are killed, locked or taken away: ``make bench-faults``.

Each fault happens in the middle of a window of open-loop load, recommendations and events side by side, on two Ray
nodes of this machine. The table says how many were sent, answered, degraded, refused and failed, whether an
acknowledged event was lost, and how many seconds passed from the fault to the last answer that was not a full one.

The event store and the Bundle lie on small file systems in memory, so that one can be full and the other read-only;
who may not mount runs ``unshare --user --map-root-user --mount make bench-faults``.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rows import RESULTS, write_row
from served import HERE, some_users, trained

from recsys.bundle import Bundle

COMMAND = "make bench-faults"
WINDOW_S = 40.0
FAULT_AT_S = 10.0
FAULT_S = 10.0
STORE_DOWN_S = 5.0
RATE, EVENT_RATE = 20.0, 5.0
LIMIT_S, NODE_LIMIT_S = 10.0, 30.0
RUN, NODE = "RECSYS_BENCH_RUN", "RECSYS_BENCH_NODE"
"""environment variables that tell the processes of this run, and those of the node that is lost"""


@dataclass
class Served:
    """What is up, and what a fault may take away."""

    url: str
    run: str
    store: Path
    bundle: Path
    cluster: Any
    users: list[str]
    items: list[str]


def end(pid: int) -> None:
    """SIGKILL, if it is still there."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill(pattern: str) -> Callable[[Served], None]:
    """SIGKILL to one process whose command line holds ``pattern``."""
    from serve.run import processes_marked

    def fault(served: Served) -> None:
        for pid in processes_marked(RUN, served.run):
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if pattern in line:
                end(pid)
                return
        raise SystemExit(f"no process is called {pattern}")

    return fault


def lose_node(served: Served) -> None:
    """SIGKILL to all processes of the second node at once; a new one joins when the window is over."""
    from serve.run import processes_marked

    for pid in processes_marked(NODE, "second"):
        end(pid)


def restart_control_store(served: Served) -> None:
    """The head's control store dies, comes back from its files, and has to replace a gateway that dies after it."""
    served.cluster.head_node.kill_gcs_server()
    time.sleep(STORE_DOWN_S)
    served.cluster.head_node.start_gcs_server()
    time.sleep(STORE_DOWN_S)
    kill("ServeReplica:recsys:gateway")(served)


def lock_store(served: Served) -> None:
    """Hold the only right to write."""
    connection = sqlite3.connect(served.store, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    time.sleep(FAULT_S)
    connection.execute("ROLLBACK")
    connection.close()


def fill_store(served: Served) -> None:
    """Not a byte is left on its disk, nor room in the store's own files."""
    with sqlite3.connect(served.store) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    filler = served.store.parent / "filler"
    block = b"\0" * (1 << 20)
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(block)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    time.sleep(FAULT_S)
    filler.unlink()


def take_store_away(served: Served) -> None:
    """The folder is not where it was."""
    away = served.store.parent.with_name("away")
    served.store.parent.rename(away)
    time.sleep(FAULT_S)
    assert not served.store.parent.exists(), "a new event store was made while the old one was away"
    away.rename(served.store.parent)


def forbid_writing(served: Served) -> None:
    """The disk with the Bundle can only be read, and a gateway that dies meanwhile comes back from it."""
    subprocess.run(["mount", "-o", "remount,ro", str(served.bundle.parent)], check=True)
    kill("ServeReplica:recsys:gateway")(served)
    time.sleep(FAULT_S)
    subprocess.run(["mount", "-o", "remount,rw", str(served.bundle.parent)], check=True)


FAULTS: dict[str, Callable[[Served], None]] = {
    "nothing": lambda _: None,
    "gateway killed": kill("ServeReplica:recsys:gateway"),
    "retrieval killed": kill("ServeReplica:recsys:retrieval"),
    "ranking killed": kill("ServeReplica:recsys:ranking"),
    "reranking killed": kill("ServeReplica:recsys:reranking"),
    "proxy killed": kill("haproxy"),
    "controller killed": kill("ServeController"),
    "event store locked 10 s": lock_store,
    "event store full 10 s": fill_store,
    "event store away 10 s": take_store_away,
    "Bundle's disk read-only, gateway killed": forbid_writing,
    "node lost": lose_node,
    # The last one: what is started again in its course carries the mark of the second node.
    "head's control store down 5 s, then a gateway killed": restart_control_store,
}


@contextmanager
def mounted(folder: Path, num_mbytes: int) -> Generator[Path, None, None]:
    """A file system in memory at ``folder``."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_mbytes}m", "tmpfs", str(folder)], check=False)
    if done.returncode:
        raise SystemExit("cannot mount: run it with `unshare --user --map-root-user --mount`")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def two_nodes(bundle: Bundle, folder: Path) -> Iterator[Served]:
    """Two replicas of everything on two Ray nodes of this machine."""
    from recsys.events.sqlite import SqliteEventStoreConfig
    from serve import fastpath
    from serve.config import ServeConfig
    from serve.run import processes_marked, serving

    run = uuid.uuid4().hex
    (folder / "haproxy").mkdir()
    (folder / "control").mkdir()
    fastpath.apply(
        fastpath.fast_path(folder / "haproxy")
        | {
            RUN: run,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
            # Fault tolerance of the head: its control store writes what it knows to disk.
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(folder / "control"),
        }
    )
    from ray.cluster_utils import Cluster

    users, items = some_users(bundle), bundle.catalogue().id_map.ids.to_pylist()
    with mounted(folder / "disk", 1024) as disk, mounted(folder / "bundles", 1024) as bundles:
        store = disk / "store" / "events.sqlite"
        shutil.copytree(bundle.path, bundles / bundle.path.name)
        two = {"min_replicas": 2, "max_replicas": 2, "num_cpus": 0.1}
        config = ServeConfig.parse(
            {
                "bundle_uri": str(bundles / bundle.path.name),
                "access": {"kind": "open"},
                "local_stages": [],
                "event_store": SqliteEventStoreConfig(path=str(store)).model_dump(),
                **dict.fromkeys(("gateway", "retrieval", "ranking", "reranking"), two),
            },
            where="bench",
        )
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        try:
            cluster.add_node(num_cpus=2, env_vars={NODE: "second"})
            with serving(config, port=8024, address=cluster.address, proxy_location="HeadOnly") as url:
                yield Served(url, run, store, bundles / bundle.path.name, cluster, users, items)
        finally:
            cluster.shutdown()
            for pid in processes_marked(RUN, run):
                end(pid)


def generate(url: str, bodies: Path, rate: float) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE / "load.py"), "--url", url, "--bodies", str(bodies), "--rate", str(rate)]
    command += ["--seconds", str(WINDOW_S), "--every", "1", "--timeout-s", "30"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def window(served: Served, folder: Path, fault: Callable[[Served], None]) -> dict[str, Any]:
    """Load, the fault in the middle of it, and what became of everything."""
    asked, told = folder / "asked.jsonl", folder / "told.jsonl"
    large = [
        {"item_id": item_id} for item_id in served.items[:3000]
    ]  # more than a buffer of HAProxy holds unless it is told
    bodies: list[dict[str, Any]] = [{"user_id": user_id} for user_id in served.users[:500]]
    for body in bodies[::10]:
        body["history"] = large
    asked.write_text("".join(json.dumps(body) + "\n" for body in bodies))
    ids = [uuid.uuid4().hex for _ in range(int(2 * EVENT_RATE * WINDOW_S))]
    stamp = datetime.now(UTC).isoformat()
    one = {"user_id": served.users[0], "item_id": served.items[0], "event": "view", "timestamp": stamp}
    told.write_text("".join(json.dumps({"events": [one | {"event_id": i}]}) + "\n" for i in ids))
    both = generate(f"{served.url}/v1/recommend", asked, RATE), generate(f"{served.url}/v1/events", told, EVENT_RATE)
    time.sleep(FAULT_AT_S)
    with ThreadPoolExecutor(2) as pool:
        printed = [pool.submit(process.communicate) for process in both]
        started = time.monotonic()
        fault(served)  # in this thread: what Ray starts again dies with the thread that started it
        answers, events = (json.loads(one.result()[0]) for one in printed)
    with sqlite3.connect(served.store) as connection:
        kept = {event_id for (event_id,) in connection.execute("SELECT event_id FROM events")}
    status = np.array(answers["status"] + events["status"])
    degraded = np.array(answers["degraded"] + [False] * len(events["status"]))
    moments = np.array(answers["at"] + events["at"])
    wrong = ((status != 200) | degraded) & (moments >= started)
    acknowledged = {ids[n] for n, code in zip(events["number"], events["status"], strict=True) if code == 200}
    return {
        "sent": len(status),
        "answered": int(np.sum(status == 200)),
        "degraded": int(degraded.sum()),
        "refused": int(np.sum(status == 503)),
        "failed": int(np.sum((status != 200) & (status != 503))),
        "events_lost": len(acknowledged - kept),
        "recovery_s": float(moments[wrong].max() - started) if wrong.any() else 0.0,
        "p50_ms": float(np.median(answers["latency_ms"])),
        "p99_ms": float(np.percentile(answers["latency_ms"], 99)),
        "why": dict(Counter(answers["why"] + events["why"])),
    }


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"some of: {', '.join(FAULTS)}")] = None,
    workdir: Annotated[Path, typer.Option(help="where Bundles are kept")] = Path("runs/bench-serve"),
) -> None:
    """Run the faults one after another on one served graph, and print the table."""
    bundle = trained(workdir)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name, two_nodes(bundle, Path(name)) as served:
        for fault in only or FAULTS:
            rows[fault] = window(served, Path(name), FAULTS[fault])
            print(fault, rows[fault], flush=True)
            if FAULTS[fault] is lose_node:
                served.cluster.add_node(num_cpus=2, env_vars={NODE: "second"})
            time.sleep(5)
            report(rows, partial=bool(only) or len(rows) < len(FAULTS))


def report(rows: dict[str, dict[str, Any]], *, partial: bool) -> None:
    """The table, and the rows where nothing was left out."""
    columns = [name for name in next(iter(rows.values())) if name != "why"]
    lines = [f"| fault | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{row[c]:.4g}' for c in columns)} |" for name, row in rows.items()]
    table = "\n".join(lines) + "\n"
    print(table)
    if partial:
        return  # a part of the table is no result
    (RESULTS / "serving").mkdir(parents=True, exist_ok=True)
    (RESULTS / "serving" / "faults.md").write_text(table)
    replicas = [rows[f"{name} killed"] for name in ("gateway", "retrieval", "ranking", "reranking")]
    failed = sum(row["failed"] for row in replicas)
    lost = sum(row["events_lost"] for row in rows.values())
    slowest = max(row["recovery_s"] for row in replicas)
    proxy, node = rows["proxy killed"]["recovery_s"], rows["node lost"]["recovery_s"]
    protocol = (
        f"{RATE:g} recommendations/s (one in ten with a history of 3,000 items, 50 KB, in its body) and "
        f"{EVENT_RATE:g} events/s, open loop, two replicas of everything on two Ray nodes of one machine, Bundle "
        f"trained on MovieLens-1M; each fault {FAULT_AT_S:g} s into a window of {WINDOW_S:g} s"
    )
    within = f"<= {LIMIT_S:g}"
    for name, what, value, unit, bar, passes in (
        ("fault_failed_requests", "a replica of each kind killed", failed, "requests", "0", failed == 0),
        ("fault_events_lost", "all faults of the table", lost, "events", "0", lost == 0),
        ("fault_recovery_s", "a replica of each kind killed", slowest, "s", within, slowest <= LIMIT_S),
        ("fault_proxy_recovery_s", "the only proxy killed", proxy, "s", within, proxy <= LIMIT_S),
        ("fault_node_recovery_s", "a node lost", node, "s", f"<= {NODE_LIMIT_S:g}", node <= NODE_LIMIT_S),
    ):
        write_row(
            "serving", name, value, unit=unit, bar=bar, passes=passes, protocol=f"{protocol}; {what}", command=COMMAND,
            seeds=[0], details=rows,
        )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
