"""The ranker: each candidate by itself, nothing from the future, and an export that ranks as the network does."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys import schema
from recsys.data.dataset import Dataset, DatasetInfo, Split
from recsys.data.features import FEATURE_NAMES, NO_TIME, ItemFeatures, candidate_features
from recsys.libraries import installed
from recsys.models.rankers import load_ranker
from recsys.models.rankers.attention import AttentionRankerConfig
from recsys.models.rankers.examples import RankingExamples, ranking_examples
from recsys.models.rankers.export import (
    ExportConfig,
    ExportedRanker,
    ItemRows,
    choose_export,
    export_ranker,
)
from recsys.models.rankers.queries import (
    PADDING,
    RankingCatalogue,
    RankingItems,
    RankingQuery,
    item_content,
    ranking_batch,
)
from recsys.pipeline.stages.ranking import RankingStage
from recsys.testing.planted import random_numeric
from recsys.training.runtime import Runtime
from recsys.types import NO_HISTORY, Candidates, History, Query

NUM_ITEMS, DIM, HOUR_MS, DAY_MS = 300, 16, 3_600_000, 86_400_000
SMALL = AttentionRankerConfig(
    dim=16, num_heads=2, hidden=32, max_history=8, epochs=30, patience=30, dropout=0.0,
    num_negatives=20, batch_queries=16, learning_rate=1e-2,
)  # fmt: skip


@pytest.fixture(scope="module")
def items() -> RankingItems:
    generator = np.random.default_rng(0)
    categories = np.eye(5, dtype=np.float32)[generator.integers(0, 5, NUM_ITEMS)]
    features = ItemFeatures(
        random_numeric(generator, NUM_ITEMS),
        categories,
        generator.integers(-1, 20, NUM_ITEMS).astype(np.int32),
        generator.integers(0, 10**12, NUM_ITEMS),
    )
    return RankingItems.of(features, generator.normal(size=(NUM_ITEMS, DIM)).astype(np.float32))


def catalogue(items: RankingItems) -> RankingCatalogue:
    return RankingCatalogue(items, item_content(None, items.features), pa.table({}))


def random_query(generator: np.random.Generator, length: int = 6, num_candidates: int = 40) -> RankingQuery:
    times = np.sort(generator.integers(10**12, 10**12 + 30 * DAY_MS, length))
    return RankingQuery(
        History(generator.integers(0, NUM_ITEMS, length).astype(np.int32), times),
        generator.choice(NUM_ITEMS, num_candidates, replace=False).astype(np.int32),
        -np.sort(-generator.normal(size=num_candidates)).astype(np.float32),
        10**12 + 31 * DAY_MS,
    )


@pytest.fixture(scope="module")
def examples(items: RankingItems) -> RankingExamples:
    """The user always takes a candidate of the category of the newest history item: planted, and learnable."""
    generator = np.random.default_rng(1)
    queries = [random_query(generator) for _ in range(300)]
    categories = items.features.categories.argmax(axis=1)
    relevant = np.zeros((len(queries), 40), bool)
    for row, query in enumerate(queries):
        same = np.flatnonzero(categories[query.candidate_item_idx] == categories[query.history.item_idx[-1]])
        relevant[row, generator.choice(same) if len(same) else 0] = True
    batch = ranking_batch(queries, items, SMALL.max_history)
    return RankingExamples(
        batch, relevant, np.arange(300, dtype=np.int32) // 3, 0, np.ones(300, np.int64), uses_time=True
    )


@pytest.fixture(scope="module")
def fitted(items: RankingItems, examples: RankingExamples):
    train, holdout = examples.split_by_user(0.3, seed=0)
    return SMALL.fit(train, catalogue(items), Runtime("cpu"), holdout=holdout, seed=0), train, holdout


def test_it_learns_what_was_planted(fitted) -> None:
    ranker, _, holdout = fitted
    before = holdout.ndcg10(holdout.batch.features[..., 0]).mean()
    after = holdout.ndcg10(ranker.score(holdout.batch)).mean()
    assert after > before + 0.1
    assert ranker.num_epochs > 0


def test_a_fresh_ranker_keeps_the_retrievers_order(items: RankingItems, examples: RankingExamples) -> None:
    untrained = SMALL.model_copy(update={"epochs": 0})
    ranker = untrained.fit(examples, catalogue(items), Runtime("cpu"), holdout=None, seed=0)
    np.testing.assert_allclose(ranker.score(examples.batch), examples.batch.features[..., 0], atol=1e-5)


def forms(fitted) -> list:
    ranker, train, _ = fitted
    return [ranker, *(export_ranker(ranker, ExportConfig(precisions=("f32", "int8")), train.batch))]


def test_a_score_depends_on_its_own_candidate_only(fitted) -> None:
    generator = np.random.default_rng(2)
    query, other = random_query(generator), random_query(generator, length=3, num_candidates=25)
    rows = generator.permutation(40)[:7]
    part = dataclasses.replace(
        query, candidate_item_idx=query.candidate_item_idx[rows], retrieval_score=query.retrieval_score[rows]
    )
    for form in forms(fitted):
        whole = form.rank([query])[0]
        np.testing.assert_allclose(form.rank([part])[0], whole[rows], atol=1e-5)
        np.testing.assert_allclose(form.rank([other, query])[1], whole, atol=1e-5)


def test_an_empty_history_and_no_candidates_are_ordinary(fitted) -> None:
    empty = RankingQuery(NO_HISTORY, np.arange(5, dtype=np.int32), np.zeros(5, np.float32), 10**12)
    nothing = dataclasses.replace(
        empty, candidate_item_idx=np.zeros(0, np.int32), retrieval_score=np.zeros(0, np.float32)
    )
    for form in forms(fitted):
        scores = form.rank([empty, nothing])
        assert np.isfinite(scores[0]).all() and len(scores[0]) == 5 and len(scores[1]) == 0


def test_order_only_queries_need_no_time(fitted) -> None:
    query = dataclasses.replace(random_query(np.random.default_rng(3)), now_ms=None)
    assert np.isfinite(fitted[0].rank([query])[0]).all()


def test_training_is_deterministic(items: RankingItems, examples: RankingExamples) -> None:
    short = SMALL.model_copy(update={"epochs": 2, "dropout": 0.3})
    a, b = (
        short.fit(examples, catalogue(items), Runtime("cpu"), holdout=None, seed=4).score(examples.batch)
        for _ in range(2)
    )
    np.testing.assert_array_equal(a, b)


def test_saving_keeps_the_scores(fitted, tmp_path) -> None:
    ranker, train, _ = fitted
    ranker.save(tmp_path / "plain")
    np.testing.assert_allclose(load_ranker(tmp_path / "plain").score(train.batch), ranker.score(train.batch), atol=1e-6)
    for form in export_ranker(ranker, ExportConfig(precisions=("f32",)), train.batch):
        form.save(tmp_path / "exported")
        loaded = load_ranker(tmp_path / "exported")
        assert isinstance(loaded, ExportedRanker)
        np.testing.assert_allclose(loaded.score(train.batch), form.score(train.batch), atol=1e-5)


@pytest.mark.skipif(not installed("openvino"), reason="openvino is not installed on this platform")
def test_the_export_ranks_as_the_network_does(fitted) -> None:
    ranker, train, holdout = fitted
    exported = export_ranker(ranker, ExportConfig(precisions=("int8", "f32")), train.batch)
    assert {"f32", "int8"} <= {form.precision for form in exported}
    _, record = choose_export(ranker, exported, holdout, ExportConfig(num_timed=10))
    json.dumps(record)
    assert record["f32"]["ndcg_loss"] <= 0.005
    assert record["served"] in {"fp32", *(form.precision for form in exported)}
    expected = ranker.score(holdout.batch)
    for form in exported:
        agreement = np.corrcoef(form.score(holdout.batch).ravel(), expected.ravel())[0, 1]
        assert agreement > {"f32": 0.99, "int8": 0.9}[form.precision], form.precision
    np.testing.assert_allclose(exported[-1].score(holdout.batch), expected, atol=0.035 * expected.std())


@pytest.mark.skipif(not installed("openvino"), reason="openvino is not installed on this platform")
def test_the_gate_keeps_fp32_when_the_export_ranks_worse(fitted) -> None:
    ranker, train, holdout = fitted
    (form,) = export_ranker(ranker, ExportConfig(precisions=("f32",)), train.batch)
    form.score = lambda batch: -ranker.score(batch)  # type: ignore[method-assign]
    served, record = choose_export(ranker, [form], holdout, ExportConfig(num_timed=10))
    assert served is ranker and record["served"] == "fp32" and not record["f32"]["passes_gate"]


def test_int8_rows_are_close_and_small() -> None:
    values = np.random.default_rng(5).normal(size=(50, 32)).astype(np.float32)
    rows = ItemRows.quantize(values)
    assert rows.codes.dtype == np.int8
    worst = np.abs(rows.gather(np.arange(50)) - values).max(axis=1)
    assert (worst <= np.abs(values).max(axis=1) / 127).all()


def test_heads_must_divide_the_dimension() -> None:
    from recsys.errors import ModelError

    with pytest.raises(ModelError, match=r"multiple of ranker\.num_heads"):
        AttentionRankerConfig(dim=10, num_heads=4).network(5)


def dataset_of(rows: list[tuple[int, int, int, float, int]]) -> Dataset:
    """Rows of (user, item, time in days, weight, split)."""
    rows = sorted(rows)
    users, num_items = max(row[0] for row in rows) + 1, max(row[1] for row in rows) + 1
    interactions = pa.table(
        {
            schema.USER_IDX: pa.array([row[0] for row in rows], pa.int32()),
            schema.ITEM_IDX: pa.array([row[1] for row in rows], pa.int32()),
            schema.TIMESTAMP: pa.array([row[2] * DAY_MS for row in rows], pa.int64()).cast(schema.TIMESTAMP_TYPE),
            schema.POSITION: pa.array(range(len(rows)), pa.int64()),
            schema.EVENT: ["rating"] * len(rows),
            schema.VALUE: pa.array([4.0] * len(rows), pa.float32()),
            schema.WEIGHT: pa.array([row[3] for row in rows], pa.float32()),
            schema.SPLIT: pa.array([row[4] for row in rows], pa.int8()),
        },
        schema=schema.PREPARED_INTERACTIONS,
    )
    catalogue = pa.table(
        {
            "item_id": [str(item) for item in range(num_items)],
            "title": [f"title {item}" for item in range(num_items)],
            "description": pa.nulls(num_items, pa.string()),
            "categories": [["a"] if item % 2 else ["a", "b"] for item in range(num_items)],
            "creator": pa.nulls(num_items, pa.string()),
            "price": pa.nulls(num_items, pa.float32()),
            "created_at": pa.nulls(num_items, schema.TIMESTAMP_TYPE),
            "available": [True] * num_items,
            "image": pa.nulls(num_items, pa.string()),
        },
        schema=schema.ITEMS,
    )
    info = DatasetInfo(
        name="t", fingerprint="f", id_map_fingerprint="i", has_time=True, protocol="rolling_next_item",
        num_users=users, num_items=num_items, num_interactions=len(rows),
        num_positives=sum(row[3] > 0 for row in rows), num_quarantined=0, counts_by_split={},
    )  # fmt: skip
    return Dataset(interactions, catalogue, pa.table({"user_id": [str(user) for user in range(users)]}), info)


PAST = [(0, 0, 1, 1.0, 0), (0, 1, 2, 1.0, 0), (1, 1, 3, 1.0, 0), (1, 3, 4, 0.0, 0)]


def test_item_features_know_nothing_of_later_splits() -> None:
    future = [(0, 2, 50, 1.0, 2), (1, 1, 51, 1.0, 2), (2, 3, 52, 1.0, 2)]
    with_future = ItemFeatures.of(dataset_of(PAST + future), Split.TRAIN)
    without = ItemFeatures.of(dataset_of([*PAST, (2, 3, 4, 0.0, 0)]), Split.TRAIN)
    np.testing.assert_array_equal(with_future.numeric[[0, 1, 2]], without.numeric[[0, 1, 2]])
    assert with_future.created_ms[2] == NO_TIME and with_future.created_ms[1] == 2 * DAY_MS
    assert ItemFeatures.of(dataset_of(PAST + future), Split.TEST).numeric[1, 0] > with_future.numeric[1, 0]


def test_features_are_named_and_finite_without_prices_or_times(items: RankingItems) -> None:
    features = ItemFeatures.of(dataset_of(PAST), Split.TRAIN)
    vectors = np.eye(4, dtype=np.float32)
    row = candidate_features(
        features, vectors, history_item_idx=np.array([0, 0], np.int32), history_timestamp_ms=None,
        candidate_item_idx=np.array([2, 3], np.int32), retrieval_score=np.array([1.0, 0.5], np.float32), now_ms=None,
    )  # fmt: skip
    assert row.shape == (2, len(FEATURE_NAMES)) and np.isfinite(row).all()
    overlap = row[:, FEATURE_NAMES.index("category_overlap")]
    assert overlap[0] > overlap[1] > 0  # item 2 shares both categories with item 0, item 3 only one


def test_examples_mark_the_relevant_and_count_the_missed() -> None:
    data = dataset_of([*PAST, (0, 2, 10, 1.0, 1), (1, 0, 11, 1.0, 1)])
    targets = data.targets(Split.VALID)
    found = Candidates.from_source("m", np.array([3, 2], np.int32), np.array([2.0, 1.0], np.float32), stage="retrieval")
    missed = Candidates.from_source("m", np.array([2], np.int32), np.array([1.0], np.float32), stage="retrieval")
    items = RankingItems.of(ItemFeatures.of(data, Split.TRAIN), np.eye(4, dtype=np.float32))
    examples = ranking_examples(targets, [found, missed], items, 8)
    assert len(examples) == 1 and examples.num_missed == 1
    assert examples.relevant.tolist() == [[False, True]]
    assert examples.batch.history_item_idx[0].tolist() == [PADDING] * 6 + [0, 1]


def test_the_stage_reorders_and_loses_nothing(fitted) -> None:
    generator = np.random.default_rng(7)
    query = random_query(generator)
    candidates = Candidates.from_source("m", query.candidate_item_idx, query.retrieval_score, stage="retrieval")
    question = Query("r", "b", query.now_ms or 0, query.history, np.zeros(0, np.int32), 10, 40)
    (result,) = RankingStage("b", fitted[0]).run_batch([question], [candidates])
    assert sorted(result.item_idx) == sorted(candidates.item_idx)
    assert (np.diff(result.score) <= 0).all() and "ranking" in result.stage_scores
    torch.testing.assert_close(
        torch.from_numpy(np.sort(result.score)), torch.from_numpy(np.sort(fitted[0].rank([query])[0]))
    )
