"""The models go on learning from the log: a child Bundle where it is better, the parent where it is not."""

import asyncio
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from jobs import update
from jobs.events import log_config
from recsys import schema
from recsys.bundle.changes import ITEM_CHANGES
from recsys.bundle.histories import histories_table
from recsys.bundle.store import BundleStore
from recsys.data.dataset import Split
from recsys.errors import BundleError, EventStoreError
from recsys.events import Event
from recsys.events.exported import write_log
from recsys.events.sqlite import SqliteEventStoreConfig
from recsys.online.config import OnlineConfig
from recsys.online.learn import lesson_data
from recsys.online.log import grow, with_unknown
from recsys.pipeline.recommender import Recommender
from recsys.pipeline.requests import RecommendRequest
from recsys.pipeline.users import HistoriesTable

ROOT = Path(__file__).resolve().parents[2]
NUM_ITEMS, NUM_CLUSTERS = 100, 10
AFTER_MS = 1_736_000_000_000
"""after the year of the synthetic data"""


@pytest.fixture
def store(published, tmp_path):
    """A copy of it."""
    shutil.copytree(published, tmp_path / "bundles")
    return BundleStore(tmp_path / "bundles")


@pytest.fixture
def events(tmp_path):
    with SqliteEventStoreConfig(path=str(tmp_path / "events.sqlite")).open() as log:
        yield log


def walk(num_users, length, *, step, first="new", start_ms=AFTER_MS, seed=0, items=NUM_ITEMS):
    """Events of users who go on ``step`` places on the ring of a cluster."""
    generator = np.random.default_rng(seed)
    made = []
    for user in range(num_users):
        item = int(generator.integers(items))
        for place in range(length):
            time_ms = start_ms + 60_000 * (place * num_users + user)
            made.append(Event(f"{first}{user}-{place}", f"{first}-{user}", f"item-{item}", "interaction", time_ms))
            item = (item + step * NUM_CLUSTERS) % items
    return made


def config_of(store, events, **online):
    tree = {
        "store": str(store),
        "events": {"kind": "sqlite", "path": str(events)},
        "online": {"learning": {"epochs": 4, "rate": 1.0}} | online,
        "canary": {"share": 0},
        "workdir": f"{Path(str(store)).parent}/updates",
    }
    return update.UpdateJobConfig.parse(tree, where="test")


def test_a_new_habit_is_learned(store, events, tmp_path):
    """All new users go backwards on the rings. The child foretells that, knows them, and the events count once."""
    parent = store.open()
    events.append(walk(60, 12, step=-1))
    outcome = update.run(config_of(store, tmp_path / "events.sqlite"), events)
    figures = outcome.verdict.figures
    assert outcome.state == "published", outcome
    assert figures["difference"][1] > 0.05
    child = store.open()
    assert child.bundle_id == outcome.child
    assert child.manifest.parent == parent.bundle_id
    assert child.manifest.events_watermark == events.watermark()
    assert outcome.record["num_new_users"] == 60
    events.seed(child.bundle_id, child.histories(), child.manifest.events_watermark)
    assert len(events.user("new-0")) == 12
    with Recommender.load(child.path) as recommender:
        last = events.user("new-0").item_ids[-1]
        wanted = f"item-{(int(last[5:]) - NUM_CLUSTERS) % NUM_ITEMS}"
        request = RecommendRequest(user_id="new-0", exclude_seen=False, top_k=5)
        now_ms = int(events.user("new-0").timestamps_ms[-1]) + 1000  # a ranker knows the hour of the day
        ranked = asyncio.run(recommender.arecommend(request, now_ms=now_ms))
        assert ranked.degraded == ()
        assert wanted in ranked.item_ids
    record = json.loads(next((tmp_path / "updates").glob("*.json")).read_text())
    assert record["state"] == "published"
    assert not (tmp_path / "updates" / "updating").exists()
    # What is contained is not learned twice.
    assert update.run(config_of(store, tmp_path / "events.sqlite"), events).state == "waiting"


