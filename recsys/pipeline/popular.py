"""What is left to show when nothing smarter can: all items, the most popular first."""

from __future__ import annotations

import numpy as np

from recsys.errors import BundleMismatchError
from recsys.types import BoolArray, Candidates, FloatArray, Int32Array

POPULAR, CATALOGUE = "popular", "catalogue"


class PopularItems:
    """Every item of the catalogue once: the popular ones, best first, then the rest in order of ``item_idx``."""

    def __init__(self, num_items: int, item_idx: Int32Array, score: FloatArray) -> None:
        """``item_idx`` int32 [P], best first, no item twice; ``score`` float32 [P], descending.

        :raises BundleMismatchError: when an item is not in the catalogue or named twice.
        """
        rest = np.ones(num_items, np.bool_)
        if len(item_idx) and not 0 <= item_idx.min() <= item_idx.max() < num_items:
            raise BundleMismatchError(f"the popular items name an item beyond the catalogue's {num_items}")
        rest[item_idx] = False
        if np.count_nonzero(rest) + len(item_idx) != num_items:
            raise BundleMismatchError("the popular items name an item twice")
        others = np.flatnonzero(rest).astype(np.int32)
        lowest = min(float(score[-1]), 0.0) if len(score) else 0.0
        self.num_popular = len(item_idx)
        self.item_idx = np.concatenate([item_idx.astype(np.int32, copy=False), others])
        self.score = np.concatenate([score.astype(np.float32, copy=False), np.full(len(others), lowest, np.float32)])

    def best(self, k: int, allowed: BoolArray) -> Candidates:
        """The first ``k`` allowed items, or all of them where there are fewer. ``allowed`` is bool [N].

        Their source is ``popular``, and ``catalogue`` for items with no popularity.
        """
        size = max(1024, 4 * k)
        rows = np.zeros(0, np.int64)
        while True:  # the first allowed items are nearly always near the front, so not all N are looked at
            rows = np.flatnonzero(allowed[self.item_idx[:size]])[:k]
            if len(rows) == k or size >= len(self.item_idx):
                break
            size *= 8
        is_popular = rows < self.num_popular
        bits = np.where(is_popular, np.uint32(1), np.uint32(2)).astype(np.uint32)
        score = self.score[rows]
        return Candidates(self.item_idx[rows], score, (POPULAR, CATALOGUE), bits, {POPULAR: score})
