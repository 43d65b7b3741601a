"""What every ranker must do, whatever its family and precision.

::

    class TestMyRanker(PlantedContract):
        config = MyRankerConfig(...)      # small enough to learn from 90 queries in seconds
"""

from __future__ import annotations

import operator
from abc import abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest

from recsys import schema
from recsys.config import parse
from recsys.data.features import ITEM_COLUMNS, ItemFeatures
from recsys.errors import ConfigError, ModelError
from recsys.models.rankers import AnyRanker, load_ranker
from recsys.models.rankers.base import SAMPLE_WORDS, Ranker, RankerConfig
from recsys.models.rankers.examples import RankingExamples
from recsys.models.rankers.queries import RankingCatalogue, RankingItems, RankingQuery, ranking_batch
from recsys.testing.samples import sample_of
from recsys.training.runtime import Runtime
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


def planted() -> tuple[RankingExamples, RankingExamples, RankingCatalogue]:
    """The user always takes the one candidate whose title has the word of the newest history item."""
    rng = np.random.default_rng(1)
    colour = np.arange(50) % 5
    features = ItemFeatures(
        np.zeros((50, len(ITEM_COLUMNS)), np.float32),
        np.zeros((50, 1), np.float32),
        np.zeros(50, np.int32),
        np.zeros(50, np.int64),
    )
    items = RankingItems.of(features, rng.normal(size=(50, 8)).astype(np.float32))
    queries: list[RankingQuery] = []
    relevant = np.zeros((120, 4), bool)
    for row in range(120):
        query = ranking_query(row, 50, length=2, num_candidates=4)
        same = colour == colour[query.history.item_idx[-1]]
        candidates = np.concatenate([rng.choice(np.flatnonzero(same), 1), rng.choice(np.flatnonzero(~same), 3, False)])
        candidates = rng.permutation(candidates).astype(np.int32)
        relevant[row] = same[candidates]
        queries.append(replace(query, candidate_item_idx=candidates))
    batch = ranking_batch(queries, items, 2)
    users = np.arange(120, dtype=np.int32)
    examples = RankingExamples(batch, relevant, users, 0, np.ones(120, np.int64), uses_time=True)
    table = schema.ITEMS.empty_table()
    columns = {name: pa.nulls(50, table.schema.field(name).type) for name in table.column_names}
    columns["title"] = pa.array([f"{SAMPLE_WORDS[item % 5]} thing" for item in range(50)])
    catalogue = RankingCatalogue(items, np.eye(5, dtype=np.float32)[colour], pa.table(columns))
    return *examples.split_by_user(0.25, 0), catalogue


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
        part = replace(
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
        query = replace(ranking_query(7, self.num_items), now_ms=None)
        assert np.isfinite(ranker.rank([query])[0]).all()

    def test_saving_keeps_the_scores(self, ranker: Ranker, tmp_path: Path) -> None:
        ranker.save(tmp_path / "ranker")
        loaded = load_ranker(tmp_path / "ranker")
        assert loaded.config == ranker.config
        assert loaded.uses_time == ranker.uses_time
        query = ranking_query(8, self.num_items)
        np.testing.assert_allclose(loaded.rank([query])[0], ranker.rank([query])[0], atol=_TOLERANCE)


class PlantedContract(RankerContract):
    """Besides: it learns. Set ``config``, or take a kind's sample. Chance orders four candidates with NDCG@10 0.64."""

    config: ClassVar[RankerConfig]

    @classmethod
    def take_sample(cls, kind: type[RankerConfig], folder: Path) -> None:
        """From now on the sample of ``kind`` is tested."""
        cls.config = sample_of(kind, folder)
        cls._fitted.pop(cls, None)

    def fit(self) -> Ranker:
        """Fitted on the planted queries."""
        train, holdout, catalogue = planted()
        return self.config.fit(train, catalogue, Runtime("cpu"), holdout=holdout, seed=0)

    def test_it_is_listed(self) -> None:
        tree = self.config.model_dump(mode="json")
        assert parse(AnyRanker, tree, where="test") == self.config
        with pytest.raises(ConfigError, match="no_such_key"):
            parse(AnyRanker, {**tree, "no_such_key": 1}, where="test")

    def test_it_finds_what_is_planted(self, ranker: Ranker) -> None:
        _, holdout, _ = planted()
        assert holdout.ndcg10(ranker.score(holdout.batch)).mean() > 0.85
        assert ranker.num_epochs > 0

    def test_it_learns_alike_in_mixed_precision(self) -> None:
        train, _, catalogue = planted()
        short = self.config.model_copy(update={"epochs": 3})
        whole, mixed = (
            [row["loss"] for row in short.fit(train, catalogue, runtime, holdout=None, seed=0).history]
            for runtime in (Runtime("cpu"), Runtime("cpu", precision="bf16"))
        )
        assert whole != mixed
        np.testing.assert_allclose(mixed, whole, rtol=0.05)
