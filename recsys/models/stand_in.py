"""For items that came after a model was fitted: the items it knows that are most like them.

A new item's vector is the mean of those of its stand-ins, each counted by how alike they are, at the length that they
have on average (a plain mean of different vectors is shorter, and would hardly be found). With texts this is k-nearest-
neighbour regression from text to the retriever's space, as in DropoutNet's content baseline.

Shape legend: N items of the model, M new ones, K stand-ins of each, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recsys.types import FloatArray, Int32Array

TEMPERATURE = 0.05
"""cosines are divided by it before the softmax that weights the stand-ins"""


@dataclass(frozen=True)
class StandIns:
    """For each of M new items, K known ones."""

    item_idx: Int32Array
    """int32 [M, K], the most alike first"""
    weight: FloatArray
    """float32 [M, K], each row adding up to 1"""
    num_known: int
    """N"""

    @classmethod
    def by_likeness(cls, likeness: FloatArray, item_idx: Int32Array, num_known: int) -> StandIns:
        """Those at ``item_idx`` int32 [M, K], weighted by the softmax of how alike they are, float32 [M, K], over
        :data:`TEMPERATURE`.
        """
        weight = np.exp((likeness - likeness.max(axis=1, initial=-np.inf, keepdims=True)) / TEMPERATURE)
        return cls(item_idx, (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32), num_known)

    def __len__(self) -> int:
        return len(self.item_idx)

    @property
    def num_items(self) -> int:
        """N + M"""
        return self.num_known + len(self)

    def of(self, item_idx: Int32Array) -> Int32Array:
        """``item_idx`` with the nearest known item in the place of each new one; what is no item stays."""
        new = item_idx >= self.num_known
        if not new.any():
            return item_idx
        known = item_idx.copy()
        known[new] = self.item_idx[item_idx[new] - self.num_known, 0]
        return known

    def mean(self, values_ND: FloatArray) -> FloatArray:
        """float32 [M, ...]: the weighted means of the stand-ins' ``values_ND``."""
        return np.einsum("mk,mk...->m...", self.weight, values_ND[self.item_idx]).astype(np.float32)

    def vectors(self, vectors_ND: FloatArray, num_compared: int) -> FloatArray:
        """float32 [M, D]; the first ``num_compared`` dimensions are what items are compared by."""
        means_MD = self.mean(vectors_ND)
        if num_compared and len(self):
            lengths_MK = np.linalg.norm(vectors_ND[self.item_idx][..., :num_compared], axis=-1)
            wanted_M = (self.weight * lengths_MK).sum(axis=1)
            found_M = np.linalg.norm(means_MD[:, :num_compared], axis=1)
            means_MD[:, :num_compared] *= (wanted_M / np.maximum(found_M, 1e-12))[:, None].astype(np.float32)
        return means_MD
