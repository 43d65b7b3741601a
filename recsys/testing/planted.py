"""Small data with a pattern planted in it, so that a test knows what a working model must find."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys import schema
from recsys.data.dataset import Dataset, DatasetInfo, Split
from recsys.data.features import ITEM_COLUMNS, NUM_PRICE_BANDS
from recsys.testing.pipeline import items_table
from recsys.types import FloatArray

CLUSTER_ITEMS = 12
"""items of a planted cluster"""
_HOUR_MS = 3_600_000
_START_MS = 1_600_000_000_000


def planted_clusters(
    *,
    num_users: int = 120,
    num_clusters: int = 4,
    items_per_cluster: int = CLUSTER_ITEMS,
    length: int = 8,
    seed: int = 0,
) -> Dataset:
    """Every user stays within one cluster of items: a checkerboard. The last item is VALID, the others TRAIN.

    Whoever learns the clusters ranks a withheld item among the ``items_per_cluster - length + 1`` unseen items of the
    user's cluster; chance ranks it among all. Users take turns over the clusters, so popularity knows nothing.
    """
    rng = np.random.default_rng(seed)
    users: list[int] = []
    items: list[int] = []
    for user in range(num_users):
        first = user % num_clusters * items_per_cluster
        users += [user] * length
        items += list(first + rng.permutation(items_per_cluster)[:length])
    position = np.tile(np.arange(length), num_users)
    split = np.where(position == length - 1, Split.VALID, Split.TRAIN)
    return dataset_of(np.array(users), np.array(items), split, num_items=num_clusters * items_per_cluster)


def planted_chain(
    *, num_users: int = 120, num_items: int = 12, length: int = 12, faith: float = 0.8, seed: int = 0
) -> Dataset:
    """A Markov chain: each item has one successor, taken with probability ``faith``, else any. The last item is VALID.

    Successors form one cycle over all items, so every item is equally popular and only order tells.
    """
    rng = np.random.default_rng(seed)
    cycle = rng.permutation(num_items)
    successor = np.empty(num_items, np.int64)
    successor[cycle] = np.roll(cycle, -1)
    items = np.empty((num_users, length), np.int64)
    items[:, 0] = rng.integers(0, num_items, num_users)
    for position in range(1, length):
        follows = rng.random(num_users) < faith
        items[:, position] = np.where(follows, successor[items[:, position - 1]], rng.integers(0, num_items, num_users))
    users = np.repeat(np.arange(num_users), length)
    split = np.where(np.tile(np.arange(length), num_users) == length - 1, Split.VALID, Split.TRAIN)
    return dataset_of(users, items.ravel(), split, num_items=num_items)


def planted_fashion(
    *, num_users: int = 120, num_items: int = 48, length: int = 8, num_last: int = 0, faith: float = 0.9, seed: int = 0
) -> Dataset:
    """Everybody takes one item a day, with probability ``faith`` one of the quarter of all items that is in fashion.

    The last ``num_last`` days have another quarter in fashion. No user takes an item twice; the last day is VALID, the
    others are TRAIN. Chance ranks the withheld item among all that are unseen; who knows the fashion of the last days
    ranks it among the unseen of a quarter.
    """
    rng = np.random.default_rng(seed)
    quarter = num_items // 4
    users: list[int] = []
    items: list[int] = []
    for user in range(num_users):
        old, new, rest = (
            first + rng.permutation(size)
            for first, size in ((0, quarter), (quarter, quarter), (2 * quarter, 2 * quarter))
        )
        fashionable = np.concatenate([old[: length - num_last], new[:num_last]])
        users += [user] * length
        items += np.where(rng.random(length) < faith, fashionable, rest[:length]).tolist()
    day = np.tile(np.arange(length), num_users)
    split = np.where(day == length - 1, Split.VALID, Split.TRAIN)
    time = _START_MS + (day * 24 + np.array(users) % 24) * _HOUR_MS
    return dataset_of(np.array(users), np.array(items), split, num_items=num_items, timestamp_ms=time)


def random_numeric(generator: np.random.Generator, num_items: int) -> FloatArray:
    """float32 [N, I]: what :attr:`recsys.data.features.ItemFeatures.numeric` may be, drawn at random."""
    numeric = generator.normal(size=(num_items, len(ITEM_COLUMNS))).astype(np.float32)
    numeric[:, ITEM_COLUMNS.index("price_band")] = generator.integers(0, NUM_PRICE_BANDS, num_items) / (
        NUM_PRICE_BANDS - 1
    )
    return numeric


def dataset_of(
    user_idx: NDArray[np.integer],
    item_idx: NDArray[np.integer],
    split: NDArray[np.integer],
    *,
    num_items: int,
    timestamp_ms: NDArray[np.integer] | None = None,
) -> Dataset:
    """A leave-one-out dataset of arrays sorted by user and order; by default one interaction an hour."""
    num_rows, num_users = len(user_idx), int(user_idx.max(initial=-1)) + 1
    if timestamp_ms is None:
        timestamp_ms = _START_MS + np.arange(num_rows) * _HOUR_MS
    rows = pa.table(
        {
            schema.USER_IDX: pa.array(user_idx, pa.int32()),
            schema.ITEM_IDX: pa.array(item_idx, pa.int32()),
            schema.TIMESTAMP: pa.array(timestamp_ms, pa.int64()).cast(schema.TIMESTAMP_TYPE),
            schema.POSITION: pa.array(np.arange(num_rows), pa.int64()),
            schema.EVENT: pa.array(["view"] * num_rows, pa.string()),
            schema.VALUE: pa.nulls(num_rows, pa.float32()),
            schema.WEIGHT: pa.array(np.ones(num_rows), pa.float32()),
            schema.SPLIT: pa.array(split, pa.int8()),
        },
        schema=schema.PREPARED_INTERACTIONS,
    )
    info = DatasetInfo(
        name="planted",
        fingerprint="planted",
        id_map_fingerprint="planted",
        has_time=True,
        protocol="leave_one_out",
        num_users=num_users,
        num_items=num_items,
        num_interactions=num_rows,
        num_positives=num_rows,
        num_quarantined=0,
        counts_by_split={part.name.lower(): int((split == part).sum()) for part in Split},
    )
    users = pa.table({"user_id": pa.array([f"u{user}" for user in range(num_users)], pa.string())})
    return Dataset(rows, items_table(num_items), users, info)