def test_noise_is_not_published_and_the_reason_is_told(store, events, tmp_path):
    """New users who mean nothing: whoever learns that forgets what there was to know."""
    generator = np.random.default_rng(0)
    usual = walk(60, 8, step=1, first="usual", start_ms=AFTER_MS + 10**9)
    noise = [
        Event(f"n{row}", f"noise-{row % 60}", f"item-{generator.integers(NUM_ITEMS)}", "interaction", AFTER_MS + row)
        for row in range(1200)
    ]
    events.append(noise + usual)
    parent = store.current()
    forgets = {"epochs": 20, "rate": 1.0, "replay": 0.0}
    gate = {"judge_share": 0.25, "max_loss": 0.02}
    config = config_of(store, tmp_path / "events.sqlite", gate=gate, learning=forgets)
    outcome = update.run(config, events)
    assert outcome.state == "kept"
    assert "worse than the parent" in update.tell(outcome) or "more is lost" in update.tell(outcome)
    assert store.current() == parent
    assert [manifest.bundle_id for manifest in store.list()] == [parent.bundle_id]


def test_too_few_events_wait(store, events, tmp_path):
    events.append(walk(5, 5, step=1))
    assert update.run(config_of(store, tmp_path / "events.sqlite"), events).state == "waiting"
    outcome = update.run(config_of(store, tmp_path / "events.sqlite", min_events=1), events)
    assert outcome.state == "kept"
    assert "nothing is settled yet" in update.tell(outcome)


def test_new_items_enter(store, events, tmp_path):
    """An item that was put while serving gets a vector of its own; one that nobody knows is counted."""
    row = dict.fromkeys(ITEM_CHANGES.names) | {
        "item_id": f"item-{NUM_ITEMS}", "title": "new", "categories": [], "available": True, "removed": False,
    }  # fmt: skip
    store.items.append(pa.Table.from_pylist([row], schema=ITEM_CHANGES))
    told = walk(60, 12, step=1, items=NUM_ITEMS + 1) + walk(1, 3, step=1, first="odd", items=10**6)
    odd = [Event(f"odd-{n}", "odd", "nobody-knows-it", "interaction", AFTER_MS) for n in range(3)]
    events.append([*told, *odd])
    outcome = update.run(config_of(store, tmp_path / "events.sqlite", gate={"max_loss": 1}), events)
    assert outcome.record["num_unknown_items"] >= 3
    assert outcome.state == "published", outcome
    child = store.open()
    assert child.manifest.num_items == NUM_ITEMS + 1
    assert child.catalogue().item(NUM_ITEMS)["title"] == "new"
    live = store.open_live(f"{child.bundle_id}+1")
    assert len(live.catalogue()) == NUM_ITEMS + 1  # the change names what is known now
    with Recommender.of(live, users=HistoriesTable(child.histories())) as recommender:
        assert recommender.recommend(user_id="new-3", top_k=5).degraded == ()


def test_a_child_is_a_canary_first(store, events, tmp_path, monkeypatch):
    events.append(walk(60, 12, step=-1))
    config = config_of(store, tmp_path / "events.sqlite")
    as_canary = config.model_copy(update={"canary": update.CanaryConfig(share=0.2, seconds=0)})
    parent = store.current().bundle_id
    moves = []
    monkeypatch.setattr(BundleStore, "start_canary", spied(BundleStore.start_canary, moves))
    outcome = update.run(as_canary, events)
    assert (outcome.state, moves) == ("published", [(outcome.child, 0.2)])
    assert store.current().previous == parent


