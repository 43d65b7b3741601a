"""What a user comes back to: how often each item stands in their own history, faded with several half-lives.

In fields where people buy or play the same again, a user's own counts foretell the next basket better than most models
do ("A Next Basket Recommendation Reality Check", Li et al., TOIS 2023; after TIFU-KNN, Hu et al., SIGIR 2020), and a
vector of few dimensions cannot remember every item of a long history. So the score of an item of the history is
lengthened by ``weight . log(1 + faded count)``, one count and one weight per half-life, where the weights are a linear
map of the user vector: whoever never takes a thing twice is given none of it.

Shape legend: Q queries, E pairs of a query and an item of its history, F half-lives, C candidates, N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recsys.data.histories import Histories
from recsys.errors import NoTimeError
from recsys.schema import DAY_MS
from recsys.types import FloatArray, Int32Array, Int64Array


@dataclass(frozen=True)
class Habits:
    """The counts of each query, item by item."""

    item_idx: Int32Array
    """int32 [E]: ``offsets[q]`` to ``offsets[q + 1]`` are the items of query ``q``, ascending, each once"""
    offsets: Int64Array
    """int64 [Q + 1]"""
    count_EF: FloatArray
    """float32: ``log(1 + faded count)``"""

    @classmethod
    def of(
        cls, histories: Histories, now_ms: Int64Array | None, half_lives_days: Sequence[float], num_items: int
    ) -> Habits:
        """Count each history (Q of them) as of ``now_ms`` (int64 [Q]), or of its own end without it.

        Without timestamps nothing fades; what is dated after ``now_ms`` has not faded yet.
        """
        rows, lengths = histories.rows(), histories.lengths
        query = np.repeat(np.arange(len(histories)), lengths)
        age_days = np.zeros(len(rows))
        if histories.timestamp_ms is not None:
            if now_ms is None:
                # An empty history has no pair that would read what stands here for it.
                now_ms = np.zeros(len(histories), np.int64)
                some = lengths > 0
                now_ms[some] = histories.timestamp_ms[histories.stops[some] - 1]
            age_days = np.maximum(now_ms[query].astype(np.float64) - histories.timestamp_ms[rows], 0) / DAY_MS
        pair, place = np.unique(query * num_items + histories.item_idx[rows], return_inverse=True)
        count_EF = np.empty((len(pair), len(half_lives_days)), np.float32)
        for f, half_life in enumerate(half_lives_days):
            count_EF[:, f] = np.log1p(np.bincount(place, np.exp2(-age_days / half_life), len(pair)))
        offsets = np.searchsorted(pair, np.arange(len(histories) + 1) * num_items)
        return cls((pair % max(1, num_items)).astype(np.int32), offsets, count_EF)

    def count(self, query_T: Int64Array, item_T: Int64Array, num_items: int) -> FloatArray:
        """float32 [T, F]: the counts of one item for one query each, 0 where it is not in the history."""
        if not len(self.item_idx):
            return np.zeros((len(query_T), self.count_EF.shape[1]), np.float32)
        pair = np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets)) * num_items + self.item_idx
        asked = query_T * num_items + item_T
        place = np.minimum(np.searchsorted(pair, asked), len(pair) - 1)
        return np.where((pair[place] == asked)[:, None], self.count_EF[place], np.float32(0))

    def among(self, candidate_C: Int64Array) -> Habits:
        """The same for places in a list of candidates instead of items; a candidate that comes twice counts twice."""
        order = np.argsort(candidate_C, kind="stable")
        ordered = candidate_C[order]
        first = np.searchsorted(ordered, self.item_idx)
        times = np.searchsorted(ordered, self.item_idx, side="right") - first
        pair = np.repeat(np.arange(len(times)), times)
        ordinal = np.arange(len(pair)) - np.repeat(np.cumsum(times) - times, times)
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(times)])
        return Habits(order[first[pair] + ordinal].astype(np.int32), before[self.offsets], self.count_EF[pair])


@dataclass(frozen=True)
class PastOfTargets:
    """For each row of a log, what its user had done before it, or before the basket that it is in."""

    histories: Histories
    """what the log is of, one history per user"""
    starts: Int64Array
    """int64 [R]"""
    stops: Int64Array
    """int64 [R]"""

    @classmethod
    def of(cls, histories: Histories, *, by_basket: bool) -> PastOfTargets:
        """:raises NoTimeError: when the data has order only."""
        if histories.timestamp_ms is None:
            raise NoTimeError("habit_half_lives_days needs timestamps, and this data has order only: leave it empty")
        rows = histories.rows()
        starts = np.zeros(len(histories.item_idx), np.int64)
        starts[rows] = np.repeat(histories.starts, histories.lengths)
        stops = np.arange(len(starts))
        if by_basket:
            begins = np.ones(len(rows), np.bool_)
            times = histories.timestamp_ms[rows]
            begins[1:] = (times[1:] != times[:-1]) | (starts[rows][1:] != starts[rows][:-1])
            stops[rows] = np.maximum.accumulate(np.where(begins, rows, 0))
        return cls(histories, starts, stops)

    def habits(
        self, target_row: Int64Array, half_lives_days: Sequence[float], num_items: int
    ) -> tuple[Habits, Int64Array]:
        """Those of the targets (int64 [T]), and for each target its query (int64 [T]): targets of one past share it."""
        stops, query_T = np.unique(self.stops[target_row], return_inverse=True)
        assert self.histories.timestamp_ms is not None
        past = Histories(self.histories.item_idx, self.starts[stops], stops, self.histories.timestamp_ms)
        # The row at which a past ends is the target itself, or the first of its basket.
        return Habits.of(past, self.histories.timestamp_ms[stops], half_lives_days, num_items), query_T
