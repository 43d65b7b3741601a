"""A fitted model and the items that came after it, each by its stand-ins (:mod:`.stand_in`), as if it knew them.

A vector retriever gets a vector for each; in a history and for a ranker the nearest stand-in takes the item's place.
The next Bundle learns the item itself.

Shape legend: N items of the model, M new ones, K stand-ins of each, B users, V vectors of each, D dimensions.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from recsys.data.histories import Histories
from recsys.errors import ModelError
from recsys.models.base import ItemBonus, Retriever, VectorRetriever
from recsys.models.rankers.base import Ranker
from recsys.models.rankers.queries import RankingBatch, RankingCatalogue, RankingQuery
from recsys.models.retrievers.blend import BlendRetriever
from recsys.models.stand_in import StandIns
from recsys.types import FloatArray, Int64Array


def with_new_items(retriever: Retriever, stand_ins: StandIns) -> Retriever:
    """``retriever`` for its items and the new ones."""
    if isinstance(retriever, BlendRetriever):
        parts = {name: with_new_items(part, stand_ins) for name, part in retriever.parts.items()}
        return BlendRetriever(retriever.config, parts)
    if isinstance(retriever, VectorRetriever):
        return StandInVectors(retriever, stand_ins)
    return StandInScores(retriever, stand_ins)


class _Unsaved:
    """Is made when it is needed."""

    def save_weights(self, folder: Path) -> None:
        """Refused."""
        raise ModelError("stand-ins are for serving: fit the model on the new items to save it")


class StandInScores(_Unsaved, Retriever):
    """Any retriever: a new item's score is the mean of those of its stand-ins."""

    def __init__(self, base: Retriever, stand_ins: StandIns) -> None:
        self.config = base.config
        self.num_items = stand_ins.num_items
        self._base, self._stand_ins = base, stand_ins

    def score(self, histories: Histories, now_ms: Int64Array | None = None) -> FloatArray:
        scores_BN = self._base.score(_known(histories, self._stand_ins), now_ms)
        return np.concatenate([scores_BN, self._stand_ins.mean(scores_BN.T).T], axis=1)


class StandInVectors(_Unsaved, VectorRetriever):
    """A vector retriever, its item vectors continued."""

    def __init__(self, base: VectorRetriever, stand_ins: StandIns) -> None:
        self.config = base.config
        self.num_items = stand_ins.num_items
        self.num_vectors = base.num_vectors
        self._base, self._stand_ins = base, stand_ins
        vectors_ND = base.item_vectors()
        self._num_compared = base.item_embeddings().shape[1]
        self.new_vectors = stand_ins.vectors(vectors_ND, self._num_compared)
        """float32 [M, D]"""
        self._vectors = np.concatenate([vectors_ND, self.new_vectors])

    @property
    def reads_clock(self) -> bool:
        return self._base.reads_clock

    def encode_users(self, histories: Histories, now_ms: Int64Array | None = None) -> FloatArray:
        return self._base.encode_users(_known(histories, self._stand_ins), now_ms)

    def item_vectors(self) -> FloatArray:
        return self._vectors

    def item_embeddings(self) -> FloatArray:
        return self._vectors[:, : self._num_compared]

    def bonus(self, histories: Histories, users_BKD: FloatArray, now_ms: Int64Array | None = None) -> ItemBonus | None:
        """Of what was really in the history: a stand-in was not."""
        return self._base.bonus(_without_new(histories, self._stand_ins.num_known), users_BKD, now_ms)


class StandInRanker(Ranker):
    """A ranker that sees each new item as its nearest stand-in, with the retrieval score of its own."""

    def __init__(self, base: Ranker, stand_ins: StandIns) -> None:
        self.config = base.config
        self.items, self.max_history, self.uses_time = base.items, base.max_history, base.uses_time
        self._base, self._stand_ins = base, stand_ins

    def rank(self, queries: list[RankingQuery]) -> list[FloatArray]:
        known = self._stand_ins.of
        return self._base.rank(
            [
                replace(
                    query,
                    history=replace(query.history, item_idx=known(query.history.item_idx)),
                    candidate_item_idx=known(query.candidate_item_idx),
                )
                for query in queries
            ]
        )

    def score(self, batch: RankingBatch) -> FloatArray:
        """See :meth:`Ranker.score`; features are those of the items named."""
        known = self._stand_ins.of
        return self._base.score(
            replace(
                batch,
                candidate_item_idx=known(batch.candidate_item_idx),
                history_item_idx=known(batch.history_item_idx),
            )
        )

    def with_items(self, catalogue: RankingCatalogue) -> Ranker:
        """See :meth:`Ranker.with_items`: of a catalogue that has the new items, no stand-ins are needed."""
        return self._base.with_items(catalogue)

    def save(self, folder: Any) -> None:
        """Refused."""
        raise ModelError("stand-ins are for serving: fit the ranker on the new items to save it")


def _known(histories: Histories, stand_ins: StandIns) -> Histories:
    return replace(histories, item_idx=stand_ins.of(histories.item_idx))


def _without_new(histories: Histories, num_known: int) -> Histories:
    packed = histories.pack()
    keep = packed.item_idx < num_known
    if keep.all():
        return histories
    kept = np.concatenate([np.zeros(1, np.int64), np.cumsum(keep, dtype=np.int64)])
    counts = kept[packed.offsets]
    times = None if packed.timestamp_ms is None else packed.timestamp_ms[keep]
    return Histories(packed.item_idx[keep], counts[:-1], counts[1:], times)
