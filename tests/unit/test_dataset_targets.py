"""Histories and evaluation queries: who is asked what, given what."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.data.config import DataConfig
from recsys.data.dataset import Dataset, Split, Targets
from recsys.data.histories import Histories
from recsys.data.prepare import prepare
from recsys.errors import DataError, LeakageError
from recsys.evaluation.protocol import check_no_leak

# user, item, time in ms, event, value; items are numbered by the catalogue a, b, c, d, e.
LOG = [
    ("u", "a", 1, "buy"),
    ("u", "b", 1, "buy"),
    ("u", "e", 2, "look"),
    ("v", "a", 3, "buy"),
    ("v", "b", 4, "buy"),
    ("u", "d", 10, "look"),
    ("u", "c", 10, "buy"),
    ("u", "a", 10, "buy"),
    ("v", "c", 11, "look"),
    ("u", "e", 20, "buy"),
    ("u", "b", 21, "buy"),
    ("v", "d", 21, "buy"),
    ("v", "d", 21, "buy"),
]


def dataset(folder: Path, split: dict[str, object]) -> Dataset:
    columns = dict(zip(["user_id", "item_id", "timestamp", "event"], zip(*LOG, strict=True), strict=True))
    # The last row repeats an item in its basket with another quantity, as two lines of an invoice do.
    columns["value"] = tuple(float(n) for n in range(len(LOG)))
    pq.write_table(pa.table({name: list(column) for name, column in columns.items()}), folder / "log.parquet")
    (folder / "items.csv").write_text("item_id,title\na,A\nb,B\nc,C\nd,D\ne,E\n")
    tree = {
        "source": {
            "kind": "parquet",
            "path": str(folder / "log.parquet"),
            "columns": {"event": "event", "value": "value"},
            "catalogue": {"path": str(folder / "items.csv")},
        },
        "positives": {"events": {"buy": {}}},
        "split": split,
    }
    return prepare(DataConfig.parse(tree, where="test"), 0, folder / "out")


TIME = {"valid_from": "1970-01-01T00:00:00.010", "test_from": "1970-01-01T00:00:00.020"}


def shown(targets: Targets) -> list[tuple[int, str, str, str]]:
    """(user, history, seen, relevant) per query, items as letters."""

    def letters(items: np.ndarray) -> str:
        return "".join("abcde"[item] for item in items)

    return [
        (
            int(targets.user_idx[row]),
            letters(targets.histories.items(row)),
            letters(targets.seen.items(row)),
            letters(targets.relevant(row)),
        )
        for row in range(len(targets))
    ]


def test_rolling_next_item_asks_for_each_positive_given_all_before(tmp_path: Path) -> None:
    data = dataset(tmp_path, {"kind": "global_time", **TIME})
    assert data.info.borders_ms == (10, 20)
    assert shown(data.targets(Split.VALID)) == [(0, "ab", "abed", "c"), (0, "abc", "abedc", "a")]
    assert shown(data.targets(Split.TEST)) == [
        (0, "abca", "abedca", "e"),
        (0, "abcae", "abedcae", "b"),
        (1, "ab", "abc", "d"),
        (1, "abd", "abcd", "d"),
    ]
    now = data.targets(Split.TEST).now_ms
    assert now is not None
    assert now.tolist() == [20, 21, 21, 21]


def test_next_basket_asks_for_all_of_a_basket_given_what_came_before_it(tmp_path: Path) -> None:
    data = dataset(tmp_path, {"kind": "next_basket", **TIME})
    assert data.info.protocol == "next_basket"
    assert shown(data.targets(Split.VALID)) == [(0, "ab", "abe", "ca")]
    assert shown(data.targets(Split.TEST)) == [
        (0, "abca", "abedca", "e"),
        (0, "abcae", "abedcae", "b"),
        (1, "ab", "abc", "d"),
    ]


@pytest.mark.parametrize("split", [Split.VALID, Split.TEST])
def test_a_basket_that_begins_with_something_else_is_no_leak(tmp_path: Path, split: Split) -> None:
    data = dataset(tmp_path, {"kind": "next_basket", **TIME})
    targets = data.targets(split)
    check_no_leak(targets, data)
    reaching = replace(targets, seen=replace(targets.seen, stops=targets.seen.stops + 1))
    with pytest.raises(LeakageError, match="seen history"):
        check_no_leak(reaching, data)


def test_leave_one_out_asks_once_per_user(tmp_path: Path) -> None:
    data = dataset(tmp_path, {"kind": "leave_one_out"})
    assert shown(data.targets(Split.VALID)) == [(0, "abca", "abedca", "e"), (1, "ab", "abc", "d")]
    assert shown(data.targets(Split.TEST)) == [(0, "abcae", "abedcae", "b"), (1, "abd", "abcd", "d")]


def test_a_part_of_the_targets_is_the_same_queries(tmp_path: Path) -> None:
    targets = dataset(tmp_path, {"kind": "global_time", **TIME}).targets(Split.TEST)
    assert shown(targets[1:3]) == shown(targets)[1:3]
    assert shown(targets[4:9]) == []
    assert shown(targets[::2]) == shown(targets)[::2]
    assert shown(targets.select(np.array([3, 0]))) == [shown(targets)[3], shown(targets)[0]]


def test_histories_until_a_split(tmp_path: Path) -> None:
    data = dataset(tmp_path, {"kind": "global_time", **TIME})
    lengths = {split: data.positives.histories(split).lengths.tolist() for split in Split}
    assert lengths == {Split.TRAIN: [2, 2], Split.VALID: [4, 2], Split.TEST: [6, 4]}
    assert data.log.histories(Split.TEST).lengths.tolist() == [8, 5]
    assert data.train_counts().tolist() == [2, 2, 0, 0, 0]
    assert data.train_counts(Split.TEST).sum() == data.info.num_positives == 10


def test_a_folder_without_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no prepared dataset"):
        Dataset.load(tmp_path)


# --- Histories --------------------------------------------------------------------------------------------------------


def test_histories_pack_newest_entries_end_to_end() -> None:
    histories = Histories.from_lists([[1, 2, 3], [], [4]], [[10, 20, 30], [], [40]])
    packed = histories.pack(2)
    assert packed.item_idx.tolist() == [2, 3, 4]
    assert packed.offsets.tolist() == [0, 2, 2, 3]
    assert packed.lengths.tolist() == [2, 0, 1]
    assert packed.timestamp_ms is not None
    assert packed.timestamp_ms.tolist() == [20, 30, 40]
    assert histories.pack().item_idx.tolist() == [1, 2, 3, 4]
    assert packed.item_idx.dtype == np.int32


def test_histories_select_and_batch_without_copying() -> None:
    histories = Histories.from_lists([[1], [2, 3], [], [4, 5, 6]])
    chosen = histories[np.array([3, 0])]
    assert [chosen.items(row).tolist() for row in range(2)] == [[4, 5, 6], [1]]
    assert chosen.item_idx is histories.item_idx
    assert [(rows.start, rows.stop, len(part)) for rows, part in histories.batches(3)] == [(0, 3, 3), (3, 4, 1)]
    assert histories.lengths.tolist() == [1, 2, 0, 3]
    assert len(Histories.from_lists([])) == 0
    assert Histories.from_lists([]).pack().offsets.tolist() == [0]
    assert Histories.single(np.array([7], np.int32)).items(0).tolist() == [7]
