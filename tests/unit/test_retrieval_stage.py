from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from recsys.data.catalogue import Catalogue
from recsys.data.histories import Histories
from recsys.errors import BundleMismatchError
from recsys.index.flat import FlatIndex
from recsys.models.base import ItemBonus, Retriever, RetrieverConfig, VectorRetriever
from recsys.models.retrievers.blend import Blend, BlendRetriever
from recsys.pipeline.stages import retrieval
from recsys.pipeline.stages.retrieval import RetrievalStage
from recsys.testing.pipeline import items_table, make_query
from recsys.types import Candidates, Filters, Query

NUM_ITEMS, DIM = 300, 8


class FakeConfig(RetrieverConfig):
    kind: Literal["fake"] = "fake"

    def fit(self, data: Any, runtime: Any) -> Retriever:
        raise AssertionError

    def load(self, folder: Path) -> Retriever:
        raise AssertionError


class MeanRetriever(VectorRetriever):
    """K vectors: means of the history, each under another rotation of the dimensions."""

    config = FakeConfig()

    def __init__(self, vectors: np.ndarray, num_vectors: int = 1) -> None:
        self.vectors = vectors
        self.num_items = len(vectors)
        self.k = num_vectors

    def encode_users(self, histories: Histories, now_ms: Any = None) -> np.ndarray:
        users = np.zeros((len(histories), self.k, self.vectors.shape[1]), np.float32)
        for row in range(len(histories)):
            mean = self.vectors[histories.items(row)].sum(axis=0) + 0.01
            for k in range(self.k):
                users[row, k] = np.roll(mean, k)
        return users

    def item_vectors(self) -> np.ndarray:
        return self.vectors

    def save_weights(self, folder: Path) -> None:
        raise AssertionError


class FondRetriever(MeanRetriever):
    """Of the items of the history some are worth more than they look, and some less."""

    def bonus(self, histories: Histories, users_BKD: np.ndarray, now_ms: Any = None) -> ItemBonus:
        items = [np.unique(histories.items(row)) for row in range(len(histories))]
        known = np.concatenate(items).astype(np.int32)
        bonus = np.where(known % 4 == 0, -9.0, 9.0).astype(np.float32)
        return ItemBonus(known, np.cumsum([0, *map(len, items)]), bonus)


class ScoringRetriever(Retriever):
    """The same scores without vectors to search."""

    config = FakeConfig()

    def __init__(self, inner: MeanRetriever) -> None:
        self.inner = inner
        self.num_items = inner.num_items

    def score(self, histories: Histories, now_ms: Any = None) -> np.ndarray:
        return self.inner.score(histories, now_ms)

    def save_weights(self, folder: Path) -> None:
        raise AssertionError


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    rng = np.random.default_rng(1)
    return Catalogue.build(
        items_table(
            NUM_ITEMS,
            categories=[["a"] if row % 50 == 0 else ["b", "c"][: 1 + row % 2] for row in range(NUM_ITEMS)],
            prices=rng.random(NUM_ITEMS).tolist(),
            available=[row % 7 != 0 for row in range(NUM_ITEMS)],
        )
    )


KINDS = ["one vector", "many vectors", "bonus", "bonus and many vectors", "scores"]


def make_stage(catalogue: Catalogue, kind: str) -> tuple[RetrievalStage, MeanRetriever]:
    vectors = np.random.default_rng(0).standard_normal((NUM_ITEMS, DIM)).astype(np.float32)
    model = (FondRetriever if "bonus" in kind else MeanRetriever)(vectors, num_vectors=3 if "many" in kind else 1)
    if kind == "scores":
        return RetrievalStage("bundle", ScoringRetriever(model), None, catalogue), model
    return RetrievalStage("bundle", model, FlatIndex().build(vectors), catalogue), model


QUERIES = [
    make_query(history=[3, 4], excluded=[3, 4], num_candidates=20),
    make_query(history=[3, 4], excluded=[3, 4], num_candidates=20, filters=Filters(categories_any=("a",))),
    make_query(),
    make_query(history=[9], excluded=range(1, 280), num_candidates=30),
    make_query(history=[3, 4, 8, 11, 52, 97], num_candidates=20, filters=Filters(categories_any=("b",))),
    make_query(history=range(250), excluded=range(40), num_candidates=30),
    make_query(history=[1, 5, 8], excluded=[5], num_candidates=1, filters=Filters(price_max=0.3)),
    make_query(history=[1], num_candidates=NUM_ITEMS * 3),
    make_query(history=[1], filters=Filters(categories_any=("nothing",))),
]


