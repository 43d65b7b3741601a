"""Ragged batches of user histories, held once and viewed many times.

A history is a stretch ``[start, stop)`` of one log that is sorted by user and then by time, so a million evaluation
queries over the same log cost two integers each. Models never see padding: :meth:`Histories.pack` concatenates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from recsys.types import NO_HISTORY, BoolArray, History, Int32Array, Int64Array


@dataclass(frozen=True)
class PackedHistories:
    """Histories laid end to end: ``item_idx[offsets[b]:offsets[b+1]]`` is history ``b``, oldest first."""

    item_idx: Int32Array
    """int32 [T]"""
    offsets: Int64Array
    """int64 [B+1], starts with 0, ends with T"""
    timestamp_ms: Int64Array | None
    """int64 [T], milliseconds since 1970 UTC, or None where the data has order only"""

    @property
    def lengths(self) -> Int64Array:
        """int64 [B]"""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Histories:
    """B views into one log; views may overlap and may be empty."""

    item_idx: Int32Array
    """int32 [R], the whole log"""
    starts: Int64Array
    """int64 [B]"""
    stops: Int64Array
    """int64 [B], ``stops >= starts``"""
    timestamp_ms: Int64Array | None = None
    """int64 [R] or None"""

    @classmethod
    def from_lists(
        cls, item_idx: Sequence[Sequence[int]], timestamp_ms: Sequence[Sequence[int]] | None = None
    ) -> Histories:
        """Histories from plain lists, oldest first."""
        stops = np.cumsum([len(history) for history in item_idx], dtype=np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), stops[:-1]]) if len(stops) else np.zeros(0, np.int64)
        flat = np.asarray([i for history in item_idx for i in history], dtype=np.int32)
        times = None
        if timestamp_ms is not None:
            times = np.asarray([t for history in timestamp_ms for t in history], dtype=np.int64)
        return cls(flat, starts, stops, times)

    @classmethod
    def of(cls, histories: Sequence[History]) -> Histories:
        """Several histories, laid end to end."""
        stops = np.cumsum([len(history) for history in histories], dtype=np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), stops[:-1]]) if len(stops) else np.zeros(0, np.int64)
        item_idx = np.concatenate([NO_HISTORY.item_idx, *(history.item_idx for history in histories)])
        timestamp_ms = np.concatenate([NO_HISTORY.timestamp_ms, *(history.timestamp_ms for history in histories)])
        return cls(item_idx, starts, stops, timestamp_ms)

    @classmethod
    def single(cls, item_idx: Int32Array, timestamp_ms: Int64Array | None = None) -> Histories:
        """One history."""
        return cls(item_idx, np.zeros(1, np.int64), np.array([len(item_idx)], np.int64), timestamp_ms)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, rows: slice | Int64Array | BoolArray) -> Histories:
        """The histories at ``rows`` (a slice, indices or a mask), without copying the log."""
        return Histories(self.item_idx, self.starts[rows], self.stops[rows], self.timestamp_ms)

    def items(self, row: int) -> Int32Array:
        """int32 [L]: the items of history ``row``, oldest first."""
        return self.item_idx[self.starts[row] : self.stops[row]]

    def history(self, row: int) -> History:
        """History ``row``."""
        rows = slice(int(self.starts[row]), int(self.stops[row]))
        times = np.zeros(rows.stop - rows.start, np.int64) if self.timestamp_ms is None else self.timestamp_ms[rows]
        return History(self.item_idx[rows], times)

    @property
    def lengths(self) -> Int64Array:
        """int64 [B]"""
        return self.stops - self.starts

    def last(self, max_length: int) -> Histories:
        """The same histories cut to their newest ``max_length`` entries."""
        starts = np.maximum(self.starts, self.stops - max_length)
        return Histories(self.item_idx, starts, self.stops, self.timestamp_ms)

    def rows(self) -> Int64Array:
        """int64 [T]: the rows of the log that the histories cover, history after history."""
        lengths = self.lengths
        ends = np.cumsum(lengths)
        return np.repeat(self.starts - (ends - lengths), lengths) + np.arange(lengths.sum())

    def pack(self, max_length: int | None = None) -> PackedHistories:
        """Copy the (newest ``max_length`` entries of the) histories end to end."""
        view = self if max_length is None else self.last(max_length)
        rows = view.rows()
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(view.lengths)])
        times = None if self.timestamp_ms is None else self.timestamp_ms[rows]
        return PackedHistories(self.item_idx[rows], offsets, times)

    def batches(self, size: int) -> Iterator[tuple[slice, Histories]]:
        """Cut into runs of at most ``size`` histories; yields the rows and the histories."""
        for start in range(0, len(self), size):
            rows = slice(start, min(start + size, len(self)))
            yield rows, self[rows]
