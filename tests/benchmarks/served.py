"""Bundles to serve, servers that serve them, and the load that is put on them."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jobs.artifacts import FORMAT
from recsys.bundle import Bundle
from recsys.index.ivf import IvfIndex
from recsys.models.retrievers.sequences.esasrec import ESASRec
from recsys.testing.tiny_bundle import Size, make_bundle

HERE = Path(__file__).parent
THREADS = 1
CONFIG = Path("configs/movielens_1m.yaml")
ML1M = Size(
    num_items=3416, num_users=6040, shortest=20, longest=310, dim=64, ranker_dim=64, ranker_history=50
)  # fmt: skip
"""as many items and users as MovieLens-1M, and as long histories: 165 on average"""
MILLION = Size(num_items=1_000_000, num_users=500, shortest=20, longest=310, dim=64, ranker_dim=64, ranker_history=50)
FRACTIONS = (0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0)
"""of the rate at which the plain reference is saturated"""
WINDOW_S = 8.0
CALLERS = 8


def trained(workdir: Path) -> Bundle:
    """MovieLens-1M as the jobs publish it, its retriever after two passes: how good it is does not matter here."""
    home = workdir / f"trained-{FORMAT}"
    store = home / "movielens_1m" / "bundles"
    if not store.exists():
        short = {"workdir": home, "retriever.train.epochs": 2, "ranking.model.epochs": 1, "compute.num_workers": 0}
        command = [sys.executable, "-m", "jobs.pipeline", "--config", str(CONFIG)]
        command += [word for name, value in short.items() for word in ("--set", f"{name}={value}")]
        subprocess.run(command, check=True)
    return Bundle.open(store)


def bundle_of(workdir: Path, name: str, size: Size, **settings: Any) -> Bundle:
    """One of random data, made once and kept."""
    folder = workdir / f"{name}-{FORMAT}"
    made = list(folder.glob("*/manifest.json"))
    return Bundle.open(made[0].parent) if made else make_bundle(folder, size=size, **settings)


def million(workdir: Path) -> Bundle:
    """A million items behind an approximate index."""
    retriever = ESASRec.parse(
        {"dim": 64, "num_blocks": 1, "hidden_dim": 128, "num_negatives": 256, "train": {"epochs": 1}}, where="bench"
    )
    return bundle_of(workdir, "million", MILLION, retriever=retriever, index=IvfIndex())


def some_users(bundle: Bundle) -> list[str]:
    """Two thousand, drawn at random."""
    users = bundle.histories()["user_id"]
    return users.take(np.random.default_rng(0).integers(0, len(users), 2000)).to_pylist()


def bodies_of(bundle: Bundle, workdir: Path) -> Path:
    """A file with a request for each of :func:`some_users`."""
    path = workdir / f"bodies-{bundle.bundle_id}.jsonl"
    path.write_text("".join(json.dumps({"user_id": user}) + "\n" for user in some_users(bundle)))
    return path


class System:
    """A server that is up: where it is, and the processes that do its work."""

    def __init__(self, name: str, url: str, processes: Callable[[], list[int]]) -> None:
        self.name, self.url, self.processes = name, url, processes

    def cpu_s(self) -> float:
        """Processor seconds of all of its processes so far."""
        return sum(map(cpu_s_of, self.processes()))


def cpu_s_of(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def load(system: System, bodies: Path, **options: Any) -> dict[str, Any]:
    """What the generator measured, and the processor seconds of the system meanwhile."""
    command = [sys.executable, str(HERE / "load.py"), "--url", system.url, "--bodies", str(bodies)]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    before = system.cpu_s()
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found | {"server_cpu_s": system.cpu_s() - before}


@contextmanager
def plain(bundle: Bundle, folder: Path, port: int) -> Iterator[System]:
    """The reference behind uvicorn."""
    import httpx

    command = [sys.executable, str(HERE / "plain_app.py"), str(bundle.path), str(folder / "plain.sqlite"), str(port)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(Path.cwd())])}
    process = subprocess.Popen(command, env=environment)
    url = f"http://127.0.0.1:{port}/v1/recommend"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                httpx.post(url, json={}).raise_for_status()
                break
            except httpx.TransportError:
                assert process.poll() is None and time.monotonic() < deadline, "the plain reference does not start"
                time.sleep(0.2)
        yield System("plain", url, lambda: [process.pid])
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def graph_and_fused(bundle: Bundle, folder: Path, port: int) -> Iterator[list[System]]:
    """Both topologies in one Ray, each with one replica of everything."""
    from recsys.events.sqlite import SqliteEventStoreConfig
    from serve.config import ServeConfig
    from serve.run import processes_of_session, serving

    one = {"min_replicas": 1, "max_replicas": 1, "num_cpus": 0.1, "threads": THREADS}
    configs = {
        topology: ServeConfig.parse(
            {
                "bundle_uri": str(bundle.path),
                "access": {"kind": "open"},
                "topology": topology,
                "event_store": SqliteEventStoreConfig(path=str(folder / f"{topology}.sqlite")).model_dump(),
                **dict.fromkeys(("gateway", "retrieval", "ranking", "reranking"), one),
            },
            where="bench",
        )
        for topology in ("graph", "fused")
    }
    with serving(configs["graph"], port=port) as url:
        from ray import serve

        from serve.app import build

        serve.run(build(configs["fused"].model_dump(mode="json")), name="fused", route_prefix="/fused")
        yield [
            System("graph", f"{url}/v1/recommend", processes_of_session),
            System("fused", f"{url}/fused/v1/recommend", processes_of_session),
        ]


def stages_cpu_ms(bundle: Bundle, users: list[str]) -> float:
    """Processor milliseconds per request of the stages in this process, state and composing the answer included."""
    import torch

    from recsys.pipeline.recommender import Recommender
    from recsys.pipeline.requests import RecommendRequest

    torch.set_num_threads(THREADS)
    with Recommender.load(bundle.path, inline=True) as recommender:

        async def ask(some: list[str]) -> float:
            started = time.process_time()
            for user_id in some:
                await recommender.arecommend(RecommendRequest(user_id=user_id))
            return (time.process_time() - started) * 1e3 / len(some)

        asyncio.run(ask(users))  # the servers, too, have seen all of them before
        return asyncio.run(ask(users))
