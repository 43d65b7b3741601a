"""The protocol: full rankings, stable ties, planted leaks, views, segments, samples, and systems that cheat."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys import schema
from recsys.data.dataset import Dataset, DatasetInfo, Split, Targets
from recsys.data.histories import Histories
from recsys.errors import ConfigError, DataError, EmptyDataError, LeakageError, ModelError
from recsys.evaluation import protocol as rooms
from recsys.evaluation.protocol import (
    EvaluationConfig,
    check_no_leak,
    evaluate_ranker,
    rank_scores,
    retriever_ranker,
    sample_queries,
)
from recsys.evaluation.report import build_report

TRAIN, VALID, TEST = Split.TRAIN, Split.VALID, Split.TEST
Row = tuple[int, int, int, float, int]
"""user_idx, item_idx, time in ms, weight, split"""


def make_dataset(rows: list[Row], *, num_items: int, protocol: str = "rolling_next_item", **info: Any) -> Dataset:
    user, item, time, weight, split = (list(column) for column in zip(*rows, strict=True))
    num_users = max(user) + 1
    has_time = info.pop("has_time", True)
    interactions = pa.table(
        {
            schema.USER_IDX: user,
            schema.ITEM_IDX: item,
            schema.TIMESTAMP: pa.array(time if has_time else [None] * len(time), pa.int64()).cast(
                schema.TIMESTAMP_TYPE
            ),
            schema.POSITION: list(range(len(rows))),
            schema.EVENT: ["view"] * len(rows),
            schema.VALUE: pa.array([None] * len(rows), pa.float32()),
            schema.WEIGHT: weight,
            schema.SPLIT: [int(part) for part in split],
        },
        schema=schema.PREPARED_INTERACTIONS,
    )
    items = pa.Table.from_pylist(
        [
            {"item_id": f"i{n}", "title": f"t{n}", "categories": ["even" if n % 2 == 0 else "odd"], "available": True}
            for n in range(num_items)
        ],
        schema=schema.ITEMS,
    )
    details = DatasetInfo(
        name="tiny",
        fingerprint="f" * 64,
        id_map_fingerprint="m" * 64,
        has_time=has_time,
        protocol=protocol,
        num_users=num_users,
        num_items=num_items,
        num_interactions=len(rows),
        num_positives=sum(w > 0 for w in weight),
        num_quarantined=0,
        counts_by_split={},
        **info,
    )
    return Dataset(interactions, items, pa.table({schema.USER_ID: [f"u{n}" for n in range(num_users)]}), details)


def next_item() -> Dataset:
    """User 0 is warm and repeats item 0; user 1 is cold and takes item 5, which nobody took in train."""
    return make_dataset(
        [
            (0, 0, 10, 1.0, TRAIN),
            (0, 1, 20, 1.0, TRAIN),
            (0, 2, 25, 0.0, TRAIN),
            (0, 3, 100, 1.0, TEST),
            (0, 0, 100, 1.0, TEST),
            (1, 1, 110, 1.0, TEST),
            (1, 5, 120, 1.0, TEST),
        ],
        num_items=6,
        borders_ms=(50, 90),
    )


def baskets() -> Dataset:
    return make_dataset(
        [
            (0, 0, 10, 1.0, TRAIN),
            (0, 1, 10, 1.0, TRAIN),
            (0, 0, 100, 1.0, TEST),
            (0, 2, 100, 1.0, TEST),
            (0, 0, 200, 1.0, TEST),
            (1, 3, 150, 1.0, TEST),
            (1, 3, 150, 1.0, TEST),
        ],
        num_items=4,
        protocol="next_basket",
    )


CONFIG = EvaluationConfig(ks=(1, 3), main_metric="ndcg@3", num_bootstrap=100)


def by_item_idx(num_items: int, depth: int = 3) -> rooms.RankFn:
    """Ranks unseen items by falling item_idx."""

    def rank(targets: Targets) -> np.ndarray:
        scores = np.tile(np.arange(num_items, dtype=np.float32), (len(targets), 1))
        return rank_scores(scores, targets.left_out, depth)

    return rank


# --- ranking ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.integers(1, 12))
def test_rank_scores_is_a_stable_sort_of_what_was_not_seen(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (5, 9)).astype(np.float32)  # ties everywhere, at the cut too
    seen = [list(rng.integers(0, 9, rng.integers(0, 12))) for _ in range(5)]
    ranked = rank_scores(scores, Histories.from_lists(seen), k)
    for row in range(5):
        left = [i for i in np.lexsort((np.arange(9), -scores[row])) if i not in seen[row]][:k]
        assert ranked[row].tolist() == left + [-1] * (k - len(left))


def test_all_scores_equal_ranks_by_item_idx() -> None:
    # A partition alone would return the tied items in an order, and at the cut a choice, of its own.
    ranked = rank_scores(np.zeros((2, 5000), np.float32), Histories.from_lists([[0], []]), 10)
    assert ranked.tolist() == [list(range(1, 11)), list(range(10))]


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ModelError, match="query 1 is not finite"):
        rank_scores(np.array([[0, 1], [0, np.nan]], np.float32), Histories.from_lists([[], []]), 1)


def test_a_retriever_must_score_the_whole_catalogue() -> None:
    class Short:
        num_items = 4

        def score(self, histories: Histories, now_ms: object = None) -> np.ndarray:
            return np.zeros((len(histories), 4), np.float32)

    dataset = next_item()
    with pytest.raises(ModelError, match="whole catalogue"):
        evaluate_ranker("short", retriever_ranker(Short(), dataset, CONFIG), dataset.targets(TEST), dataset, CONFIG)  # type: ignore[arg-type]


# --- results ----------------------------------------------------------------------------------------------------------


def test_next_item_by_hand() -> None:
    dataset = next_item()
    result = evaluate_ranker("high", by_item_idx(6), dataset.targets(TEST), dataset, CONFIG)
    [view] = result.views
    # Queries: user 0 takes 3, then 0 again (left out: seen), user 1 takes 1, then 5.
    assert view.view == "new" and view.num_left_out == 1 and result.num_targets == 4
    whole = view.segments["all"]
    assert whole.rows.tolist() == [0, 2, 3]
    assert whole.values["mrr@3"].tolist() == [1 / 3, 0, 1]  # 5 4 [3] | 5 4 3 | [5] 4 3
    assert whole.values["hr@1"].tolist() == [0, 0, 1]
    assert view.segments["warm_users"].rows.tolist() == [0]
    assert view.segments["cold_users"].rows.tolist() == [2, 3]
    assert view.segments["warm_items"].rows.tolist() == [2]
    assert view.segments["cold_items"].rows.tolist() == [0, 3]
    assert view.slates["coverage@3"] == 3 / 6


def test_seen_items_can_be_asked_for() -> None:
    dataset = next_item()
    config = EvaluationConfig(ks=(6,), main_metric="hr@6", exclude_seen=False)
    [view] = evaluate_ranker("high", by_item_idx(6, 6), dataset.targets(TEST), dataset, config).views
    assert view.view == "with_repeats" and view.num_left_out == 0
    assert view.segments["all"].values["mrr@6"].tolist() == [1 / 3, 1 / 6, 1 / 5, 1]


def test_next_basket_is_reported_with_and_without_repeats() -> None:
    dataset = baskets()
    result = evaluate_ranker("high", by_item_idx(4), dataset.targets(TEST), dataset, CONFIG)
    repeats, new = result.views
    assert (repeats.view, new.view) == ("with_repeats", "new")
    # Baskets: {0, 2}, {0}, {3} (named twice, relevant once); ranking 3 2 1 for all
    assert repeats.segments["all"].values["recall@3"].tolist() == [1 / 2, 0, 1]
    # New: {2} given {0, 1}: 3 [2]; {0} is no query; {3}
    assert new.num_left_out == 1
    assert new.segments["all"].values["mrr@3"].tolist() == [1 / 2, 1]
    # Of the first basket item 0 is warm (missed) and item 2 is cold (found).
    assert repeats.segments["warm_items"].values["recall@3"].tolist() == [0, 0]
    assert repeats.segments["cold_items"].values["recall@3"].tolist() == [1, 1]


def test_batches_do_not_change_the_result() -> None:
    dataset = next_item()
    small, large = (
        evaluate_ranker(
            "high", by_item_idx(6), dataset.targets(TEST), dataset, CONFIG.model_copy(update={"batch_size": n})
        )
        for n in (1, 100)
    )
    for name, segment in small.views[0].segments.items():
        for metric, values in segment.values.items():
            np.testing.assert_array_equal(values, large.views[0].segments[name].values[metric])


# --- sampling ---------------------------------------------------------------------------------------------------------


def many_users() -> Dataset:
    rows: list[Row] = []
    for user in range(40):
        rows.append((user, 0, 10, 1.0, TRAIN))
        rows += [(user, 1 + n, 100 + n, 1.0, TEST) for n in range(1 + user % 4)]
    return make_dataset(rows, num_items=8)


def test_a_sample_takes_whole_users_and_depends_on_the_seed_alone() -> None:
    targets = many_users().targets(TEST)
    config = EvaluationConfig(max_queries=30, seed=1)
    rows = sample_queries(targets, config)
    assert 25 <= len(rows) <= 30
    chosen = set(targets.user_idx[rows].tolist())
    assert rows.tolist() == np.flatnonzero(np.isin(targets.user_idx, list(chosen))).tolist()
    np.testing.assert_array_equal(rows, sample_queries(targets, config))
    assert rows.tolist() != sample_queries(targets, EvaluationConfig(max_queries=30, seed=2)).tolist()
    assert len(sample_queries(targets, EvaluationConfig(max_queries=1))) >= 1
    assert len(sample_queries(targets, EvaluationConfig())) == len(targets)


def test_sampled_queries_keep_their_values() -> None:
    dataset = many_users()
    full = evaluate_ranker("a", by_item_idx(8), dataset.targets(TEST), dataset, CONFIG).views[0].segments["all"]
    config = CONFIG.model_copy(update={"max_queries": 30})
    part = evaluate_ranker("a", by_item_idx(8), dataset.targets(TEST), dataset, config).views[0].segments["all"]
    assert 0 < len(part.rows) < len(full.rows)
    np.testing.assert_array_equal(part.values["mrr@3"], full.values["mrr@3"][np.searchsorted(full.rows, part.rows)])


# --- leaks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", [next_item(), baskets(), many_users()], ids=["next_item", "basket", "many"])
def test_what_the_dataset_makes_has_no_leak(dataset: Dataset) -> None:
    check_no_leak(dataset.targets(TEST), dataset)


def test_no_leak_without_time() -> None:
    rows: list[Row] = [(0, 0, 0, 1.0, TRAIN), (0, 1, 0, 1.0, VALID), (0, 2, 0, 1.0, TEST)]
    dataset = make_dataset(rows, num_items=3, has_time=False, protocol="leave_one_out")
    targets = dataset.targets(TEST)
    check_no_leak(targets, dataset)
    with pytest.raises(LeakageError):
        check_no_leak(moved(targets, "histories"), dataset)


def moved(targets: Targets, view: str) -> Targets:
    """The last query's history reaches one row further: it holds the target (or ends outside)."""
    histories: Histories = getattr(targets, view)
    stops = histories.stops.copy()
    stops[-1] += 1
    return replace(targets, **{view: replace(histories, stops=stops)})


