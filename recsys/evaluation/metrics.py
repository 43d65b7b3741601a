"""Ranking metrics over full rankings, vectorised over queries.

Shape legend: Q queries, K ranks, N items, C categories.

Every function takes ``ranked`` int32 [Q, K], best first, -1 where a system had nothing more to offer, no item twice in
a row; and, where relevance matters, the relevant items of query ``q`` as
``relevant_item_idx[relevant_offsets[q]:relevant_offsets[q + 1]]``. Relevance is binary. With
``hit(q, r)`` = 1 where the item at rank ``r`` (from 1) is relevant and ``R_q`` the number of relevant items:

============== =======================================================================================
``recall@k``   ``sum_{r<=k} hit(q, r) / R_q``
``hr@k``       hit rate: 1 if any ``hit(q, r)`` with ``r <= k``, else 0
``mrr@k``      ``1 / r`` of the first hit with ``r <= k``, else 0 (Voorhees, TREC-8, 1999)
``ndcg@k``     ``sum_{r<=k} hit(q, r) / log2(r + 1)`` over its greatest possible value,
               ``sum_{r<=min(k, R_q)} 1 / log2(r + 1)`` (Järvelin and Kekäläinen, TOIS 20(4), 2002)
============== =======================================================================================

These are the definitions of TREC and of ``ranx``, which the tests compare with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from recsys.errors import DataError
from recsys.ndcg import discounts
from recsys.types import BoolArray, Float64Array, FloatArray, Int32Array, Int64Array

ACCURACY = ("recall", "ndcg", "mrr", "hr")
"""Names of the per-query metrics, each reported at every ``k``."""

_CHUNK_CELLS = 1 << 24
"""Largest temporary array, in cells."""


def hits(ranked: Int32Array, relevant_item_idx: Int32Array, relevant_offsets: Int64Array, num_items: int) -> BoolArray:
    """bool [Q, K]: whether the item at each rank is relevant to its query."""
    query_of = np.repeat(np.arange(len(relevant_offsets) - 1, dtype=np.int64), np.diff(relevant_offsets))
    wanted = query_of * num_items + relevant_item_idx
    offered = np.arange(len(ranked), dtype=np.int64)[:, None] * num_items + ranked
    return np.isin(offered, wanted) & (ranked >= 0)


def accuracy(
    ranked: Int32Array,
    relevant_item_idx: Int32Array,
    relevant_offsets: Int64Array,
    *,
    ks: Sequence[int],
    num_items: int,
) -> dict[str, Float64Array]:
    """``recall@k``, ``ndcg@k``, ``mrr@k`` and ``hr@k`` for each of ``ks``: float64 [Q] in [0, 1].

    Every query needs at least one relevant item, none twice, and ``K >= max(ks)``; :class:`DataError` otherwise.
    """
    num_relevant = np.diff(relevant_offsets)
    if len(ranked) != len(num_relevant):
        raise DataError(f"{len(ranked)} rankings for {len(num_relevant)} queries")
    if (num_relevant < 1).any():
        raise DataError(
            f"query {int(np.argmax(num_relevant < 1))} has no relevant item", row=int(np.argmax(num_relevant < 1))
        )
    if ranked.shape[1] < max(ks):
        raise DataError(f"rankings of depth {ranked.shape[1]} cannot be judged at k = {max(ks)}")
    hit = hits(ranked, relevant_item_idx, relevant_offsets, num_items)
    discount = discounts(ranked.shape[1])
    ideal_dcg = np.cumsum(discount)
    num_hits, dcg = np.cumsum(hit, axis=1), np.cumsum(hit * discount, axis=1)
    reciprocal = np.where(hit.any(axis=1), 1.0 / (np.argmax(hit, axis=1) + 1), 0.0)
    result: dict[str, Float64Array] = {}
    for k in ks:
        found = num_hits[:, k - 1]
        result[f"recall@{k}"] = found / num_relevant
        result[f"ndcg@{k}"] = dcg[:, k - 1] / ideal_dcg[np.minimum(k, num_relevant) - 1]
        result[f"mrr@{k}"] = np.where(found > 0, reciprocal, 0.0)
        result[f"hr@{k}"] = (found > 0).astype(np.float64)
    return result


def coverage(ranked: Int32Array, num_items: int) -> float:
    """Share of the catalogue that appears in at least one slate, in [0, 1] (Ge et al., RecSys 2010)."""
    return len(np.unique(ranked[ranked >= 0])) / num_items


def novelty(ranked: Int32Array, counts: Int64Array) -> float:
    """Mean self-information of the recommended items, in bits; higher is less obvious.

    ``-log2 p(i)`` with ``p(i) = (c_i + 1) / (sum_j c_j + N)``, ``c_i`` the training count of item ``i``
    (Zhou et al., PNAS 107(10), 2010; add-one smoothing here, so that items without interactions are finite).
    NaN where nothing was recommended.
    """
    information = -np.log2((counts + 1.0) / (counts.sum() + len(counts)))
    shown = ranked[ranked >= 0]
    return float(information[shown].mean()) if len(shown) else float("nan")


def popularity_lift(
    ranked: Int32Array, profile_item_idx: Int32Array, profile_offsets: Int64Array, counts: Int64Array
) -> float:
    """Popularity bias: how much more popular the slates are than what their users chose before.

    ``(GAP_slates - GAP_profiles) / GAP_profiles``, where GAP is the mean over queries of the mean training count of
    their items (Abdollahpouri et al., RMSE at RecSys 2019); 0 is unbiased, 1 means twice as popular. Queries with an
    empty profile or an empty slate are left out of both sides; NaN when none remains.
    """
    shown = ranked >= 0
    lengths = np.diff(profile_offsets)
    usable = (lengths > 0) & shown.any(axis=1)
    if not usable.any():
        return float("nan")
    totals = np.concatenate([[0.0], np.cumsum(counts[profile_item_idx], dtype=np.float64)])
    profile = (totals[profile_offsets[1:]] - totals[profile_offsets[:-1]])[usable] / lengths[usable]
    slate = np.where(shown, counts[ranked], 0).sum(axis=1)[usable] / shown.sum(axis=1)[usable]
    return float((slate.mean() - profile.mean()) / profile.mean()) if profile.mean() > 0 else float("nan")


class CategoryTable:
    """Categories of all items as integers, for :func:`category_diversity`."""

    def __init__(self, categories: pa.ChunkedArray) -> None:
        """``categories`` list<string> [N]: the column ``categories`` of the item table."""
        column = categories.combine_chunks()
        lengths = np.asarray(column.value_lengths().fill_null(0), dtype=np.int64)
        codes = column.flatten().dictionary_encode()
        item = np.repeat(np.arange(len(column), dtype=np.int64), lengths)
        code = np.asarray(codes.indices.fill_null(len(codes.dictionary)), dtype=np.int64)
        pairs = np.unique(item * (len(codes.dictionary) + 1) + code)  # a category named twice counts once
        item, self.codes = np.divmod(pairs, len(codes.dictionary) + 1)
        self.offsets = np.searchsorted(item, np.arange(len(column) + 1)).astype(np.int64)

    def one_hot(self, item_idx: Int64Array) -> FloatArray:
        """float32 [len(item_idx), C']: over the categories that occur among ``item_idx``."""
        starts, lengths = self.offsets[item_idx], np.diff(self.offsets)[item_idx]
        ends = np.cumsum(lengths)
        gather = np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)
        present, column = np.unique(self.codes[gather], return_inverse=True)
        matrix = np.zeros((len(item_idx), len(present)), np.float32)
        matrix[np.repeat(np.arange(len(item_idx)), lengths), column] = 1.0
        return matrix


