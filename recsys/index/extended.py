"""An index and the vectors that came after it, searched as if they were one."""

from __future__ import annotations

import numpy as np

from recsys.errors import ModelError
from recsys.index.base import VectorIndex
from recsys.types import BoolArray, FloatArray, Int32Array


class ExtendedIndex(VectorIndex):
    """``base`` and a few more rows, which are scored exactly: their number is what changed since it was built."""

    def __init__(self, base: VectorIndex, item_idx: Int32Array, vectors: FloatArray, num_items: int) -> None:
        """``vectors`` float32 [E, D] are those of ``item_idx`` int32 [E]: of items beyond the base, or in place of what
        the base has. ``num_items`` counts all of them.

        :raises ModelError: when shapes do not fit.
        """
        if vectors.shape != (len(item_idx), base.dim):
            raise ModelError(f"vectors of shape {vectors.shape} do not extend an index of dimension {base.dim}")
        self.config = base.config
        self._base = base
        self._item_idx = item_idx
        self._vectors_ED = np.ascontiguousarray(vectors, np.float32)
        self._num_items = num_items
        self._kept = np.ones(base.num_items, np.bool_)
        self._kept[item_idx[item_idx < base.num_items]] = False

    @property
    def num_items(self) -> int:
        return self._num_items

    @property
    def dim(self) -> int:
        return self._base.dim

    def search(self, queries: FloatArray, k: int, allowed: BoolArray | None = None) -> tuple[FloatArray, Int32Array]:
        if allowed is not None and allowed.shape != (self.num_items,):
            raise ModelError(f"a mask of shape {allowed.shape} does not fit {self.num_items} items")
        inside = self._kept if allowed is None else self._kept & allowed[: len(self._kept)]
        found = self._base.search(queries, k, None if inside.all() else inside)
        queries_BD = np.ascontiguousarray(queries, np.float32)
        extra = np.arange(len(self._item_idx)) if allowed is None else np.flatnonzero(allowed[self._item_idx])
        scores_BE = queries_BD @ self._vectors_ED[extra].T
        items_BE = np.broadcast_to(self._item_idx[extra], scores_BE.shape)
        scores = np.concatenate([found[0], scores_BE], axis=1)
        items = np.concatenate([found[1], items_BE], axis=1)
        order = np.lexsort((items, -scores))[:, :k]
        # What was not found has no place in the order of items.
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(items, order, axis=1)

    def vectors(self) -> FloatArray | None:
        """None: nobody needs them."""
        return None

    def save(self, folder: object) -> None:
        """Refused: the next Bundle has an index of its own."""
        raise ModelError("an extended index is for serving; build one over all vectors")
