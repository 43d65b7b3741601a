"""NDCG, for whoever trains, ranks or judges (Järvelin and Kekäläinen, TOIS 20(4), 2002).

Shape legend: Q queries, K ranks.
"""

from __future__ import annotations

import numpy as np

from recsys.types import BoolArray, Float64Array, Int64Array


def discounts(depth: int) -> Float64Array:
    """float64 [depth]: ``1 / log2(rank + 1)`` for the ranks from 1."""
    return 1.0 / np.log2(np.arange(2, depth + 2))


def ndcg(hit_QK: BoolArray, num_relevant_Q: Int64Array, k: int) -> Float64Array:
    """float64 [Q], 0 to 1: NDCG@k of binary relevance. ``hit_QK`` (K up to ``k``) marks the ranks that hold a relevant
    item; of those there are ``num_relevant_Q`` (1 or more) per query, found or not.
    """
    discount = discounts(k)
    ideal = np.cumsum(discount)[np.clip(num_relevant_Q, 1, k) - 1]
    return (hit_QK * discount[: hit_QK.shape[1]]).sum(axis=1) / ideal
