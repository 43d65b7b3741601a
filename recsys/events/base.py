"""What every event store is: a durable, idempotent log of events and the state of each user that follows from it.

A user's state is the history that a Bundle was published with (the *seed*) plus the events of the log that the
Bundle does not contain yet. Which those are is told by the *watermark*: an opaque name of a place in one log.

A new store is one file with an :class:`EventStoreConfig` (its ``kind`` and settings) and an :class:`EventStore`, plus
its line in ``recsys/events/__init__.py``.
"""

from __future__ import annotations

import hashlib
import math
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa
from pydantic import Field

from recsys import schema
from recsys.errors import EventStoreError, RequestError, SchemaError
from recsys.ids import id_problem
from recsys.kinds import Kind
from recsys.types import FloatArray, Int64Array

RESTORED_GAP = 1 << 32
"""A restored log goes on so many positions later, behind all that the first one may have given after the backup."""
MAX_FUTURE_MS = schema.DAY_MS
"""How far ahead of this machine's clock an event may claim to be, in milliseconds (wrong time zones)."""

_FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True)
class Event:
    """Something a user did to an item. ``event_id`` makes sending it twice harmless."""

    event_id: str
    user_id: str
    item_id: str
    event: str
    timestamp_ms: int
    """when it happened, milliseconds since 1970 UTC"""
    value: float | None = None
    request_id: str | None = None
    """the recommendation it followed from, if any"""
    slate_position: int | None = None
    """rank of the item in that recommendation, from 0"""
    surface: str | None = None


@dataclass(frozen=True, slots=True)
class AppendResult:
    """What became of a batch: ``accepted + duplicates`` is its length."""

    accepted: int
    duplicates: int


@dataclass(frozen=True, slots=True)
class UserState:
    """What is known of a user: the newest interactions, oldest first. L entries, aligned."""

    user_id: str
    version: int
    """differs from every earlier version of this user's state when the state differs"""
    item_ids: tuple[str, ...]
    timestamps_ms: Int64Array
    """int64 [L], milliseconds since 1970 UTC; 0 for seeded entries that have order only"""
    events: tuple[str, ...]
    values: FloatArray
    """float32 [L], NaN where the event has no value"""

    def __len__(self) -> int:
        return len(self.item_ids)


