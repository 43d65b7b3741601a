"""Where a system is good and where it is not: accuracy by what is known of the item and of the user.

A slice is a set of (query, relevant item) pairs. Its value is the mean gain of its items: ``1 / log2(rank + 1)`` where
the item is among the first ``k``, else 0. With one relevant item per query that is NDCG@k; with several it is what each
item adds to the DCG, so that slices by item stay meaningful in baskets.

Shape legend: Q queries, P pairs, K ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from recsys.data.dataset import Dataset, Split, Targets
from recsys.ndcg import discounts
from recsys.schema import DAY_MS
from recsys.types import Float64Array, Int32Array, Int64Array

Edges = Sequence[int]
ITEM_COUNT: Edges = (0, 1, 2, 5, 10, 50, 200)
HISTORY_LENGTH: Edges = (0, 1, 2, 5, 10, 20, 50, 100)
ITEM_AGE_DAYS: Edges = (0, 1, 7, 30, 90, 365, 3650)


@dataclass(frozen=True)
class Slices:
    """Mean gain per bucket of one quantity. Buckets run from their edge up to the next one."""

    quantity: str
    labels: tuple[str, ...]
    num_pairs: tuple[int, ...]
    gain: tuple[float | None, ...]
    """None where a bucket is empty"""


def slices(ranked: Int32Array, targets: Targets, dataset: Dataset, *, k: int = 10) -> list[Slices]:
    """Slices of ``ranked`` int32 [Q, K] by training interactions of the item, length of the history and, in data with
    time, age of the item (days since its first interaction in the data).
    """
    lengths = np.diff(targets.relevant_offsets)
    query_P = np.repeat(np.arange(len(targets)), lengths)
    item_P = targets.relevant_item_idx
    gain_P = _gain(ranked[:, :k], query_P, item_P)
    counts = dataset.train_counts(Split.TRAIN)
    found = [
        _slice("training interactions of the item", counts[item_P], gain_P, ITEM_COUNT),
        _slice("length of the history", targets.histories.lengths[query_P], gain_P, HISTORY_LENGTH),
    ]
    log = dataset.log
    if log.timestamp_ms is not None and targets.now_ms is not None:
        first = np.full(dataset.num_items, np.iinfo(np.int64).max)
        np.minimum.at(first, log.item_idx, log.timestamp_ms)
        age_days = np.maximum(targets.now_ms[query_P] - first[item_P], 0) / DAY_MS
        found.append(_slice("age of the item in days", age_days, gain_P, ITEM_AGE_DAYS))
    return found


def _gain(ranked_QK: Int32Array, query_P: Int64Array, item_P: Int32Array) -> Float64Array:
    gain_P = np.zeros(len(item_P))
    discount = discounts(ranked_QK.shape[1])
    for start in range(0, len(item_P), 65536):
        pairs = slice(start, start + 65536)
        hit = ranked_QK[query_P[pairs]] == item_P[pairs, None]
        gain_P[pairs] = (hit * discount).sum(axis=1)
    return gain_P


def _slice(quantity: str, value_P: NDArray[np.generic], gain_P: Float64Array, edges: Edges) -> Slices:
    bucket_P = np.searchsorted(np.asarray(edges), value_P.astype(np.float64), side="right") - 1
    num = np.bincount(bucket_P, minlength=len(edges))
    total = np.bincount(bucket_P, weights=gain_P, minlength=len(edges))
    labels = [f"{low}" if high == low + 1 else f"{low} to {high - 1}" for low, high in pairwise(edges)]
    return Slices(
        quantity,
        (*labels, f"{edges[-1]} and more"),
        tuple(num.tolist()),
        tuple(float(t / n) if n else None for t, n in zip(total.tolist(), num.tolist(), strict=True)),
    )
