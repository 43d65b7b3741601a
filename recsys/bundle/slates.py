"""Slates that were made offline, one per user: shown when retrieval fails, before mere popularity is."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from recsys.data.id_map import IdMap
from recsys.errors import BundleMismatchError
from recsys.types import Candidates, Int32Array

SLATES = "slates"
SLATES_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_idx", pa.list_(pa.int32()), nullable=False),
        pa.field("score", pa.list_(pa.float32()), nullable=False),
    ]
)
"""One row per user; lists aligned, best first."""


class Slates:
    """Of one Bundle. The table stays as it is, mapped, and costs no Python object per user."""

    def __init__(self, table: pa.Table, num_items: int) -> None:
        """``table``: :data:`SLATES_SCHEMA`.

        :raises BundleMismatchError: for other columns, lists of different lengths, or items beyond the catalogue.
        """
        if not table.schema.equals(SLATES_SCHEMA):
            raise BundleMismatchError(f"slates need the columns\n{SLATES_SCHEMA}\nnot\n{table.schema}")
        table = table.combine_chunks()
        self._items, self._scores = (_flat(table[name]) for name in ("item_idx", "score"))
        if not np.array_equal(self._items[1], self._scores[1]):
            raise BundleMismatchError("slates have items and scores of different lengths")
        items: Int32Array = self._items[0]
        if len(items) and not 0 <= items.min() <= items.max() < num_items:
            raise BundleMismatchError(f"slates name an item beyond the catalogue's {num_items}")
        self._users = IdMap.build(table["user_id"])

    def of(self, user_id: str) -> Candidates:
        """The user's slate, best first; empty for somebody who has none."""
        row = int(self._users.rows([user_id])[0])
        if row < 0:
            return Candidates.empty()
        items, offsets = self._items
        span = slice(int(offsets[row]), int(offsets[row + 1]))
        return Candidates.from_source(SLATES, items[span], self._scores[0][span], stage=SLATES)


def _flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Values and offsets of a list column."""
    lists = column.chunk(0) if column.num_chunks else pa.array([], column.type)
    return lists.values.to_numpy(zero_copy_only=False), lists.offsets.to_numpy()
