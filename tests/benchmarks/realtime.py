"""How soon and how surely what happened counts, written to ``results/realtime.json``: ``make bench-realtime``."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import typer
from rows import write_row
from served import some_users, trained

from jobs.artifacts import FORMAT
from recsys.events import AnyEventStore, Event
from recsys.events.base import events_of
from recsys.events.redis import RedisEventStoreConfig
from recsys.events.sqlite import SqliteEventStoreConfig
from recsys.testing.redis_server import RedisServer

COMMAND = "make bench-realtime"
CALLERS = 16
NUM_PAIRS = 10_000
NUM_KILLS, NUM_EVENTS = 50, 100_000


@contextmanager
def stores(folder: Path) -> Generator[dict[str, AnyEventStore], None, None]:
    """A store of each kind: Redis from the machine's ``redis-server``."""
    (folder / "redis").mkdir()
    server = RedisServer(folder / "redis")
    server.start()
    try:
        yield {
            "sqlite": SqliteEventStoreConfig(path=str(folder / "events.sqlite")),
            "redis": RedisEventStoreConfig.parse({"url": server.url}, where="bench"),
        }
    finally:
        server.kill()


def stale(workdir: Path) -> None:
    """An event is acknowledged, and its user asks again, of whichever of two gateways."""
    bundle = trained(workdir)
    users = list(dict.fromkeys(some_users(bundle)))
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name, stores(Path(name)) as by_kind:
        for kind, store in by_kind.items():
            command = [sys.executable, __file__, "--serve", str(bundle.path), "--store", store.model_dump_json()]
            process = subprocess.Popen([*command, "--workdir", str(workdir)], stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            try:
                url = next(line.split()[1] for line in process.stdout if line.startswith("ready "))
                found[kind] = asyncio.run(_pairs(url, users))
            finally:
                process.send_signal(signal.SIGINT)
                process.wait(60)
            print(kind, found[kind], flush=True)
    number = sum(each["stale"] for each in found.values())
    write_row(
        "realtime", "stale_next_requests", number, unit="requests", bar="0, none without the user's state",
        passes=number == 0 and not any(each["stranger"] for each in found.values()), command=COMMAND, seeds=[0],
        protocol=f"{NUM_PAIRS:,} times per kind of event store: the best item shown to a user is clicked, and once the "
        f"event is acknowledged the user asks again; stale where the item is still shown; {CALLERS} callers at once, "
        "two gateways, Bundle trained on MovieLens-1M",
        details=found,
    )  # fmt: skip


async def _pairs(url: str, users: list[str]) -> dict[str, float]:
    numbers = iter(range(NUM_PAIRS))
    counts = {"stale": 0, "stranger": 0, "degraded": 0}
    event_ms: list[float] = []

    async def caller(own: list[str]) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=30) as client:
            shown: dict[str, str] = {}
            for turn, _ in enumerate(numbers):
                user_id = own[turn % len(own)]
                if user_id not in shown:
                    shown[user_id] = await ask(client, user_id)
                item_id = shown[user_id]
                stamp = datetime.now(UTC).isoformat()
                told = {"event_id": uuid.uuid4().hex, "user_id": user_id, "item_id": item_id, "event": "click"}
                started = time.perf_counter()
                answer = await client.post("/v1/events", json={"events": [told | {"timestamp": stamp}]})
                event_ms.append((time.perf_counter() - started) * 1e3)
                answer.raise_for_status()
                shown[user_id] = await ask(client, user_id, not_again=item_id)

    async def ask(client: httpx.AsyncClient, user_id: str, not_again: str | None = None) -> str:
        response = await client.post("/v1/recommend", json={"user_id": user_id, "deadline_ms": 5000})
        while response.status_code == 503:  # too much at once, and said so
            await asyncio.sleep(0.05)
            response = await client.post("/v1/recommend", json={"user_id": user_id, "deadline_ms": 5000})
        response.raise_for_status()
        answer = response.json()
        counts["stranger"] += "state" in answer["degraded"]
        items = [item["item_id"] for item in answer["items"]]
        counts["stale"] += not_again in items
        counts["degraded"] += bool(answer["degraded"])
        return items[0]

    await asyncio.gather(*(caller(users[first::CALLERS]) for first in range(CALLERS)))
    return counts | {"event_p50_ms": float(np.median(event_ms)), "event_p99_ms": float(np.percentile(event_ms, 99))}


