"""Embedding in one process: parts, what an interruption leaves, and putting parts in order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs._ray import ComputeConfig
from jobs.artifacts import Embedded
from jobs.steps import embed
from recsys.errors import DataError


def part(path, item_idx, seed=0):
    vectors = np.random.default_rng(seed).normal(size=(len(item_idx), 3)).astype(np.float32)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 3)
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"item_idx": pa.array(item_idx, pa.int32()), "vector": column}), path)
    return vectors


def test_parts_are_put_in_order_and_doubles_count_once(tmp_path):
    first = part(tmp_path / "v" / "b.parquet", [4, 0, 2])
    part(tmp_path / "v" / "c.parquet", [1, 3], seed=1)
    part(tmp_path / "v" / "d.parquet", [4, 0, 2])
    assert embed.consolidate(tmp_path / "v", tmp_path / Embedded.FILE, 5) == 3
    assert pq.read_table(tmp_path / Embedded.FILE)["item_idx"].to_pylist() == [0, 1, 2, 3, 4]
    vectors = Embedded("embed", "key", tmp_path).vectors()
    assert (vectors.shape, vectors.dtype) == ((5, 3), np.float32)
    np.testing.assert_array_equal(vectors[[4, 0, 2]], first)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [Embedded.FILE]


def test_a_missing_vector_is_an_error(tmp_path):
    part(tmp_path / "v" / "a.parquet", [0, 2])
    with pytest.raises(DataError, match="item_idx 1 has no vector"):
        embed.consolidate(tmp_path / "v", tmp_path / "out.parquet", 3)
    assert not (tmp_path / "out.parquet").exists()
    with pytest.raises(DataError, match="no vectors"):
        embed.consolidate(tmp_path, tmp_path / "out.parquet", 3)


def test_parts_grow_with_the_catalogue():
    assert embed.part_rows(10) == embed.part_rows(1_000_000) == 1024
    assert embed.part_rows(10_000_000) == 10_000
    assert embed.part_rows(10**9) == 65536


def test_only_missing_parts_are_embedded(tmp_path, monkeypatch):
    calls: list[str] = []

    class Fake:
        def __init__(self, **kwargs):
            pass

        def make(self, part):
            calls.append(Path(part).name)
            return 1

    monkeypatch.setattr(embed, "Embedder", Fake)
    for number in range(3):
        part(tmp_path / "t" / f"part-{number}.parquet", [number])
    part(tmp_path / "v" / "part-1.parquet", [1])
    embed.embed_parts(tmp_path / "t", tmp_path / "v", {}, ComputeConfig(num_workers=0))
    assert calls == ["part-0.parquet", "part-2.parquet"]
