"""The ranking stage: scores each candidate against the user's history."""

from __future__ import annotations

from collections.abc import Sequence

from recsys.models.rankers.base import Ranker
from recsys.models.rankers.queries import RankingQuery
from recsys.pipeline.stage import RANKING
from recsys.types import Candidates, Query


class RankingStage:
    """Rescores what retrieval found. It neither adds nor removes candidates."""

    name = RANKING

    def __init__(self, bundle_id: str, ranker: Ranker) -> None:
        self.bundle_id = bundle_id
        self._ranker = ranker

    def run_batch(self, queries: Sequence[Query], candidates: Sequence[Candidates]) -> list[Candidates]:
        """The same candidates, ordered by the ranker's score."""
        timed = self._ranker.uses_time
        scores = self._ranker.rank(
            [
                RankingQuery(
                    history=query.history,
                    candidate_item_idx=one.item_idx,
                    retrieval_score=one.score,
                    now_ms=query.now_ms if timed else None,
                )
                for query, one in zip(queries, candidates, strict=True)
            ]
        )
        return [one.scored(self.name, score) for one, score in zip(candidates, scores, strict=True)]