def serve(bundle: Path, store: dict[str, Any]) -> None:
    """Two gateways over ``store`` until SIGINT."""
    from serve.config import ServeConfig
    from serve.run import serving

    two = {"min_replicas": 2, "max_replicas": 2, "num_cpus": 0.1}
    tree = {"bundle_uri": str(bundle), "access": {"kind": "open"}, "topology": "fused", "event_store": store}
    with serving(ServeConfig.parse(tree | {"gateway": two}, where="bench"), port=8031) as url:
        print(f"ready {url}", flush=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            time.sleep(3600)
        except KeyboardInterrupt:
            return


def crash(workdir: Path) -> None:
    """The process that writes is killed at random moments."""
    chance = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name:
        store = SqliteEventStoreConfig(path=f"{name}/events.sqlite")
        promised: list[str] = []
        for kill in range(NUM_KILLS):
            target = (kill + 1) * NUM_EVENTS // NUM_KILLS
            command = [sys.executable, __file__, "--write", str(kill), "--store", store.model_dump_json()]
            writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert writer.stdout is not None
            assert writer.stdin is not None
            # It sends again what the one before it had sent last, as a caller does who has heard nothing.
            writer.stdin.write(json.dumps(promised[-200:]) + "\n")
            writer.stdin.flush()
            extra = chance.randrange(500)
            while len(promised) < target + extra:
                promised += json.loads(writer.stdout.readline())
            time.sleep(chance.random() * 0.05)
            writer.kill()
            for line in writer.stdout.readlines():
                if line.endswith("\n"):
                    promised += json.loads(line)
            writer.wait()
            print(f"killed {kill + 1} times, {len(promised):,} events acknowledged", flush=True)
        with store.open() as opened:
            kept = [event.event_id for table in opened.log() for event in events_of(table)]
    lost = len(set(promised) - set(kept))
    twice = len(kept) - len(set(kept))
    write_row(
        "realtime", "crash_lost_events", lost + twice, unit="events", bar="0", passes=lost + twice == 0,
        command=COMMAND, seeds=[0],
        protocol=f"embedded event store; its writer (4 threads, batches of 1 to 20) is killed {NUM_KILLS} times at "
        f"random moments while it writes {NUM_EVENTS:,} events; acknowledged events that are "
        "not there, or there twice although the next writer sends the last ones again",
        details={"acknowledged": len(promised), "kept": len(kept)},
    )  # fmt: skip


def write(store: AnyEventStore, name: str) -> None:
    """Append, and print what was acknowledged, until killed."""
    chance = random.Random(name)
    with store.open() as opened, ThreadPoolExecutor(4) as pool:

        def batch(number: int) -> None:
            ids = [f"{name}-{number}-{place}" for place in range(chance.randrange(1, 21))]
            opened.append([Event(i, f"u{number % 100}", "i", "click", 1000 + number) for i in ids])
            os.write(1, (json.dumps(ids) + "\n").encode())

        again = [Event(i, "u", "i", "click", 1000) for i in json.loads(sys.stdin.readline())]
        if again:
            assert opened.append(again).accepted == 0, "what was acknowledged is not there"
        for first in range(0, 10**9, 64):
            list(pool.map(batch, range(first, first + 64)))


def durability(workdir: Path) -> None:
    """What it costs to be on disk before an event is acknowledged."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-", dir=workdir) as name:
        for fsync in ("always", "everysec"):
            server = RedisServer(Path(name), {"appendfsync": fsync})
            server.start()
            try:
                tree = {"url": server.url, "fsync": fsync, "prefix": fsync}
                found[f"redis, appendfsync {fsync}"] = _append_ms(RedisEventStoreConfig.parse(tree, where="bench"))
            finally:
                server.kill()
        found["sqlite, synchronous FULL"] = _append_ms(SqliteEventStoreConfig(path=f"{name}/events.sqlite"))
    ms = found["sqlite, synchronous FULL"]["alone_p50_ms"]
    write_row(
        "realtime", "event_durable_ms", ms, unit="ms", bar="<= 20", passes=ms <= 20, command=COMMAND, seeds=[0],
        protocol="embedded event store on the disk of the checkout: median time of one event, on disk when it is "
        "acknowledged; beside it 16 callers at once, and Redis with and without waiting for the disk",
        details=found,
    )  # fmt: skip


def _append_ms(config: AnyEventStore) -> dict[str, float]:
    with config.open() as store:

        def append(number: int) -> float:
            started = time.perf_counter()
            store.append([Event(uuid.uuid4().hex, f"u{number}", "i", "click", 1000)])
            return (time.perf_counter() - started) * 1e3

        alone = [append(number) for number in range(500)]
        started = time.perf_counter()
        with ThreadPoolExecutor(CALLERS) as pool:
            together = list(pool.map(append, range(5000)))
        rate = 5000 / (time.perf_counter() - started)
    return {
        "alone_p50_ms": float(np.median(alone)),
        "together_p50_ms": float(np.median(together)),
        "events_per_s": rate,
    }


def visible(workdir: Path) -> None:
    """A new item is put, and somebody who likes items such as it asks until it is shown."""
    from recsys.bundle.store import BundleStore
    from serve.config import ServeConfig
    from serve.run import serving

    bundle = trained(workdir)
    likes = bundle.catalogue().id_map.take(bundle.popular()[0][:3])
    waited: list[float] = []
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name:
        store = BundleStore(Path(name) / "bundles")
        store.publish(bundle.path, None)
        tree = {
            "bundle_uri": str(store),
            "access": {"kind": "open"},
            "event_store": SqliteEventStoreConfig(path=f"{name}/events.sqlite").model_dump(),
        }
        with serving(ServeConfig.parse(tree, where="bench"), port=8032) as url, httpx.Client(base_url=url) as client:
            for number in range(NUM_NEW_ITEMS):
                category = f"kind {number}"
                item = {"item_id": f"new-{number}", "title": f"New {number}", "categories": [category]}
                started = time.perf_counter()
                client.put("/v1/items", json={"items": [item]}).raise_for_status()
                asked = {"history": [{"item_id": like} for like in likes], "filters": {"categories_any": [category]}}
                while not client.post("/v1/recommend", json=asked).raise_for_status().json()["items"]:
                    time.sleep(0.05)
                waited.append(time.perf_counter() - started)
    longest = max(waited)
    write_row(
        "realtime", "new_item_visible_s", longest, unit="s", bar="<= 5", passes=longest <= 5, command=COMMAND,
        seeds=[0],
        protocol=f"{NUM_NEW_ITEMS} new items one after another, from PUT /v1/items to the first recommendation that "
        "shows the item, the longest; topology graph, Bundle trained on MovieLens-1M",
        details={"seconds": waited},
    )  # fmt: skip


def replayed(workdir: Path) -> tuple[Path, list[str], list[int]]:
    """A store of Bundles that know all of MovieLens-1M but the last two interactions of each user, all its lines, and
    the numbers of those held back: users in turn, first what they did last but one, then what they did last.
    """
    home = workdir / f"replayed-{FORMAT}"
    lines = Path("../shared/data/ml-1m/ml-1m.txt").read_text().splitlines()
    last_of = {line.split()[0]: row for row, line in enumerate(lines)}
    held = [row - back for back in (1, 0) for row in last_of.values()]
    home.mkdir(parents=True, exist_ok=True)
    known = set(held)
    (home / "before.txt").write_text("".join(f"{line}\n" for row, line in enumerate(lines) if row not in known))
    store = home / "movielens_1m" / "bundles"
    if not store.exists():
        settings = {
            "workdir": home, "data.source.path": home / "before.txt", "retriever.train.epochs": 10,
            "ranking.model.epochs": 2,
        }  # fmt: skip
        command = [sys.executable, "-m", "jobs.pipeline", "--config", "configs/movielens_1m.yaml"]
        subprocess.run(command + [w for k, v in settings.items() for w in ("--set", f"{k}={v}")], check=True)
    return store, lines, held


def learn(workdir: Path) -> None:
    """From the last of 12,080 events until the gate has passed on weights that know them."""
    store, lines, rows = replayed(workdir)
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name:
        now_ms = time.time_ns() // 1_000_000 - 1000 * len(rows)
        events = [
            Event(f"e{row}", user_id, item_id, "interaction", now_ms + 1000 * place)
            for place, row in enumerate(rows)
            for user_id, item_id in [lines[row].split()]
        ]
        with SqliteEventStoreConfig(path=f"{name}/events.sqlite").open() as log:
            log.append(events)
        shutil.copytree(store, f"{name}/bundles")
        command = [
            sys.executable,
            "-m",
            "jobs.update",
            "--store",
            f"{name}/bundles",
            "--events",
            f"{name}/events.sqlite",
        ]
        command += ["--set", f"workdir={name}/updates", "--set", "canary.share=0"]
        started = time.perf_counter()
        subprocess.run(command, check=True)
        whole_s = time.perf_counter() - started
        record = json.loads(next(Path(name, "updates").glob("*.json")).read_text())
    value = record["event_to_weights_s"]
    write_row(
        "realtime", "event_to_weights_s", value, unit="s", bar="<= 300, the gate passes",
        passes=value <= 300 and record["state"] == "published", command=COMMAND, seeds=[0],
        protocol=f"the last two interactions of all {len(rows) // 2:,} users of MovieLens-1M, by order, in the event "
        "log of a Bundle that was trained without them (10 epochs); python -m jobs.update, from its start until the "
        "gate has passed",
        details={name: found for name, found in record.items() if name not in {"parent", "child", "watermark"}}
        | {"with_publication_s": whole_s},
    )  # fmt: skip


def intent(workdir: Path) -> None:
    """Three events of a kind that is new to a user, and what the next slate is made of."""
    from recsys.bundle.store import BundleStore
    from recsys.pipeline.recommender import Recommender

    bundle = BundleStore(replayed(workdir)[0]).open()
    catalogue = bundle.catalogue()
    chance = np.random.default_rng(0)
    best = bundle.popular()[0]
    before: list[float] = []
    after: list[float] = []
    with Recommender.load(bundle.path, inline=True) as recommender:
        for user_id in list(dict.fromkeys(some_users(bundle)))[:500]:
            state = recommender.user(user_id)
            assert state is not None
            seen = catalogue.id_map.rows(state.item_ids)
            shares = {name: np.isin(seen, catalogue.in_category(name)).mean() for name in catalogue.category_names}
            strange = [name for name, share in shares.items() if share < 0.1 and len(catalogue.in_category(name)) > 50]
            if not strange:
                continue
            kind = catalogue.in_category(strange[int(chance.integers(len(strange)))])
            told = catalogue.id_map.take(best[np.isin(best, kind) & ~np.isin(best, seen)][:3])
            for history, into in ((), before), (told, after):
                items = recommender.recommend(user_id=user_id, history=history, top_k=10).item_ids
                into.append(float(np.isin(catalogue.id_map.rows(items), kind).mean()))
    share = float(np.median(after))
    write_row(
        "realtime", "intent_share", share, unit="", bar=">= 0.5", passes=share >= 0.5, command=COMMAND, seeds=[0],
        protocol=f"{len(after)} users of MovieLens-1M, for each a genre that less than a tenth of their history has, "
        "its three most popular films as events; the share of the next ten items that has the genre, median over "
        "users; Bundle whose retriever was trained for ten epochs",
        details={"before": float(np.median(before)), "mean_before": np.mean(before), "mean_after": np.mean(after)},
    )  # fmt: skip


NUM_NEW_ITEMS = 10
FIGURES: dict[str, Callable[[Path], None]] = {
    "stale": stale,
    "crash": crash,
    "durability": durability,
    "visible": visible,
    "learn": learn,
    "intent": intent,
}


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"figures to measure: {', '.join(FIGURES)}")] = None,
    workdir: Annotated[Path, typer.Option(help="where Bundles are kept")] = Path("runs/bench-serve"),
    serve_: Annotated[Path | None, typer.Option("--serve", hidden=True)] = None,
    write_: Annotated[str, typer.Option("--write", hidden=True)] = "",
    store: Annotated[str, typer.Option(hidden=True)] = "{}",
) -> None:
    """Measure how soon and how surely what happened counts."""
    tree = json.loads(store)
    if serve_ is not None:
        serve(serve_, tree)
    elif write_:
        write(SqliteEventStoreConfig.parse(tree, where="bench"), write_)
    else:
        workdir.mkdir(parents=True, exist_ok=True)
        for name in only or FIGURES:
            print(f"== {name}", flush=True)
            FIGURES[name](workdir)


if __name__ == "__main__":
    typer.run(main)