def test_planted_leaks_are_found() -> None:
    dataset = next_item()
    targets = dataset.targets(TEST)
    last = targets.histories
    relevant = targets.relevant_item_idx.copy()
    relevant[0] = 0
    earlier_start = replace(last, starts=np.zeros_like(last.starts))  # user 1 is given user 0's history
    train_rows = dataset.interactions.set_column(
        7, schema.PREPARED_INTERACTIONS.field(schema.SPLIT), pa.array([0] * 7, pa.int8())
    )
    now = targets.now_ms
    assert now is not None
    planted: dict[str, tuple[Targets, Dataset]] = {
        "history holds the target": (moved(targets, "histories"), dataset),
        "seen holds the target": (moved(targets, "seen"), dataset),
        "another user's log": (replace(targets, histories=earlier_start), dataset),
        "time of the target is too early": (replace(targets, now_ms=now - 95), dataset),
        "target is not what followed": (replace(targets, relevant_item_idx=relevant), dataset),
        "target was trained on": (targets, replace(dataset, interactions=train_rows)),
        "some other log": (replace(targets, histories=replace(last, item_idx=last.item_idx[::-1])), dataset),
        "before the end of train": (
            targets,
            replace(dataset, info=dataset.info.model_copy(update={"borders_ms": (105, 120)})),
        ),
    }
    for name, (leaky, its_dataset) in planted.items():
        with pytest.raises(LeakageError):
            check_no_leak(leaky, its_dataset)
        assert name


