"""A golden query accepts what rounding may change, and nothing else."""

from __future__ import annotations

import pytest

from recsys.bundle import GoldenQuery
from recsys.errors import BundleMismatchError, ConfigError
from recsys.files import read_json, write_json
from recsys.types import Filters, HistoryItem

GOLDEN = GoldenQuery(
    history=(HistoryItem(item_id="x", event="view", timestamp_ms=3, value=1.5),),
    now_ms=10,
    top_k=4,
    filters=Filters(categories_any=("Drama",), price_max=3.0),
    item_ids=("a", "b", "c", "d"),
    scores=(0.9, 0.5, 0.4995, 0.1),
    tolerance=1e-3,
)


@pytest.mark.parametrize(
    ("item_ids", "scores"),
    [
        ("abcd", (0.9, 0.5, 0.4995, 0.1)),
        ("abcd", (0.9005, 0.4995, 0.499, 0.0995)),
        ("acbd", (0.9, 0.5, 0.4996, 0.1)),  # b and c are tied within the tolerance
        ("abce", (0.9, 0.5, 0.4995, 0.1004)),  # e was just below d
    ],
)
def test_accepted(item_ids: str, scores: tuple[float, ...]) -> None:
    assert GOLDEN.compare(list(item_ids), scores) == []
    GOLDEN.check(list(item_ids), scores)


@pytest.mark.parametrize(
    ("item_ids", "scores", "problem"),
    [
        ("abcd", (0.9, 0.51, 0.4995, 0.1), "rank 1: score 0.51"),
        ("bacd", (0.9, 0.5, 0.4995, 0.1), "'b' scored 0.9, expected 0.5"),
        ("ebcd", (0.9, 0.5, 0.4995, 0.1), "'e' is not expected"),
        ("abc", (0.9, 0.5, 0.4995), "3 items"),
        ("abcc", (0.9, 0.5, 0.4995, 0.4995), "twice"),
        ("abcd", (0.9, 0.5, 0.4995, float("nan")), "rank 3: score nan"),
        ("abcd", (0.9, 0.5, 0.4995), "3 scores"),
    ],
)
def test_refused(item_ids: str, scores: tuple[float, ...], problem: str) -> None:
    with pytest.raises(BundleMismatchError, match=problem):
        GOLDEN.check(list(item_ids), scores)


def test_survives_json(tmp_path: object) -> None:
    path = f"{tmp_path}/golden.json"
    write_json(path, GOLDEN.model_dump(mode="json"))
    assert GoldenQuery.parse(read_json(path), where=path) == GOLDEN


@pytest.mark.parametrize("change", [{"scores": [0.9]}, {"item_ids": [], "scores": []}, {"top_k": 2}, {"tolerance": -1}])
def test_nonsense_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        GoldenQuery.parse({**GOLDEN.model_dump(mode="json"), **change}, where="golden.json")
