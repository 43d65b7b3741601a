"""One rule for ids, whichever way they come in."""

from __future__ import annotations

import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import TypeAdapter, ValidationError

from recsys.data.sources.parquet import ParquetSource
from recsys.data.validation import clean_items, validate
from recsys.errors import RequestError
from recsys.events.base import Event, check_events
from recsys.ids import MAX_ID_LENGTH, id_problem
from recsys.pipeline.config import PipelineConfig
from recsys.pipeline.requests import HistoryItem, RecommendRequest, SimilarRequest
from serve.http.wire import Id

LONGEST = "é" * MAX_ID_LENGTH
BAD = {"": "non-empty", LONGEST + "é": "257 characters", "a\0b": "NUL", "a\ud800b": "surrogate"}


@pytest.mark.parametrize("good", ["1", "a/b", "片", " spaced ", LONGEST])
def test_every_border_takes_an_id(good: str) -> None:
    assert id_problem(good) is None
    assert TypeAdapter(Id).validate_python(good) == good
    RecommendRequest(user_id=good, history=[HistoryItem(good)]).check(PipelineConfig())
    check_events([Event(good, good, good, good, 0)])


@pytest.mark.parametrize(("bad", "why"), BAD.items())
def test_every_border_refuses_what_is_no_id(bad: str, why: str) -> None:
    assert why in (id_problem(bad) or "")
    with pytest.raises(ValidationError):
        TypeAdapter(Id).validate_python(bad)
    for request in (RecommendRequest(user_id=bad), RecommendRequest(history=[HistoryItem(bad)]), SimilarRequest(bad)):
        with pytest.raises(RequestError, match=why):
            request.check(PipelineConfig())
    with pytest.raises(RequestError, match=why):
        check_events([Event("e", "u", bad, "click", 0)])


def test_a_number_is_no_id() -> None:
    assert id_problem(7) == "must be a non-empty string, not 7"


def test_rows_with_such_ids_are_refused_with_the_reason(tmp_path: Path) -> None:
    ids = ["ok", LONGEST, LONGEST + "é", "a\0b"]
    log = pa.table({"user_id": ids, "item_id": ids[::-1], "timestamp": [1, 2, 3, 4]})
    pq.write_table(log, tmp_path / "log.parquet")
    source = ParquetSource(path=str(tmp_path / "log.parquet"))
    accepted, rejected = validate(log, source, 0, time.time_ns() // 1_000_000)
    assert accepted["user_id"].to_pylist() == []
    assert rejected["reason"].to_pylist() == [
        "item_id holds a NUL",
        "item_id is longer than 256 characters",
        "user_id is longer than 256 characters",
        "user_id holds a NUL",
    ]
    items, refused, _ = clean_items(pa.table({"item_id": ids}), "test")
    assert items["item_id"].to_pylist() == ids[:2]
    assert refused["reason"].to_pylist() == ["item_id is longer than 256 characters", "item_id holds a NUL"]
