"""Every kind of index keeps the same promises."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from recsys.errors import ConfigError, ModelError
from recsys.files import read_json, write_json
from recsys.index import KINDS, IndexConfig, load_index
from recsys.index.flat import FlatIndex
from recsys.index.hnsw import HnswIndex
from recsys.index.ivf import IvfIndex
from recsys.testing.samples import sample_of

NUM_ITEMS, DIM = 2003, 24


@dataclass
class Case:
    config: IndexConfig
    min_recall: float
    score_tolerance: float


VARIANTS = {
    "ivf-exact-codes": Case(IvfIndex(codec="flat"), 0.6, 1e-4),
    "ivf-one-probe": Case(IvfIndex(num_lists=20, num_probes=1, exhaustive_below=0.0), 0.05, 0.05),
}


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(NUM_ITEMS, DIM)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(7, DIM)).astype(np.float32)


@pytest.fixture(scope="module", params=[*KINDS.names, *VARIANTS])
def case(request, tmp_path_factory):
    if request.param in VARIANTS:
        return VARIANTS[request.param]
    config = sample_of(KINDS.get(request.param), tmp_path_factory.mktemp("sample"))
    return Case(config, config.min_recall, config.score_tolerance)


@pytest.fixture(scope="module")
def built(case, vectors):
    return case.config.build(vectors)


@pytest.fixture(params=KINDS.names)
def sample(request, tmp_path):
    return sample_of(KINDS.get(request.param), tmp_path)


def exact_top(queries, vectors, k, allowed=None):
    scores = queries @ vectors.T
    if allowed is not None:
        scores = np.where(allowed, scores, -np.inf)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def test_shapes_types_and_order(built, queries):
    scores, items = built.search(queries, 10)
    assert scores.shape == items.shape == (7, 10)
    assert scores.dtype == np.float32
    assert items.dtype == np.int32
    assert (np.diff(scores, axis=1) <= 0).all()
    assert all(len(set(row)) == 10 for row in items.tolist())
    assert items.min() >= 0
    assert items.max() < NUM_ITEMS


def test_scores_are_inner_products(case, built, vectors, queries):
    scores, items = built.search(queries, 10)
    expected = np.einsum("bd,bkd->bk", queries, vectors[items])
    np.testing.assert_allclose(scores, expected, atol=case.score_tolerance)


def test_recall(case, built, vectors, queries):
    _, items = built.search(queries, 20)
    expected = exact_top(queries, vectors, 20)
    recall = np.mean([len(set(a) & set(b)) / 20 for a, b in zip(items.tolist(), expected.tolist(), strict=True)])
    assert recall >= case.min_recall


def test_mask_is_obeyed(built, queries):
    allowed = np.random.default_rng(2).random(NUM_ITEMS) < 0.5
    _, items = built.search(queries, 50, allowed)
    assert allowed[items].all()


@pytest.mark.parametrize("num_allowed", [1, 5, 60])
def test_a_narrow_mask_never_comes_up_short(built, vectors, queries, num_allowed):
    allowed = np.zeros(NUM_ITEMS, bool)
    allowed[np.random.default_rng(3).choice(NUM_ITEMS, num_allowed, replace=False)] = True
    scores, items = built.search(queries, 40, allowed)
    found = min(40, num_allowed)
    assert (items[:, :found] >= 0).all()
    assert allowed[items[:, :found]].all()
    assert (items[:, found:] == -1).all()
    assert np.isneginf(scores[:, found:]).all()
    if found == num_allowed:
        assert all(set(row[:found]) == set(np.flatnonzero(allowed)) for row in items.tolist())


def test_nothing_allowed(built, queries):
    scores, items = built.search(queries, 3, np.zeros(NUM_ITEMS, bool))
    assert (items == -1).all()
    assert np.isneginf(scores).all()


def test_k_above_the_number_of_items(built, queries):
    _, items = built.search(queries, NUM_ITEMS + 5)
    assert (np.sort(items[:, :NUM_ITEMS], axis=1) == np.arange(NUM_ITEMS)).all()
    assert (items[:, NUM_ITEMS:] == -1).all()


def test_no_queries(built):
    scores, items = built.search(np.zeros((0, DIM), np.float32), 3)
    assert scores.shape == items.shape == (0, 3)


def test_saved_and_mapped_index_answers_the_same(built, queries, tmp_path):
    built.save(tmp_path)
    loaded = load_index(tmp_path)
    assert loaded.config == built.config
    assert (loaded.num_items, loaded.dim) == (NUM_ITEMS, DIM)
    allowed = np.arange(NUM_ITEMS) % 3 == 0
    for mask in (None, allowed, np.arange(NUM_ITEMS) < 12):
        for before, after in zip(built.search(queries, 15, mask), loaded.search(queries, 15, mask), strict=True):
            np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    ("queries", "k", "allowed"),
    [
        (np.zeros((1, DIM + 1), np.float32), 1, None),
        (np.zeros(DIM, np.float32), 1, None),
        (np.zeros((1, DIM), np.float32), 0, None),
        (np.zeros((1, DIM), np.float32), 1, np.ones(NUM_ITEMS - 1, bool)),
        (np.zeros((1, DIM), np.float32), 1, np.ones(NUM_ITEMS, np.uint8)),
    ],
)
def test_misuse_is_refused(built, queries, k, allowed):
    with pytest.raises(ModelError):
        built.search(queries, k, allowed)


@pytest.mark.parametrize("num_items", [1, 2, 50])
def test_tiny_catalogues(sample, num_items, vectors, queries):
    _, items = sample.build(vectors[:num_items]).search(queries, num_items)
    np.testing.assert_array_equal(np.sort(items, axis=1), np.tile(np.arange(num_items), (7, 1)))


def test_unusable_vectors_are_refused(sample, vectors):
    broken = vectors.copy()
    broken[17, 3] = np.nan
    with pytest.raises(ModelError, match="item_idx 17"):
        sample.build(broken)
    with pytest.raises(ModelError, match="shape"):
        sample.build(vectors[:0])


def test_flat_is_exact_and_breaks_ties_by_item_idx(queries):
    few = np.random.default_rng(4).integers(-1, 2, size=(500, 4)).astype(np.float32)
    coarse = np.random.default_rng(5).integers(-1, 2, size=(9, 4)).astype(np.float32)
    index = FlatIndex().build(few)
    for allowed in (None, np.arange(500) % 2 == 1, np.arange(500) > 490):
        expected = exact_top(coarse, few, 7, allowed)
        np.testing.assert_array_equal(index.search(coarse, 7, allowed)[1], expected)


def test_exhaustive_search_of_hnsw_is_exact(vectors, queries):
    allowed = np.arange(NUM_ITEMS) % 40 == 0
    _, items = HnswIndex(search_effort=1).build(vectors).search(queries, 10, allowed)
    np.testing.assert_array_equal(items, exact_top(queries, vectors, 10, allowed))


def test_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="flat"):
        KINDS.parse({"kind": "annoy"}, where="test.yaml")


def test_broken_folders_are_refused(vectors, tmp_path):
    with pytest.raises(ModelError, match=r"index\.json"):
        load_index(tmp_path)
    FlatIndex().build(vectors).save(tmp_path)
    info = read_json(tmp_path / "index.json")
    write_json(tmp_path / "index.json", {**info, "num_items": 1})
    with pytest.raises(ModelError, match="2003"):
        load_index(tmp_path)
    write_json(tmp_path / "index.json", info)
    (tmp_path / "index.faiss").write_bytes(b"not an index")
    with pytest.raises(ModelError, match="not a readable"):
        load_index(tmp_path)


def test_gpu_without_a_gpu_is_refused(vectors):
    import faiss

    if getattr(faiss, "get_num_gpus", int)():
        pytest.skip("this machine has a GPU that FAISS can use")
    with pytest.raises(ModelError, match="GPU"):
        FlatIndex(device="gpu").build(vectors)
