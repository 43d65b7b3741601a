"""The event log and the user state: order, idempotency, seeds and watermarks, durability, refusals."""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from recsys.errors import EventStoreError, RequestError
from recsys.events import Event
from recsys.events import sqlite as sqlite_module
from recsys.events.sqlite import SqliteEventStoreConfig

DAY_MS = 86_400_000


@pytest.fixture
def config(tmp_path):
    return SqliteEventStoreConfig(path=str(tmp_path / "events.sqlite"), max_history=5)


@pytest.fixture
def store(config):
    with config.open() as store:
        yield store


def event(event_id, item_id="a", *, user_id="u", at=1000, name="click", **rest):
    return Event(event_id, user_id, item_id, name, at, **rest)


def histories(**users):
    """``u=[("a", 1000), ...]``"""
    return pa.table(
        {
            "user_id": pa.array(list(users), pa.string()),
            "item_ids": pa.array([[i for i, _ in h] for h in users.values()], pa.list_(pa.string())),
            "timestamps_ms": pa.array([[t for _, t in h] for h in users.values()], pa.list_(pa.int64())),
            "events": pa.array([["rating"] * len(h) for h in users.values()], pa.list_(pa.string())),
            "values": pa.array([[4.0] * len(h) for h in users.values()], pa.list_(pa.float32())),
        }
    )


def test_an_event_is_in_the_next_read_and_stays(config):
    with config.open() as store:
        assert store.user("u") is None
        result = store.append([event("1", "a", value=2.5, request_id="r", slate_position=3, surface="home")])
        assert (result.accepted, result.duplicates) == (1, 0)
        state = store.user("u")
    with config.open() as store:
        again = store.user("u")
    assert (again.item_ids, again.events, again.timestamps_ms.tolist(), again.values.tolist()) == (
        ("a",),
        ("click",),
        [1000],
        [2.5],
    )
    assert again.version == state.version


def test_duplicates_within_and_across_batches_count_once(store):
    assert store.append([event("1"), event("1", "b"), event("2", "c")]).duplicates == 1
    result = store.append([event("2", "x"), event("3", "d")])
    assert (result.accepted, result.duplicates) == (1, 1)
    assert store.user("u").item_ids == ("a", "c", "d")
    assert store.append([]).accepted == 0


def test_late_events_land_in_place_and_ties_keep_arrival(store):
    store.append([event("1", "new", at=3000), event("2", "tie", at=3000)])
    before = store.user("u").version
    store.append([event("3", "late", at=1000)])
    state = store.user("u")
    assert state.item_ids == ("late", "new", "tie")
    assert state.version != before


def test_history_is_bounded_to_the_newest(store):
    store.append([event(str(i), str(i), at=i) for i in range(8)])
    assert store.user("u").item_ids == ("3", "4", "5", "6", "7")
    store.append([event("old", "old", at=0)])
    assert store.user("u").item_ids == ("3", "4", "5", "6", "7")


def test_log_only_events_are_recorded_but_are_no_state(store):
    assert store.append([event("1", name="impression")]).accepted == 1
    assert store.user("u") is None
    assert store.append([event("1", name="impression")]).duplicates == 1


def test_missing_value_reads_as_nan(store):
    store.append([event("1")])
    assert math.isnan(store.user("u").values[0])


def test_seed_is_read_bounded_and_idempotent(store):
    table = histories(u=[(str(i), i) for i in range(7)], v=[], w=[("x", 5)])
    assert store.seed("b1", table) is True
    assert store.seed("b1", table) is False
    assert store.user("u").item_ids == ("2", "3", "4", "5", "6")
    assert store.user("w").values.tolist() == [4.0]
    assert len(store.user("v")) == 0
    assert store.user("x") is None


def test_seed_and_events_merge_by_time(store):
    store.seed("b1", histories(u=[("s1", 1000), ("s2", 2000)]))
    store.append([event("1", "e", at=1500), event("2", "tie", at=2000)])
    assert store.user("u").item_ids == ("s1", "e", "s2", "tie")


def test_seed_without_times_comes_before_events(store):
    table = histories(u=[("s1", None), ("s2", None)])
    store.seed("b1", table)
    store.append([event("1", "e")])
    assert store.user("u").item_ids == ("s1", "s2", "e")


