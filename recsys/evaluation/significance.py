"""Intervals and comparisons for queries that come in clusters.

The queries of one user resemble each other, so treating them as independent makes intervals too narrow. Whole users
are resampled instead (the cluster bootstrap: Field and Welsh, JRSS-B 69(3), 2007), and a comparison of two systems
flips the sign of whole users (the paired randomisation test recommended by Smucker et al., CIKM 2007, by cluster).
Both are seeded: equal input gives equal output.

Shape legend: Q queries, U users, M metrics, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from recsys.errors import DataError
from recsys.types import Float64Array, Int32Array

_CHUNK_CELLS = 1 << 23
"""Largest temporary array, in cells."""


@dataclass(frozen=True)
class Interval:
    """A mean over queries and its percentile bootstrap interval, clustered by user."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Mean of A minus B over the same queries, its interval, and the two-sided p value of no difference."""

    mean: float
    low: float
    high: float
    p_value: float


def bootstrap(
    values: Float64Array,
    user_idx: Int32Array,
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Interval]:
    """One interval per column of ``values`` float64 [Q, M]; ``user_idx`` int32 [Q] names the cluster of each query."""
    sums, counts = _by_user(values, user_idx)
    rng = np.random.default_rng(seed)
    num_users = len(counts)
    means = np.empty((num_resamples, values.shape[1]))
    for rows in _chunks(num_resamples, num_users):
        size = rows.stop - rows.start
        drawn = rng.integers(num_users, size=(size, num_users)) + num_users * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * num_users).reshape(size, num_users).astype(np.float64)
        means[rows] = (times @ sums) / (times @ counts)[:, None]
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail], axis=0)
    mean = values.mean(axis=0)
    return [Interval(float(m), float(a), float(b)) for m, a, b in zip(mean, low, high, strict=True)]


def paired_difference(
    a: Float64Array,
    b: Float64Array,
    user_idx: Int32Array,
    *,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> list[Difference]:
    """One difference per column of ``a`` minus ``b``, both float64 [Q, M], row by row the same queries."""
    if a.shape != b.shape:
        raise DataError(f"a paired comparison needs the same queries and metrics: {a.shape} against {b.shape}")
    intervals = bootstrap(a - b, user_idx, num_resamples=num_resamples, confidence=confidence, seed=seed)
    sums, _ = _by_user(a - b, user_idx)
    observed = np.abs(sums.sum(axis=0))
    # Sums that differ by rounding alone are ties, and a tie counts as at least as extreme.
    threshold = observed - 1e-9 * np.abs(sums).sum(axis=0)
    rng = np.random.default_rng([seed, 1])
    extreme = np.zeros(a.shape[1], np.int64)
    for rows in _chunks(num_resamples, len(sums)):
        signs = rng.integers(2, size=(rows.stop - rows.start, len(sums))).astype(np.float64) * 2.0 - 1.0
        extreme += (np.abs(signs @ sums) >= threshold).sum(axis=0)
    p_values = (extreme + 1) / (num_resamples + 1)
    return [Difference(i.mean, i.low, i.high, float(p)) for i, p in zip(intervals, p_values, strict=True)]


def _by_user(values: Float64Array, user_idx: Int32Array) -> tuple[Float64Array, Float64Array]:
    """Sums [U, M] and numbers of queries [U] of each user that occurs."""
    if values.ndim != 2 or len(values) != len(user_idx):
        raise DataError(f"values of shape {values.shape} do not fit {len(user_idx)} queries")
    if not len(values):
        raise DataError("there are no queries to compute an interval over")
    _, cluster = np.unique(user_idx, return_inverse=True)
    num_users = int(cluster.max()) + 1
    sums = np.zeros((num_users, values.shape[1]))
    np.add.at(sums, cluster, values)
    return sums, np.bincount(cluster, minlength=num_users).astype(np.float64)


def _chunks(num_resamples: int, num_users: int) -> Iterator[slice]:
    size = max(1, _CHUNK_CELLS // num_users)
    for start in range(0, num_resamples, size):
        yield slice(start, min(start + size, num_resamples))