def expected_of(catalogue: Catalogue, model: MeanRetriever, query: Query) -> list[int]:
    scores = model.score(Histories.single(query.history.item_idx))[0]
    allowed = catalogue.allowed(query.filters, query.excluded_item_idx)
    order = [row for row in np.argsort(-scores, kind="stable").tolist() if allowed[row]]
    return order[: query.num_candidates]


def run(stage: RetrievalStage, queries: list[Query]) -> list[Candidates]:
    return stage.run_batch(queries, [Candidates.empty() for _ in queries])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_overfetch", [0, 5, 1024])
def test_exactly_the_best_allowed_items(
    catalogue: Catalogue, kind: str, max_overfetch: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(retrieval, "_MAX_OVERFETCH", max_overfetch)
    stage, model = make_stage(catalogue, kind)
    for query, found in zip(QUERIES, run(stage, QUERIES), strict=True):
        assert found.item_idx.tolist() == expected_of(catalogue, model, query)
        assert (np.diff(found.score) <= 0).all()
        assert found.sources == ("fake",)
        np.testing.assert_array_equal(found.stage_scores["retrieval"], found.score)


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_does_not_depend_on_the_batch(catalogue: Catalogue, kind: str):
    stage, _ = make_stage(catalogue, kind)
    alone = [run(stage, [query])[0] for query in QUERIES]
    for order in (range(len(QUERIES)), range(len(QUERIES) - 1, -1, -1)):
        together = run(stage, [QUERIES[row] for row in order] * 2)
        for row, found in zip([*order, *order], together, strict=True):
            assert found.item_idx.tolist() == alone[row].item_idx.tolist()
            np.testing.assert_allclose(found.score, alone[row].score, rtol=1e-5)


def test_an_empty_batch(catalogue: Catalogue):
    assert run(make_stage(catalogue, "one vector")[0], []) == []


def test_parts_that_count_differently_are_refused(catalogue: Catalogue):
    model = MeanRetriever(np.ones((NUM_ITEMS - 1, DIM), np.float32))
    with pytest.raises(BundleMismatchError, match="count different items"):
        RetrievalStage("bundle", model, FlatIndex().build(model.vectors), catalogue)


class Fixed(Retriever):
    """Always the same order: ``first`` and then the rest."""

    def __init__(self, first: list[int], num_items: int) -> None:
        self.config = FakeConfig()
        self.num_items = num_items
        self._scores = np.zeros(num_items, np.float32)
        self._scores[first] = np.arange(len(first), 0, -1)

    def score(self, histories: Histories, now_ms: Any = None) -> np.ndarray:
        return np.tile(self._scores, (len(histories), 1))

    def save_weights(self, folder: Path) -> None:
        raise NotImplementedError


def test_sources_fill_their_shares_and_candidates_say_where_they_are_from(catalogue) -> None:
    num_items = len(catalogue)
    sources = {"a": {"retriever": FakeConfig(), "share": 3}, "b": {"retriever": FakeConfig(), "share": 1}}
    blend = Blend.parse({"sources": sources}, where="test")
    parts = {"a": Fixed([1, 2, 3, 4, 5, 6, 7], num_items), "b": Fixed([10, 2, 11, 12, 13], num_items)}
    stage = RetrievalStage("b1", BlendRetriever(blend, parts), None, catalogue)
    (found,) = stage.run_batch([make_query(num_candidates=4)], [Candidates.empty()])
    # Three of a and one of b are owed; 2 is proposed by both and so fused to the top.
    assert found.item_idx.tolist()[0] == 2
    assert set(found.item_idx.tolist()) == {1, 2, 3, 10}
    assert {int(item): found.sources_of(row) for row, item in enumerate(found.item_idx)} == {
        1: ["a"], 2: ["a", "b"], 3: ["a"], 10: ["b"],
    }  # fmt: skip
    assert (np.diff(found.score) <= 0).all()
    (whole,) = stage.run_batch([make_query(num_candidates=num_items)], [Candidates.empty()])
    assert sorted(whole.item_idx) == np.flatnonzero(catalogue.matching(Filters()).allowed).tolist()
    assert all(whole.sources_of(row) == ["a", "b"] for row in range(len(whole)))
    assert whole.item_idx[0] == 2