def test_a_child_that_is_taken_back_leaves_the_parent(store, events, tmp_path, monkeypatch):
    events.append(walk(60, 12, step=-1))
    config = config_of(store, tmp_path / "events.sqlite")
    parent = store.current().bundle_id
    real = BundleStore.start_canary

    def taken_back(self, bundle_id, share, **how):
        pointer = real(self, bundle_id, share, **how)
        self.withdraw(bundle_id, reason="too slow")
        return pointer

    monkeypatch.setattr(BundleStore, "start_canary", taken_back)
    outcome = update.run(config.model_copy(update={"canary": update.CanaryConfig(share=0.2, seconds=5)}), events)
    assert outcome.state == "kept"
    assert "taken back: too slow" in update.tell(outcome)
    assert store.current().bundle_id == parent


def spied(real, calls):
    def call(self, bundle_id, share, **how):
        calls.append((bundle_id, share))
        return real(self, bundle_id, share, **how)

    return call


def test_the_command_says_what_it_did(store, events, tmp_path):
    events.append(walk(5, 5, step=1))
    app = typer.Typer()
    app.command()(update.main)
    words = ["--store", str(store), "--events", str(tmp_path / "events.sqlite")]
    told = CliRunner().invoke(app, [*words, "--set", f"workdir={tmp_path}/updates"])
    assert told.exit_code == 0
    assert "25 new events are too few" in told.output.replace("\n", " ")
    told = CliRunner().invoke(app, [*words, "--set", "online.min_evnts=1"])
    assert told.exit_code == 2
    assert "min_evnts" in told.output


KILLED = """
import os, signal, sys, typer
from jobs import update
from recsys.bundle import store as store_module, writer as writer_module
owner, name = {place}
setattr(owner, name, lambda *_, **__: os.killpg(0, signal.SIGKILL))
typer.run(update.main)
"""
# Where it dies, and how many children are in the store by then.
PLACES: dict[str, tuple[str, int]] = {
    "with all to learn": ("update, '_learned'", 0),
    "taught": ("update, 'judge'", 0),
    "half written": ("writer_module.BundleWriter, 'finish'", 0),
    "half copied into the store": ("store_module, 'move_into_place'", 0),
    "in the store": ("update.BundleStore, 'start_canary'", 1),
    "the canary": ("update.BundleStore, 'promote'", 1),  # the same child: it was learned from the same events
}


@pytest.mark.timeout(600)  # an update for each of the stages
def test_killed_at_any_stage_it_leaves_all_as_it_was(store, events, tmp_path):
    events.append(walk(60, 12, step=-1))
    before, parent = snapshot(tmp_path / "bundles"), store.current()
    command = ["--store", str(store), "--events", str(tmp_path / "events.sqlite")]
    for setting in (
        "canary.seconds=0",
        f"workdir={tmp_path}/updates",
        "online.learning.epochs=4",
        "online.learning.rate=1",
    ):
        command += ["--set", setting]
    for stage, (place, num_added) in PLACES.items():
        script = [sys.executable, "-c", KILLED.format(place=place), *command]
        process = subprocess.run(script, cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, check=False)
        assert process.returncode == -signal.SIGKILL, (stage, process.stderr)
        assert store.open().bundle_id == parent.bundle_id, stage
        after = snapshot(tmp_path / "bundles")
        assert {path: after[path] for path in before} == before, stage
        added = {manifest.bundle_id for manifest in store.list()} - {parent.bundle_id}
        assert len(added) == num_added, stage
    canary = store.current().canary
    assert canary.bundle_id in added
    store.withdraw(canary.bundle_id, reason="not what is tested here")
    subprocess.run([sys.executable, "-m", "jobs.update", *command], cwd=ROOT, check=True, stderr=subprocess.DEVNULL)
    child = store.open()
    assert child.manifest.parent == parent.bundle_id
    child.check()
    assert not (tmp_path / "updates" / "updating").exists()


