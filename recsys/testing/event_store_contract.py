"""What every event store must do, whatever it keeps its events in.

::

    class TestMyStore(EventStoreContract):
        def config(self, folder):
            return MyStoreConfig(...)      # the same folder opens the same store again
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recsys.errors import EventStoreError, RequestError
from recsys.events import Event, EventStore, EventStoreConfig


def click(event_id: str, item_id: str = "item", *, user_id: str = "user", at_ms: int = 1000) -> Event:
    """An event."""
    return Event(event_id, user_id, item_id, "click", at_ms)


def seed_table(user_id: str, *entries: tuple[str, int]) -> pa.Table:
    """The histories of one user as a Bundle holds them."""
    return pa.table(
        {
            "user_id": pa.array([user_id]),
            "item_ids": pa.array([[item for item, _ in entries]], pa.list_(pa.string())),
            "timestamps_ms": pa.array([[time for _, time in entries]], pa.list_(pa.int64())),
            "events": pa.array([["rating"] * len(entries)], pa.list_(pa.string())),
            "values": pa.array([[4.0] * len(entries)], pa.list_(pa.float32())),
        }
    )


class EventStoreContract:
    """Inherit it under a name that begins with ``Test`` and say how the store is configured."""

    @abstractmethod
    def config(self, folder: Path) -> EventStoreConfig:
        """A configuration that keeps its state below ``folder``."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Generator[EventStore]:
        """A fresh store."""
        with self.config(tmp_path).open() as store:
            yield store

    def test_what_was_acknowledged_is_in_the_next_read_and_after_reopening(self, tmp_path: Path) -> None:
        with self.config(tmp_path).open() as store:
            assert store.user("user") is None
            assert store.append([click("1", "a"), click("2", "b", at_ms=2000)]).accepted == 2
            state = store.user("user")
            assert state is not None
            assert state.item_ids == ("a", "b")
        with self.config(tmp_path).open() as store:
            again = store.user("user")
            assert again is not None
            assert again.item_ids == ("a", "b")
            assert np.isnan(again.values).all()

    def test_an_event_counts_once(self, store: EventStore) -> None:
        assert store.append([click("1"), click("1")]).duplicates == 1
        result = store.append([click("1", "other"), click("2", at_ms=2000)])
        assert (result.accepted, result.duplicates) == (1, 1)
        state = store.user("user")
        assert state is not None
        assert len(state) == 2

    def test_late_events_land_in_place(self, store: EventStore) -> None:
        store.append([click("1", "first", at_ms=1000), click("2", "last", at_ms=3000)])
        store.append([click("3", "late", at_ms=2000)])
        state = store.user("user")
        assert state is not None
        assert state.item_ids == ("first", "late", "last")

    def test_a_state_has_a_version_of_its_own(self, store: EventStore) -> None:
        versions: set[int] = set()
        for number in range(5):
            store.append([click(str(number), at_ms=1000 + number)])
            state = store.user("user")
            assert state is not None
            versions.add(state.version)
        assert len(versions) == 5

    def test_a_seed_comes_once_and_its_watermark_keeps_events_from_counting_twice(self, store: EventStore) -> None:
        assert store.seed("bundle", seed_table("user", ("a", 1000)))
        assert not store.seed("bundle", seed_table("user", ("a", 1000)))
        store.append([click("1", "b", at_ms=2000)])
        absorbed = store.watermark()
        store.append([click("2", "c", at_ms=3000)])
        assert store.seed("child", seed_table("user", ("a", 1000), ("b", 2000)), absorbed)
        state = store.user("user")
        assert state is not None
        assert state.item_ids == ("a", "b", "c")

    def test_a_malformed_event_is_named_and_none_of_its_batch_is_kept(self, store: EventStore) -> None:
        with pytest.raises(RequestError, match="1"):
            store.append([click("1"), click("")])
        assert store.user("user") is None

    def test_many_threads_lose_nothing(self, store: EventStore) -> None:
        def send(thread: int) -> int:
            return sum(store.append([click(f"{thread}-{n}", user_id=f"u{thread}")]).accepted for n in range(20))

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(send, range(8))) == [20] * 8
        states = [store.user(f"u{thread}") for thread in range(8)]
        assert [len(state) for state in states if state is not None] == [20] * 8

    def test_closing_twice_is_harmless_and_a_closed_store_refuses(self, tmp_path: Path) -> None:
        store = self.config(tmp_path).open()
        store.close()
        store.close()
        with pytest.raises(EventStoreError):
            store.append([click("1")])
