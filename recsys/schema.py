"""The data contract: names and Arrow types of interactions, items and events.

Outside the library users and items have string ids (``user_id``, ``item_id``). Inside, after :mod:`recsys.data`
has prepared a dataset, they are dense integers from 0 (``user_idx``, ``item_idx``: the row in the user and item table).
"""

from __future__ import annotations

import pyarrow as pa

USER_ID = "user_id"
ITEM_ID = "item_id"
TIMESTAMP = "timestamp"
POSITION = "position"
EVENT = "event"
VALUE = "value"

USER_IDX = "user_idx"
ITEM_IDX = "item_idx"
WEIGHT = "weight"
SPLIT = "split"

DAY_MS = 86_400_000
"""milliseconds of a day"""

TIMESTAMP_TYPE = pa.timestamp("ms", tz="UTC")

ITEMS = pa.schema(
    [
        pa.field(ITEM_ID, pa.string(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("description", pa.string()),
        pa.field("categories", pa.list_(pa.string()), nullable=False),
        pa.field("creator", pa.string()),
        pa.field("price", pa.float32()),
        pa.field("created_at", TIMESTAMP_TYPE),
        pa.field("available", pa.bool_(), nullable=False),
        pa.field("image", pa.string()),
    ]
)
"""One row per item of the catalogue."""

PREPARED_INTERACTIONS = pa.schema(
    [
        pa.field(USER_IDX, pa.int32(), nullable=False),
        pa.field(ITEM_IDX, pa.int32(), nullable=False),
        pa.field(TIMESTAMP, TIMESTAMP_TYPE),
        pa.field(POSITION, pa.int64(), nullable=False),
        pa.field(EVENT, pa.string(), nullable=False),
        pa.field(VALUE, pa.float32()),
        pa.field(WEIGHT, pa.float32(), nullable=False),
        pa.field(SPLIT, pa.int8(), nullable=False),
    ]
)
"""Interactions after preparation, sorted by ``(user_idx, timestamp, position)``.

``weight`` > 0 marks a positive, 0 an interaction that counts as seen only; ``split`` is a value of
:class:`recsys.data.dataset.Split`.
"""

EVENTS = pa.schema(
    [
        pa.field("event_id", pa.string(), nullable=False),
        pa.field(USER_ID, pa.string(), nullable=False),
        pa.field(ITEM_ID, pa.string(), nullable=False),
        pa.field(EVENT, pa.string(), nullable=False),
        pa.field(TIMESTAMP, TIMESTAMP_TYPE, nullable=False),
        pa.field(VALUE, pa.float32()),
        pa.field("request_id", pa.string()),
        pa.field("slate_position", pa.int32()),
        pa.field("surface", pa.string()),
    ]
)
"""One row per event received while serving; ``event_id`` is the idempotency key."""

EVENT_LOG = EVENTS.insert(0, pa.field("position", pa.int64(), nullable=False))
"""Events in the order they arrived; ``position`` rises by one or more from row to row."""
