"""How a log is cut into train, validation and test, and the proof that nothing leaks through the cut.

Every kind labels the interactions of a prepared log (sorted by user, time and position) so that within a user the
labels never go back, and checks the labelled log before anybody learns from it.

A new kind is one file with one subclass of :class:`SplitPolicy` and one line in ``recsys/data/splits/__init__.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from recsys import schema
from recsys.data.dataset import Split
from recsys.data.validation import equal_pairs
from recsys.errors import EmptyDataError, LeakageError, NoTimeError
from recsys.kinds import Kind
from recsys.moments import milliseconds
from recsys.types import BoolArray, FloatArray, Int32Array, Int64Array

Borders = tuple[int, int]


@dataclass(frozen=True)
class Labels:
    """The result of a split."""

    split: NDArray[np.int8]
    """int8 [R]: a :class:`~recsys.data.dataset.Split` per interaction"""
    borders_ms: Borders | None = None
    """first millisecond of validation and of test, for a split in time"""


class SplitPolicy(Kind, ABC):
    """Cuts a log. Subclasses add ``kind: Literal["..."]``."""

    kind: str
    protocol: ClassVar[str]
    """How the split is evaluated; see :class:`~recsys.data.dataset.DatasetInfo`"""

    @abstractmethod
    def assign(self, user_idx: Int32Array, timestamp_ms: Int64Array | None, positive: BoolArray) -> Labels:
        """Label R interactions that are sorted by user, time and position; ``timestamp_ms`` is None without time.

        Raises :class:`~recsys.errors.NoTimeError` where the split needs time and there is none.
        """

    def check(self, interactions: pa.Table, borders_ms: Borders | None) -> None:
        """Raise :class:`~recsys.errors.LeakageError` if the labelled log (``PREPARED_INTERACTIONS``) leaks."""
        log = LogColumns.of(interactions)
        check_order(log)
        check_duplicates(log)
        check_labels_advance(log)
        self.check_cut(log, borders_ms)

    @abstractmethod
    def check_cut(self, log: LogColumns, borders_ms: Borders | None) -> None:
        """The part of :meth:`check` that differs from kind to kind."""


class TimeSplit(SplitPolicy, ABC):
    """One moment for all users cuts train from validation, another one validation from test.

    A border is a timestamp, and an interaction at exactly that time belongs to the later part, so equal times are never
    cut apart. Given fractions are shares of all interactions; ties at a border make the later part larger.
    """

    valid_fraction: float = Field(default=0.1, gt=0, lt=1, description="Share of interactions in validation (0 to 1).")
    test_fraction: float = Field(
        default=0.1, gt=0, lt=1, description="Share of interactions, the newest, in test (0 to 1)."
    )
    valid_from: datetime | None = Field(
        default=None, description="First moment of validation (ISO 8601; UTC without a zone), instead of fractions."
    )
    test_from: datetime | None = Field(
        default=None, description="First moment of test (ISO 8601; UTC without a zone), instead of fractions."
    )

    @model_validator(mode="after")
    def _borders_make_sense(self) -> Self:
        if (self.valid_from is None) != (self.test_from is None):
            raise ValueError("give both valid_from and test_from, or neither")
        if self.valid_from is not None and self.test_from is not None:
            if milliseconds(self.valid_from) >= milliseconds(self.test_from):
                raise ValueError("valid_from must be before test_from")
        elif self.valid_fraction + self.test_fraction >= 1:
            raise ValueError("valid_fraction and test_fraction leave nothing to train on: their sum must be below 1")
        return self

    def assign(self, user_idx: Int32Array, timestamp_ms: Int64Array | None, positive: BoolArray) -> Labels:
        if timestamp_ms is None:
            raise NoTimeError(f"split {self.kind} needs timestamps, but this data has order only: use leave_one_out")
        if self.valid_from is not None and self.test_from is not None:
            valid_from, test_from = milliseconds(self.valid_from), milliseconds(self.test_from)
        else:
            valid_from, test_from = (
                self._quantile(timestamp_ms, 1 - self.valid_fraction - self.test_fraction),
                self._quantile(timestamp_ms, 1 - self.test_fraction),
            )
        split = (timestamp_ms >= valid_from).astype(np.int8) + (timestamp_ms >= test_from)
        return Labels(split.astype(np.int8), (valid_from, test_from))

    @staticmethod
    def _quantile(timestamp_ms: Int64Array, share: float) -> int:
        rank = min(int(len(timestamp_ms) * share), len(timestamp_ms) - 1)
        return int(np.partition(timestamp_ms, rank)[rank])

    def check_cut(self, log: LogColumns, borders_ms: Borders | None) -> None:
        if log.time is None or borders_ms is None:
            raise LeakageError(f"split {self.kind}: a split in time without timestamps or borders proves nothing")
        valid_from, test_from = borders_ms
        low = np.array([np.iinfo(np.int64).min, valid_from, test_from])
        high = np.array([valid_from, test_from, np.iinfo(np.int64).max])
        wrong = (log.time < low[log.split]) | (log.time >= high[log.split])
        refuse(wrong, log, "lies on the wrong side of a border in time")


@dataclass(frozen=True)
class LogColumns:
    """The columns of a prepared log as arrays of R rows."""

    user: Int32Array
    item: Int32Array
    time: Int64Array | None
    position: Int64Array
    event: Int32Array
    value: FloatArray
    positive: BoolArray
    split: NDArray[np.int8]

    @classmethod
    def of(cls, interactions: pa.Table) -> LogColumns:
        def column(name: str) -> NDArray[Any]:
            return interactions[name].to_numpy()

        times = interactions[schema.TIMESTAMP]
        has_time = times.null_count < len(times)
        if has_time and times.null_count:
            raise LeakageError("some interactions have a time and some have none: their order means nothing")
        return cls(
            user=column(schema.USER_IDX),
            item=column(schema.ITEM_IDX),
            time=times.cast(pa.int64()).to_numpy() if has_time else None,
            position=column(schema.POSITION),
            event=interactions[schema.EVENT].combine_chunks().dictionary_encode().indices.to_numpy(),
            value=interactions[schema.VALUE].to_numpy(),
            positive=column(schema.WEIGHT) > 0,
            split=column(schema.SPLIT),
        )


def check_order(log: LogColumns) -> None:
    """Sorted by user and time, each user's positions 0, 1, 2 and so on: any other order is not the prepared one."""
    same_user = log.user[1:] == log.user[:-1]
    wrong = np.zeros(len(log.user), bool)
    wrong[1:] = log.user[1:] < log.user[:-1]
    refuse(wrong, log, "comes after a higher user_idx: the log is not sorted by user")
    if log.time is not None:
        wrong[1:] = same_user & (log.time[1:] < log.time[:-1])
        refuse(wrong, log, "is older than the one before it: the user's log is not sorted by time")
    wrong[1:] = log.position[1:] != np.where(same_user, log.position[:-1] + 1, 0)
    wrong[:1] = log.position[:1] != 0
    refuse(wrong, log, "has a position that does not follow the one before it: the order is not the stable one")