class EventLog(ABC):
    """Every event in the order it arrived. Errors are :class:`~recsys.errors.EventStoreError`."""

    log_only: tuple[str, ...] = ()
    """names of events that are recorded but are no part of a user's state, and no interactions"""

    @abstractmethod
    def watermark(self) -> str:
        """Where the log ends now: the place up to which a Bundle published from it contains its events."""

    @abstractmethod
    def log(self, after: str | None = None) -> Iterator[pa.Table]:
        """Every event that came after the watermark ``after`` (None: all that are kept), in the order they arrived.

        Tables of :data:`recsys.schema.EVENT_LOG` of up to ten thousand rows, read as they are asked for.

        :raises EventStoreError: for a watermark of another log or behind the end of this one, and where events after it
            were compacted away.
        """

    @abstractmethod
    def compacted(self) -> int:
        """The last position that was removed from the log; 0 where none was."""

    @abstractmethod
    def close(self) -> None:
        """Finish what was accepted and release the log. Closing twice is harmless."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class EventStore(EventLog):
    """Safe to use from many threads. Errors are :class:`~recsys.errors.EventStoreError`."""

    is_remote = False
    """whether a read waits for another machine, and so must not be made in an event loop"""

    @abstractmethod
    def append(self, events: Sequence[Event]) -> AppendResult:
        """Add events to the log, all or none; durable on disk before it returns.

        An ``event_id`` already in the log (or earlier in ``events``) is counted as a duplicate and changes nothing.
        A malformed event raises :class:`~recsys.errors.RequestError` naming the row, and none of the batch is kept.
        """

    @abstractmethod
    def user(self, user_id: str) -> UserState | None:
        """The user's state, every event acknowledged so far included, or None for a user nobody knows.

        Entries are ordered by (timestamp, arrival), so a late event lands where it belongs.
        """

    @abstractmethod
    def seed(self, bundle_id: str, histories: pa.Table, watermark: str | None = None) -> bool:
        """Make ``histories`` what user states start from; True if done now, False if this Bundle was seeded before.

        ``histories`` has one row per user: ``user_id`` string and, aligned and oldest first, ``item_ids``
        list<string>, ``timestamps_ms`` list<int64>, ``events`` list<string>, ``values`` list<float32>. They replace
        the histories seeded before. Events of the log up to ``watermark`` (see :meth:`watermark`; None for nothing)
        are taken to be in ``histories`` and count no more on their own; all others still do.
        A watermark of some other log names nothing of this one.

        :raises EventStoreError: for a watermark behind the end of this log, as one of a restored copy that went on is,
            and where events after it were compacted away.
        """

    def merge(self, from_user_id: str, into_user_id: str) -> AppendResult:
        """What one user id did is what another one did, too: of somebody who signs in, under the id they had before.

        The interactions in the state of ``from_user_id`` that are not in that of ``into_user_id`` are appended to it,
        at the times they have; the others count as duplicates. The other id keeps what it has.
        """
        state, own = self.user(from_user_id), self.user(into_user_id)
        if state is None or not len(state):
            return AppendResult(0, 0)
        there = (
            Counter()
            if own is None
            else Counter(zip(own.item_ids, own.timestamps_ms.tolist(), own.events, strict=True))
        )
        rows = zip(state.item_ids, state.timestamps_ms.tolist(), state.events, state.values.tolist(), strict=True)
        before: Counter[tuple[str, int, str]] = Counter()
        events: list[Event] = []
        for item_id, time_ms, event, value in rows:
            # The same thing at the same time may be there twice, and then it is twice.
            number = before[item_id, time_ms, event]
            before[item_id, time_ms, event] += 1
            if number < there[item_id, time_ms, event]:
                continue
            parts = (from_user_id, into_user_id, item_id, event, str(time_ms), str(number))
            event_id = f"merged:{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()}"
            events.append(Event(event_id, into_user_id, item_id, event, time_ms, None if math.isnan(value) else value))
        if not events:
            return AppendResult(0, len(state))
        result = self.append(events)
        return AppendResult(result.accepted, len(state) - result.accepted)

    @abstractmethod
    def compact(self, before_ms: int) -> int:
        """Remove events that happened before ``before_ms`` and that the seeded histories contain; how many.

        No user's state changes. What is removed is forgotten: sent once more, it counts as new.
        """

    @abstractmethod
    def restore(self, watermark: str, tables: Iterable[pa.Table], compacted: int = 0) -> int:
        """Fill an empty store with what :meth:`log` gave, and :meth:`watermark` and :meth:`compacted` said.

        Returns the number of events.
        It becomes that log: watermarks in Bundles go on naming the same places of it, and what comes from now on is
        behind all of them, those of Bundles that were published after the backup included.

        :raises EventStoreError: when the store is not empty, or ``tables`` end behind ``watermark``.
        """


class EventLogConfig(Kind, ABC):
    """Where a log of events is. Subclasses add ``kind: Literal["..."]``."""

    log_only: tuple[str, ...] = Field(
        default=("impression",), description="event names that are recorded but are no part of a user's state"
    )

    @abstractmethod
    def open(self) -> EventLog:
        """Open the log."""


class EventStoreConfig(EventLogConfig, ABC):
    """Settings of one kind of store. The samples of two folders are two stores, those of one folder are one."""

    max_history: int = Field(
        default=500, ge=1, le=100_000, description="newest interactions kept in a user's state (entries, 1 to 100000)"
    )
    cached_users: int = Field(
        default=4096,
        ge=1,
        description="users whose state is kept in memory, brought up to date at each read (users per process)",
    )
    ttl_days: float = Field(
        default=0,
        ge=0,
        le=36_500,
        description="a user without interactions for so long is a stranger again (days; 0 for never); the log keeps "
        "the events until `jobs.events compact`",
    )

    @abstractmethod
    def open(self) -> EventStore:
        """Open the store, making it if there is none yet."""


def position_in(watermark: str | None, log_id: str, compacted: int, end: int) -> int:
    """The position that ``watermark`` names; ``compacted`` is the last one that was removed from this log, ``end`` its
    last one.

    :raises EventStoreError: for a watermark of another log or behind the end, and where events after it were removed.
    """
    if watermark is None:
        return 0
    found, _, position = watermark.rpartition(":")
    if found != log_id or not position.isdecimal():
        raise EventStoreError(f"the watermark {watermark} is one of another log, this one is {log_id}")
    if int(position) > end:
        raise EventStoreError(f"the watermark {watermark} is behind the end of this log, {log_id}:{end}")
    if int(position) < compacted:
        raise EventStoreError(f"events after {watermark} were compacted away, up to {log_id}:{compacted}")
    return int(position)


def check_seed(bundle_id: str, watermark: str | None, log_position: int, compacted: int, end: int) -> None:
    """Raise :class:`~recsys.errors.EventStoreError` for histories that lack events which the log has no more, and for
    such as claim to have what is still to come.
    """
    if log_position < compacted:
        raise EventStoreError(
            f"Bundle {bundle_id} was published with the watermark {watermark}, and events after it were compacted "
            "away: users would lose them. Train it on the log as it is now (`jobs.events export`)",
            bundle_id=bundle_id,
        )
    if log_position > end:
        raise EventStoreError(
            f"Bundle {bundle_id} was published with the watermark {watermark}, behind the end of this log, {end}: it "
            "has learned from a copy that went on by itself, and would hide what users do here from now on",
            bundle_id=bundle_id,
        )


def check_restored(positions: Sequence[int], last: int, watermark: str) -> None:
    """Raise :class:`~recsys.errors.EventStoreError` for rows behind the ``watermark`` of position ``last``."""
    if positions and max(positions) > last:
        raise EventStoreError(f"there is an event at {max(positions)}, behind the watermark {watermark}")


def log_table(rows: Sequence[Sequence[Any]]) -> pa.Table:
    """``rows`` of (position, event_id, user_id, item_id, event, timestamp_ms, value, request_id, slate_position,
    surface) as :data:`recsys.schema.EVENT_LOG`.
    """
    columns = list(zip(*rows, strict=True)) or [()] * len(schema.EVENT_LOG)
    arrays = [
        pa.array(column, pa.int64()).cast(field.type)
        if pa.types.is_timestamp(field.type)
        else pa.array(column, field.type)
        for column, field in zip(columns, schema.EVENT_LOG, strict=True)
    ]
    return pa.table(arrays, schema=schema.EVENT_LOG)


def events_of(table: pa.Table) -> list[Event]:
    """The rows of a table with the columns of :data:`recsys.schema.EVENTS`; others are left aside.

    :raises SchemaError: when one is missing, or of a type that cannot be read as the one it should have.
    """
    columns: list[list[Any]] = []
    for field in schema.EVENTS:
        if field.name not in table.column_names:
            if not field.nullable:
                raise SchemaError(f"events need the column {field.name!r}, there are {table.column_names}")
            columns.append([None] * len(table))
            continue
        column = table[field.name]
        try:
            if pa.types.is_timestamp(field.type):
                column = column.cast(field.type).cast(pa.int64())
            else:
                column = column.cast(field.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise SchemaError(f"the column {field.name!r} of events is {column.type}: {error}") from error
        columns.append(column.to_pylist())
    return [Event(*row) for row in zip(*columns, strict=True)]


def check_events(events: Sequence[Event], now_ms: int | None = None) -> None:
    """Raise :class:`~recsys.errors.RequestError`, naming row and field, for the first event no store may accept."""
    latest_ms = (time.time_ns() // 1_000_000 if now_ms is None else now_ms) + MAX_FUTURE_MS
    for row, event in enumerate(events):
        for name in ("event_id", "user_id", "item_id", "event"):
            if why := id_problem(getattr(event, name)):
                raise _bad(row, name, why)
        for name in ("request_id", "surface"):
            if (text := getattr(event, name)) is not None and (why := id_problem(text)):
                raise _bad(row, name, why)
        _check_integer(row, "timestamp_ms", event.timestamp_ms)
        if not 0 <= event.timestamp_ms <= latest_ms:
            raise _bad(row, "timestamp_ms", f"{event.timestamp_ms} is before 1970 or more than a day in the future")
        if event.slate_position is not None:
            _check_integer(row, "slate_position", event.slate_position)
            if not 0 <= event.slate_position < 2**31:
                raise _bad(row, "slate_position", f"{event.slate_position} is not in 0 to 2147483647")
        if event.value is not None and not (_is_number(event.value) and abs(event.value) <= _FLOAT32_MAX):
            raise _bad(row, "value", f"{event.value!r} is not a finite 32-bit number")


def _check_integer(row: int, name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _bad(row, name, f"must be an integer, not {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bad(row: int, name: str, why: str) -> RequestError:
    return RequestError(f"event {row}: {name} {why}", row=row, field=name)
