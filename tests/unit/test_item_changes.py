"""Items put, changed and removed after a Bundle was published: the log of changes, and the parts that grow by them."""

import threading

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.bundle import changes as changes_module
from recsys.bundle.changes import FOLD_EVERY, ITEM_CHANGES, ItemLog, last_word
from recsys.bundle.live import LiveBundle, live_id, split_id
from recsys.bundle.location import Location
from recsys.data.catalogue import Catalogue
from recsys.data.changed_catalogue import ChangedCatalogue
from recsys.data.histories import Histories
from recsys.errors import BundleCorruptError, ModelError
from recsys.index.extended import ExtendedIndex
from recsys.index.flat import FlatIndex
from recsys.models.extended import with_new_items
from recsys.models.retrievers.blend import Blend
from recsys.models.retrievers.matrices.als import ALS
from recsys.models.retrievers.matrices.ease import EASE
from recsys.models.retrievers.neighbours.item_knn import ItemKNN
from recsys.models.stand_in import StandIns
from recsys.models.text.encoder import TextEncoderConfig
from recsys.models.text.tiny_encoder import tiny_encoder
from recsys.pipeline.recommender import Recommender
from recsys.testing.tiny_bundle import NUM_ITEMS, make_bundle
from recsys.types import Filters


def change(item_id, **values):
    """One row of changes."""
    row = dict.fromkeys(ITEM_CHANGES.names) | {"item_id": item_id, "title": item_id, "categories": []}
    return row | {"available": True, "removed": False} | values


def changes(*rows):
    return pa.Table.from_pylist(list(rows), schema=ITEM_CHANGES)


@pytest.fixture
def log(tmp_path):
    return ItemLog(Location.of(tmp_path / "items"))


# --- the log ----------------------------------------------------------------------------------------------------------


def test_versions_count_calls_and_the_last_word_holds(log):
    assert log.version() == 0
    assert log.read().equals(ITEM_CHANGES.empty_table())
    assert log.append(changes(change("a", price=1.0), change("b"))) == 1
    assert log.append(changes(change("c"), change("a", price=2.0))) == 2
    now = log.read()
    assert now["item_id"].to_pylist() == ["a", "b", "c"]  # the order of their first change
    assert now["price"].to_pylist() == [2.0, None, None]
    assert log.read(1)["price"].to_pylist() == [1.0, None]


def test_a_fold_says_all_and_what_it_contains_goes(log, tmp_path, monkeypatch):
    monkeypatch.setattr(changes_module, "KEPT_VERSIONS", FOLD_EVERY)
    for number in range(1, 2 * FOLD_EVERY + 2):
        assert log.append(changes(change(f"i{number % 5}", price=float(number)))) == number
    names = sorted(path.name for path in (tmp_path / "items").iterdir())
    assert names[0] == f"{FOLD_EVERY:08d}.all.arrow"
    assert len(names) == FOLD_EVERY + 2
    assert log.read()["item_id"].to_pylist() == ["i1", "i2", "i3", "i4", "i0"]
    last = 2 * FOLD_EVERY + 1
    assert log.read()["price"].to_pylist() == [
        max(n for n in range(1, last + 1) if n % 5 == i) for i in (1, 2, 3, 4, 0)
    ]


def test_writers_at_the_same_time_lose_nothing(log):
    def write(name):
        for number in range(20):
            log.append(changes(change(f"{name}{number}")))

    threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert log.version() == 80
    assert sorted(log.read()["item_id"].to_pylist()) == sorted(f"{name}{n}" for name in "abcd" for n in range(20))


def test_a_missing_or_broken_file_is_named(log, tmp_path):
    for item_id in "abc":
        log.append(changes(change(item_id)))
    (tmp_path / "items" / "00000003.arrow").write_bytes(b"nothing")
    with pytest.raises(BundleCorruptError, match=r"00000003\.arrow"):
        log.read()
    (tmp_path / "items" / "00000002.arrow").unlink()
    with pytest.raises(BundleCorruptError, match="version 2"):
        log.read()
    assert log.read(1)["item_id"].to_pylist() == ["a"]


