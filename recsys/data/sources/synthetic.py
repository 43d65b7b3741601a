"""Made-up interactions of any size, with a structure that a good model can find."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from recsys import schema
from recsys.data.sources.base import Source, TimestampEncoding
from recsys.schema import DAY_MS

FORMAT = 1
"""Raised when the same configuration gives other rows."""

USERS_PER_CHUNK = 4096

_QUALITIES = ("amber", "bright", "calm", "deep", "early", "fresh", "golden", "hidden")
_THINGS = ("river", "engine", "garden", "mountain", "signal", "kitchen", "harbour", "orchestra")


class SyntheticSource(Source):
    """Users who walk through clusters of items.

    The items of a cluster form a ring. After an item a user takes, with probability ``chain``, its successor on the
    ring; else an item drawn with weights 1/rank from the same cluster or, with probability ``jump``, from a random
    one. So a popular item is a fair guess, the last item's cluster a better one, and its successor the
    best: popularity, co-occurrence and sequence models come out in this order.

    Each user starts at a random moment of the period and spreads the walk over the rest of it. Users are made in
    chunks, each from its own random stream, so that any number of rows needs the memory of one chunk.
    """

    kind: Literal["synthetic"] = "synthetic"
    num_users: int = Field(default=1000, ge=1, le=10**9, description="Number of users.")
    num_items: int = Field(default=500, ge=2, le=10**8, description="Number of items.")
    num_clusters: int = Field(default=20, ge=1, description="Number of clusters; each has at least two items.")
    mean_length: float = Field(default=20.0, gt=1, le=1000, description="Mean interactions per user (at least 1 each).")
    chain: float = Field(
        default=0.6, ge=0, le=1, description="Probability (0 to 1) that the successor of the last item follows."
    )
    jump: float = Field(
        default=0.1, ge=0, le=1, description="Probability (0 to 1), off the chain, of a change of cluster."
    )
    start: datetime = Field(
        default=datetime(2024, 1, 1, tzinfo=UTC), description="First moment (ISO 8601; UTC without a zone)."
    )
    days: float = Field(default=365.0, gt=0, le=36500, description="Length of the period in days.")
    seed: int = Field(default=0, ge=0, description="Seed of the random numbers; equal seeds give equal data.")

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls(num_users=30, num_items=40)

    @model_validator(mode="after")
    def _clusters_have_rings(self) -> Self:
        if self.num_items < 2 * self.num_clusters:
            raise ValueError(f"{self.num_clusters} clusters need at least {2 * self.num_clusters} items")
        return self

    @property
    def timestamp_encoding(self) -> TimestampEncoding:
        return "ms"

    def read(self) -> Iterator[pa.Table]:
        for first_user in range(0, self.num_users, USERS_PER_CHUNK):
            yield self._chunk(first_user, min(USERS_PER_CHUNK, self.num_users - first_user))

    def _chunk(self, first_user: int, num_users: int) -> pa.Table:
        rng = np.random.default_rng([self.seed, 1, first_user])
        lengths = 1 + rng.poisson(self.mean_length - 1, num_users)
        steps = int(lengths.max())
        items = np.empty((num_users, steps), np.int64)
        items[:, 0] = self._in_cluster(rng.integers(self.num_clusters, size=num_users), rng)
        for step in range(1, steps):
            last = items[:, step - 1]
            cluster = last % self.num_clusters
            jump = rng.random(num_users) < self.jump
            cluster_after = np.where(jump, rng.integers(self.num_clusters, size=num_users), cluster)
            elsewhere = self._in_cluster(cluster_after, rng)
            items[:, step] = np.where(rng.random(num_users) < self.chain, self.successor(last), elsewhere)
        valid = np.arange(steps) < lengths[:, None]
        gaps = np.where(valid, rng.exponential(size=(num_users, steps)), 0.0)
        progress = np.cumsum(gaps, axis=1) / (gaps.sum(axis=1, keepdims=True) + rng.exponential(size=(num_users, 1)))
        begin = rng.random((num_users, 1))
        start = self.start if self.start.tzinfo else self.start.replace(tzinfo=UTC)
        moments = round(start.timestamp() * 1000) + (begin + (1 - begin) * progress) * self.days * DAY_MS
        users = np.repeat(np.arange(first_user, first_user + num_users), lengths)
        return pa.table(
            {
                schema.USER_ID: _ids("user-", users),
                schema.ITEM_ID: _ids("item-", items[valid]),
                schema.TIMESTAMP: pa.array(moments[valid].astype(np.int64)),
            }
        )

    def successor(self, item: np.ndarray) -> np.ndarray:
        """int64: the number of the item that most often follows each of ``item`` (the next one of its ring)."""
        following = item + self.num_clusters
        return np.where(following < self.num_items, following, item % self.num_clusters)

    def _in_cluster(self, cluster: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One item of each cluster, with weights near 1/rank (the continuous law ``size ** u``, cut to ranks)."""
        size = (self.num_items - cluster - 1) // self.num_clusters + 1
        rank = np.floor((size + 1.0) ** rng.random(len(cluster))).astype(np.int64) - 1
        return cluster + self.num_clusters * np.minimum(rank, size - 1)

    def items(self) -> pa.Table:
        numbers = np.arange(self.num_items)
        cluster = numbers % self.num_clusters
        rng = np.random.default_rng([self.seed, 2])
        names = [f"{_QUALITIES[c % 8]} {_THINGS[c // 8 % 8]} {c}" for c in range(self.num_clusters)]
        title = [f"The {names[c]}, part {n // self.num_clusters + 1}" for n, c in zip(numbers, cluster, strict=True)]
        return pa.table(
            {
                schema.ITEM_ID: _ids("item-", numbers),
                "title": pa.array(title, pa.string()),
                "categories": pa.array([[names[c]] for c in cluster], pa.list_(pa.string())),
                "creator": pa.array(
                    [f"Studio {c}-{n % 5}" for n, c in zip(numbers, cluster, strict=True)], pa.string()
                ),
                "price": pa.array(np.exp(rng.normal(3.0, 0.5, self.num_items)).astype(np.float32)),
            }
        )

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{FORMAT} {self.content_hash()}".encode()).hexdigest()

    def num_rows(self) -> int:
        return round(self.num_users * self.mean_length)


def _ids(prefix: str, numbers: np.ndarray) -> pa.Array:
    return pa.array(np.char.add(prefix, numbers.astype(str)).tolist(), pa.string())
