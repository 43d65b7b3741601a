"""What a step of next-item training sees: windows of histories packed into batches, and sampled negatives.

Everything is drawn from seeds that name the epoch and the step, on every worker alike, so the same global batch comes
out whether one worker takes it whole, several share it or one takes it in parts.

Shape legend: W windows, T tokens, R rows of the log, S negatives, N items.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from recsys.data.histories import Histories
from recsys.errors import NoTimeError
from recsys.schema import DAY_MS
from recsys.types import BoolArray, Float64Array, FloatArray, Int64Array

_NO_INPUT = -1


@dataclass(frozen=True)
class Windows:
    """Stretches of the log to be predicted: the rows ``[starts, stops)``, each given the ones before it."""

    starts: Int64Array
    """int64 [W]"""
    stops: Int64Array
    """int64 [W]"""
    heads: BoolArray
    """bool [W]: True where the window begins with the user's first interaction, predicted from nothing"""

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, rows: Int64Array) -> Windows:
        return Windows(self.starts[rows], self.stops[rows], self.heads[rows])

    @property
    def lengths(self) -> Int64Array:
        """int64 [W]"""
        return self.stops - self.starts


@dataclass(frozen=True)
class PackedWindows:
    """One worker's part of a step. Token ``t`` reads ``input_row`` and must predict ``target_row``."""

    input_row: Int64Array
    """int64 [T], row of the log, or -1 for the start of a history"""
    target_row: Int64Array
    """int64 [T]"""
    lengths: Int64Array
    """int64 [W]"""
    counts: bool
    """False for a part that only keeps its worker in step: it must weigh nothing"""