def test_a_child_bundle_counts_no_event_twice_and_loses_none(store):
    store.seed("parent", histories(u=[("s", 500)]))
    store.append([event("1", "in-child", at=1000)])
    watermark = store.watermark()
    store.append([event("2", "after", at=2000), event("3", "late", at=700)])
    version = store.user("u").version
    store.seed("child", histories(u=[("s", 500), ("in-child", 1000)]), watermark)
    assert store.user("u").item_ids == ("s", "late", "in-child", "after")
    assert store.user("u").version != version
    assert store.seed("parent", histories(u=[("s", 500)])) is False
    assert store.user("u").item_ids == ("s", "late", "in-child", "after")
    assert store.append([event("1", "in-child")]).duplicates == 1


def test_a_watermark_of_another_log_hides_nothing(store, tmp_path):
    with SqliteEventStoreConfig(path=str(tmp_path / "other.sqlite")).open() as other:
        other.append([event(str(i)) for i in range(10)])
        foreign = other.watermark()
    store.append([event("1", "mine")])
    store.seed("b", histories(), foreign)
    assert store.user("u").item_ids == ("mine",)


def test_a_seed_that_fails_changes_nothing(store):
    store.seed("good", histories(u=[("a", 1)]))
    twice = pa.concat_tables([histories(u=[("b", 1)]), histories(u=[("c", 1)])])
    with pytest.raises(EventStoreError, match="twice"):
        store.seed("bad", twice)
    ragged = histories(u=[("b", 1)]).set_column(2, "timestamps_ms", pa.array([[1, 2]], pa.list_(pa.int64())))
    with pytest.raises(EventStoreError, match="timestamps_ms"):
        store.seed("bad", ragged)
    assert store.user("u").item_ids == ("a",)
    assert store.seed("bad", histories(u=[("b", 1)])) is True


def test_events_are_written_and_states_read_while_a_seed_is_written(store, monkeypatch):
    store.seed("first", histories(u=[("old", 1)]))
    started, go_on = threading.Event(), threading.Event()
    rows_of = sqlite_module.history_rows

    def slow(batch, max_history):
        yield from rows_of(batch, max_history)
        started.set()
        assert go_on.wait(30)

    monkeypatch.setattr(sqlite_module, "history_rows", slow)
    monkeypatch.setattr(sqlite_module, "_SEED_ROWS", 1)
    with ThreadPoolExecutor(2) as pool:
        seeds = [pool.submit(store.seed, "second", histories(u=[("new", 1)], v=[("x", 1)])) for _ in range(2)]
        assert started.wait(30)
        assert store.append([event("1", "a")]).accepted == 1
        assert store.user("u").item_ids == ("old", "a") and store.user("v") is None
        go_on.set()
        assert sorted(seed.result() for seed in seeds) == [False, True]  # whoever waited finds it done
    assert store.user("u").item_ids == ("new", "a") and store.user("v").item_ids == ("x",)
    with sqlite3.connect(store.path) as connection:
        assert connection.execute("SELECT count(*) FROM histories").fetchone() == (2,)
    connection.close()


def test_what_a_seed_left_that_was_killed_is_removed_by_the_next(store, monkeypatch):
    def killed(seconds):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sqlite_module.time, "sleep", killed)
        with pytest.raises(KeyboardInterrupt):
            store.seed("first", histories(u=[("lost", 1)], w=[("lost", 1)]))
    assert store.user("u") is None
    assert store.seed("second", histories(u=[("kept", 1)])) is True
    assert store.user("u").item_ids == ("kept",) and store.user("w") is None


