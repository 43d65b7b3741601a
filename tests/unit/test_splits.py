"""Splits label as documented, and each planted leak is found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys import schema
from recsys.config import parse
from recsys.data.dataset import Split
from recsys.data.splits import AnySplit, SplitPolicy, check_not_empty
from recsys.data.splits.global_time import GlobalTimeSplit
from recsys.data.splits.leave_one_out import LeaveOneOutSplit
from recsys.data.splits.next_basket import NextBasketSplit
from recsys.errors import ConfigError, EmptyDataError, LeakageError, NoTimeError

TRAIN, VALID, TEST = Split


def interactions(rows: list[tuple[int, int, int | None, int]], **columns: Any) -> pa.Table:
    """Prepared interactions from (user_idx, item_idx, timestamp in ms, split), positions as they should be."""
    users = np.array([row[0] for row in rows])
    positions = [int((users[:n] == user).sum()) for n, user in enumerate(users)]
    values: dict[str, Any] = {
        schema.USER_IDX: users,
        schema.ITEM_IDX: [row[1] for row in rows],
        schema.TIMESTAMP: [row[2] for row in rows],
        schema.POSITION: positions,
        schema.EVENT: ["click"] * len(rows),
        schema.VALUE: [None] * len(rows),
        schema.WEIGHT: [1.0] * len(rows),
        schema.SPLIT: [int(row[3]) for row in rows],
        **columns,
    }
    arrays = [pa.array(values[field.name]).cast(field.type) for field in schema.PREPARED_INTERACTIONS]
    return pa.table(arrays, schema=schema.PREPARED_INTERACTIONS)


def labels(
    split: SplitPolicy, user: list[int], time: list[int] | None, positive: list[bool] | None = None
) -> list[int]:
    mask = np.ones(len(user), bool) if positive is None else np.array(positive)
    moments = None if time is None else np.array(time, np.int64)
    return split.assign(np.array(user, np.int32), moments, mask).split.tolist()


# --- labels -----------------------------------------------------------------------------------------------------------


def test_global_time_by_share() -> None:
    split = GlobalTimeSplit(valid_fraction=0.2, test_fraction=0.2)
    result = split.assign(np.zeros(10, np.int32), np.arange(10, dtype=np.int64) * 5, np.ones(10, bool))
    assert result.split.tolist() == [0] * 6 + [1] * 2 + [2] * 2
    assert result.borders_ms == (30, 40)


def test_ties_at_a_border_all_go_to_the_later_part() -> None:
    split = GlobalTimeSplit(valid_fraction=0.2, test_fraction=0.2)
    assert labels(split, list(range(10)), [0, 1, 2, 3, 4, 6, 6, 6, 8, 8]) == [0] * 5 + [1] * 3 + [2] * 2


def test_global_time_by_moments() -> None:
    split = parse(
        AnySplit,
        {"kind": "global_time", "valid_from": "1970-01-01T00:00:01", "test_from": "1970-01-01T01:00:02+01:00"},
        where="test",
    )
    assert labels(split, [0, 0, 1, 1], [999, 2000, 1000, 1999]) == [0, 2, 1, 1]


def test_leave_one_out_counts_positives_and_never_goes_back() -> None:
    user = [0] * 6 + [1] * 2 + [2] * 4
    positive = [True, True, False, True, False, True] + [True] * 2 + [True, True, True, False]
    assert labels(LeaveOneOutSplit(), user, None, positive) == [0, 0, 0, 1, 1, 2, 0, 0, 0, 1, 2, 2]


def test_leave_one_out_leaves_short_users_in_train() -> None:
    assert labels(LeaveOneOutSplit(min_positives=4), [0] * 3 + [1] * 4, None) == [0, 0, 0, 0, 0, 1, 2]


@pytest.mark.parametrize("split", [GlobalTimeSplit(), NextBasketSplit()])
def test_order_without_time_cannot_be_split_in_time(split: SplitPolicy) -> None:
    with pytest.raises(NoTimeError, match="leave_one_out"):
        labels(split, [0, 0, 0], None)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"kind": "random"}, "global_time"),
        ({"kind": "global_time", "valid_from": "2024-01-01"}, "both"),
        ({"kind": "global_time", "valid_from": "2024-02-01", "test_from": "2024-01-01T00:00:00Z"}, "before"),
        ({"kind": "next_basket", "valid_fraction": 0.5, "test_fraction": 0.5}, "below 1"),
        ({"kind": "leave_one_out", "min_positives": 2}, "min_positives"),
    ],
)
def test_senseless_splits_are_refused(tree: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(AnySplit, tree, where="test")


def test_a_part_without_positives_is_named() -> None:
    with pytest.raises(EmptyDataError, match="the valid part has no positives"):
        check_not_empty(np.array([0, 1, 2], np.int8), np.array([True, False, True]))


# --- leaks ------------------------------------------------------------------------------------------------------------

CLEAN = [
    (0, 1, 10, TRAIN),
    (0, 2, 20, TRAIN),
    (0, 3, 20, TRAIN),
    (0, 4, 30, VALID),
    (0, 5, 40, TEST),
    (1, 1, 5, TRAIN),
    (1, 2, 31, VALID),
    (1, 3, 45, TEST),
]
BORDERS = (30, 40)
POLICIES: list[SplitPolicy] = [GlobalTimeSplit(), LeaveOneOutSplit(), NextBasketSplit()]
every_policy = pytest.mark.parametrize("split", POLICIES, ids=lambda split: split.kind)
time_policies = pytest.mark.parametrize("split", [GlobalTimeSplit(), NextBasketSplit()], ids=lambda split: split.kind)


@every_policy
def test_a_clean_log_passes(split: SplitPolicy) -> None:
    split.check(interactions(CLEAN), BORDERS)


@every_policy
def test_leak_future_label_in_the_past(split: SplitPolicy) -> None:
    rows = [*CLEAN[:3], (0, 4, 30, TEST), (0, 5, 40, VALID), *CLEAN[5:]]
    with pytest.raises(LeakageError, match="earlier part than the one before it"):
        split.check(interactions(rows), BORDERS)


@every_policy
def test_leak_unsorted_time(split: SplitPolicy) -> None:
    rows = [(0, 1, 20, TRAIN), (0, 2, 10, TRAIN), *CLEAN[2:]]
    with pytest.raises(LeakageError, match="not sorted by time") as caught:
        split.check(interactions(rows), BORDERS)
    assert caught.value.details["row"] == 1


@every_policy
def test_leak_unsorted_users(split: SplitPolicy) -> None:
    with pytest.raises(LeakageError, match="not sorted by user"):
        split.check(interactions(CLEAN[5:] + CLEAN[:5]), BORDERS)


@every_policy
def test_leak_unstable_order_of_ties(split: SplitPolicy) -> None:
    table = interactions(CLEAN)
    swapped = table.take([0, 2, 1, 3, 4, 5, 6, 7])
    with pytest.raises(LeakageError, match="not the stable one"):
        split.check(swapped, BORDERS)


@every_policy
def test_leak_lost_first_row(split: SplitPolicy) -> None:
    with pytest.raises(LeakageError, match="not the stable one"):
        split.check(interactions(CLEAN).slice(1), BORDERS)


@every_policy
def test_leak_duplicate_across_the_border(split: SplitPolicy) -> None:
    rows = [*CLEAN[:3], (0, 4, 30, TRAIN), *CLEAN[3:]]
    with pytest.raises(LeakageError, match="duplicate of one in another part"):
        split.check(interactions(rows), BORDERS)


@every_policy
def test_leak_half_of_the_times_missing(split: SplitPolicy) -> None:
    with pytest.raises(LeakageError, match="some have none"):
        split.check(interactions([(0, 1, None, TRAIN), *CLEAN[1:]]), BORDERS)


@time_policies
@pytest.mark.parametrize("row", [(1, 9, 30, TRAIN), (1, 9, 29, VALID), (1, 9, 40, VALID)])
def test_leak_wrong_side_of_a_border(split: SplitPolicy, row: tuple[int, int, int, int]) -> None:
    rows = sorted([*CLEAN[:5], (1, 1, 5, TRAIN), row, (1, 3, 45, TEST)], key=lambda r: (r[0], r[2]))
    with pytest.raises(LeakageError, match="wrong side of a border"):
        split.check(interactions(rows), BORDERS)


@time_policies
def test_leak_time_split_without_time(split: SplitPolicy) -> None:
    rows = [(user, item, None, label) for user, item, _, label in CLEAN]
    with pytest.raises(LeakageError, match="without timestamps or borders"):
        split.check(interactions(rows), BORDERS)
    with pytest.raises(LeakageError, match="without timestamps or borders"):
        split.check(interactions(CLEAN), None)


def test_leak_two_test_positives_of_a_user() -> None:
    rows = [*CLEAN[:5], (0, 6, 41, TEST), *CLEAN[5:]]
    with pytest.raises(LeakageError, match="user_idx 0 has 3 training, 1 validation and 2 test"):
        LeaveOneOutSplit().check(interactions(rows), None)


def test_leak_evaluated_user_with_nothing_to_learn_from() -> None:
    with pytest.raises(LeakageError, match="user_idx 1 has 0 training"):
        LeaveOneOutSplit().check(interactions([*CLEAN[:5], (1, 2, 31, VALID), (1, 3, 45, TEST)]), None)


def test_leave_one_out_works_on_order_alone() -> None:
    rows = [(user, item, None, label) for user, item, _, label in CLEAN]
    LeaveOneOutSplit().check(interactions(rows), None)
