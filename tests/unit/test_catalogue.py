from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recsys.data.catalogue import Catalogue, contains
from recsys.errors import BundleMismatchError, SchemaError
from recsys.pipeline.popular import PopularItems
from recsys.testing.pipeline import items_table
from recsys.types import Filters

NOTHING = np.zeros(0, np.int32)


@pytest.fixture(params=["built", "loaded"])
def catalogue(request: pytest.FixtureRequest, tmp_path: Path) -> Catalogue:
    items = items_table(
        6,
        categories=[["comedy"], ["comedy", "drama"], ["drama"], [], ["crime", "drama"], ["comedy"]],
        creators=["ann", None, "bob", "ann", None, "eve"],
        prices=[1.0, 2.0, None, 4.0, 5.0, 6.0],
        available=[True, True, True, True, True, False],
    )
    built = Catalogue.build(items)
    if request.param == "built":
        return built
    built.save(tmp_path)
    return Catalogue.load(tmp_path)


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        (Filters(), [0, 1, 2, 3, 4]),
        (Filters(categories_any=("comedy",)), [0, 1]),
        (Filters(categories_any=("comedy", "crime")), [0, 1, 4]),
        (Filters(categories_none=("drama",)), [0, 3]),
        (Filters(categories_any=("drama",), categories_none=("crime",)), [1, 2]),
        (Filters(categories_any=("unheard of",)), []),
        (Filters(categories_none=("unheard of",)), [0, 1, 2, 3, 4]),
        (Filters(price_min=2.0), [1, 3, 4]),
        (Filters(price_max=2.0), [0, 1]),
        (Filters(price_min=1.5, price_max=4.5), [1, 3]),
        (Filters(categories_any=("drama",), price_max=100.0), [1, 4]),
    ],
)
def test_allowed(catalogue: Catalogue, filters: Filters, expected: list[int]):
    assert np.flatnonzero(catalogue.allowed(filters, NOTHING)).tolist() == expected
    assert catalogue.matching(filters).count == len(expected)
    excluded = np.array([1, 4], np.int32)
    assert np.flatnonzero(catalogue.allowed(filters, excluded)).tolist() == [i for i in expected if i not in (1, 4)]


def test_what_one_caller_does_to_its_mask_does_not_reach_another(catalogue: Catalogue):
    catalogue.allowed(Filters(), NOTHING)[:] = False
    assert catalogue.allowed(Filters(), NOTHING).sum() == 5


def test_violations_name_the_first_reason_of_each_item(catalogue: Catalogue):
    items = np.array([5, 0, 1, 2, 3, 4], np.int32)
    filters = Filters(categories_any=("comedy", "drama"), categories_none=("crime",), price_min=0.0)
    found = {
        reason: items[mask].tolist()
        for reason, mask in catalogue.violations(items, filters, np.array([0], np.int32))
    }  # fmt: skip
    assert found == {"unavailable": [5], "excluded": [0], "category": [3, 4], "price": [2]}
    assert catalogue.violations(np.array([1], np.int32), filters, NOTHING) == []


def test_look_ups(catalogue: Catalogue):
    assert catalogue.num_items == len(catalogue) == 6
    assert catalogue.id_map.rows(["i5", "i0", "x"]).tolist() == [5, 0, -1]
    assert catalogue.titles(np.array([4, 1], np.int32)) == ["Item 4", "Item 1"]
    assert catalogue.item(2)["creator"] == "bob"
    codes = catalogue.creator_codes
    assert codes[0] == codes[3] and len({codes[0], codes[2], codes[5]}) == 3
    assert codes[[1, 4]].tolist() == [-1, -1]
    assert catalogue.in_category("drama").tolist() == [1, 2, 4]


def test_category_rows_give_cosines(catalogue: Catalogue):
    rows = catalogue.category_rows(np.array([0, 1, 2, 3], np.int32))
    np.testing.assert_allclose(
        rows @ rows.T,
        [[1, 0.5**0.5, 0, 0], [0.5**0.5, 1, 0.5**0.5, 0], [0, 0.5**0.5, 1, 0], [0, 0, 0, 0]],
        atol=1e-6,
    )
    assert catalogue.category_rows(NOTHING).shape == (0, 0)


def test_the_fingerprint_survives_saving(tmp_path: Path):
    built = Catalogue.build(items_table(100))
    built.save(tmp_path)
    assert Catalogue.load(tmp_path).id_map_fingerprint == built.id_map_fingerprint


def test_an_empty_catalogue(tmp_path: Path):
    Catalogue.build(items_table(0)).save(tmp_path)
    empty = Catalogue.load(tmp_path)
    assert empty.allowed(Filters(categories_any=("a",)), NOTHING).tolist() == []
    assert len(PopularItems(0, NOTHING, np.zeros(0, np.float32)).best(3, np.zeros(0, bool))) == 0


def test_refuses_a_table_that_breaks_the_contract():
    good = items_table(3)
    with pytest.raises(SchemaError, match="title"):
        Catalogue.build(good.drop_columns(["title"]))
    with pytest.raises(SchemaError, match="same id"):
        Catalogue.build(pa.concat_tables([good, good]))
    with pytest.raises(SchemaError, match="'title'"):
        Catalogue.build(good.set_column(1, "title", pa.array(["a", None, "b"])))
    with pytest.raises(SchemaError, match="null among its categories"):
        Catalogue.build(items_table(1, categories=[["a", None]]))  # type: ignore[list-item]


def test_parts_of_different_catalogues_do_not_load(tmp_path: Path):
    Catalogue.build(items_table(3)).save(tmp_path)
    Catalogue.build(items_table(4)).save(tmp_path / "other")
    (tmp_path / "other" / "ids.arrow").rename(tmp_path / "ids.arrow")
    with pytest.raises(BundleMismatchError, match="3 rows"):
        Catalogue.load(tmp_path)


def test_contains():
    rng = np.random.default_rng(0)
    for size in (0, 1, 50):
        items, asked = rng.integers(0, 60, size).astype(np.int32), rng.integers(0, 60, 40).astype(np.int32)
        assert contains(items, asked).tolist() == np.isin(asked, items).tolist()


def test_popular_items_are_all_items_the_popular_first():
    popular = PopularItems(5, np.array([3, 1], np.int32), np.array([9, 4], np.float32))
    best = popular.best(4, np.array([True, True, False, True, True]))
    assert best.item_idx.tolist() == [3, 1, 0, 4]
    assert best.score.tolist() == [9, 4, 0, 0]
    assert [best.sources_of(row) for row in range(4)] == [["popular"], ["popular"], ["catalogue"], ["catalogue"]]
    for wrong in ([5], [-1], [1, 1]):
        with pytest.raises(BundleMismatchError):
            PopularItems(5, np.array(wrong, np.int32), np.zeros(len(wrong), np.float32))


def test_popular_items_are_found_far_down_the_list():
    allowed = np.zeros(50_000, bool)
    allowed[[7, 49_999]] = True
    popular = PopularItems(50_000, np.arange(50_000, dtype=np.int32), np.zeros(50_000, np.float32))
    assert popular.best(10, allowed).item_idx.tolist() == [7, 49_999]
