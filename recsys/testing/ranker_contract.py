"""What every ranker must do, whatever its family and precision.

::

    class TestMyRanker(RankerContract):
        def fit(self):
            return ...      # a fitted ranker over at least 50 items
"""

from __future__ import annotations

import dataclasses
import operator
from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from recsys.errors import ModelError
from recsys.models import load_ranker
from recsys.models.rankers.base import Ranker, RankingQuery
from recsys.types import History

_TOLERANCE = 1e-4


def ranking_query(seed: int, num_items: int, *, length: int = 6, num_candidates: int = 40) -> RankingQuery:
    """A random query about items 0 to ``num_items`` - 1."""
    rng = np.random.default_rng(seed)
    return RankingQuery(
        history=History(
            rng.integers(0, num_items, length).astype(np.int32), np.sort(rng.integers(10**12, 2 * 10**12, length))
        ),
        candidate_item_idx=rng.choice(num_items, num_candidates, replace=False).astype(np.int32),
        retrieval_score=-np.sort(-rng.normal(size=num_candidates)).astype(np.float32),
        now_ms=2 * 10**12,
    )


class RankerContract:
    """Inherit it under a name that begins with ``Test`` and say how a ranker is made."""

    num_items: ClassVar[int] = 50
    _fitted: ClassVar[dict[type, Ranker]] = {}

    @abstractmethod
    def fit(self) -> Ranker:
        """A fitted ranker."""

    @pytest.fixture
    def ranker(self) -> Ranker:
        """Fitted once per class."""
        if type(self) not in self._fitted:
            type(self)._fitted[type(self)] = self.fit()
        return self._fitted[type(self)]

    def test_a_score_depends_on_its_own_candidate_only(self, ranker: Ranker) -> None:
        query, other = ranking_query(1, self.num_items), ranking_query(2, self.num_items, length=2, num_candidates=9)
        rows = np.random.default_rng(3).permutation(40)[:7]
        part = dataclasses.replace(
            query, candidate_item_idx=query.candidate_item_idx[rows], retrieval_score=query.retrieval_score[rows]
        )
        whole = ranker.rank([query])[0]
        np.testing.assert_allclose(ranker.rank([part])[0], whole[rows], atol=_TOLERANCE)
        np.testing.assert_allclose(ranker.rank([other, query])[1], whole, atol=_TOLERANCE)

    def test_same_seed_same_ranker(self, ranker: Ranker) -> None:
        query = ranking_query(9, self.num_items)
        np.testing.assert_array_equal(self.fit().rank([query])[0], ranker.rank([query])[0])

    @pytest.mark.parametrize("field", ["candidate_item_idx", "history.item_idx"])
    @pytest.mark.parametrize("item_idx", [-1, 50])
    def test_an_item_outside_the_catalogue_is_refused(self, ranker: Ranker, field: str, item_idx: int) -> None:
        query = ranking_query(10, self.num_items)
        operator.attrgetter(field)(query)[-1] = item_idx
        with pytest.raises(ModelError, match=r"item_idx outside 0\.\.49"):
            ranker.rank([query])

    def test_a_score_that_is_no_number_is_refused(self, ranker: Ranker) -> None:
        query = ranking_query(11, self.num_items)
        query.retrieval_score[3] = np.nan
        with pytest.raises(ModelError, match=f"item_idx {query.candidate_item_idx[3]} is not finite"):
            ranker.rank([query])

    def test_nobody_and_nothing_are_answered(self, ranker: Ranker) -> None:
        stranger = ranking_query(4, self.num_items, length=0)
        nothing = ranking_query(5, self.num_items, num_candidates=0)
        scores = ranker.rank([stranger, nothing])
        assert [len(one) for one in scores] == [40, 0]
        assert np.isfinite(scores[0]).all()
        assert ranker.rank([]) == []

    def test_more_candidates_than_ever_before(self, ranker: Ranker) -> None:
        query = ranking_query(6, self.num_items, length=500, num_candidates=self.num_items)
        assert np.isfinite(ranker.rank([query])[0]).all()

    def test_times_may_be_absent(self, ranker: Ranker) -> None:
        query = dataclasses.replace(ranking_query(7, self.num_items), now_ms=None)
        assert np.isfinite(ranker.rank([query])[0]).all()

    def test_saving_keeps_the_scores(self, ranker: Ranker, tmp_path: Path) -> None:
        ranker.save(tmp_path / "ranker")
        loaded = load_ranker(tmp_path / "ranker")
        assert loaded.config == ranker.config
        assert loaded.uses_time == ranker.uses_time
        query = ranking_query(8, self.num_items)
        np.testing.assert_allclose(loaded.rank([query])[0], ranker.rank([query])[0], atol=_TOLERANCE)
