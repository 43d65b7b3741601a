"""Retrieval: the few hundred items of the catalogue that fit a user best, hard rules applied inside the search.

Shape legend: B queries, K vectors per user, D dimensions, N items, k results.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from recsys.data.catalogue import Catalogue, contains
from recsys.data.histories import Histories
from recsys.errors import BundleMismatchError
from recsys.index import VectorIndex
from recsys.models.base import ItemBonus, Retriever, VectorRetriever
from recsys.models.retrievers.blend import RANK_OFFSET, BlendRetriever
from recsys.pipeline.cache import Cache
from recsys.pipeline.stage import RETRIEVAL
from recsys.types import BoolArray, Candidates, Filters, FloatArray, Int32Array, Int64Array, Query

_MAX_OVERFETCH = 1024
"""A query that excludes more items than this searches under a mask of its own instead of fetching more and dropping."""
_MAX_SCORES = 1 << 25
"""scores held at once (float32) where a retriever scores all items"""


class RetrievalStage:
    """A vector retriever searches the index; any other retriever scores every item, and a blend asks each source.

    While allowed items remain, a query gets ``num_candidates`` of them. With an exact index the result is what a search
    among the allowed items alone gives.
    """

    name = RETRIEVAL

    def __init__(
        self,
        bundle_id: str,
        retriever: Retriever,
        index: VectorIndex | None,
        catalogue: Catalogue,
        *,
        source: str | None = None,
        encoding_cache: int = 0,
    ) -> None:
        """``index`` holds the retriever's item vectors; None where it has none. ``source`` defaults to its kind.

        ``encoding_cache`` histories are remembered with their vectors, unless those depend on the time of the request.

        :raises BundleMismatchError: when retriever, index and catalogue do not count the same items.
        """
        self.bundle_id = bundle_id
        self.retriever = retriever
        self.catalogue = catalogue
        self.source = source or retriever.config.kind
        self._vector_retriever = retriever if isinstance(retriever, VectorRetriever) else None
        self._index = index if self._vector_retriever is not None else None
        self.encodings: Cache[bytes, FloatArray] = Cache(encoding_cache)
        self._remembers = encoding_cache > 0 and not (self._vector_retriever and self._vector_retriever.reads_clock)
        self._sources: dict[str, RetrievalStage] = {}
        if isinstance(retriever, BlendRetriever):
            self._shares = retriever.config.shares
            self._sources = {
                name: RetrievalStage(bundle_id, part, None, catalogue, source=name)
                for name, part in retriever.parts.items()
            }
        counts = {"retriever": retriever.num_items, "catalogue": len(catalogue)}
        if self._index is not None:
            counts["index"] = self._index.num_items
        if len(set(counts.values())) != 1:
            raise BundleMismatchError(f"parts of Bundle {bundle_id} count different items: {counts}", **counts)

    def run_batch(self, queries: Sequence[Query], candidates: Sequence[Candidates]) -> list[Candidates]:
        """Fresh candidates for each query; ``candidates`` are not looked at."""
        if not queries:
            return []
        if self._sources:
            proposed = [source.run_batch(queries, candidates) for source in self._sources.values()]
            shares = list(self._shares.values())
            return [_fused(parts, shares, query) for query, *parts in zip(queries, *proposed, strict=True)]
        histories = Histories.of([query.history for query in queries])
        now_ms = np.array([query.now_ms for query in queries], np.int64)
        if self._vector_retriever is not None and self._index is not None:
            users_BKD = self._encode(self._vector_retriever, queries, histories, now_ms)
            bonus = self._vector_retriever.bonus(histories, users_BKD, now_ms)
            return self._search(self._index, queries, users_BKD, bonus)
        found: list[Candidates] = []
        for rows, part in histories.batches(max(1, _MAX_SCORES // max(1, len(self.catalogue)))):
            scores_BN = self.retriever.score(part, now_ms[rows])
            for query, scores_N in zip(queries[rows], scores_BN, strict=True):
                allowed = self.catalogue.allowed(query.filters, query.excluded_item_idx)
                item_idx = np.flatnonzero(allowed).astype(np.int32)
                found.append(self._best(item_idx, scores_N[item_idx], query.num_candidates))
        return found

    def _encode(
        self, retriever: VectorRetriever, queries: Sequence[Query], histories: Histories, now_ms: Int64Array
    ) -> FloatArray:
        """User vectors [B, K, D]. A history is its own key, so that nothing that happened can be overlooked."""
        if not self._remembers:
            return retriever.encode_users(histories, now_ms)
        keys = [_key(query) for query in queries]
        known = [self.encodings.get(key) for key in keys]
        missing = [row for row, vectors_KD in enumerate(known) if vectors_KD is None]
        if missing:
            rows = np.array(missing)
            fresh_BKD = retriever.encode_users(histories[rows], now_ms[rows])
            for row, vectors_KD in zip(missing, fresh_BKD, strict=True):
                vectors_KD = vectors_KD.copy()  # a view would keep the whole batch alive
                self.encodings.put(keys[row], vectors_KD)
                known[row] = vectors_KD
        return np.stack([vectors_KD for vectors_KD in known if vectors_KD is not None])

    def _search(
        self, index: VectorIndex, queries: Sequence[Query], users_BKD: FloatArray, bonus: ItemBonus | None
    ) -> list[Candidates]:
        """Queries under one mask share one search; what a query gets does not depend on who shares it.

        Items with a bonus are left out of the search and scored one by one.
        """
        left_out = [query.excluded_item_idx for query in queries]
        if bonus is not None:
            left_out = [np.union1d(excluded, bonus.of(row)[0]) for row, excluded in enumerate(left_out)]
        groups: defaultdict[tuple[Filters, int, int], list[int]] = defaultdict(list)
        for row, query in enumerate(queries):
            num_excluded = len(left_out[row])
            if num_excluded <= _MAX_OVERFETCH:
                groups[query.filters, _power_of_two(query.num_candidates + num_excluded), -1].append(row)
            else:
                groups[query.filters, query.num_candidates, row].append(row)
        found: dict[int, Candidates] = {}
        for (filters, fetch, own), rows in groups.items():
            mask: BoolArray | None
            if own >= 0:
                mask = self.catalogue.allowed(filters, left_out[own])
            else:
                matching = self.catalogue.matching(filters)
                mask = None if matching.count == len(self.catalogue) else matching.allowed
            users_bKD = users_BKD[rows]
            num_vectors = users_bKD.shape[1]
            fetch = min(fetch, len(self.catalogue))
            scores, items = index.search(users_bKD.reshape(len(rows) * num_vectors, -1), fetch, mask)
            scores_bk = scores.reshape(len(rows), -1)
            items_bk = items.reshape(len(rows), -1)
            for row, row_scores, row_items in zip(rows, scores_bk, items_bk, strict=True):
                query = queries[row]
                keep = (row_items >= 0) & ~contains(left_out[row], row_items)
                item_idx, score = row_items[keep], row_scores[keep]
                if num_vectors > 1:
                    item_idx, score = _best_of_each(item_idx, score)
                if bonus is not None:
                    known, known_score = self._known(query, users_BKD[row], *bonus.of(row))
                    item_idx, score = np.concatenate([item_idx, known]), np.concatenate([score, known_score])
                found[row] = self._best(item_idx, score, query.num_candidates)
        return [found[row] for row in range(len(queries))]

    def _known(
        self, query: Query, user_KD: FloatArray, item_idx: Int32Array, bonus: FloatArray
    ) -> tuple[Int32Array, FloatArray]:
        """Those of the items with a bonus that the query may have, and their scores."""
        assert self._vector_retriever is not None
        keep = self.catalogue.matching(query.filters).allowed[item_idx] & ~contains(query.excluded_item_idx, item_idx)
        item_idx = item_idx[keep]
        products = user_KD @ self._vector_retriever.item_vectors()[item_idx].T
        return item_idx, products.max(axis=0) + bonus[keep]

    def _best(self, item_idx: Int32Array, score: FloatArray, k: int) -> Candidates:
        """The ``k`` best, descending; equal scores in order of ``item_idx``, so the result is the same every time."""
        if len(score) > 4 * k:
            threshold = np.partition(score, len(score) - k)[len(score) - k]
            rows = np.flatnonzero(score >= threshold)
            item_idx, score = item_idx[rows], score[rows]
        order = np.lexsort((item_idx, -score))[:k]
        return Candidates.from_source(self.source, item_idx[order], score[order], stage=self.name)


def _fused(parts: Sequence[Candidates], shares: Sequence[float], query: Query) -> Candidates:
    """The best of each source as far as its share goes, then the best by fused score; in order of that score."""
    item_idx = np.unique(np.concatenate([part.item_idx for part in parts]))
    score = np.zeros(len(item_idx))
    bits = np.zeros(len(item_idx), np.uint32)
    in_share = np.zeros(len(item_idx), np.bool_)
    for bit, (part, share) in enumerate(zip(parts, shares, strict=True)):
        place = np.searchsorted(item_idx, part.item_idx)
        score[place] += share / (RANK_OFFSET + 1 + np.arange(len(part)))
        bits[place] |= np.uint32(1 << bit)
        in_share[place[: max(1, int(share * query.num_candidates))]] = True
    chosen = np.lexsort((item_idx, -score, ~in_share))[: query.num_candidates]
    chosen = chosen[np.lexsort((item_idx[chosen], -score[chosen]))]
    fused = score[chosen].astype(np.float32)
    names = tuple(name for part in parts for name in part.sources)
    return Candidates(item_idx[chosen], fused, names, bits[chosen], {RetrievalStage.name: fused})


def _key(query: Query) -> bytes:
    digest = hashlib.blake2b(query.history.item_idx.tobytes(), digest_size=16)
    digest.update(query.history.timestamp_ms.tobytes())
    return digest.digest()


def _best_of_each(item_idx: Int32Array, score: FloatArray) -> tuple[Int32Array, FloatArray]:
    """Each item once, with the best score any of the K vectors gave it."""
    order = np.lexsort((-score, item_idx))
    item_idx, score = item_idx[order], score[order]
    first = np.ones(len(item_idx), np.bool_)
    first[1:] = item_idx[1:] != item_idx[:-1]
    return item_idx[first], score[first]


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
