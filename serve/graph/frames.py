"""What crosses a hop between the gateway and a stage: flat tuples of plain values, arrays as bytes.

Pickling the dataclasses themselves takes several times as long as everything else that we do for a hop.
Arrays come out read-only; no stage writes into what it is given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from recsys.pipeline.stage import StageOutput
from recsys.types import NO_FILTERS, Candidates, Filters, History, Query, Removal

Frame = tuple[Any, ...]


def pack_call(query: Query, candidates: Candidates) -> Frame:
    """What a stage is asked."""
    filters = query.filters
    return (
        query.request_id,
        query.bundle_id,
        query.now_ms,
        _bytes(query.history.item_idx, np.int32),
        _bytes(query.history.timestamp_ms, np.int64),
        _bytes(query.excluded_item_idx, np.int32),
        query.top_k,
        query.num_candidates,
        None
        if filters.empty
        else (filters.categories_any, filters.categories_none, filters.price_min, filters.price_max),
        query.diversity,
        _pack(candidates),
    )


def unpack_call(frame: Frame) -> tuple[Query, Candidates]:
    """The other end of :func:`pack_call`."""
    request_id, bundle_id, now_ms, history, times, excluded, top_k, num_candidates, filters, diversity, found = frame
    query = Query(
        request_id,
        bundle_id,
        now_ms,
        History(np.frombuffer(history, np.int32), np.frombuffer(times, np.int64)),
        np.frombuffer(excluded, np.int32),
        top_k,
        num_candidates,
        NO_FILTERS if filters is None else Filters(*filters),
        diversity,
    )
    return query, _unpack(found)


def pack_output(output: StageOutput) -> Frame:
    """What a stage answers."""
    return _pack(output.candidates), output.bundle_id, output.busy_ms


def unpack_output(frame: Frame) -> StageOutput:
    """The other end of :func:`pack_output`."""
    found, bundle_id, busy_ms = frame
    return StageOutput(_unpack(found), bundle_id, busy_ms)


def _pack(one: Candidates) -> Frame:
    return (
        _bytes(one.item_idx, np.int32),
        _bytes(one.score, np.float32),
        one.sources,
        _bytes(one.source_bits, np.uint32),
        tuple((stage, _bytes(score, np.float32)) for stage, score in one.stage_scores.items()),
        tuple((_bytes(each.item_idx, np.int32), each.stage, each.reason) for each in one.removed),
        tuple((_bytes(each.item_idx, np.int32), each.stage, each.reason) for each in one.dropped),
    )


def _unpack(frame: Frame) -> Candidates:
    items, score, sources, bits, stage_scores, removed, dropped = frame
    return Candidates(
        np.frombuffer(items, np.int32),
        np.frombuffer(score, np.float32),
        sources,
        np.frombuffer(bits, np.uint32),
        {stage: np.frombuffer(values, np.float32) for stage, values in stage_scores},
        tuple(Removal(np.frombuffer(each, np.int32), stage, reason) for each, stage, reason in removed),
        tuple(Removal(np.frombuffer(each, np.int32), stage, reason) for each, stage, reason in dropped),
    )


def _bytes(array: NDArray[Any], dtype: type[np.generic]) -> bytes:
    return np.asarray(array, dtype).tobytes()
