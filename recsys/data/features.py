"""Features of a candidate for a user at a moment: one definition, used by training and by serving.

Item features are frozen at a cutoff (nothing from after it enters), so what a ranker sees in training is what it would
have seen then. A new feature is a name in ``FEATURE_NAMES`` and a line that fills its column.

Shape legend: N items, I columns of an item, C candidates, L history length, G categories, D retriever dimension,
F features.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys import schema
from recsys.arrow import one_chunk, pc
from recsys.data.dataset import Dataset, Split
from recsys.data.leaks import check_blind
from recsys.errors import ModelError
from recsys.files import map_arrow, write_arrow
from recsys.schema import DAY_MS
from recsys.types import Float64Array, FloatArray, Int32Array, Int64Array

MAX_CATEGORIES = 64
"""The most frequent categories that get a column of their own; the rest share the last."""
RECENT_DAYS = 30.0
WEEK_DAYS = 7.0
SALE = "purchase"
"""the event of which each is a sale, whatever its value and whether or not it is a positive; name it so in the source's
``event`` or ``columns.event``"""
NUM_PRICE_BANDS = 10
"""the catalogue in order of price, cut into as many parts of equal size"""
NO_TIME = np.iinfo(np.int64).min
"""``created_ms`` of an item whose age is unknown"""

FEATURE_NAMES = (
    "retrieval_score",
    "similarity_last",
    "similarity_recent_max",
    "similarity_mean",
    "category_overlap",
    "category_overlap_recent",
    "creator_share",
    "price_log_ratio",
    "item_log_popularity",
    "item_log_popularity_recent",
    "item_popularity_trend",
    "item_mean_value",
    "item_is_cold",
    "item_num_categories",
    "item_log_age_days",
    "popularity_gap",
    "user_log_history_length",
    "user_mean_log_popularity",
    "user_log_idle_hours",
    "request_hour_sin",
    "request_hour_cos",
    "request_weekday_sin",
    "request_weekday_cos",
    "item_log_popularity_week",
    "item_log_sales",
    "item_price_band",
    "price_band_share",
    "user_purchasing_power",
    "user_log_events_week",
)
"""Per candidate. Of the item alone, of the user and the moment alone, and of both (crosses): similarity to what the
user had, overlap of categories, share of creators, price and popularity beside the user's own, and how much of the
history lies in the candidate's price band. ``user_purchasing_power`` is the mean price band of the history."""
NUM_FEATURES = len(FEATURE_NAMES)
ITEM_COLUMNS = (
    "log_popularity",
    "log_popularity_recent",
    "popularity_trend",
    "mean_value",
    "is_cold",
    "num_categories",
    "log_price",
    "log_popularity_week",
    "log_sales",
    "price_band",
)
"""of :attr:`ItemFeatures.numeric`; logs are log(1 + x); ``log_price`` and ``price_band`` (0 for the cheapest part to 1
for the dearest) are NaN where an item has no price"""
_OF_ITEMS_ALONE = tuple(name for name in ITEM_COLUMNS if name not in ("log_price", "price_band"))
"""become the features ``item_NAME`` as they are"""
_RECENT = 10
_NAMES, _FEATURES = b"category_names", b"features"
_COLUMN = {name: column for column, name in enumerate(ITEM_COLUMNS)}
_PLACE = {name: place for place, name in enumerate(FEATURE_NAMES)}
_NO_BAND = 0.5
"""stands for a price band that is unknown: the middle"""


