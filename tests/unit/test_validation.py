"""Good rows are converted, each bad row is refused for its reason, and a bad table is an error that says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys import schema
from recsys.data import validation
from recsys.data.sources.base import Source, TimestampEncoding
from recsys.data.validation import Quarantine, clean_items, equal_pairs, timestamps_ms, validate
from recsys.errors import SchemaError

NOW = 1_700_000_000_000


class TableSource(Source):
    """A source of one table, for tests."""

    kind: Literal["table"] = "table"
    timed: bool = True
    encoding: TimestampEncoding = "ms"

    @property
    def has_time(self) -> bool:
        return self.timed

    @property
    def timestamp_encoding(self) -> TimestampEncoding:
        return self.encoding

    def read(self) -> Iterator[pa.Table]:
        yield from ()

    def items(self) -> pa.Table | None:
        return None

    def fingerprint(self) -> str:
        return ""


def check(columns: dict[str, Any], source: Source | None = None, first_row: int = 0) -> tuple[pa.Table, dict[int, str]]:
    """The accepted table, and the reason per refused row number."""
    good, bad = validate(pa.table(columns), source or TableSource(), first_row, NOW)
    reasons = dict(zip(bad["row"].to_pylist(), bad["reason"].to_pylist(), strict=True))
    assert sorted(good["row"].to_pylist() + list(reasons)) == list(range(first_row, first_row + len(good) + len(bad)))
    return good, reasons


def test_each_bad_row_is_refused_for_its_reason() -> None:
    good, reasons = check(
        {
            "user_id": ["u", None, "  ", "u", "u", "u", "u", "u", "u", "u", "u", "u"],
            "item_id": ["i", "i", "i", "", "i", "i", "i", "i", "i", "i", "i", "i"],
            "timestamp": ["1", "1", "1", "1", "", "tomorrow", str(NOW + 1), "1", "1", "1", "1", "1e400"],
            "value": ["1.5", "1", "1", "1", "1", "1", "1", "many", "nan", "1e39", "", "1"],
            "event": ["rating"] * 10 + [None, "rating"],
        },
        first_row=100,
    )
    assert good["row"].to_pylist() == [100]
    assert reasons == {
        101: validation.MISSING_USER,
        102: validation.MISSING_USER,
        103: validation.MISSING_ITEM,
        104: validation.MISSING_TIMESTAMP,
        105: validation.UNPARSABLE_TIMESTAMP,
        106: validation.FUTURE_TIMESTAMP,
        107: validation.UNPARSABLE_VALUE,
        108: validation.NOT_FINITE_VALUE,
        109: validation.NOT_FINITE_VALUE,
        110: validation.MISSING_EVENT,
        111: validation.UNPARSABLE_TIMESTAMP,
    }


def test_accepted_rows_have_the_types_of_the_contract() -> None:
    good, reasons = check(
        {"user_id": [1, 2], "item_id": [7, 8], "timestamp": [NOW, -5], "value": pa.array([True, None])}
    )
    assert not reasons
    assert good.schema.field("user_id").type == pa.string()
    assert good.to_pylist() == [
        {
            "row": 0,
            "user_id": "1",
            "item_id": "7",
            "event": "interaction",
            "timestamp": NOW,
            "position": None,
            "value": 1,
        },
        {
            "row": 1,
            "user_id": "2",
            "item_id": "8",
            "event": "interaction",
            "timestamp": -5,
            "position": None,
            "value": None,
        },
    ]
    assert good.schema.field("value").type == pa.float32()


def test_the_last_millisecond_is_not_the_future() -> None:
    _, reasons = check({"user_id": ["u", "u"], "item_id": ["i", "i"], "timestamp": [NOW, NOW + 1]})
    assert reasons == {1: validation.FUTURE_TIMESTAMP}


def test_nan_in_floats_is_refused_and_null_is_not() -> None:
    columns = {"user_id": ["u"] * 3, "item_id": ["i"] * 3, "timestamp": [1.0, float("nan"), 2.5]}
    good, reasons = check({**columns, "value": pa.array([None, 1.0, float("inf")], pa.float64())})
    assert reasons == {1: validation.UNPARSABLE_TIMESTAMP, 2: validation.NOT_FINITE_VALUE}
    assert good["value"].to_pylist() == [None]


def test_positions_are_integers() -> None:
    columns = {"user_id": ["u"] * 4, "item_id": ["i"] * 4, "position": ["3", "1.5", "x", None]}
    good, reasons = check(columns, TableSource(timed=False))
    assert good["position"].to_pylist() == [3]
    assert good["timestamp"].null_count == 1
    assert reasons == dict.fromkeys([1, 2, 3], validation.UNPARSABLE_POSITION)


def test_what_the_source_refuses_keeps_its_reason_first() -> None:
    columns = {"user_id": [None, "u"], "item_id": ["i", "i"], "timestamp": [1, 1], "rejected": ["cancelled", None]}
    _, reasons = check(columns)
    assert reasons == {0: "cancelled"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"item_id": ["i"], "timestamp": [1]}, "missing column.*user_id"),
        ({"user_id": ["u"], "item_id": ["i"]}, "missing column.*timestamp"),
        ({"user_id": ["u"], "item_id": ["i"], "timestamp": [1], "stars": [5]}, "extra column.*stars"),
        ({"user_id": [1.5], "item_id": ["i"], "timestamp": [1]}, "user_id: the column holds double.*text or integers"),
        ({"user_id": ["u"], "item_id": [["i"]], "timestamp": [1]}, "item_id: the column holds list"),
        ({"user_id": ["u"], "item_id": ["i"], "timestamp": [[1]]}, "timestamp: the column holds list"),
        ({"user_id": ["u"], "item_id": ["i"], "timestamp": [1], "value": [{"a": 1}]}, "value: .* must hold numbers"),
        ({"user_id": ["u"], "item_id": ["i"], "timestamp": [1], "event": [3]}, "event: .* must hold text"),
    ],
)
def test_a_table_of_the_wrong_form_is_a_schema_error(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemaError, match=message):
        check(columns)


def test_numbers_where_iso_text_is_expected() -> None:
    with pytest.raises(SchemaError, match="timestamp_unit"):
        check({"user_id": ["u"], "item_id": ["i"], "timestamp": [1]}, TableSource(encoding="iso"))


ISO = {
    "1970-01-01": 0,
    "1970-01-01T00:00:01": 1000,
    "1970-01-01 00:00:01.0005": 1000,
    "1970-01-01T00:00:01Z": 1000,
    "1970-01-01T02:00:01+02:00": 1000,
    "1969-12-31T23:59:59.9995": -1,
    " 2023-11-14T22:13:20Z ": 1_700_000_000_000,
}


@pytest.mark.parametrize("broken", [False, True], ids=["all readable", "one unreadable"])
def test_iso_timestamps(broken: bool) -> None:
    texts = [*ISO, *(["14/11/2023"] if broken else [])]
    found = timestamps_ms(pa.chunked_array([texts]), "iso").to_pylist()
    assert found == [*ISO.values(), *([None] if broken else [])]


@pytest.mark.parametrize(
    ("column", "encoding", "expected"),
    [
        (pa.array([1, None]), "s", [1000, None]),
        (pa.array([1.0015, -0.0005]), "s", [1001, -1]),
        (pa.array(["1500", "x"]), "us", [1, None]),
        (pa.array([1_700_000_000_000]), "ms", [1_700_000_000_000]),
        (pa.array([2**62]), "s", [None]),
        (pa.array([1_999, -1], pa.timestamp("us")), "iso", [1, -1]),
        (pa.array([1_999_999, -1], pa.timestamp("ns", "Europe/Berlin")), "s", [1, -1]),
        (pa.array([2], pa.date32()), "s", [172_800_000]),
    ],
)
def test_other_timestamps(column: pa.Array, encoding: TimestampEncoding, expected: list[int | None]) -> None:
    assert timestamps_ms(pa.chunked_array([column]), encoding).to_pylist() == expected


def test_quarantine_keeps_fields_as_they_were_found(tmp_path: Path) -> None:
    raw = pa.table({"user_id": [1, None], "item_id": ["a", "b"], "timestamp": [5, 6], "value": [0.5, float("nan")]})
    with Quarantine.create(tmp_path / "q.parquet") as quarantine:
        quarantine.add(validate(raw, TableSource(), 10, NOW)[1])
        quarantine.add(pa.table({"row": [3], "reason": ["malformed"], "line": ["a,b"]}))
    table = pq.read_table(tmp_path / "q.parquet")
    assert table.schema.equals(validation.QUARANTINE)
    assert table.to_pylist() == [
        {
            "row": 11,
            "reason": validation.MISSING_USER,
            "user_id": None,
            "item_id": "b",
            "timestamp": "6",
            "position": None,
            "event": None,
            "value": "nan",
            "line": None,
        },
        {**dict.fromkeys(validation.QUARANTINE.names), "row": 3, "reason": "malformed", "line": "a,b"},
    ]
    assert quarantine.counts == {validation.MISSING_USER: 1, "malformed": 1}


def test_quarantine_of_a_failed_run_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Quarantine.create(tmp_path / "q.parquet"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_catalogue_is_completed_and_its_bad_rows_refused() -> None:
    raw = pa.table(
        {
            "item_id": ["a", "b", "a", None, "c", "d", "e", "f"],
            "title": ["A", " ", "again", "x", None, "D", "E", "F"],
            "price": ["1.5", "", "1", "1", "2", "cheap", "inf", "3"],
            "available": ["true", "0", "1", "1", None, "1", "1", "perhaps"],
            "created_at": ["2024-01-01", None, None, None, "", None, None, None],
            "categories": [["x", None], None, [], [], [], [], [], []],
        }
    )
    items, rejected, untitled = clean_items(raw, "test")
    assert items.schema.equals(schema.ITEMS)
    assert items.select(["item_id", "title", "price", "available", "categories"]).to_pylist() == [
        {"item_id": "a", "title": "A", "price": 1.5, "available": True, "categories": ["x"]},
        {"item_id": "b", "title": "b", "price": None, "available": False, "categories": []},
        {"item_id": "c", "title": "c", "price": 2.0, "available": True, "categories": []},
    ]
    assert items["created_at"].cast(pa.int64()).to_pylist() == [1_704_067_200_000, None, None]
    assert untitled == 2
    assert dict(zip(rejected["row"].to_pylist(), rejected["reason"].to_pylist(), strict=True)) == {
        2: validation.DUPLICATE_ITEM,
        3: validation.MISSING_ITEM,
        5: "price is unreadable",
        6: "price is NaN or infinite",
        7: "available is unreadable",
    }


def test_catalogue_of_the_wrong_form() -> None:
    with pytest.raises(SchemaError, match="no column item_id"):
        clean_items(pa.table({"title": ["A"]}), "test")
    with pytest.raises(SchemaError, match=r"extra column.*colour"):
        clean_items(pa.table({"item_id": ["a"], "colour": ["red"]}), "test")
    with pytest.raises(SchemaError, match=r"categories: .* lists of text"):
        clean_items(pa.table({"item_id": ["a"], "categories": ["x"]}), "test")
    with pytest.raises(SchemaError, match=r"title: .* must hold text"):
        clean_items(pa.table({"item_id": ["a"], "title": [1]}), "test")


def test_no_catalogue_is_an_empty_one() -> None:
    items, rejected, untitled = clean_items(None, "test")
    assert (len(items), len(rejected), untitled) == (0, 0, 0)
    assert items.schema.equals(schema.ITEMS)


def test_equal_pairs_finds_every_repeat_once() -> None:
    nan = float("nan")
    user = np.array([0, 0, 0, 0, 0, 1, 1])
    item = np.array([5, 6, 5, 5, 5, 5, 5])
    time = np.array([1, 1, 1, 1, 2, 2, 2])
    event = np.zeros(7, np.int32)
    value = np.array([nan, 1, nan, nan, nan, 0.0, -0.0], np.float32)
    earlier, later = equal_pairs(user, item, time, event, value)
    assert sorted(zip(earlier.tolist(), later.tolist(), strict=True)) == [(0, 2), (2, 3), (5, 6)]
    empty = np.zeros(0, np.int64)
    assert len(equal_pairs(empty, empty, empty, empty, empty.astype(np.float32))[0]) == 0
