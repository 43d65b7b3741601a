"""Small catalogues, queries and stages to test a stage, a runner or an application with."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from recsys import schema
from recsys.pipeline.stage import RANKING, RETRIEVAL, Stage
from recsys.types import Candidates, Filters, History, Query


def items_table(
    num_items: int,
    *,
    categories: Sequence[Sequence[str]] | None = None,
    creators: Sequence[str | None] | None = None,
    prices: Sequence[float | None] | None = None,
    available: Sequence[bool] | None = None,
) -> pa.Table:
    """``ITEMS`` rows ``i0``, ``i1``, ... with titles ``Item 0``, ``Item 1``, ...; available unless said otherwise."""
    columns: dict[str, Any] = {
        "item_id": [f"i{row}" for row in range(num_items)],
        "title": [f"Item {row}" for row in range(num_items)],
        "description": [None] * num_items,
        "categories": [[]] * num_items if categories is None else categories,
        "creator": [None] * num_items if creators is None else creators,
        "price": [None] * num_items if prices is None else prices,
        "created_at": [None] * num_items,
        "available": [True] * num_items if available is None else available,
        "image": [None] * num_items,
    }
    return pa.table(columns, schema=schema.ITEMS)


def make_query(
    *,
    history: Sequence[int] = (),
    excluded: Sequence[int] = (),
    top_k: int = 10,
    num_candidates: int = 50,
    filters: Filters | None = None,
    diversity: float | None = None,
    bundle_id: str = "bundle",
    request_id: str = "test",
    now_ms: int = 0,
) -> Query:
    """A query, at the beginning of 1970 unless said otherwise."""
    return Query(
        request_id=request_id,
        bundle_id=bundle_id,
        now_ms=now_ms,
        history=History(np.array(history, np.int32), np.arange(len(history), dtype=np.int64)),
        excluded_item_idx=np.array(excluded, np.int32),
        top_k=top_k,
        num_candidates=num_candidates,
        filters=filters or Filters(),
        diversity=diversity,
    )


class FunctionStage:
    """A stage made of a function of one query and its candidates."""

    def __init__(
        self, name: str, function: Callable[[Query, Candidates], Candidates], *, bundle_id: str = "bundle"
    ) -> None:
        self.name = name
        self.bundle_id = bundle_id
        self.function = function
        self.calls = 0

    def run_batch(self, queries: Sequence[Query], candidates: Sequence[Candidates]) -> list[Candidates]:
        self.calls += 1
        return [self.function(query, found) for query, found in zip(queries, candidates, strict=True)]


def retrieves(*item_idx: int) -> FunctionStage:
    """A retrieval stage that always finds these items, in this order, whatever the rules say."""
    found = np.array(item_idx, np.int32)
    score = np.linspace(1.0, 0.5, len(found), dtype=np.float32)
    return FunctionStage(
        RETRIEVAL, lambda _query, _candidates: Candidates.from_source("fake", found, score, stage=RETRIEVAL)
    )


def ranks_backwards() -> FunctionStage:
    """A ranking stage that turns the order round."""

    def rank(_query: Query, candidates: Candidates) -> Candidates:
        return candidates.scored(RANKING, np.arange(len(candidates), dtype=np.float32))

    return FunctionStage(RANKING, rank)


def raises(name: str, error: BaseException | None = None) -> FunctionStage:
    """A stage that fails."""

    def fail(_query: Query, _candidates: Candidates) -> Candidates:
        raise error or RuntimeError(f"{name} is broken")

    return FunctionStage(name, fail)


def sleeps(stage: Stage, seconds: float) -> FunctionStage:
    """The same stage, too slow."""

    def slow(query: Query, candidates: Candidates) -> Candidates:
        time.sleep(seconds)
        return stage.run_batch([query], [candidates])[0]

    return FunctionStage(stage.name, slow, bundle_id=stage.bundle_id)