def category_diversity(ranked: Int32Array, categories: CategoryTable) -> float:
    """Intra-list diversity by categories, in [0, 1]: mean over slates of the mean pairwise Jaccard distance.

    ``1 - |A & B| / |A | B|`` over the pairs of a slate (Ziegler et al., WWW 2005, with this distance). A pair in which
    an item has no category says nothing and is left out, and so is a slate without a pair; NaN when none remains.
    """
    depth = ranked.shape[1]
    upper = np.triu(np.ones((depth, depth), bool), k=1)
    total, num_slates = 0.0, 0
    num_categories = int(categories.codes.max(initial=0)) + 1
    chunk = max(1, _CHUNK_CELLS // (depth * (min(num_categories, 4096) + depth)))
    for start in range(0, len(ranked), chunk):
        slates = ranked[start : start + chunk]
        unique, where = np.unique(np.maximum(slates, 0), return_inverse=True)
        one_hot_BKC = categories.one_hot(unique.astype(np.int64))[where.reshape(slates.shape)]
        shared = np.einsum("bkc,blc->bkl", one_hot_BKC, one_hot_BKC, optimize=True)
        sizes = one_hot_BKC.sum(axis=2)
        either = sizes[:, :, None] + sizes[:, None, :] - shared
        known = (sizes > 0) & (slates >= 0)
        pairs = upper & known[:, :, None] & known[:, None, :]
        distance = np.where(pairs, 1.0 - shared / np.maximum(either, 1.0), 0.0)
        num_pairs = pairs.sum(axis=(1, 2))
        usable = num_pairs > 0
        total += float((distance.sum(axis=(1, 2))[usable] / num_pairs[usable]).sum())
        num_slates += int(usable.sum())
    return total / num_slates if num_slates else float("nan")
