"""Whatever the log: nothing is lost, the order is the stable one, and no split leaks."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given
from hypothesis import strategies as st

from recsys import schema
from recsys.data.config import DataConfig
from recsys.data.dataset import Dataset, Split
from recsys.data.prepare import PreparationReport, prepare
from recsys.data.splits.global_time import GlobalTimeSplit
from recsys.data.splits.leave_one_out import LeaveOneOutSplit
from recsys.data.splits.next_basket import NextBasketSplit
from recsys.data.validation import timestamps_ms
from recsys.errors import EmptyDataError
from recsys.files import read_json

ROWS = st.lists(
    st.tuples(
        st.sampled_from(["u1", "u2", "u3", "u4", "", None]),
        st.sampled_from(["a", "b", "c", "d", None]),
        st.one_of(st.integers(0, 12), st.none(), st.just(10**15)),
        st.sampled_from([None, 1.0, 4.0, 5.0, float("nan")]),
    ),
    max_size=60,
)
SPLITS = st.sampled_from(["global_time", "leave_one_out", "next_basket"])
MINIMUM = st.integers(1, 3)


def prepared(folder: Path, rows: list[tuple[Any, ...]], settings: dict[str, Any]) -> Dataset | None:
    """The dataset, or None where the rows leave nothing to work on."""
    columns = list(zip(*rows, strict=True)) if rows else [[], [], [], []]
    types = [pa.string(), pa.string(), pa.int64(), pa.float64()]
    names = ["user_id", "item_id", "timestamp", "value"]
    arrays = [pa.array(list(column), kind) for column, kind in zip(columns, types, strict=True)]
    pq.write_table(pa.table(arrays, names=names), folder / "log.parquet")
    source = {"kind": "parquet", "path": str(folder / "log.parquet"), "columns": {"value": "value"}, "event": "rating"}
    try:
        return prepare(DataConfig.parse({"source": source, **settings}, where="test"), 0, folder / "out")
    except EmptyDataError:
        return None


@given(rows=ROWS, split=SPLITS, user_minimum=MINIMUM, item_minimum=MINIMUM)
def test_every_row_is_accepted_quarantined_or_filtered(
    rows: list[tuple[Any, ...]], split: str, user_minimum: int, item_minimum: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        filters = {"min_user_interactions": user_minimum, "min_item_interactions": item_minimum}
        dataset = prepared(folder, rows, {"split": {"kind": split}, "filters": filters})
        quarantine = pq.read_table(folder / "out" / "quarantine.parquet")
        assert len(set(quarantine["row"].to_pylist())) == len(quarantine), "a row is refused once"
        if dataset is None:
            return
        report = PreparationReport.parse(read_json(folder / "out" / "preparation.json"), where="test")
    assert report.num_read == len(rows)
    assert sum(report.quarantined.values()) == len(quarantine) == dataset.info.num_quarantined
    assert report.num_read == report.num_accepted + len(quarantine) + sum(report.filtered.values())
    refused = set(quarantine["row"].to_pylist())
    candidates = Counter((row[0], row[1], row[2], row[3]) for n, row in enumerate(rows) if n not in refused)
    users, items = dataset.users["user_id"].to_pylist(), dataset.items["item_id"].to_pylist()
    kept = Counter(
        (users[row["user_idx"]], items[row["item_idx"]], round(row["timestamp"].timestamp() * 1000), row["value"])
        for row in dataset.interactions.to_pylist()
    )
    assert kept <= candidates
    assert sum(candidates.values()) - sum(kept.values()) == sum(report.filtered.values())
    assert min(Counter(dataset.interactions["user_idx"].to_pylist()).values()) >= user_minimum
    assert min(Counter(dataset.interactions["item_idx"].to_pylist()).values()) >= item_minimum
    assert len(set(users)) == len(users)
    assert set(dataset.interactions["user_idx"].to_pylist()) == set(range(len(users)))


@given(rows=ROWS)
def test_order_is_by_user_time_and_original_row(rows: list[tuple[Any, ...]]) -> None:
    numbered = [(user, f"{item}{n}" if item else None, time, value) for n, (user, item, time, value) in enumerate(rows)]
    with tempfile.TemporaryDirectory() as name:
        dataset = prepared(Path(name), numbered, {})
    if dataset is None:
        return
    items = dataset.items["item_id"].to_pylist()
    origin = np.array([int(items[item][1:]) for item in dataset.interactions["item_idx"].to_pylist()])
    keys = list(zip(dataset.log.user_idx.tolist(), dataset.log.timestamp_ms.tolist(), origin.tolist(), strict=True))
    assert keys == sorted(keys)
    firsts = [min(n for user, _, n in keys if user == number) for number in range(dataset.num_users)]
    assert firsts == sorted(firsts), "users are numbered by their first row"
    for user in range(dataset.num_users):
        own = dataset.interactions.filter(pa.compute.equal(dataset.interactions["user_idx"], user))
        assert own["position"].to_pylist() == list(range(len(own)))


LOGS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9), st.booleans()), min_size=1, max_size=60)


def arrays(log: list[tuple[int, int, bool]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    log = sorted(log, key=lambda row: row[:2])
    user, time, positive = zip(*log, strict=True)
    return np.array(user, np.int32), np.array(time, np.int64), np.array(positive, bool)


@given(log=LOGS, valid=st.floats(0.05, 0.45), test=st.floats(0.05, 0.45), basket=st.booleans())
def test_time_splits_have_one_border_for_all(
    log: list[tuple[int, int, bool]], valid: float, test: float, basket: bool
) -> None:
    user, time, positive = arrays(log)
    kind = NextBasketSplit if basket else GlobalTimeSplit
    labels = kind(valid_fraction=valid, test_fraction=test).assign(user, time, positive)
    assert labels.borders_ms is not None
    valid_from, test_from = labels.borders_ms
    np.testing.assert_array_equal(labels.split, (time >= valid_from).astype(int) + (time >= test_from))
    share = (labels.split == Split.TEST).mean()
    assert share >= test - 1e-9, "ties make the later part larger, never smaller"
    kind(valid_fraction=valid, test_fraction=test).check(_table(user, time, positive, labels.split), labels.borders_ms)


@given(log=LOGS, minimum=st.integers(3, 5))
def test_leave_one_out_takes_the_last_two_positives(log: list[tuple[int, int, bool]], minimum: int) -> None:
    user, _, positive = arrays(log)
    split = LeaveOneOutSplit(min_positives=minimum)
    labels = split.assign(user, None, positive).split
    for number in np.unique(user):
        own = user == number
        targets = labels[own & positive]
        if len(targets) >= minimum:
            assert targets.tolist() == [Split.TRAIN] * (len(targets) - 2) + [Split.VALID, Split.TEST]
        else:
            assert not labels[own].any()
        assert (np.diff(labels[own]) >= 0).all()
    split.check(_table(user, None, positive, labels), None)


@given(st.lists(st.datetimes(), min_size=1, max_size=20), st.booleans())
def test_iso_text_and_arrow_timestamps_agree(moments: list[Any], with_garbage: bool) -> None:
    texts = [moment.isoformat() for moment in moments] + (["yesterday"] if with_garbage else [])
    read = timestamps_ms(pa.chunked_array([texts]), "iso").to_pylist()
    typed = timestamps_ms(pa.chunked_array([pa.array(moments, pa.timestamp("us"))]), "iso").to_pylist()
    assert read[: len(moments)] == typed
    assert read[len(moments) :] == [None] * with_garbage


def _table(user: np.ndarray, time: np.ndarray | None, positive: np.ndarray, split: np.ndarray) -> pa.Table:
    position = np.arange(len(user)) - np.searchsorted(user, user)
    columns = {
        "user_idx": user,
        # Each row is another item, so that no row is a duplicate.
        "item_idx": np.arange(len(user)),
        "timestamp": pa.nulls(len(user), pa.int64()) if time is None else time,
        "position": position,
        "event": ["click"] * len(user),
        "value": pa.nulls(len(user), pa.float32()),
        "weight": positive.astype(np.float32),
        "split": split,
    }
    values = [pa.array(columns[field.name]).cast(field.type) for field in schema.PREPARED_INTERACTIONS]
    return pa.table(values, schema=schema.PREPARED_INTERACTIONS)