@dataclass(frozen=True)
class ItemFeatures:
    """What is known of every item at the cutoff."""

    numeric: FloatArray
    """float32 [N, I], columns as in ``ITEM_COLUMNS``"""
    categories: FloatArray
    """float32 [N, G], rows of unit length (or zero)"""
    creator: Int32Array
    """int32 [N], -1 where unknown"""
    created_ms: Int64Array
    """int64 [N]: creation, else first interaction before the cutoff, else ``NO_TIME``"""
    category_names: tuple[str, ...] | None = None
    """G: what the columns of :attr:`categories` stand for; where there are :data:`MAX_CATEGORIES`, the last one stands
    for all others as well; None where that was not written down"""

    @classmethod
    def of(cls, dataset: Dataset, until: Split, category_names: tuple[str, ...] | None = None) -> ItemFeatures:
        """Features from the interactions up to and with the split ``until``.

        ``category_names`` keeps the columns that a ranker was trained with; None chooses them anew.

        :raises LeakageError: when they depend on what came after.
        """
        return check_blind("item features", lambda source: cls._of(source, until, category_names), dataset, until)

    @classmethod
    def _of(cls, dataset: Dataset, until: Split, category_names: tuple[str, ...] | None = None) -> ItemFeatures:
        log = dataset.log
        rows = log.split <= until
        num_items = dataset.num_items
        items, weight = log.item_idx[rows], log.weight[rows]
        positive = weight > 0
        popularity = np.bincount(items[positive], minlength=num_items).astype(np.float64)
        recent = week = popularity
        created = dataset.items["created_at"].cast(pa.int64()).fill_null(NO_TIME).to_numpy()
        if log.timestamp_ms is not None:
            times = log.timestamp_ms[rows]
            cutoff = times.max() if len(times) else 0
            recent, week = (
                np.bincount(items[positive & (times > cutoff - days * DAY_MS)], minlength=num_items)
                for days in (RECENT_DAYS, WEEK_DAYS)
            )
            first = np.full(num_items, np.iinfo(np.int64).max)
            np.minimum.at(first, items, times)
            unknown = (created == NO_TIME) & (first != np.iinfo(np.int64).max)
            created = np.where(unknown, first, created)
        sold = pc.equal(dataset.interactions[schema.EVENT], SALE).to_numpy()[rows]
        values = np.nan_to_num(dataset.interactions["value"].to_numpy(zero_copy_only=False).astype(np.float64)[rows])
        counts = np.bincount(items, minlength=num_items)
        overall = float(values.mean()) if len(values) else 0.0
        # Shrunk towards the overall mean by five interactions: an item with one rating is not yet the best of all.
        mean_value = (np.bincount(items, values, minlength=num_items) + 5.0 * overall) / (counts + 5.0)
        categories = dataset.items["categories"]
        num_categories = pc.list_value_length(categories).to_numpy(zero_copy_only=False).astype(np.float64)
        price = dataset.items["price"].to_numpy(zero_copy_only=False).astype(np.float64)
        numeric = {
            "log_popularity": np.log1p(popularity),
            "log_popularity_recent": np.log1p(recent),
            "popularity_trend": np.log1p(recent) / np.log(2.0 + popularity),
            "mean_value": mean_value,
            "is_cold": popularity == 0,
            "num_categories": np.nan_to_num(num_categories),
            "log_price": np.log1p(np.maximum(price, 0.0)),
            "log_popularity_week": np.log1p(week),
            "log_sales": np.log1p(np.bincount(items[sold], minlength=num_items)),
            "price_band": price_bands(price),
        }
        lists = one_chunk(categories)
        creators = one_chunk(dataset.items["creator"]).dictionary_encode().indices
        names = category_columns(lists) if category_names is None else category_names
        return cls(
            np.stack([numeric[name] for name in ITEM_COLUMNS], axis=1).astype(np.float32),
            _category_rows(lists, num_items, names),
            creators.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32),
            created,
            names,
        )

    def save(self, path: str | Path) -> None:
        """Write one Arrow file that can be memory-mapped."""
        write_arrow(
            path,
            pa.table(
                {
                    "numeric": fixed_size_list(self.numeric),
                    "categories": fixed_size_list(self.categories),
                    "creator": self.creator,
                    "created_ms": self.created_ms,
                }
            ).replace_schema_metadata({_NAMES: json.dumps(self.category_names), _FEATURES: json.dumps(FEATURE_NAMES)}),
        )

    @classmethod
    def load(cls, path: str | Path) -> ItemFeatures:
        """Memory-map what :meth:`save` wrote.

        :raises ModelError: where it belongs to a ranker that reads other features than this version computes.
        """
        table = map_arrow(path)
        metadata = table.schema.metadata or {}
        if json.loads(metadata.get(_FEATURES, b"null")) != list(FEATURE_NAMES):
            raise ModelError(
                f"{path} is of a ranker that reads other features than this version computes: train it again"
            )
        names = json.loads(metadata.get(_NAMES, b"null"))
        return cls(
            matrix(table["numeric"]),
            matrix(table["categories"]),
            table["creator"].to_numpy(),
            table["created_ms"].to_numpy(),
            None if names is None else tuple(names),
        )


