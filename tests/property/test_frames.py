"""What a hop carries arrives as it was sent, as plain values alone."""

from __future__ import annotations

import pickle
from dataclasses import fields
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from recsys.pipeline.stage import StageOutput
from recsys.types import NO_FILTERS, Candidates, Filters, History, Query, Removal
from serve.graph.frames import pack_call, pack_output, unpack_call, unpack_output

texts = st.text(max_size=8)
numbers = st.none() | st.floats(0, 1e6)


def array(dtype: type, size: int | None = None) -> st.SearchStrategy[Any]:
    return arrays.arrays(dtype, st.integers(0, 20) if size is None else size)


removals = st.lists(st.builds(Removal, array(np.int32), texts, texts), max_size=3).map(tuple)
categories = st.lists(texts, max_size=3).map(tuple)
queries = st.integers(0, 20).flatmap(
    lambda length: st.builds(
        Query,
        request_id=texts,
        bundle_id=texts,
        now_ms=st.integers(0, 2**50),
        history=st.builds(History, array(np.int32, length), array(np.int64, length)),
        excluded_item_idx=array(np.int32),
        top_k=st.integers(1, 1000),
        num_candidates=st.integers(1, 1000),
        filters=st.just(NO_FILTERS) | st.builds(Filters, categories, categories, numbers, numbers),
        diversity=st.none() | st.floats(0, 1),
    )
)
candidates = st.integers(0, 20).flatmap(
    lambda size: st.builds(
        Candidates,
        item_idx=array(np.int32, size),
        score=array(np.float32, size),
        sources=st.lists(texts, max_size=3).map(tuple),
        source_bits=array(np.uint32, size),
        stage_scores=st.dictionaries(texts, array(np.float32, size), max_size=3),
        removed=removals,
        dropped=removals,
    )
)


def same(sent: Any, received: Any) -> bool:
    if isinstance(sent, np.ndarray):
        return sent.dtype == received.dtype and np.array_equal(sent, received, equal_nan=sent.dtype.kind == "f")
    if isinstance(sent, dict):
        return list(sent) == list(received) and all(same(sent[key], received[key]) for key in sent)
    if isinstance(sent, tuple):
        return len(sent) == len(received) and all(map(same, sent, received))
    if isinstance(sent, Query | History | Candidates | Removal | StageOutput):
        pairs = ((getattr(sent, field.name), getattr(received, field.name)) for field in fields(sent))
        return type(sent) is type(received) and all(same(*pair) for pair in pairs)
    return sent == received


def plain(frame: Any) -> bool:
    return all(map(plain, frame)) if type(frame) is tuple else type(frame) in (str, bytes, int, float, type(None))


@given(queries, candidates)
def test_a_call_arrives_as_it_was_sent(query: Query, found: Candidates) -> None:
    frame = pack_call(query, found)
    assert plain(frame)
    assert same((query, found), unpack_call(pickle.loads(pickle.dumps(frame))))


@given(candidates, texts, st.floats(0, 1e4))
def test_an_output_arrives_as_it_was_sent(found: Candidates, bundle_id: str, busy_ms: float) -> None:
    sent = StageOutput(found, bundle_id, busy_ms)
    frame = pack_output(sent)
    assert plain(frame)
    assert same(sent, unpack_output(pickle.loads(pickle.dumps(frame))))