def test_a_leak_fails_the_evaluation_itself() -> None:
    dataset = next_item()
    with pytest.raises(LeakageError, match=r"query \d"):
        evaluate_ranker("x", by_item_idx(6), moved(dataset.targets(TEST), "histories"), dataset, CONFIG)


def test_a_log_out_of_order_in_time_is_a_leak() -> None:
    dataset = make_dataset(
        [(0, 0, 500, 1.0, TRAIN), (0, 1, 100, 1.0, TEST)],
        num_items=2,
    )
    with pytest.raises(LeakageError, match="reaches past the time"):
        check_no_leak(dataset.targets(TEST), dataset)


def test_a_basket_in_two_parts_is_a_leak() -> None:
    dataset = baskets()
    targets = dataset.targets(TEST)
    # The second item of the first basket as a query of its own, given the first one.
    halved = replace(
        targets[:1],
        histories=replace(targets[:1].histories, stops=targets.histories.stops[:1] + 1),
        seen=replace(targets[:1].seen, stops=targets.seen.stops[:1] + 1),
        relevant_item_idx=targets.relevant_item_idx[1:2],
        relevant_offsets=np.array([0, 1]),
    )
    with pytest.raises(LeakageError, match="reaches past the time"):
        check_no_leak(halved, dataset)