def fixed_size_list(values: NDArray[np.generic]) -> pa.FixedSizeListArray:
    """A [N, D] matrix as one Arrow column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])


def matrix(column: pa.ChunkedArray) -> FloatArray:
    """A fixed-size-list column as a [N, D] matrix, without a copy where the column is one chunk."""
    array = one_chunk(column)
    return array.flatten().to_numpy().reshape(len(array), array.type.list_size)


def price_bands(price: Float64Array) -> Float64Array:
    """float64 [N] from 0 (the cheapest :data:`NUM_PRICE_BANDS`-th of ``price``) to 1; equal prices share a band, and
    NaN has none.
    """
    known = np.sort(price[np.isfinite(price)])
    below = np.searchsorted(known, price, side="left") / max(1, len(known))
    band = np.minimum(np.floor(below * NUM_PRICE_BANDS), NUM_PRICE_BANDS - 1) / (NUM_PRICE_BANDS - 1)
    return np.where(np.isfinite(price), band, np.nan)


def category_columns(categories: pa.ListArray) -> tuple[str, ...]:
    """The categories that get a column, most frequent first; ties by name, so that equal data gives equal columns."""
    encoded = categories.flatten().dictionary_encode()
    counts = np.bincount(encoded.indices.to_numpy(zero_copy_only=False), minlength=len(encoded.dictionary))
    names: list[str] = encoded.dictionary.to_pylist()
    order = np.lexsort((np.array(names, dtype=object).astype(str), -counts)) if names else np.zeros(0, np.int64)
    return tuple(names[place] for place in order[:MAX_CATEGORIES].tolist())


def _category_rows(categories: pa.ListArray, num_items: int, names: tuple[str, ...]) -> FloatArray:
    lengths = pc.fill_null(pc.list_value_length(categories), 0).to_numpy(zero_copy_only=False)
    rows = np.repeat(np.arange(num_items), lengths)
    encoded = categories.flatten().dictionary_encode()
    width = max(1, len(names))
    column_of = {name: column for column, name in enumerate(names)}
    other = width - 1 if len(names) == MAX_CATEGORIES else -1
    columns = np.array([column_of.get(name, other) for name in encoded.dictionary.to_pylist()], np.int64)
    column = columns[encoded.indices.to_numpy(zero_copy_only=False)]
    result = np.zeros((num_items, width), np.float32)
    result[rows[column >= 0], column[column >= 0]] = 1.0
    norm = np.linalg.norm(result, axis=1, keepdims=True)
    return result / np.maximum(norm, 1.0)


def candidate_features(
    items: ItemFeatures,
    unit_vectors: FloatArray,
    *,
    history_item_idx: Int32Array,
    history_timestamp_ms: Int64Array | None,
    candidate_item_idx: Int32Array,
    retrieval_score: FloatArray,
    now_ms: int | None,
) -> FloatArray:
    """float32 [C, F], columns as in ``FEATURE_NAMES``. A row depends on its own candidate only.

    Args:
        items: item features at the cutoff.
        unit_vectors: float32 [N, D], the retriever's item vectors scaled to unit length.
        history_item_idx: int32 [L], positives, oldest first; may be empty.
        history_timestamp_ms: int64 [L], or None where the data has order only.
        candidate_item_idx: int32 [C].
        retrieval_score: float32 [C].
        now_ms: the time of the request, or None where the data has order only.
    """
    numeric = items.numeric[candidate_item_idx]
    features_FC = np.zeros((NUM_FEATURES, len(candidate_item_idx)), np.float32)

    def put(name: str, values: Any) -> None:
        features_FC[_PLACE[name]] = values

    def of_items(name: str) -> FloatArray:
        return numeric[:, _COLUMN[name]]

    put("retrieval_score", retrieval_score)
    num_history = len(history_item_idx)
    purchasing_power = _NO_BAND
    if num_history:
        history = items.numeric[history_item_idx]
        recent = history_item_idx[-_RECENT:]
        vectors, categories = unit_vectors[candidate_item_idx], items.categories[candidate_item_idx]
        near = vectors @ unit_vectors[recent].T
        put("similarity_last", near[:, -1])
        put("similarity_recent_max", near.max(axis=1))
        put("similarity_mean", vectors @ unit_vectors[history_item_idx].mean(axis=0))
        put("category_overlap", categories @ items.categories[history_item_idx].mean(axis=0))
        put("category_overlap_recent", categories @ items.categories[recent].mean(axis=0))
        creator = items.creator[candidate_item_idx]
        known = creator >= 0
        if known.any():
            share = (creator[:, None] == items.creator[history_item_idx][None, :]).mean(axis=1)
            put("creator_share", known * share)
        prices = history[:, _COLUMN["log_price"]]
        if np.isfinite(prices).any():
            put("price_log_ratio", np.nan_to_num(of_items("log_price") - np.nanmean(prices)))
            bands = history[:, _COLUMN["price_band"]]
            purchasing_power = float(np.nanmean(bands))
            share = np.bincount(_band_number(bands), minlength=NUM_PRICE_BANDS + 1) / np.isfinite(bands).sum()
            share[NUM_PRICE_BANDS] = 0.0
            put("price_band_share", share[_band_number(of_items("price_band"))])
        mean_popularity = history[:, _COLUMN["log_popularity"]].mean()
        put("popularity_gap", of_items("log_popularity") - mean_popularity)
        put("user_mean_log_popularity", mean_popularity)
    for name in _OF_ITEMS_ALONE:
        put(f"item_{name}", of_items(name))
    put("item_price_band", np.nan_to_num(of_items("price_band"), nan=_NO_BAND))
    put("user_log_history_length", np.log1p(num_history))
    put("user_purchasing_power", purchasing_power)
    if now_ms is not None:
        created = items.created_ms[candidate_item_idx]
        age_days = np.where(created == NO_TIME, 0.0, (now_ms - created.astype(np.float64)) / DAY_MS)
        put("item_log_age_days", np.log1p(np.maximum(age_days, 0.0)))
        if num_history and history_timestamp_ms is not None:
            put("user_log_idle_hours", np.log1p(max(0.0, (now_ms - int(history_timestamp_ms[-1])) / 3_600_000.0)))
            in_week = (history_timestamp_ms > now_ms - WEEK_DAYS * DAY_MS).sum()
            put("user_log_events_week", np.log1p(in_week))
        day = 2 * np.pi * (now_ms / DAY_MS % 1.0)
        week = 2 * np.pi * (now_ms / DAY_MS / 7.0 % 1.0)
        put("request_hour_sin", np.sin(day))
        put("request_hour_cos", np.cos(day))
        put("request_weekday_sin", np.sin(week))
        put("request_weekday_cos", np.cos(week))
    return np.ascontiguousarray(features_FC.T)


def _band_number(bands: FloatArray) -> Int64Array:
    """int64: 0 to :data:`NUM_PRICE_BANDS` - 1, and :data:`NUM_PRICE_BANDS` where there is no price."""
    number = np.clip(np.round(bands * (NUM_PRICE_BANDS - 1)), 0, NUM_PRICE_BANDS - 1)
    return np.nan_to_num(number, nan=NUM_PRICE_BANDS).astype(np.int64)
