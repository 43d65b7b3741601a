"""The flat index where FAISS is not installed, held against FAISS's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from recsys.errors import ModelError, NotInstalledError
from recsys.files import read_json, write_json
from recsys.index import base, exact, load_index
from recsys.index.flat import FlatIndex
from recsys.index.hnsw import HnswIndex
from recsys.index.ivf import IvfIndex

NUM_ITEMS, DIM = 400, 8


@pytest.fixture
def no_faiss(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    base.faiss.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "faiss", None)
        yield
    base.faiss.cache_clear()


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(NUM_ITEMS, DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def coarse() -> np.ndarray:
    """Small whole numbers: many items tie, and every inner product is exact."""
    return np.random.default_rng(1).integers(-1, 2, size=(NUM_ITEMS, DIM)).astype(np.float32)


MASKS = {
    "all": None,
    "half": np.arange(NUM_ITEMS) % 2 == 1,
    "few": np.arange(NUM_ITEMS) > NUM_ITEMS - 6,
    "none": np.zeros(NUM_ITEMS, bool),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("k", [1, 7, NUM_ITEMS + 2])
def test_same_answers_as_faiss(vectors: np.ndarray, coarse: np.ndarray, mask: str, k: int, tmp_path: Path) -> None:
    for items in (vectors, coarse):
        queries = np.vstack([items[:30], -items[:3], np.zeros((1, DIM), np.float32)])
        expected = FlatIndex().build(items).search(queries, k, MASKS[mask])
        found = exact.ExactIndex(FlatIndex(), items).search(queries, k, MASKS[mask])
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(found[1], expected[1])


def test_many_queries_are_searched_a_few_at_a_time(vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    index = exact.ExactIndex(FlatIndex(), vectors)
    expected = index.search(vectors[:50], 5)
    monkeypatch.setattr(exact, "_MAX_SCORES", 3 * NUM_ITEMS)
    for found, whole in zip(index.search(vectors[:50], 5), expected, strict=True):
        np.testing.assert_allclose(found, whole, rtol=1e-5)


@pytest.mark.usefixtures("no_faiss")
def test_without_faiss_flat_is_built_by_numpy(vectors: np.ndarray, tmp_path: Path) -> None:
    index = FlatIndex().build(vectors)
    assert isinstance(index, exact.ExactIndex)
    index.save(tmp_path)
    again = load_index(tmp_path)
    assert isinstance(again, exact.ExactIndex)
    for before, after in zip(index.search(vectors[:9], 5), again.search(vectors[:9], 5), strict=True):
        np.testing.assert_array_equal(before, after)
    np.testing.assert_array_equal(again.vectors(), vectors)


def test_both_write_the_same_file_and_read_the_others(
    vectors: np.ndarray, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    FlatIndex().build(vectors).save(tmp_path / "faiss")
    exact.ExactIndex(FlatIndex(), vectors).save(tmp_path / "numpy")
    for name in ("index.faiss", "index.json"):
        assert (tmp_path / "faiss" / name).read_bytes() == (tmp_path / "numpy" / name).read_bytes()
    np.testing.assert_array_equal(load_index(tmp_path / "numpy").vectors(), vectors)
    request.getfixturevalue("no_faiss")
    found = load_index(tmp_path / "faiss")
    assert isinstance(found, exact.ExactIndex)
    np.testing.assert_array_equal(found.vectors(), vectors)


@pytest.mark.parametrize("config", [IvfIndex(), HnswIndex()])
def test_the_others_say_what_to_install(
    config: base.IndexConfig, vectors: np.ndarray, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config.build(vectors).save(tmp_path)
    request.getfixturevalue("no_faiss")
    for work in (lambda: config.build(vectors), lambda: load_index(tmp_path)):
        with pytest.raises(NotInstalledError, match=rf"{config.kind}.*pip install 'recsys-ray\[cpu\]'.*flat"):
            work()


@pytest.mark.usefixtures("no_faiss")
def test_a_gpu_needs_faiss(vectors: np.ndarray) -> None:
    with pytest.raises(NotInstalledError, match=r"recsys-ray\[gpu\]"):
        FlatIndex(device="gpu").build(vectors)


@pytest.mark.parametrize("damage", ["not an index", "cut", "longer", "of another kind"])
def test_broken_files_are_refused(damage: str, vectors: np.ndarray, tmp_path: Path, request) -> None:
    (IvfIndex() if damage == "of another kind" else FlatIndex()).build(vectors).save(tmp_path)
    info = read_json(tmp_path / "index.json")
    write_json(tmp_path / "index.json", {**info, "config": FlatIndex().model_dump()})
    path = tmp_path / "index.faiss"
    content = path.read_bytes()
    changed = {"not an index": b"nothing", "cut": content[:-4], "longer": content + b"1234"}
    path.write_bytes(changed.get(damage, content))
    request.getfixturevalue("no_faiss")
    with pytest.raises(ModelError, match=r"index\.faiss: not a readable flat FAISS index"):
        load_index(tmp_path)