def test_sliced_and_chunked_histories_keep_their_rows(store, monkeypatch):
    monkeypatch.setattr(sqlite_module, "_SEED_ROWS", 3)
    table = histories(**{f"u{i}": [(f"{i}-{j}", j) for j in range(i % 4)] for i in range(20)})
    store.seed("b", pa.concat_tables([table.slice(0, 7), table.slice(7)]).slice(2))
    for i in range(2, 20):
        assert store.user(f"u{i}").item_ids == tuple(f"{i}-{j}" for j in range(i % 4))
    assert store.user("u1") is None


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (event(""), "event_id"),
        (event("1", ""), "item_id"),
        (event("1", user_id="x" * 257), "user_id"),
        (event("1", name="nul\0"), "event"),
        (event("1", "\ud800"), "item_id"),
        (event("1", at=-1), "timestamp_ms"),
        (event("1", at=int(time.time() * 1000) + 2 * DAY_MS), "timestamp_ms"),
        (event("1", at=10**30), "timestamp_ms"),
        (event("1", value=float("nan")), "value"),
        (event("1", value=float("inf")), "value"),
        (event("1", value=1e39), "value"),
        (event("1", slate_position=-1), "slate_position"),
    ],
)
def test_malformed_events_are_refused_by_row_and_nothing_is_kept(store, bad, field):
    with pytest.raises(RequestError, match=f"event 1: {field}") as raised:
        store.append([event("fine"), bad])
    assert raised.value.details == {"row": 1, "field": field}
    assert store.user("u") is None


def test_another_machine_is_refused_until_it_takes_over(config, monkeypatch):
    config.open().close()
    monkeypatch.setattr(sqlite_module, "_machine", lambda: "elsewhere/1")
    config.open().close()  # the same kernel: another container of this machine
    monkeypatch.setattr(sqlite_module, "_machine", lambda: "far-away/1")
    monkeypatch.setattr(sqlite_module, "_boot", lambda: "another-boot")
    with pytest.raises(EventStoreError, match=r"one machine only.*shared store"):
        config.open()
    config.model_copy(update={"take_over": True}).open().close()
    config.open().close()


def test_foreign_files_are_refused(tmp_path):
    text = tmp_path / "text.sqlite"
    text.write_text("this is not a database, but it is long enough to be mistaken for one" * 10)
    with pytest.raises(EventStoreError, match="not a database"):
        SqliteEventStoreConfig(path=str(text)).open()
    other = tmp_path / "other.sqlite"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    with pytest.raises(EventStoreError, match="something else"):
        SqliteEventStoreConfig(path=str(other)).open()


def test_a_closed_store_refuses_and_closing_twice_is_fine(config):
    store = config.open()
    store.append([event("1")])
    store.close()
    store.close()
    with pytest.raises(EventStoreError, match="closed"):
        store.append([event("2")])
    with pytest.raises(EventStoreError, match="closed"):
        store.user("u")