def test_a_store_in_memory_has_a_log_too():
    log = ItemLog(Location.of("memory://item-log/items"))
    assert log.append(changes(change("a"))) == 1
    assert log.append(changes(change("b"))) == 2
    assert log.read()["item_id"].to_pylist() == ["a", "b"]


def test_ids_name_bundle_and_version():
    assert split_id(live_id("abc", 17)) == ("abc", (17, 0))
    assert split_id(live_id("abc", 0)) == ("abc", (0, 0))
    assert live_id("abc", 0) == "abc"


# --- the catalogue ----------------------------------------------------------------------------------------------------

CATEGORIES = ("a", "b", "c", "d")
rows = st.builds(
    lambda number, categories, creator, price, available: change(
        f"i{number}",
        title=f"title {number} {price}",
        categories=sorted(categories),
        creator=creator,
        price=price,
        available=available,
    ),
    st.integers(0, 12),
    st.sets(st.sampled_from(CATEGORIES)),
    st.none() | st.sampled_from(["x", "y", "z"]),
    st.none() | st.integers(0, 9).map(float),
    st.booleans(),
)


def built(table):
    return Catalogue.build(table.select([name for name in ITEM_CHANGES.names if name not in LAST_COLUMNS]))


LAST_COLUMNS = ("removed", "text_vector", "encoder")


@settings(max_examples=60, deadline=None)
@given(st.lists(rows, min_size=1, max_size=10), st.lists(rows, max_size=10))
def test_a_changed_catalogue_is_one_built_of_what_is_now(before, after):
    base = last_word(changes(*before))
    changed = last_word(changes(*after))
    whole = built(last_word(pa.concat_tables([base, changed])))
    found = ChangedCatalogue(built(base), changed)
    everything = np.arange(len(whole), dtype=np.int32)
    assert len(found) == len(whole)
    assert found.id_map.take(everything) == whole.id_map.take(everything)
    assert (
        found.id_map.rows([f"i{n}" for n in range(13)]).tolist()
        == whole.id_map.rows([f"i{n}" for n in range(13)]).tolist()
    )
    assert found.id_map_fingerprint == whole.id_map_fingerprint
    assert found.titles(everything) == whole.titles(everything)
    np.testing.assert_array_equal(found.price, whole.price)
    codes, expected = found.creator_codes, whole.creator_codes
    np.testing.assert_array_equal(codes < 0, expected < 0)
    np.testing.assert_array_equal(codes[:, None] == codes, expected[:, None] == expected)
    assert [found.item(row) for row in everything.tolist()] == [whole.item(row) for row in everything.tolist()]
    for category in (*CATEGORIES, "none"):
        assert found.in_category(category).tolist() == whole.in_category(category).tolist()
    same = whole.category_rows(everything) @ whole.category_rows(everything).T
    np.testing.assert_allclose(found.category_rows(everything) @ found.category_rows(everything).T, same, atol=1e-6)
    for filters in (Filters(), Filters(("a",)), Filters((), ("b",)), Filters(price_min=2.0, price_max=5.0)):
        np.testing.assert_array_equal(found.matching(filters).allowed, whole.matching(filters).allowed)
        of_found, of_whole = (each.violations(everything, filters, everything[:1]) for each in (found, whole))
        assert [(reason, bad.tolist()) for reason, bad in of_found] == [
            (reason, bad.tolist()) for reason, bad in of_whole
        ]