def test_an_export_teaches_as_the_store_does(store, events, tmp_path):
    """On a machine that cannot reach the store of events: all of the log, then only what came since."""
    events.append(walk(60, 12, step=-1))
    path = tmp_path / "log.parquet"
    write_log(events, path, None, events.watermark())
    config = config_of(store, tmp_path / "events.sqlite")
    elsewhere = config.model_copy(update={"events": log_config(str(path), [])})
    with elsewhere.events.open() as log:
        outcome = update.run(elsewhere, log)
        child = store.open()
        assert outcome.state == "published"
        assert child.manifest.events_watermark == events.watermark()
        events.append(walk(5, 5, step=1, first="more"))
        write_log(events, path, child.manifest.events_watermark, events.watermark())
        outcome = update.run(elsewhere, log)  # the file was replaced meanwhile
        assert (outcome.state, outcome.record["num_events"]) == ("waiting", 25)
        with pytest.raises(EventStoreError, match="begins after"):
            list(log.log())
        write_log(events, path, events.watermark(), events.watermark())
        with pytest.raises(EventStoreError, match="compacted away"):
            update.run(elsewhere, log)
    path.write_bytes(b"no Parquet")
    with pytest.raises(EventStoreError, match="cannot read"):
        elsewhere.events.open()
    pq.write_table(pa.table({"position": [1]}), path)
    with pytest.raises(EventStoreError, match=r"no log that `jobs\.events export` wrote"):
        elsewhere.events.open()


def test_a_loop_goes_on_whatever_happens_once(store, events, tmp_path, monkeypatch):
    problems = [OSError(28, "No space left on device"), EventStoreError("it is away"), KeyboardInterrupt()]
    told = []

    def run(*given):
        told.append(given)
        raise problems.pop(0)

    monkeypatch.setattr(update, "run", run)
    app = typer.Typer()
    app.command()(update.main)
    words = ["--store", str(store), "--events", str(tmp_path / "events.sqlite")]
    result = CliRunner().invoke(app, [*words, "--every", "0.01"])
    assert len(told) == 3
    assert "No space left on device" in result.output
    assert "EventStoreError: it is away" in result.output
    problems.append(OSError(28, "No space left on device"))
    assert isinstance(CliRunner().invoke(app, words).exception, OSError)


def test_the_ranker_learns_what_judged_it(store, events, tmp_path, monkeypatch):
    events.append(walk(60, 12, step=-1))
    lessons = []
    real = update.ranking_lesson

    def spy(stage, dataset, split, *rest):
        lessons.append(split)
        return real(stage, dataset, split, *rest)

    monkeypatch.setattr(update, "ranking_lesson", spy)
    outcome = update.run(config_of(store, tmp_path / "events.sqlite"), events)
    assert outcome.state == "published"
    assert lessons == [Split.VALID, Split.TEST]


