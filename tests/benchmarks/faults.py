"""What becomes of requests while parts of a served graph are killed, locked or taken away: ``make bench-faults``.

Each fault happens in the middle of a window of open-loop load, recommendations and events side by side. The table says
how many were sent, answered, degraded, refused and failed, whether an acknowledged event was lost, and how many
seconds passed from the fault to the last answer that was not a full one.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
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
from serving import HERE, ML1M, bundle_of

COMMAND = "make bench-faults"
WINDOW_S = 40.0
FAULT_AT_S = 10.0
RATE, EVENT_RATE = 20.0, 5.0
LIMIT_S = 10.0


def kill(pattern: str) -> Callable[[Path], None]:
    """SIGKILL to one process whose command line holds ``pattern``."""

    def fault(_: Path) -> None:
        from serve.run import processes_of_session

        for pid in processes_of_session():
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if pattern in line:
                os.kill(pid, signal.SIGKILL)
                return
        raise SystemExit(f"no process is called {pattern}")

    return fault


def lock_store(store: Path) -> None:
    """Hold the only right to write for ten seconds."""
    connection = sqlite3.connect(store, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    time.sleep(10)
    connection.execute("ROLLBACK")
    connection.close()


FAULTS: dict[str, Callable[[Path], None]] = {
    "nothing": lambda _: None,
    "gateway killed": kill("ServeReplica:recsys:gateway"),
    "retrieval killed": kill("ServeReplica:recsys:retrieval"),
    "ranking killed": kill("ServeReplica:recsys:ranking"),
    "reranking killed": kill("ServeReplica:recsys:reranking"),
    "proxy killed": kill("haproxy"),
    "controller killed": kill("ServeController"),
    "event store locked 10 s": lock_store,
}


def generate(url: str, bodies: Path, rate: float) -> subprocess.Popen[str]:
    command = [sys.executable, str(HERE / "load.py"), "--url", url, "--bodies", str(bodies), "--rate", str(rate)]
    command += ["--seconds", str(WINDOW_S), "--every", "1"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def window(url: str, folder: Path, store: Path, fault: Callable[[Path], None]) -> dict[str, Any]:
    """Load, the fault in the middle of it, and what became of everything."""
    generator = np.random.default_rng(0)
    asked, told = folder / "asked.jsonl", folder / "told.jsonl"
    asked.write_text(
        "".join(json.dumps({"user_id": f"u{u}"}) + "\n" for u in generator.integers(0, ML1M.num_users, 500))
    )
    ids = [uuid.uuid4().hex for _ in range(int(2 * EVENT_RATE * WINDOW_S))]
    stamp = datetime.now(UTC).isoformat()
    told.write_text(
        "".join(
            json.dumps(
                {"events": [{"event_id": i, "user_id": "u1", "item_id": "i1", "event": "view", "timestamp": stamp}]}
            )
            + "\n"
            for i in ids
        )
    )
    both = generate(f"{url}/v1/recommend", asked, RATE), generate(f"{url}/v1/events", told, EVENT_RATE)
    time.sleep(FAULT_AT_S)
    done = threading.Thread(target=fault, args=(store,))
    started = time.monotonic()
    done.start()
    answers, events = (json.loads(process.communicate()[0]) for process in both)
    done.join()
    with sqlite3.connect(store) as connection:
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
        "p99_ms": float(np.percentile(answers["latency_ms"], 99)),
    }


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"some of: {', '.join(FAULTS)}")] = None,
    workdir: Annotated[Path, typer.Option(help="where Bundles are kept")] = Path("runs/bench-serve"),
) -> None:
    """Run the faults one after another on one served graph, and print the table."""
    from recsys.events import SqliteEventStoreConfig
    from serve.config import ServeConfig
    from serve.run import serving

    bundle = bundle_of(workdir, "ml1m", ML1M)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name:
        folder = Path(name)
        store = folder / "events.sqlite"
        two = {"min_replicas": 2, "num_cpus": 0.1}
        config = ServeConfig.parse(
            {
                "bundle_uri": str(bundle.path),
                "access": {"kind": "open"},
                "event_store": SqliteEventStoreConfig(path=str(store)).model_dump(),
                **dict.fromkeys(("gateway", "retrieval", "ranking", "reranking"), two),
            },
            where="bench",
        )
        with serving(config, port=8024) as url:
            for fault in only or FAULTS:
                rows[fault] = window(url, folder, store, FAULTS[fault])
                print(fault, rows[fault], flush=True)
                time.sleep(5)
    columns = list(next(iter(rows.values())))
    lines = [f"| fault | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{row[c]:.4g}' for c in columns)} |" for name, row in rows.items()]
    table = "\n".join(lines) + "\n"
    print(table)
    (RESULTS / "serving").mkdir(parents=True, exist_ok=True)
    (RESULTS / "serving" / "faults.md").write_text(table)
    killed = {name: row for name, row in rows.items() if "killed" in name}
    failed = sum(row["failed"] for row in killed.values())
    lost = sum(row["events_lost"] for row in rows.values())
    slowest = max((row["recovery_s"] for row in killed.values()), default=0.0)
    protocol = (
        f"{RATE:g} recommendations/s and {EVENT_RATE:g} events/s, open loop, two replicas of everything, Bundle of the "
        f"size of MovieLens-1M; the fault {FAULT_AT_S:g} s into a window of {WINDOW_S:g} s"
    )
    for name, value, unit, bar, passes in (
        ("fault_failed_requests", failed, "requests", "0", failed == 0),
        ("fault_events_lost", lost, "events", "0", lost == 0),
        ("fault_recovery_s", slowest, "s", f"<= {LIMIT_S:g}", slowest <= LIMIT_S),
    ):
        write_row(
            "serving", name, value, unit=unit, bar=bar, passes=passes, protocol=protocol, command=COMMAND,
            seeds=[0], details=rows,
        )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