# --- the index --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.integers(0, 8), st.integers(0, 5), st.integers(1, 30), st.booleans())
def test_base_and_delta_find_what_one_index_over_all_finds(seed, num_new, num_replaced, k, masked):
    generator = np.random.default_rng(seed)
    vectors = generator.integers(-3, 4, (20 + num_new, 4)).astype(np.float32)  # integers: equal scores are common
    before = vectors[:20].copy()
    replaced = generator.choice(20, num_replaced, replace=False).astype(np.int32)
    before[replaced] = generator.normal(size=(num_replaced, 4))
    rows = np.concatenate([replaced, np.arange(20, 20 + num_new)]).astype(np.int32)
    extended = ExtendedIndex(FlatIndex().build(before), rows, vectors[rows], len(vectors))
    queries = generator.integers(-3, 4, (3, 4)).astype(np.float32)
    allowed = generator.random(len(vectors)) < 0.6 if masked else None
    expected = FlatIndex().build(vectors).search(queries, k, allowed)
    found = extended.search(queries, k, allowed)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    np.testing.assert_array_equal(found[1], expected[1])


def test_vectors_and_masks_of_another_shape_are_refused():
    base = FlatIndex().build(np.eye(3, dtype=np.float32))
    with pytest.raises(ModelError, match="dimension 3"):
        ExtendedIndex(base, np.array([3], np.int32), np.zeros((1, 4), np.float32), 4)
    extended = ExtendedIndex(base, np.array([3], np.int32), np.ones((1, 3), np.float32), 4)
    with pytest.raises(ModelError, match="4 items"):
        extended.search(np.ones((1, 3), np.float32), 1, np.ones(3, np.bool_))


