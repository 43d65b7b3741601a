"""The event store against the obvious model of it: a list of events, sorted, under any order of operations."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyarrow as pa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from recsys.events import Event, EventStoreConfig
from recsys.events.redis import RedisEventStoreConfig
from recsys.events.sqlite import SqliteEventStoreConfig
from recsys.testing.redis_server import redis_server

USERS = ("a", "b")
MAX_HISTORY = 6


class StoreMachine(RuleBasedStateMachine):
    """Two stores on one log, as two processes would have; each read must show what either has acknowledged."""

    def config(self, folder: str) -> EventStoreConfig:
        raise NotImplementedError

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        config = self.config(self.folder.name)
        self.stores = [config.open(), config.open()]
        self.log: list[Event] = []
        self.seeded: dict[str, list[tuple[int, str]]] = {}
        self.contained = 0
        self.bundles = 0
        self.versions: dict[tuple[str, int], tuple] = {}

    @rule(
        store=st.integers(0, 1),
        events=st.lists(st.tuples(st.integers(0, 30), st.sampled_from(USERS), st.integers(0, 20)), max_size=5),
    )
    def append(self, store: int, events: list[tuple[int, str, int]]) -> None:
        batch = [Event(str(key), user, f"item {key}", "click", time) for key, user, time in events]
        known = {event.event_id for event in self.log}
        fresh = {}
        for event in batch:
            if event.event_id not in known:
                fresh.setdefault(event.event_id, event)
        result = self.stores[store].append(batch)
        assert (result.accepted, result.duplicates) == (len(fresh), len(batch) - len(fresh))
        self.log += fresh.values()

    @rule(store=st.integers(0, 1))
    def publish_a_child(self, store: int) -> None:
        """A Bundle made from the log as it is now; its histories are what users did so far."""
        watermark = self.stores[store].watermark()
        for user in USERS:
            seen = self.seeded.get(user, []) + [
                (e.timestamp_ms, e.item_id) for e in self.log[self.contained :] if e.user_id == user
            ]
            self.seeded[user] = sorted(seen, key=lambda entry: entry[0])
        self.contained = len(self.log)
        self.bundles += 1
        table = pa.table(
            {
                "user_id": list(self.seeded),
                "item_ids": pa.array([[i for _, i in h] for h in self.seeded.values()], pa.list_(pa.string())),
                "timestamps_ms": pa.array([[t for t, _ in h] for h in self.seeded.values()], pa.list_(pa.int64())),
                "events": pa.array([["click"] * len(h) for h in self.seeded.values()], pa.list_(pa.string())),
                "values": pa.array([[None] * len(h) for h in self.seeded.values()], pa.list_(pa.float32())),
            }
        )
        assert self.stores[store].seed(str(self.bundles), table, watermark)
        assert not self.stores[1 - store].seed(str(self.bundles), table, watermark)

    @invariant()
    def every_read_is_right(self) -> None:
        for user in USERS:
            fresh = [(e.timestamp_ms, e.item_id) for e in self.log[self.contained :] if e.user_id == user]
            expected = sorted(self.seeded.get(user, []) + fresh, key=lambda entry: entry[0])[-MAX_HISTORY:]
            for store in self.stores:
                state = store.user(user)
                if state is None:
                    assert not expected
                    assert user not in self.seeded
                    continue
                assert list(zip(state.timestamps_ms.tolist(), state.item_ids, strict=True)) == expected
                assert self.versions.setdefault((user, state.version), tuple(expected)) == tuple(expected)

    def teardown(self) -> None:
        if hasattr(self, "stores"):
            for store in self.stores:
                store.close()
            self.folder.cleanup()


class SqliteMachine(StoreMachine):
    def config(self, folder: str) -> EventStoreConfig:
        return SqliteEventStoreConfig(path=f"{folder}/events.sqlite", max_history=MAX_HISTORY, cached_users=1)


class RedisMachine(StoreMachine):
    url = ""

    def config(self, folder: str) -> EventStoreConfig:
        tree = {"url": self.url, "prefix": f"{Path(folder).name}:", "max_history": MAX_HISTORY, "cached_users": 1}
        return RedisEventStoreConfig.parse(tree, where="test")


EFFORT = settings(max_examples=25, stateful_step_count=15, deadline=None)


def test_sqlite() -> None:
    run_state_machine_as_test(SqliteMachine, settings=EFFORT)


def test_redis(tmp_path: Path) -> None:
    with redis_server(tmp_path) as server:
        RedisMachine.url = server.url
        run_state_machine_as_test(RedisMachine, settings=EFFORT)