def test_the_relevant_items_are_the_basket_each_once() -> None:
    dataset = make_dataset(
        [
            (0, 0, 10, 1.0, TRAIN),
            (0, 2, 100, 1.0, TEST),
            (0, 2, 100, 2.0, TEST),  # a second line of the same item
            (0, 1, 100, 1.0, TEST),
            (0, 3, 200, 1.0, TEST),
        ],
        num_items=4,
        protocol="next_basket",
    )
    targets = dataset.targets(TEST)
    check_no_leak(targets, dataset)
    for told in ([2, 3], [2, 2]):  # an item of the next basket; one item twice and the other not at all
        wrong = replace(targets, relevant_item_idx=np.array([*told, 3], np.int32))
        with pytest.raises(LeakageError, match="query 0: the relevant items are not those that follow"):
            check_no_leak(wrong, dataset)


# --- systems that cheat, and misuse ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranking", "message"),
    [
        ([3, 3, 4], "twice"),
        ([3, 4, 6], "outside 0 to 5"),
        ([-2, 4, 5], "outside"),
        ([3, -1, 4], "after a -1"),
        ([1, 3, 4], "has seen"),
        ([3, 4], "shape"),
    ],
)
def test_unusable_rankings_are_refused_by_name(ranking: list[int], message: str) -> None:
    dataset = next_item()
    with pytest.raises(ModelError, match=f"^cheat: .*{message}"):
        evaluate_ranker(
            "cheat", lambda t: np.tile(np.array(ranking, np.int32), (len(t), 1)), dataset.targets(TEST), dataset, CONFIG
        )


def test_nothing_to_judge_is_an_error() -> None:
    dataset = next_item()
    with pytest.raises(EmptyDataError):
        evaluate_ranker("x", by_item_idx(6), dataset.targets(VALID), dataset, CONFIG)


@pytest.mark.parametrize(
    "bad", [{"ks": []}, {"ks": [0]}, {"ks": [5, 5]}, {"main_metric": "ndcg"}, {"main_metric": "auc@5"}, {"k": 3}]
)
def test_bad_configuration_is_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        EvaluationConfig.parse(bad, where="test")


# --- report -----------------------------------------------------------------------------------------------------------


def test_report(tmp_path: Any) -> None:
    dataset = many_users()
    targets = dataset.targets(TEST)

    def best(t: Targets) -> np.ndarray:
        scores = np.zeros((len(t), 8), np.float32)
        scores[np.arange(len(t)), t.relevant_item_idx[t.relevant_offsets[:-1]]] = 1
        return rank_scores(scores, t.left_out, 3)

    def nothing(t: Targets) -> np.ndarray:
        return np.full((len(t), 3), -1, np.int32)

    systems = {"oracle": best, "falling": by_item_idx(8), "nothing": nothing}
    results = [evaluate_ranker(name, fn, targets, dataset, CONFIG) for name, fn in systems.items()]
    report = build_report(results, dataset, TEST, CONFIG, baselines=["nothing", "falling"])
    assert report.best_baseline == {"new": "falling"}
    oracle, falling = report.system("oracle").views[0], report.system("falling").views[0]
    assert oracle.segments["all"].metrics["ndcg@3"].mean == 1.0
    assert oracle.differences["ndcg@3"].low > 0 and oracle.differences["ndcg@3"].p_value < 0.05
    assert not falling.differences
    assert (oracle.segments["all"].num_queries, oracle.segments["all"].num_users) == (100, 40)
    assert oracle.segments["cold_users"].num_queries == 0 and oracle.segments["cold_users"].metrics == {}
    report.save(tmp_path)
    again = build_report(results, dataset, TEST, CONFIG, baselines=["nothing", "falling"])
    again.save(tmp_path / "again")
    assert (tmp_path / "metrics.json").read_text() == (tmp_path / "again" / "metrics.json").read_text()
    assert "NaN" not in (tmp_path / "metrics.json").read_text()
    text = (tmp_path / "report.md").read_text()
    for expected in ("rolling_next_item", "split test", "100 of 100 queries", "40 users", "ffff", "falling (baseline)"):
        assert expected in text
    report.print()


def test_a_comparison_needs_the_same_queries() -> None:
    dataset = many_users()
    targets = dataset.targets(TEST)
    full = evaluate_ranker("a", by_item_idx(8), targets, dataset, CONFIG)
    sampled = CONFIG.model_copy(update={"max_queries": 30})
    part = evaluate_ranker("b", by_item_idx(8), targets, dataset, sampled)
    with pytest.raises(DataError, match="different queries"):
        build_report([full, part], dataset, TEST, CONFIG)
    with pytest.raises(DataError, match="same name"):
        build_report([full, full], dataset, TEST, CONFIG)
    with pytest.raises(DataError, match="not evaluated: z"):
        build_report([full], dataset, TEST, CONFIG, baselines=["z"])
    with pytest.raises(DataError, match="no evaluated systems"):
        build_report([], dataset, TEST, CONFIG)