def snapshot(folder):
    return {str(path): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def test_the_schema_of_the_log_is_what_it_reads(events):
    """The job reads the log as a table; an empty one has its columns too."""
    assert update._read(events, None, events.watermark(), ("impression",)).schema.equals(schema.EVENT_LOG)


def test_what_is_shown_is_no_interaction(store, events, tmp_path):
    shown = [Event(f"s{n}", "user-1", f"item-{n % 100}", "impression", AFTER_MS + n) for n in range(500)]
    events.append(shown)
    outcome = update.run(config_of(store, tmp_path / "events.sqlite"), events)
    assert (outcome.state, outcome.record["num_events"]) == ("waiting", 0)


def test_a_parent_that_was_replaced_meanwhile_stays_replaced(store, bundles, events, tmp_path, monkeypatch):
    """Somebody publishes while the update learns: neither way of taking over undoes that."""
    store.add(bundles[0])
    events.append(walk(60, 12, step=-1))
    config = config_of(store, tmp_path / "events.sqlite")
    real = update._learned

    def meanwhile(*given):
        learned = real(*given)
        current = store.current().bundle_id
        if current != bundles[0].bundle_id:
            store.activate(bundles[0].bundle_id, current)
        return learned

    monkeypatch.setattr(update, "_learned", meanwhile)
    parent = store.current().bundle_id
    for share in (0, 0.5):
        outcome = update.run(config.model_copy(update={"canary": update.CanaryConfig(share=share, seconds=0)}), events)
        assert outcome.state == "kept"
        assert "expected" in outcome.record["taken_back"]
        assert store.current().bundle_id == bundles[0].bundle_id
        assert store.current().canary is None
        store.activate(parent, bundles[0].bundle_id)


def test_a_canary_that_nobody_ends_is_ended_by_the_next_update(store, bundles, events, tmp_path, monkeypatch):
    store.add(bundles[0])
    store.start_canary(bundles[0].bundle_id, 0.1, reason=update._REASON)
    monkeypatch.setattr(update, "_PATIENCE_S", -1000.0)
    assert update.run(config_of(store, tmp_path / "events.sqlite"), events).state == "waiting"
    assert store.current().canary is None
    store.start_canary(bundles[0].bundle_id, 0.1, reason="somebody's own")
    update.run(config_of(store, tmp_path / "events.sqlite"), events)
    assert store.current().canary is not None


def test_one_update_at_a_time(store, events, tmp_path):
    config = config_of(store, tmp_path / "events.sqlite")
    with update._alone(config.workdir), pytest.raises(BundleError, match="another update"):
        update.run(config, events)


def test_late_events_are_learned_and_what_nobody_knows_is_kept(store, events):
    """A late event is as new to the models as any other; one with an unknown item stays in its user's history."""
    parent = store.open()
    state = dict(
        zip(parent.histories()["user_id"].to_pylist(), parent.histories()["timestamps_ms"].to_pylist(), strict=True)
    )
    user_id = max(state, key=lambda each: len(state[each]))
    middle_ms = int(np.mean(state[user_id][:2]))
    late = Event("late", user_id, "item-5", "interaction", middle_ms)
    strange = Event("strange", user_id, "not yet", "interaction", AFTER_MS)
    events.append([late, strange, *walk(20, 10, step=1)])
    new = update._read(events, None, events.watermark(), ())
    log = grow(parent, new, log_only=(), judge_share=0.3, protocol="rolling_next_item")
    assert log.late.sum() == 1
    assert log.unknown["item_id"].to_pylist() == ["not yet"]
    data = lesson_data(parent.retriever().config, log.dataset, Split.VALID, None, OnlineConfig(), None, log.late)
    row = np.flatnonzero(log.late[log.dataset.log.weight > 0])
    assert data.lesson.weight[row] == 1
    assert row[0] in data.lesson.histories.rows()
    whole = with_unknown(histories_table(log.dataset, 500), log.unknown, 500)
    (kept,) = [each for each in whole.to_pylist() if each["user_id"] == user_id]
    assert kept["item_ids"][-1] == "not yet"
    assert "item-5" in kept["item_ids"]
    assert len(whole) == len(histories_table(log.dataset, 500))


def test_items_without_any_event_enter_too(store, events, tmp_path):
    """All new events happen at one moment and judge; the catalogue grows all the same."""
    row = dict.fromkeys(ITEM_CHANGES.names) | {
        "item_id": "fresh", "title": "fresh", "categories": ["a", "b"], "available": True, "removed": False,
    }  # fmt: skip
    store.items.append(pa.Table.from_pylist([row], schema=ITEM_CHANGES))
    at_once = [Event(f"e{n}", f"user-{n}", f"item-{n % 100}", "interaction", AFTER_MS) for n in range(150)]
    events.append(at_once)
    outcome = update.run(config_of(store, tmp_path / "events.sqlite", gate={"max_loss": 1}), events)
    assert outcome.verdict.figures["num_queries"] > 100
    assert outcome.state == "published"
    assert store.open().catalogue().item(NUM_ITEMS)["item_id"] == "fresh"