def test_a_writer_that_holds_the_file_too_long_is_reported_and_survived(config):
    with config.model_copy(update={"busy_timeout_s": 0.05}).open() as store:
        blocker = sqlite3.connect(config.path, isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        with pytest.raises(EventStoreError, match="locked"):
            store.append([event("1")])
        blocker.execute("ROLLBACK")
        blocker.close()
        assert store.append([event("1")]).accepted == 1


def test_nothing_is_acknowledged_while_the_file_is_gone(tmp_path):
    """SQLite alone would write on, into a file that has no name any more."""
    here, away = tmp_path / "here", tmp_path / "away"
    with SqliteEventStoreConfig(path=str(here / "events.sqlite")).open() as store:
        store.append([event("1")])
        here.rename(away)
        with pytest.raises(EventStoreError, match="did not keep the events"):
            store.append([event("2")])
        assert not here.exists()  # and no empty file is made where it was
        away.rename(here)
        assert store.append([event("2", "b")]).accepted == 1
        assert store.user("u").item_ids == ("a", "b")


def test_nothing_is_acknowledged_once_another_file_took_the_place(tmp_path):
    here = tmp_path / "here"
    with SqliteEventStoreConfig(path=str(here / "events.sqlite")).open() as store:
        store.append([event("1")])
        here.rename(tmp_path / "away")
        SqliteEventStoreConfig(path=str(here / "events.sqlite")).open().close()
        with pytest.raises(EventStoreError, match="replaced by another"):
            store.append([event("2")])


def test_concurrent_appends_share_commits_and_all_count(config, monkeypatch):
    commits = []
    commit = sqlite_module.SqliteEventStore._commit

    def slow_commit(self, connection, requests):
        commits.append(len(requests))
        time.sleep(0.02)
        return commit(self, connection, requests)

    monkeypatch.setattr(sqlite_module.SqliteEventStore, "_commit", slow_commit)
    with config.model_copy(update={"max_history": 1000}).open() as store:
        start = threading.Barrier(16)

        def send(i):
            start.wait()
            return sum(store.append([event(f"{i}-{j}"), event(f"shared-{j}")]).accepted for j in range(5))

        with ThreadPoolExecutor(16) as pool:
            accepted = sum(pool.map(send, range(16)))
        assert accepted == 16 * 5 + 5
        assert len(store.user("u")) == accepted
    assert len(commits) < 40


WRITER = """
import sys
from recsys.events import Event
from recsys.events.sqlite import SqliteEventStoreConfig
store = SqliteEventStoreConfig(path=sys.argv[1]).open()
for i in range(10**6):
    store.append([Event(f"{sys.argv[2]}-{i}-{j}", "u", str(i), "click", i) for j in range(3)])
    print(i, flush=True)
"""


def test_what_was_acknowledged_survives_sigkill_exactly_once(tmp_path):
    path = str(tmp_path / "events.sqlite")
    env = os.environ | {"PYTHONPATH": str(Path(sqlite_module.__file__).parents[2])}
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, path, str(w)], stdout=subprocess.PIPE, text=True, env=env)
        for w in range(2)
    ]
    # Both are past their first appends, then die in the middle of whatever they do.
    acknowledged = [[writer.stdout.readline() for _ in range(20)] for writer in writers]
    for writer, lines in zip(writers, acknowledged, strict=True):
        writer.send_signal(signal.SIGKILL)
        lines.extend(writer.stdout.readlines())
        writer.stdout.close()
        writer.wait()
    with SqliteEventStoreConfig(path=path, max_history=100_000).open() as store:
        connection = sqlite3.connect(path)
        kept = [row[0] for row in connection.execute("SELECT event_id FROM events")]
        connection.close()
        assert len(kept) == len(set(kept))
        for w, lines in enumerate(acknowledged):
            promised = [f"{w}-{json.loads(line)}-{j}" for line in lines for j in range(3)]
            assert len(promised) >= 60
            assert set(promised) <= set(kept)
            assert store.append([Event(e, "u", "x", "click", 0) for e in promised]).accepted == 0
        # A batch is kept whole or not at all.
        batches = {}
        for event_id in kept:
            batches.setdefault(event_id.rsplit("-", 1)[0], []).append(event_id)
        assert {len(batch) for batch in batches.values()} == {3}


FULL = """
import resource, signal, sqlite3, sys
from recsys.errors import EventStoreError
from recsys.events import Event
from recsys.events.sqlite import SqliteEventStoreConfig
path, limit = sys.argv[1:]
unlimited, connect = resource.getrlimit(resource.RLIMIT_FSIZE), sqlite3.connect
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def small(*args, **kwargs):
    connection = connect(*args, **kwargs)
    connection.execute("PRAGMA max_page_count = 100")
    return connection
if limit == "pages":
    sqlite3.connect = small
with SqliteEventStoreConfig(path=path).open() as store:
    if limit == "size":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, unlimited[1]))
    for i in range(10**6):
        try:
            store.append([Event(str(i), "u", "x" * 200, "click", i)])
        except EventStoreError as error:
            print("full", i, error, flush=True)
            break
        print(i, flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    if limit == "size":
        print("again", store.append([Event(str(i), "u", "y", "click", i)]).accepted)
"""


@pytest.mark.parametrize(("limit", "why"), [("pages", "full"), ("size", "I/O error")])
def test_without_room_it_is_an_error_nothing_is_lost_and_room_is_enough_to_go_on(tmp_path, limit, why):
    """SQLite finds no page left, or the system refuses to write beyond a mebibyte."""
    path = str(tmp_path / "events.sqlite")
    env = os.environ | {"PYTHONPATH": str(Path(sqlite_module.__file__).parents[2])}
    command = [sys.executable, "-c", FULL, path, limit]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
    lines = [line for line in done.stdout.splitlines() if not line.startswith("again ")]
    assert lines[-1].startswith(f"full {len(lines) - 1} ")
    assert why in lines[-1]
    with SqliteEventStoreConfig(path=path, max_history=100_000).open() as store:
        after = int("again 1" in done.stdout)
        assert after == (limit == "size")
        assert len(store.user("u")) == len(lines) - 1 + after
        assert store.append([event("one more")]).accepted == 1
