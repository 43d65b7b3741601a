"""Metrics against hand-computed values and against their definitions written out."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from recsys.errors import DataError
from recsys.evaluation import metrics


def ragged(*relevant: list[int]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.cumsum([0, *map(len, relevant)]).astype(np.int64)
    return np.array([i for items in relevant for i in items], np.int32), offsets


def test_accuracy_by_hand() -> None:
    ranked = np.array([[3, 1, 2], [0, 4, -1], [5, 6, 7]], np.int32)
    found = metrics.accuracy(ranked, *ragged([1, 2], [0], [9]), ks=(1, 3), num_items=10)
    np.testing.assert_allclose(found["recall@1"], [0, 1, 0])
    np.testing.assert_allclose(found["recall@3"], [1, 1, 0])
    np.testing.assert_allclose(found["hr@1"], [0, 1, 0])
    np.testing.assert_allclose(found["mrr@3"], [1 / 2, 1, 0])
    np.testing.assert_allclose(found["mrr@1"], [0, 1, 0])
    ideal = 1 + 1 / np.log2(3)
    np.testing.assert_allclose(found["ndcg@3"], [(1 / np.log2(3) + 1 / 2) / ideal, 1, 0])


def test_ndcg_of_a_perfect_slate_is_one_where_more_is_relevant_than_fits() -> None:
    found = metrics.accuracy(np.array([[0, 1]], np.int32), *ragged([0, 1, 2, 3]), ks=(2,), num_items=4)
    assert found["ndcg@2"][0] == 1.0
    assert found["recall@2"][0] == 0.5


def test_padding_never_hits() -> None:
    # -1 in row 1 must not be taken for the last item of row 0.
    ranked = np.array([[0, 1], [0, -1]], np.int32)
    found = metrics.accuracy(ranked, *ragged([9], [9]), ks=(2,), num_items=10)
    assert found["hr@2"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("ranked", "relevant", "message"),
    [
        (np.zeros((1, 2), np.int32), ([],), "no relevant item"),
        (np.zeros((1, 1), np.int32), ([1],), "depth 1"),
        (np.zeros((2, 2), np.int32), ([1],), "2 rankings for 1"),
    ],
)
def test_unusable_input_is_refused(ranked: np.ndarray, relevant: tuple[list[int], ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        metrics.accuracy(ranked, *ragged(*relevant), ks=(2,), num_items=3)


def test_coverage_and_novelty() -> None:
    ranked = np.array([[0, 1], [1, -1]], np.int32)
    counts = np.array([6, 2, 0, 0], np.int64)
    assert metrics.coverage(ranked, 4) == 0.5
    information = -np.log2(np.array([7, 3, 1, 1]) / 12)
    assert metrics.novelty(ranked, counts) == pytest.approx((information[0] + 2 * information[1]) / 3)
    assert np.isnan(metrics.novelty(np.full((1, 2), -1, np.int32), counts))


def test_popularity_lift() -> None:
    counts = np.array([10, 2, 0], np.int64)
    profile = ragged([1], [1, 2], [])
    slates = np.array([[0, 1], [1, -1], [0, 0]], np.int32)
    # GAP of slates: (6 + 2) / 2; of profiles: (2 + 1) / 2; the user without a profile is left out of both
    assert metrics.popularity_lift(slates, *profile, counts) == pytest.approx((4 - 1.5) / 1.5)
    assert np.isnan(metrics.popularity_lift(slates[:1], *ragged([]), counts))


def test_category_diversity_against_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_CHUNK_CELLS", 500)  # several chunks
    rng = np.random.default_rng(3)
    names = list("abcdef")
    categories = [list(rng.choice(names, rng.integers(0, 4))) for _ in range(30)]  # repeats and empty lists included
    ranked = rng.integers(-1, 30, (40, 5)).astype(np.int32)
    means = []
    for row in ranked:
        sets = [set(categories[i]) for i in row if i >= 0 and categories[i]]
        pairs = [1 - len(a & b) / len(a | b) for n, a in enumerate(sets) for b in sets[n + 1 :]]
        means += [np.mean(pairs)] if pairs else []
    table = metrics.CategoryTable(pa.chunked_array([categories[:10], categories[10:]], pa.list_(pa.string())))
    assert metrics.category_diversity(ranked, table) == pytest.approx(np.mean(means))


def test_category_diversity_without_categories_is_undefined() -> None:
    table = metrics.CategoryTable(pa.chunked_array([[[], []]], pa.list_(pa.string())))
    assert np.isnan(metrics.category_diversity(np.array([[0, 1]], np.int32), table))