# --- stand-ins --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        None,
        ItemKNN(),
        EASE(),
        ALS(),
        Blend.parse(
            {"sources": {"a": {"retriever": {"kind": "item_knn"}}, "b": {"retriever": {"kind": "ease"}}}}, where="test"
        ),
    ],
    ids=lambda config: "esasrec" if config is None else config.kind,
)
def test_a_twin_of_an_item_scores_as_it_does(tmp_path, config):
    retriever = make_bundle(tmp_path, retriever=config).retriever()
    twin = StandIns(np.array([[5, 6], [9, 3]], np.int32), np.array([[1, 0], [1, 0]], np.float32), NUM_ITEMS)
    grown = with_new_items(retriever, twin)
    now_ms = np.array([1_700_000_100_000] * 2)
    plain = Histories.from_lists([[5, 9, 1], [2]], [[1, 2, 3], [4]])
    with_twins = Histories.from_lists([[NUM_ITEMS, NUM_ITEMS + 1, 1], [2]], [[1, 2, 3], [4]])
    before, after = retriever.score(plain, now_ms), grown.score(with_twins, now_ms)
    assert after.shape == (2, NUM_ITEMS + 2)
    if retriever.config.kind != "blend":  # there scores are made of places among all
        np.testing.assert_allclose(grown.score(plain, now_ms)[:, :NUM_ITEMS], before, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(after[1, NUM_ITEMS:], before[1, [5, 9]], rtol=1e-4, atol=1e-5)


def test_the_vector_of_a_new_item_is_as_long_as_those_of_its_stand_ins():
    vectors = np.array([[2, 0, 7], [0, 2, 5]], np.float32)
    stand_ins = StandIns(np.array([[0, 1]], np.int32), np.full((1, 2), 0.5, np.float32), 2)
    found = stand_ins.vectors(vectors, 2)
    np.testing.assert_allclose(np.linalg.norm(found[0, :2]), 2.0, rtol=1e-6)
    assert found[0, 2] == 6.0


# --- the whole --------------------------------------------------------------------------------------------------------

WORDS = ["red", "green", "blue", "apple", "train", "river"]
TITLES = [f"{first} {second}" for first in WORDS for second in WORDS]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Items with words for titles, in a Bundle with an encoder that knows these words."""
    folder = tmp_path_factory.mktemp("live")
    config = TextEncoderConfig.parse(
        {"model": str(tiny_encoder(folder / "bert", WORDS)), "fields": ["title"]}, where="test"
    )
    titles = [TITLES[row % len(TITLES)] for row in range(NUM_ITEMS)]
    return make_bundle(folder / "bundles", titles=titles, encoder=config)


def recommender_of(bundle, *rows):
    live = LiveBundle(bundle, changes(*rows), 3)
    live.check()
    return Recommender.of(live)


def test_a_new_item_is_found_and_recommended(bundle):
    with recommender_of(bundle, change("new", title=TITLES[7], categories=["fresh"])) as recommender:
        assert recommender.bundle_id == f"{bundle.bundle_id}+3"
        assert recommender.item("new")["title"] == TITLES[7]
        assert "new" in recommender.search(TITLES[7], top_k=20).item_ids
        answer = recommender.recommend(history=["i1", "i2"], filters=Filters(categories_any=("fresh",)), top_k=5)
        assert answer.item_ids == ["new"]
        assert answer.degraded == ()
        assert {"retrieval", "ranking"} <= set(answer.items[0].stage_scores)
        same = recommender.similar("new", top_k=20).item_ids
        assert {f"i{7 + 36 * n}" for n in range(NUM_ITEMS // 36)} & set(same)
        told = recommender.recommend(history=["new"], top_k=10)
        assert told.degraded == () and "new" not in told.item_ids


def test_users_of_an_item_are_shown_its_twin(bundle):
    """The new item has the text of one item, alone; who would be shown that one is shown the new one beside it."""
    with Recommender.of(bundle) as before, recommender_of(bundle, change("new", title=TITLES[0])) as after:
        wanted = before.recommend(history=["i3"], top_k=300)
        place = after.recommend(history=["i3"], top_k=300).item_ids.index("new")
        twins = [wanted.item_ids.index(f"i{row}") for row in range(0, NUM_ITEMS, 36)]
        assert min(twins) - 5 <= place <= max(twins) + 15


def test_changes_of_old_items_hold(bundle):
    rows = [
        change("i1", title="river river", categories=["odd"], price=5.0, available=False),
        change("i2", title="blue blue blue", categories=["other"], price=7.0),
        change("i3", removed=True, available=False),
    ]
    with recommender_of(bundle, *rows) as recommender:
        everything = recommender.recommend(history=["i9"], top_k=300).item_ids
        assert not {"i1", "i3"} & set(everything)
        assert recommender.item("i1")["available"] is False
        assert recommender.item("i3") is None
        assert recommender.recommend(filters=Filters(categories_any=("other",)), top_k=3).item_ids == ["i2"]
        assert recommender.search("blue blue blue", top_k=1).item_ids == ["i2"]
        assert recommender.recommend(history=["i3"], top_k=10).degraded == ()
        assert recommender.recommend(history=["i3"], top_k=10).item_ids != recommender.recommend(top_k=10).item_ids


def test_items_without_words_stand_by_their_categories(tmp_path):
    bundle = make_bundle(tmp_path)
    with recommender_of(bundle, change("new", categories=["odd"]), change("strange")) as recommender:
        odd = recommender.runner.stages[0].stage.retriever
        assert odd.num_items == NUM_ITEMS + 2
        found = LiveBundle(bundle, changes(change("new", categories=["odd"]), change("strange")), 1).stand_ins()
        assert set(found.item_idx[0] % 2) == {1}
        np.testing.assert_allclose(found.weight.sum(axis=1), 1, rtol=1e-5)
        best = bundle.popular()[0][:10]
        assert found.item_idx[1].tolist() == best.tolist()  # nothing is known of it: what most people like
        assert "new" in recommender.recommend(history=["i1"], top_k=300).item_ids


def test_vectors_that_another_encoder_made_are_made_anew(bundle):
    theirs = change("new", title=TITLES[7], text_vector=[1.0] + [0.0] * 15, encoder="another")
    with recommender_of(bundle, theirs) as recommender:
        found = recommender.search(TITLES[7], top_k=20)
        assert found.items[found.item_ids.index("new")].score == pytest.approx(1, abs=1e-4)


def test_the_given_vector_is_used(bundle):
    vector = bundle.words().encode([TITLES[7]])[0].tolist()
    ours = change("new", title="green green", text_vector=vector, encoder=bundle.encoder_id)
    with recommender_of(bundle, ours) as recommender:
        assert "new" in recommender.search(TITLES[7], top_k=20).item_ids
