"""Features of items and users that shop: sales, prices and what happened in the last week."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys import schema
from recsys.data import features as module
from recsys.data.dataset import Dataset, DatasetInfo, Split
from recsys.data.features import FEATURE_NAMES, ITEM_COLUMNS, NUM_PRICE_BANDS, ItemFeatures, candidate_features
from recsys.errors import ModelError
from recsys.testing.planted import random_numeric

DAY_MS = 86_400_000
NOW_MS = 100 * DAY_MS
ROWS = (  # user, item, day, event, split
    (0, 0, 10, "purchase", 0),
    (0, 0, 60, "click", 0),
    (0, 1, 80, "click", 0),
    (0, 1, 97, "purchase", 0),
    (0, 1, 98, "click", 0),
    (0, 2, 99, "purchase", 0),
    (0, 2, 120, "purchase", 2),
)
PRICES = (1.0, 5.0, 9.0, 9.0, None)


@pytest.fixture(scope="module")
def shop() -> Dataset:
    users, items, days, events, splits = zip(*ROWS, strict=True)
    interactions = pa.table(
        {
            schema.USER_IDX: pa.array(users, pa.int32()),
            schema.ITEM_IDX: pa.array(items, pa.int32()),
            schema.TIMESTAMP: pa.array([day * DAY_MS for day in days], pa.int64()).cast(schema.TIMESTAMP_TYPE),
            schema.POSITION: pa.array(range(len(ROWS)), pa.int64()),
            schema.EVENT: events,
            schema.VALUE: pa.nulls(len(ROWS), pa.float32()),
            schema.WEIGHT: pa.array([1.0] * len(ROWS), pa.float32()),
            schema.SPLIT: pa.array(splits, pa.int8()),
        },
        schema=schema.PREPARED_INTERACTIONS,
    )
    columns = {name: pa.nulls(len(PRICES), schema.ITEMS.field(name).type) for name in schema.ITEMS.names}
    columns |= {
        "item_id": [f"item-{item}" for item in range(len(PRICES))],
        "title": [f"title {item}" for item in range(len(PRICES))],
        "categories": [["all"]] * len(PRICES),
        "price": pa.array(PRICES, pa.float32()),
        "available": [True] * len(PRICES),
    }
    info = DatasetInfo(
        name="shop", fingerprint="f", id_map_fingerprint="i", has_time=True, protocol="leave_one_out", num_users=1,
        num_items=len(PRICES), num_interactions=len(ROWS), num_positives=len(ROWS), num_quarantined=0,
        counts_by_split={},
    )  # fmt: skip
    return Dataset(interactions, pa.table(columns, schema=schema.ITEMS), pa.table({"user_id": ["user-0"]}), info)


def item(features: ItemFeatures, name: str) -> np.ndarray:
    return features.numeric[:, ITEM_COLUMNS.index(name)]


def test_sales_and_windows_count_what_happened_until_the_cutoff(shop):
    features = ItemFeatures.of(shop, Split.TRAIN)
    np.testing.assert_allclose(np.expm1(item(features, "log_popularity")), [2, 3, 1, 0, 0], atol=1e-5)
    np.testing.assert_allclose(np.expm1(item(features, "log_popularity_recent")), [0, 3, 1, 0, 0], atol=1e-5)
    np.testing.assert_allclose(np.expm1(item(features, "log_popularity_week")), [0, 2, 1, 0, 0], atol=1e-5)
    np.testing.assert_allclose(np.expm1(item(features, "log_sales")), [1, 1, 1, 0, 0], atol=1e-5)
    assert np.expm1(item(ItemFeatures.of(shop, Split.TEST), "log_sales"))[2] == pytest.approx(2)


def asked(features: ItemFeatures, history: list[int], days: list[int], candidates: list[int]) -> dict[str, list[float]]:
    rows = candidate_features(
        features,
        np.eye(len(PRICES), dtype=np.float32),
        history_item_idx=np.array(history, np.int32),
        history_timestamp_ms=np.array(days, np.int64) * DAY_MS,
        candidate_item_idx=np.array(candidates, np.int32),
        retrieval_score=np.zeros(len(candidates), np.float32),
        now_ms=NOW_MS,
    )
    return {name: rows[:, place].tolist() for place, name in enumerate(FEATURE_NAMES)}


def test_purchasing_power_is_the_price_band_of_what_the_user_had(shop):
    features = ItemFeatures.of(shop, Split.TRAIN)
    cheap, dear = asked(features, [0, 0], [1, 2], [0, 2]), asked(features, [2, 3], [1, 2], [0, 2])
    assert cheap["user_purchasing_power"] == [0.0, 0.0]
    assert dear["user_purchasing_power"][0] > 0.5
    assert cheap["price_band_share"] == [1.0, 0.0]
    assert dear["price_band_share"] == [0.0, 1.0]
    assert cheap["item_price_band"] == dear["item_price_band"]


def test_without_prices_the_user_stands_in_the_middle(shop):
    features = ItemFeatures.of(shop, Split.TRAIN)
    for history in ([], [4]):
        found = asked(features, history, [1] * len(history), [0, 4])
        assert found["user_purchasing_power"] == [0.5, 0.5]
        assert found["price_band_share"] == [0.0, 0.0]
        assert found["item_price_band"][1] == 0.5


def test_activity_counts_the_last_week_only(shop):
    features = ItemFeatures.of(shop, Split.TRAIN)
    found = asked(features, [0, 1, 2], [10, 95, 99], [0])
    assert found["user_log_events_week"] == pytest.approx([np.log1p(2)])
    assert found["user_log_history_length"] == pytest.approx([np.log1p(3)])


@given(st.lists(st.one_of(st.none(), st.floats(0, 1e6)), min_size=1, max_size=50))
def test_price_bands_keep_the_order_of_prices(prices):
    price = np.array([np.nan if one is None else one for one in prices])
    bands = module.price_bands(price)
    known = np.isfinite(price)
    assert np.isnan(bands[~known]).all()
    assert ((bands[known] >= 0) & (bands[known] <= 1)).all()
    assert np.isin(np.round(bands[known] * (NUM_PRICE_BANDS - 1), 6), range(NUM_PRICE_BANDS)).all()
    order = np.argsort(price[known], kind="stable")
    assert (np.diff(bands[known][order]) >= 0).all()
    for value in np.unique(price[known]):
        assert len(np.unique(bands[price == value])) == 1


def test_features_of_another_version_are_refused(shop, tmp_path, monkeypatch):
    features = ItemFeatures.of(shop, Split.TRAIN)
    with monkeypatch.context() as patch:
        patch.setattr(module, "FEATURE_NAMES", FEATURE_NAMES[:-1])
        features.save(tmp_path / "features.arrow")
    with pytest.raises(ModelError, match=r"features\.arrow .* train it again"):
        ItemFeatures.load(tmp_path / "features.arrow")
    features.save(tmp_path / "features.arrow")
    np.testing.assert_array_equal(ItemFeatures.load(tmp_path / "features.arrow").numeric, features.numeric)


def test_every_feature_says_something():
    """Of users and items that differ in all that is known of them, no column is the same for all."""
    rng = np.random.default_rng(0)
    numeric = random_numeric(rng, 200)
    categories = np.eye(4, dtype=np.float32)[rng.integers(0, 4, 200)]
    creator, created = rng.integers(-1, 3, 200).astype(np.int32), rng.integers(0, NOW_MS, 200)
    features = ItemFeatures(numeric, categories, creator, created)
    rows = []
    for _ in range(50):
        now_ms = NOW_MS + int(rng.integers(0, 7 * DAY_MS))
        times = np.sort(rng.integers(NOW_MS - 20 * DAY_MS, NOW_MS, rng.integers(1, 30)))
        rows.append(
            candidate_features(
                features,
                rng.normal(size=(200, 8)).astype(np.float32),
                history_item_idx=rng.integers(0, 200, len(times)).astype(np.int32),
                history_timestamp_ms=times,
                candidate_item_idx=rng.integers(0, 200, 20).astype(np.int32),
                retrieval_score=rng.normal(size=20).astype(np.float32),
                now_ms=now_ms,
            )
        )
    spread = np.concatenate(rows).std(axis=0)
    assert [name for name, value in zip(FEATURE_NAMES, spread, strict=True) if value < 1e-3] == []