def cut_windows(
    histories: Histories, max_length: int, rng: np.random.Generator, heads: BoolArray | None = None
) -> Windows:
    """Cut every non-empty history into windows of at most ``max_length`` targets.

    The first cut of a long history is random, so that from epoch to epoch every item is seen with different
    contexts; every target is in exactly one window. ``heads`` (bool [B], None for all) tells of each history whether
    it begins with its user's first interaction.
    """
    rows = np.flatnonzero(histories.lengths > 0)
    starts, lengths = histories.starts[rows], histories.lengths[rows]
    first = np.where(lengths > max_length, rng.integers(1, max_length + 1, len(rows)), lengths)
    counts = 1 + -(-(lengths - first) // max_length)
    user = np.repeat(np.arange(len(rows)), counts)
    ordinal = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    stops = np.minimum(first[user] + ordinal * max_length, lengths[user])
    begins = np.where(ordinal == 0, 0, first[user] + (ordinal - 1) * max_length)
    is_head = ordinal == 0 if heads is None else (ordinal == 0) & heads[rows][user]
    return Windows(starts[user] + begins, starts[user] + stops, is_head)


def plan_epoch(windows: Windows, batch_tokens: int, rng: np.random.Generator) -> list[Windows]:
    """Shuffle windows and group them into global batches of about ``batch_tokens`` targets; none for no window."""
    if not len(windows):
        return []
    shuffled = windows[rng.permutation(len(windows))]
    ends = np.cumsum(shuffled.lengths)
    borders = np.searchsorted(ends, np.arange(batch_tokens, ends[-1] + batch_tokens, batch_tokens)) + 1
    borders = np.unique(np.minimum(np.concatenate([[0], borders]), len(shuffled)))
    return [shuffled[np.arange(lo, hi)] for lo, hi in pairwise(borders)]


def split_batch(batch: Windows, num_parts: int) -> list[PackedWindows]:
    """Deal a global batch out into ``num_parts`` of near equal token counts, longest windows first.

    A part left empty gets a window that does not count, because data-parallel workers must all take part in a step.
    """
    order = np.argsort(-batch.lengths, kind="stable")
    return [_pack(batch[order[part::num_parts]] if part < len(batch) else batch[order[-1:]], part < len(batch))
            for part in range(num_parts)]  # fmt: skip


def _pack(windows: Windows, counts: bool) -> PackedWindows:
    target_row = Histories(np.zeros(0, np.int32), windows.starts, windows.stops).rows()
    input_row = target_row - 1
    firsts = np.cumsum(windows.lengths) - windows.lengths
    input_row[firsts[windows.heads]] = _NO_INPUT
    return PackedWindows(input_row, target_row, windows.lengths, counts)


def first_of_basket(part: PackedWindows, timestamp_ms: Int64Array) -> Int64Array:
    """int64 [T]: the first token of the basket that each token's target is in.

    A basket is what one user did at one time (``timestamp_ms``: int64 [R], of the log). What the first token has read
    ends before the basket; where a window begins inside a basket, the part of it before the window counts as read.
    """
    rows = part.target_row
    firsts = np.cumsum(part.lengths) - part.lengths
    begins = np.ones(len(rows), bool)
    begins[1:] = timestamp_ms[rows[1:]] != timestamp_ms[rows[:-1]]
    begins[firsts] = True
    return np.maximum.accumulate(np.where(begins, np.arange(len(rows)), 0))


class NegativeSampler:
    """Draws items with probability proportional to ``count ** power`` over the ``eligible`` items, with replacement."""

    def __init__(self, counts: Float64Array, power: float, eligible: BoolArray | None = None) -> None:
        """``counts``: float64 [N], items with 0 are drawn as rarely as those with 1; ``power`` 0 draws uniformly.

        ``eligible``: bool [N], None for all.
        """
        mass = np.maximum(counts, 1.0) ** power
        if eligible is not None:
            mass = mass * eligible
        self.probability = mass / mass.sum()
        """float64 [N]"""
        self._cumulative = np.cumsum(self.probability)

    def draw(self, num: int, rng: np.random.Generator) -> Int64Array:
        """int64 [S]"""
        return np.searchsorted(self._cumulative, rng.random(num) * self._cumulative[-1], side="right").astype(np.int64)

    def log_correction(self, items: Int64Array) -> FloatArray:
        """float32 [S]: ``-log(S q)`` of each drawn item, for :func:`recsys.training.losses.softmax_loss`."""
        return -np.log(len(items) * self.probability[items]).astype(np.float32)


def rng_for(seed: int, *names: int) -> np.random.Generator:
    """A generator that depends on ``seed`` and what it is for (purpose, epoch, step), not on what was drawn before."""
    return np.random.default_rng(np.random.SeedSequence([seed, *names]))


def token_weight(part: PackedWindows, weights: FloatArray) -> FloatArray:
    """float32 [T]: the weight of each target of ``part``."""
    return weights[part.target_row] * np.float32(part.counts)


def total_weight(batch: Windows, running: Float64Array) -> float:
    """The sum of all target weights of a global batch: what its loss is divided by, on every worker alike.

    ``running`` (float64 [R + 1]) is the weight of all rows before each.
    """
    return float((running[batch.stops] - running[batch.starts]).sum())


def recency_weight(weights: FloatArray, histories: Histories, half_life_days: float | None) -> FloatArray:
    """float32 [R]: ``weights`` of the log's rows, halved for every ``half_life_days`` before the newest history's end.

    The mean over the rows of ``histories`` stays, so that a learning rate keeps its meaning. None leaves all as is.

    :raises NoTimeError: when there is a half-life and no time.
    """
    if half_life_days is None:
        return weights
    if histories.timestamp_ms is None:
        raise NoTimeError("recency_half_life_days needs timestamps, and this data has order only: set it to null")
    rows = histories.rows()
    age_days = (histories.timestamp_ms[rows].max() - histories.timestamp_ms) / DAY_MS
    # Rows after the histories' end are not learned from; their age would be negative.
    decayed = weights * np.exp2(-np.maximum(age_days, 0) / half_life_days)
    return (decayed * (weights[rows].sum() / decayed[rows].sum())).astype(np.float32)
