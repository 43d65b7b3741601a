from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from recsys.data import id_map as module
from recsys.data.id_map import IdMap, fingerprint_ids
from recsys.errors import SchemaError


def test_finds_every_id_and_nothing_else():
    ids = [f"item-{row}" for row in range(2000)] + ["", "é", "日本", "a b"]
    id_map = IdMap.build(pa.array(ids))
    assert id_map.rows(ids).tolist() == list(range(len(ids)))
    assert id_map.rows(["item-7", "nope", "item-7", "ite", "item-70000"]).tolist() == [7, -1, 7, -1, -1]
    assert id_map.rows([]).tolist() == []
    assert id_map.take(np.array([3, 2001], np.int32)) == ["item-3", "é"]


def test_an_unpaired_surrogate_is_an_unknown_id():
    assert IdMap.build(pa.array(["a", "b"])).rows(["\ud800", "b"]).tolist() == [-1, 1]


@pytest.mark.parametrize("num_hashes", [1, 3])
def test_colliding_hashes_are_told_apart_by_the_string(monkeypatch: pytest.MonkeyPatch, num_hashes: int):
    monkeypatch.setattr(module, "_hashes", lambda ids: np.array([len(i) % num_hashes for i in ids], np.uint64))
    ids = [f"{'x' * (row % 5)}{row}" for row in range(60)]
    id_map = IdMap.build(pa.array(ids))
    assert id_map.rows([*ids, "other", "y"]).tolist() == [*range(60), -1, -1]
    with pytest.raises(SchemaError, match="rows 0 and 2 have the same id 'a'"):
        IdMap.build(pa.array(["a", "b", "a"]))


def test_refuses_null_and_repeated_ids():
    with pytest.raises(SchemaError, match="rows 1 and 3 have the same id 'b'"):
        IdMap.build(pa.array(["a", "b", "c", "b"]))
    with pytest.raises(SchemaError, match="row 1: the id is null"):
        IdMap.build(pa.array(["a", None]))


def test_an_empty_map_knows_nothing():
    id_map = IdMap.build(pa.array([], pa.string()))
    assert id_map.rows(["a"]).tolist() == [-1]


def test_works_on_slices_and_chunks():
    whole = pa.array(["x", "a", "b", "c"])
    id_map = IdMap.build(pa.chunked_array([whole.slice(1, 2), whole.slice(3)]))
    assert id_map.rows(["a", "b", "c", "x"]).tolist() == [0, 1, 2, -1]


def test_fingerprint_is_the_one_that_preparation_writes():
    ids = pa.array([f"é{row}" for row in range(70_000)])
    assert IdMap.build(ids).fingerprint() == fingerprint_ids(pa.chunked_array([ids]))
    assert IdMap.build(pa.array(["ab", "c"])).fingerprint() != IdMap.build(pa.array(["a", "bc"])).fingerprint()
