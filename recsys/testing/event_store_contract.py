"""What every event store must do, whatever it keeps its events in.

::

    class TestMyStore(EventStoreContract):
        kind = MyStoreConfig      # its sample: the same folder opens the same store again
"""

from __future__ import annotations

import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest

from recsys import schema
from recsys.errors import EventStoreError, RequestError
from recsys.events import Event, EventStore, EventStoreConfig
from recsys.events.base import RESTORED_GAP, UserState, events_of
from recsys.testing.samples import sample_of


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


def known(store: EventStore, user_id: str = "user") -> UserState:
    """The state of a user whom the store knows."""
    state = store.user(user_id)
    assert state is not None
    return state


class EventStoreContract:
    """Inherit it under a name that begins with ``Test`` and say which kind it is."""

    kind: ClassVar[type[EventStoreConfig]]

    def config(self, folder: Path) -> EventStoreConfig:
        """A configuration that keeps its state in ``folder``, or under its name."""
        return sample_of(self.kind, folder)

    @pytest.fixture
    def store(self, tmp_path: Path) -> Generator[EventStore]:
        """A fresh store."""
        with self.config(tmp_path).open() as store:
            yield store

    def test_what_was_acknowledged_is_in_the_next_read_and_after_reopening(self, tmp_path: Path) -> None:
        with self.config(tmp_path).open() as store:
            assert store.user("user") is None
            assert store.append([click("1", "a"), click("2", "b", at_ms=2000)]).accepted == 2
            assert known(store).item_ids == ("a", "b")
        with self.config(tmp_path).open() as store:
            again = known(store)
            assert again.item_ids == ("a", "b")
            assert np.isnan(again.values).all()

    def test_an_event_counts_once(self, store: EventStore) -> None:
        assert store.append([click("1"), click("1")]).duplicates == 1
        result = store.append([click("1", "other"), click("2", at_ms=2000)])
        assert (result.accepted, result.duplicates) == (1, 1)
        assert len(known(store)) == 2

    def test_late_events_land_in_place(self, store: EventStore) -> None:
        store.append([click("1", "first", at_ms=1000), click("2", "last", at_ms=3000)])
        store.append([click("3", "late", at_ms=2000)])
        assert known(store).item_ids == ("first", "late", "last")

    def test_who_does_nothing_for_long_is_a_stranger_again(self, tmp_path: Path) -> None:
        now_ms, day_ms = time.time_ns() // 1_000_000, schema.DAY_MS
        with self.config(tmp_path).model_copy(update={"ttl_days": 30.0}).open() as store:
            store.seed("bundle", seed_table("seeded", ("old", now_ms - 40 * day_ms)))
            assert store.user("seeded") is None
            old = click("1", user_id="gone", at_ms=now_ms - 31 * day_ms)
            store.append([old, click("2", "late", at_ms=now_ms - 29 * day_ms), click("3", at_ms=now_ms - 31 * day_ms)])
            assert store.user("gone") is None
            assert known(store).item_ids == ("item", "late")  # the newest decides, whatever else there is
            store.append([click("4", "again", user_id="seeded", at_ms=now_ms)])
            assert known(store, "seeded").item_ids[-1] == "again"
        with self.config(tmp_path).open() as store:
            assert store.user("gone") is not None

    def test_a_bundle_that_learned_from_a_copy_that_went_on_is_refused(self, store: EventStore) -> None:
        store.append([click("1")])
        log_id, _, position = store.watermark().rpartition(":")
        with pytest.raises(EventStoreError, match="behind the end of this log"):
            store.seed("bundle", seed_table("user", ("old", 1)), f"{log_id}:{int(position) + 1}")
        store.append([click("2", "next", at_ms=2000)])
        assert known(store).item_ids == ("item", "next")

    def test_a_state_has_a_version_of_its_own(self, store: EventStore) -> None:
        versions: set[int] = set()
        for number in range(5):
            store.append([click(str(number), at_ms=1000 + number)])
            versions.add(known(store).version)
        assert len(versions) == 5

    def test_a_seed_comes_once_and_its_watermark_keeps_events_from_counting_twice(self, store: EventStore) -> None:
        assert store.seed("bundle", seed_table("user", ("a", 1000)))
        assert not store.seed("bundle", seed_table("user", ("a", 1000)))
        store.append([click("1", "b", at_ms=2000)])
        absorbed = store.watermark()
        store.append([click("2", "c", at_ms=3000)])
        assert store.seed("child", seed_table("user", ("a", 1000), ("b", 2000)), absorbed)
        assert known(store).item_ids == ("a", "b", "c")

    def test_a_malformed_event_is_named_and_none_of_its_batch_is_kept(self, store: EventStore) -> None:
        with pytest.raises(RequestError, match="1"):
            store.append([click("1"), click("")])
        assert store.user("user") is None

    def test_a_hundred_thousand_events_in_one_call(self, store: EventStore) -> None:
        events = [click(str(number), user_id=f"u{number % 1000}", at_ms=1000 + number) for number in range(100_000)]
        assert store.append(events).accepted == 100_000
        assert store.append(events[::1000]).duplicates == 100
        assert len(known(store, "u7")) == 100

    def test_many_threads_lose_nothing(self, store: EventStore) -> None:
        def send(thread: int) -> int:
            return sum(store.append([click(f"{thread}-{n}", user_id=f"u{thread}")]).accepted for n in range(20))

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(send, range(8))) == [20] * 8
        states = [store.user(f"u{thread}") for thread in range(8)]
        assert [len(state) for state in states if state is not None] == [20] * 8

    def test_merging_an_anonymous_history_into_a_user_counts_once_and_in_place(self, store: EventStore) -> None:
        store.seed("bundle", seed_table("visitor", ("seeded", 500)))
        store.append([click("1", "a", user_id="visitor", at_ms=1000), click("2", "a", user_id="visitor", at_ms=1000)])
        store.append([click("3", "mine", at_ms=1500), click("4", "b", user_id="visitor", at_ms=2000)])
        assert store.merge("visitor", "user").accepted == 4
        store.append([click("5", "later", user_id="visitor", at_ms=3000)])
        result = store.merge("visitor", "user")
        assert (result.accepted, result.duplicates) == (1, 4)
        assert store.merge("visitor", "user").duplicates == 5
        state = known(store)
        assert state.item_ids == ("seeded", "a", "a", "mine", "b", "later")
        assert state.values[0] == 4
        assert store.merge("nobody", "user").accepted == 0
        # Back again, and once more forth: everybody has all of it already.
        assert store.merge("user", "visitor").accepted == 1
        assert store.merge("visitor", "user").accepted == 0
        assert store.merge("user", "visitor").accepted == 0

    def test_the_log_is_read_in_order_from_any_watermark(self, store: EventStore) -> None:
        assert list(store.log()) == []
        rich = Event("1", "user", "a", "rating", 2000, 4.5, "request", 3, "home")
        store.append([rich, click("2", "b", at_ms=1000)])
        middle = store.watermark()
        store.append([click("1"), click("3", "ü", user_id="other"), Event("4", "user", "a", "impression", 1)])
        everything = pa.concat_tables(store.log())
        assert everything.schema == schema.EVENT_LOG
        assert everything["event_id"].to_pylist() == ["1", "2", "3", "4"]
        assert events_of(everything)[0] == rich
        assert events_of(everything)[1].value is None
        positions = everything["position"].to_pylist()
        assert positions == sorted(set(positions))
        assert [event.item_id for table in store.log(middle) for event in events_of(table)] == ["ü", "a"]
        assert list(store.log(store.watermark())) == []
        with pytest.raises(EventStoreError, match="one of another log"):
            list(store.log("elsewhere:0"))

    def test_compaction_changes_no_state(self, store: EventStore) -> None:
        store.append([click("1", "a"), click("2", "b", at_ms=2000), click("3", "c", at_ms=9000)])
        assert store.compact(10_000) == 0  # no Bundle has them yet
        absorbed = store.watermark()
        store.append([click("4", "d", at_ms=1500)])
        store.seed("child", seed_table("user", ("a", 1000), ("b", 2000), ("c", 9000)), absorbed)
        before = known(store)
        end = store.watermark()
        assert store.compact(5000) == 2  # neither the new one nor the one that is late enough
        assert [event.event_id for table in store.log() for event in events_of(table)] == ["3", "4"]
        with pytest.raises(EventStoreError, match="compacted away"):
            list(store.log(f"{end.rpartition(':')[0]}:1"))
        assert [event.event_id for table in store.log(absorbed) for event in events_of(table)] == ["4"]
        after = known(store)
        assert after.item_ids == before.item_ids == ("a", "d", "b", "c")
        assert store.watermark() == end
        assert store.append([click("3"), click("4")]).accepted == 0
        # A Bundle that knows less than was removed would lose it.
        with pytest.raises(EventStoreError, match="users would lose them"):
            store.seed("from elsewhere", seed_table("user", ("a", 1000)))
        # A later compaction that removes less does not hide what an earlier one removed.
        store.seed("grandchild", seed_table("user", ("a", 1000)), store.watermark())
        assert store.compact(2000) == 1
        with pytest.raises(EventStoreError, match="compacted away"):
            list(store.log(f"{end.rpartition(':')[0]}:1"))
        assert store.compacted() == 4

    def test_a_restored_store_is_the_same_log(self, store: EventStore, tmp_path: Path) -> None:
        store.append([click("1", "a"), click("2", "b", at_ms=2000)])
        absorbed = store.watermark()
        store.append([Event("3", "user", "c", "rating", 3000, 4.0), Event("4", "user", "c", "impression", 3000)])
        with self.config(tmp_path / "elsewhere").open() as other:
            assert other.restore(store.watermark(), store.log()) == 4
            assert pa.concat_tables(other.log()) == pa.concat_tables(store.log())
            log_id, _, last = store.watermark().rpartition(":")
            # What this log gives from here on, that one may have given to other events.
            assert other.watermark() == f"{log_id}:{int(last) + RESTORED_GAP}"
            assert list(other.log(store.watermark())) == []
            for each in (store, other):
                each.seed("child", seed_table("user", ("a", 1000), ("b", 2000)), absorbed)
                state = known(each)
                assert state.item_ids == ("a", "b", "c")
                assert state.values[-1] == 4
                assert each.append([click("4"), click("5", at_ms=9000)]).accepted == 1
            assert [e.event_id for table in other.log() for e in events_of(table)] == ["1", "2", "3", "4", "5"]
            # A Bundle that was published after the backup has events that are lost here, and none of the new ones.
            other.seed("lost", seed_table("user", ("x", 1)), f"{log_id}:{int(last) + 1}")
            assert known(other).item_ids == ("x", "item")
            end = other.watermark()
            with pytest.raises(EventStoreError, match="not empty"):
                other.restore(store.watermark(), store.log())
        with self.config(tmp_path / "elsewhere").open() as again:
            assert again.watermark() == end
            with pytest.raises(EventStoreError, match="behind the end"):
                list(again.log(f"{end}0"))

    def test_closing_twice_is_harmless_and_a_closed_store_refuses(self, tmp_path: Path) -> None:
        store = self.config(tmp_path).open()
        store.close()
        store.close()
        with pytest.raises(EventStoreError):
            store.append([click("1")])