def check_duplicates(log: LogColumns) -> None:
    """No interaction of known time is there on both sides of a border."""
    if log.time is None:
        return
    earlier, later = equal_pairs(log.user, log.item, log.time, log.event, log.value)
    wrong = np.zeros(len(log.user), bool)
    wrong[later[log.split[earlier] != log.split[later]]] = True
    refuse(wrong, log, "is a duplicate of one in another part")


def check_labels_advance(log: LogColumns) -> None:
    """Within a user the labels never go back from test to validation to train."""
    wrong = np.zeros(len(log.user), bool)
    wrong[1:] = (log.user[1:] == log.user[:-1]) & (log.split[1:] < log.split[:-1])
    refuse(wrong, log, "belongs to an earlier part than the one before it: the future would be in the past")


def check_not_empty(split: NDArray[np.int8], positive: BoolArray) -> None:
    """Every part has a positive to learn from or to be judged on; else :class:`~recsys.errors.EmptyDataError`."""
    for part in Split:
        if not (positive & (split == part)).any():
            raise EmptyDataError(
                f"the {part.name.lower()} part has no positives; change the split's fractions or borders, or what "
                "counts as a positive",
                part=part.name.lower(),
            )


def refuse(wrong: BoolArray, log: LogColumns, what: str) -> None:
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        user, item = int(log.user[row]), int(log.item[row])
        raise LeakageError(
            f"row {row} (user_idx {user}, item_idx {item}, {Split(int(log.split[row])).name.lower()}) {what}; "
            f"{int(wrong.sum())} such row(s)",
            row=row,
            user_idx=user,
            count=int(wrong.sum()),
        )
