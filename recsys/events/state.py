"""A user's state from what a Bundle brought and what came after it, the same for every event store."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from recsys.errors import EventStoreError
from recsys.events.base import UserState
from recsys.schema import DAY_MS

pc: Any = pyarrow.compute  # its functions are made at import, out of a type checker's sight
SEPARATOR = "\0"
GENERATION_BITS = 40
POSITION_MASK = (1 << GENERATION_BITS) - 1
"""a version is the generation of the seed, and in these bits the position of the user's last event"""


def remembered(state: UserState | None, ttl_days: float) -> UserState | None:
    """``state``, or None where its newest interaction is older than ``ttl_days`` (0: never)."""
    if state is None or not ttl_days or not len(state):
        return state
    newest_ms = int(state.timestamps_ms.max())
    # What has order only has no age.
    forgotten = 0 < newest_ms < time.time_ns() // 1_000_000 - round(ttl_days * DAY_MS)
    return None if forgotten else state


def seeded(user_id: str, history: tuple[str, bytes, str, bytes] | None) -> UserState:
    if history is None or not history[1]:
        return UserState(user_id, 0, (), np.zeros(0, np.int64), (), np.zeros(0, np.float32))
    items, times, events, values = history
    return UserState(
        user_id,
        0,
        tuple(items.split(SEPARATOR)),
        np.frombuffer(times, np.int64),
        tuple(events.split(SEPARATOR)),
        np.frombuffer(values, np.float32),
    )


def merged(state: UserState, rows: Sequence[tuple[Any, ...]], version: int, max_history: int) -> UserState:
    """``state`` with the ``rows`` (sorted by time, then arrival) that came after it, in order of time."""
    _, new_items, new_times, new_events, new_values = zip(*rows, strict=True) if rows else ((),) * 5
    items = state.item_ids + new_items
    events = state.events + new_events
    times = np.concatenate([state.timestamps_ms, np.array(new_times, np.int64)])
    values = np.concatenate([state.values, np.array(new_values, np.float32)])  # None becomes NaN
    num_old = len(state)
    if rows and num_old and times[num_old] < times[num_old - 1]:
        order = np.argsort(times, kind="stable")
        items, events = tuple(items[i] for i in order), tuple(events[i] for i in order)
        times, values = times[order], values[order]
    times.flags.writeable = values.flags.writeable = False  # the state is shared by all who read it
    return UserState(
        state.user_id, version, items[-max_history:], times[-max_history:], events[-max_history:], values[-max_history:]
    )


def history_rows(batch: pa.RecordBatch, max_history: int) -> Iterator[tuple[Any, ...]]:
    """One compact row per user of ``batch``, cut to the newest ``max_history`` entries."""
    lengths = pc.fill_null(pc.list_value_length(batch["item_ids"]), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    kept = np.minimum(lengths, max_history)
    kept_offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])
    rows = np.repeat(offsets[1:] - kept - kept_offsets[:-1], kept) + np.arange(kept_offsets[-1])

    def flat(name: str, type_: pa.DataType, default: Any) -> pa.Array:
        values = pc.list_flatten(batch[name])
        if len(values) != offsets[-1]:
            raise EventStoreError(f"histories: column {name} has {len(values)} entries, item_ids {offsets[-1]}")
        return pc.fill_null(values.take(pa.array(rows)).cast(type_), default)

    def joined(name: str) -> list[str]:
        texts = flat(name, pa.string(), "")
        if pc.any(pc.match_substring(texts, SEPARATOR)).as_py():
            raise EventStoreError(f"histories: column {name} holds a NUL character, which is no text")
        lists = pa.ListArray.from_arrays(pa.array(kept_offsets, pa.int32()), texts)
        return pc.binary_join(lists, SEPARATOR).to_pylist()

    times = flat("timestamps_ms", pa.int64(), 0).to_numpy(zero_copy_only=False).tobytes()
    values = flat("values", pa.float32(), float("nan")).to_numpy(zero_copy_only=False).tobytes()
    bounds = kept_offsets[:-1].tolist(), kept_offsets[1:].tolist()
    columns = zip(batch["user_id"].to_pylist(), joined("item_ids"), joined("events"), strict=True)
    for (user_id, items, events), start, stop in zip(columns, *bounds, strict=True):
        yield user_id, items, times[8 * start : 8 * stop], events, values[4 * start : 4 * stop]
