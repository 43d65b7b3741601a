"""A prepared dataset: validated, indexed, ordered and split. What every training and every evaluation reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsys import schema
from recsys.arrow import pc
from recsys.config import StrictConfig
from recsys.data.histories import Histories
from recsys.data.positives import PositivePolicy
from recsys.errors import DataError
from recsys.files import read_json, write_json, write_parquet
from recsys.types import BoolArray, FloatArray, Int32Array, Int64Array

ITEMS_FILE = "items.parquet"


class Split(IntEnum):
    """The part of a log an interaction belongs to. Within a user the parts follow each other in this order."""

    TRAIN = 0
    VALID = 1
    TEST = 2


class DatasetInfo(StrictConfig):
    """What is known of a prepared dataset as a whole; saved beside it as ``dataset.json``."""

    name: str
    fingerprint: str
    """SHA-256 of the source's content and of the preparation's configuration"""
    id_map_fingerprint: str
    """SHA-256 over the item ids in order of ``item_idx``: models, index and item table must agree on it"""
    has_time: bool
    protocol: str
    """``rolling_next_item``, ``leave_one_out`` or ``next_basket``: how the split is evaluated"""
    num_users: int
    num_items: int
    num_interactions: int
    num_positives: int
    num_quarantined: int
    counts_by_split: Mapping[str, int]
    borders_ms: tuple[int, int] | None = None
    """For a global time split: the first millisecond of validation and of test"""
    events_watermark: str | None = None
    """Where the source is an export of an event log: the place in it up to which the data contains it"""


@dataclass(frozen=True)
class Log:
    """Interactions as arrays, sorted by user, then time, then original row. R rows."""

    user_idx: Int32Array
    item_idx: Int32Array
    timestamp_ms: Int64Array | None
    weight: FloatArray
    split: NDArray[np.int8]
    user_offsets: Int64Array
    """int64 [num_users + 1]: rows ``user_offsets[u]`` to ``user_offsets[u + 1]`` are user ``u``"""

    def histories(self, until: Split) -> Histories:
        """One history per user (B = num_users, empty ones included): the rows of splits up to and with ``until``."""
        counts = np.bincount(self.user_idx[self.split <= until], minlength=len(self.user_offsets) - 1)
        starts = self.user_offsets[:-1]
        return Histories(self.item_idx, starts, starts + counts, self.timestamp_ms)


@dataclass(frozen=True)
class Targets:
    """Evaluation queries: given ``histories[b]``, the items ``relevant(b)`` came next. B queries."""

    user_idx: Int32Array
    """int32 [B]: intervals are clustered by it"""
    histories: Histories
    """positives before the target"""
    seen: Histories
    """every interaction before the target, positives or not"""
    relevant_item_idx: Int32Array
    """int32 [R]"""
    relevant_offsets: Int64Array
    """int64 [B+1]"""
    now_ms: Int64Array | None
    """int64 [B]: when the target happened, or None where the data has order only"""
    repeats: bool = False
    """whether an item that was seen before may be an answer"""

    @property
    def left_out(self) -> Histories:
        """What may not be an answer: what was seen, unless it may be repeated."""
        return replace(self.seen, stops=self.seen.starts) if self.repeats else self.seen

    def __len__(self) -> int:
        return len(self.user_idx)

    def __getitem__(self, rows: slice) -> Targets:
        """A run of queries."""
        return self.select(np.arange(*rows.indices(len(self))))

    def select(self, rows: Int64Array) -> Targets:
        """The queries at ``rows``, in that order."""
        relevant = Histories(self.relevant_item_idx, self.relevant_offsets[rows], self.relevant_offsets[rows + 1])
        packed = relevant.pack()
        return Targets(
            self.user_idx[rows],
            self.histories[rows],
            self.seen[rows],
            packed.item_idx,
            packed.offsets,
            None if self.now_ms is None else self.now_ms[rows],
            self.repeats,
        )

    def relevant(self, row: int) -> Int32Array:
        """int32: the relevant items of query ``row``."""
        return self.relevant_item_idx[self.relevant_offsets[row] : self.relevant_offsets[row + 1]]


@dataclass(frozen=True)
class Dataset:
    """Interactions (``PREPARED_INTERACTIONS``, sorted), items (row = ``item_idx``), users (row = ``user_idx``)."""

    interactions: pa.Table
    items: pa.Table
    users: pa.Table
    info: DatasetInfo

    def save(self, folder: str | Path) -> None:
        """Write three Parquet files and ``dataset.json`` (last)."""
        folder = Path(folder)
        write_parquet(folder / "interactions.parquet", self.interactions)
        write_parquet(folder / ITEMS_FILE, self.items)
        write_parquet(folder / "users.parquet", self.users)
        write_json(folder / "dataset.json", self.info.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: str | Path) -> Dataset:
        """Read what :meth:`save` wrote."""
        folder = Path(folder)
        if not (folder / "dataset.json").exists():
            raise DataError(f"{folder}: no prepared dataset here (dataset.json is missing)", path=str(folder))
        info = DatasetInfo.parse(read_json(folder / "dataset.json"), where=str(folder / "dataset.json"))
        tables = [pq.read_table(folder / name) for name in ("interactions.parquet", ITEMS_FILE, "users.parquet")]
        return cls(*tables, info=info)

    @property
    def num_users(self) -> int:
        """Rows of ``users``."""
        return self.info.num_users

    @property
    def num_items(self) -> int:
        """Rows of ``items``, those nobody has touched included."""
        return self.info.num_items

    @cached_property
    def log(self) -> Log:
        """Every interaction."""
        return self._log(self.interactions)

    @cached_property
    def positives(self) -> Log:
        """Interactions with ``weight`` > 0: what models learn from and are judged on."""
        return self._log(self.interactions.filter(pc.greater(self.interactions[schema.WEIGHT], 0)))

    def _log(self, table: pa.Table) -> Log:
        def column(name: str) -> NDArray[Any]:
            return table[name].to_numpy(zero_copy_only=False)

        user_idx = column(schema.USER_IDX)
        offsets = np.searchsorted(user_idx, np.arange(self.num_users + 1)).astype(np.int64)
        times = table[schema.TIMESTAMP].cast(pa.int64()).to_numpy() if self.info.has_time else None
        return Log(user_idx, column(schema.ITEM_IDX), times, column(schema.WEIGHT), column(schema.SPLIT), offsets)

    def targets(self, split: Split) -> Targets:
        """The evaluation queries of ``split`` under the dataset's protocol.

        Next item (rolling or leave-one-out): every positive of the split is one query, given all before it in the
        user's order. Next basket: the positives of one user at one time are one query, all of them relevant.
        """
        log, seen_log = self.positives, self.log
        rows = np.flatnonzero(log.split == split)
        users, relevant = log.user_idx[rows], log.item_idx[rows]
        heads = np.arange(len(rows))
        if self.info.protocol == "next_basket":
            heads = heads[_starts_basket(log)[rows]]
        offsets = np.concatenate([heads, [len(rows)]]).astype(np.int64)
        users, stops = users[heads], rows[heads]
        # The seen log holds the same rows and more; a target's place in it is found by the row number in the whole log.
        seen_stops = np.flatnonzero(self._is_positive)[stops]
        if self.info.protocol == "next_basket":
            # The rest of the basket is as unknown as its positives, and an item on two of its lines is one item.
            whole = np.arange(len(seen_log.user_idx))
            seen_stops = np.maximum.accumulate(np.where(_starts_basket(seen_log), whole, 0))[seen_stops]
            query = np.repeat(np.arange(len(heads)), np.diff(offsets))
            first = np.sort(np.unique(query * self.num_items + relevant, return_index=True)[1])
            relevant, offsets = relevant[first], np.searchsorted(query[first], np.arange(len(heads) + 1))
        return Targets(
            user_idx=users,
            histories=Histories(log.item_idx, log.user_offsets[users], stops, log.timestamp_ms),
            seen=Histories(seen_log.item_idx, seen_log.user_offsets[users], seen_stops, seen_log.timestamp_ms),
            relevant_item_idx=relevant,
            relevant_offsets=offsets,
            now_ms=None if log.timestamp_ms is None else log.timestamp_ms[stops],
        )

    def everybody(self) -> Targets:
        """One query per user, with all they did, as of a minute after the end of the data. Nothing is relevant, and
        nothing left out: whether items come again is the pipeline's to say.
        """
        log, num_users = self.positives, self.num_users
        now_ms = None if self.log.timestamp_ms is None else int(self.log.timestamp_ms.max()) + 60_000
        return Targets(
            user_idx=np.arange(num_users, dtype=np.int32),
            histories=log.histories(Split.TEST),
            seen=self.log.histories(Split.TEST),
            relevant_item_idx=np.zeros(0, np.int32),
            relevant_offsets=np.zeros(num_users + 1, np.int64),
            now_ms=None if now_ms is None else np.full(num_users, now_ms, np.int64),
            repeats=True,
        )

    def hides(self, policy: PositivePolicy) -> BoolArray:
        """bool [R]: the rows of :attr:`log` that say that their user wants no more of an item."""
        return policy.judge(self.interactions[schema.EVENT], self.interactions[schema.VALUE])[1]

    @cached_property
    def _is_positive(self) -> BoolArray:
        return self.interactions[schema.WEIGHT].to_numpy() > 0

    def train_counts(self, until: Split = Split.TRAIN) -> Int64Array:
        """int64 [num_items]: positives per item up to and with ``until``."""
        log = self.positives
        return np.bincount(log.item_idx[log.split <= until], minlength=self.num_items)


def _starts_basket(log: Log) -> BoolArray:
    """bool [R]: whether a row is the first of its user at its time."""
    times = log.timestamp_ms
    assert times is not None, "preparation refuses next_basket without time"
    starts = np.ones(len(times), bool)
    starts[1:] = (log.user_idx[1:] != log.user_idx[:-1]) | (times[1:] != times[:-1])
    return starts
