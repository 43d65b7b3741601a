"""What a ranker learns from: the retriever's own candidates, with the ones the user chose marked.

Shape legend: B queries, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from recsys.data.dataset import Targets
from recsys.models.rankers.queries import PADDING, RankingBatch, RankingItems, RankingQuery, ranking_batch
from recsys.ndcg import ndcg
from recsys.types import BoolArray, Candidates, Float64Array, FloatArray, Int32Array, Int64Array


@dataclass(frozen=True)
class RankingExamples:
    """Queries with known answers, from the retriever's own candidates."""

    batch: RankingBatch
    relevant: BoolArray
    """bool [B, C]: which candidates the user chose; at least one per query"""
    user_idx: Int32Array
    """int32 [B]"""
    num_missed: int
    """queries left out because retrieval did not bring the target"""
    num_relevant: Int64Array
    """int64 [B]: relevant items of the query, retrieved or not (the ideal of NDCG)"""
    uses_time: bool

    def __len__(self) -> int:
        return len(self.batch)

    def __getitem__(self, rows: Int64Array) -> RankingExamples:
        return RankingExamples(
            self.batch[rows], self.relevant[rows], self.user_idx[rows], 0, self.num_relevant[rows], self.uses_time
        )

    def concat(self, other: RankingExamples) -> RankingExamples:
        """These queries, then those of ``other``; the shorter candidate lists are padded."""
        width = max(self.relevant.shape[1], other.relevant.shape[1])
        a, b = self._widened(width), other._widened(width)
        parts = zip(vars(a.batch).values(), vars(b.batch).values(), strict=True)
        return RankingExamples(
            RankingBatch(*(np.concatenate(pair) for pair in parts)),
            np.concatenate([a.relevant, b.relevant]),
            np.concatenate([a.user_idx, b.user_idx]),
            a.num_missed + b.num_missed,
            np.concatenate([a.num_relevant, b.num_relevant]),
            a.uses_time,
        )

    def _widened(self, width: int) -> RankingExamples:
        extra = ((0, 0), (0, width - self.relevant.shape[1]))
        batch = replace(
            self.batch,
            candidate_item_idx=np.pad(self.batch.candidate_item_idx, extra, constant_values=PADDING),
            features=np.pad(self.batch.features, (*extra, (0, 0))),
        )
        return replace(self, batch=batch, relevant=np.pad(self.relevant, extra))

    def ndcg10(self, scores: FloatArray) -> Float64Array:
        """float64 [B]: NDCG@10 of the order by ``scores`` (ties by place in the retriever's order)."""
        scores = np.where(self.batch.candidate_item_idx == PADDING, -np.inf, scores)
        top = np.argsort(-scores, axis=1, kind="stable")[:, :10]
        return ndcg(np.take_along_axis(self.relevant, top, axis=1), self.num_relevant, 10)

    def split_by_user(self, holdout_share: float, seed: int) -> tuple[RankingExamples, RankingExamples]:
        """Training and holdout examples with no user in both."""
        users = np.unique(self.user_idx)
        held = np.random.default_rng(seed).permutation(users)[: max(1, round(len(users) * holdout_share))]
        mask = np.isin(self.user_idx, held)
        return self[np.flatnonzero(~mask)], self[np.flatnonzero(mask)]

    def sample(
        self, rows: Int64Array, num_negatives: int, generator: np.random.Generator
    ) -> tuple[RankingBatch, BoolArray]:
        """The relevant candidates and ``num_negatives`` others of each query, drawn without replacement."""
        batch, relevant = self.batch[rows], self.relevant[rows]
        keys = generator.random(relevant.shape)
        keys[relevant] = -1.0
        keys[batch.candidate_item_idx == PADDING] = 2.0
        width = min(relevant.shape[1], int(relevant.sum(axis=1).max()) + num_negatives)
        chosen = np.argpartition(keys, width - 1, axis=1)[:, :width]
        sampled = RankingBatch(
            np.take_along_axis(batch.candidate_item_idx, chosen, axis=1),
            batch.history_item_idx,
            batch.history_age_ms,
            np.take_along_axis(batch.features, chosen[..., None], axis=1),
        )
        return sampled, np.take_along_axis(relevant, chosen, axis=1)


def ranking_examples(
    targets: Targets,
    candidates: Sequence[Candidates],
    items: RankingItems,
    max_history: int,
) -> RankingExamples:
    """Mark the relevant among the candidates of each query; queries whose targets were not retrieved are left out.

    The targets must lie after everything the retriever and ``items`` were made from, else scores of the past leak in.
    """
    width = max((len(one) for one in candidates), default=0)
    relevant = np.zeros((len(targets), width), bool)
    queries: list[RankingQuery] = []
    for row, one in enumerate(candidates):
        relevant[row, : len(one)] = np.isin(one.item_idx, targets.relevant(row))
        queries.append(
            RankingQuery(
                history=targets.histories.history(row),
                candidate_item_idx=one.item_idx,
                retrieval_score=one.score,
                now_ms=None if targets.now_ms is None else int(targets.now_ms[row]),
            )
        )
    hit = np.flatnonzero(relevant.any(axis=1))
    return RankingExamples(
        ranking_batch([queries[row] for row in hit], items, max_history),
        relevant[hit],
        targets.user_idx[hit],
        len(targets) - len(hit),
        np.diff(targets.relevant_offsets)[hit],
        targets.now_ms is not None,
    )
