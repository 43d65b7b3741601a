"""What flows through the pipeline: a query goes in, candidates pass from stage to stage, a slate comes out.

All of it is small and made of ids and float32 arrays, because in a Serve graph it crosses process borders.
Shape legend: C candidates, L history length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

Int32Array = NDArray[np.int32]
Int64Array = NDArray[np.int64]
FloatArray = NDArray[np.float32]
Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Filters:
    """Hard rules of one request. Prices are in the catalogue's own unit; one without a price fails a price bound."""

    categories_any: tuple[str, ...] = ()
    categories_none: tuple[str, ...] = ()
    price_min: float | None = None
    price_max: float | None = None

    def __post_init__(self) -> None:
        # Lists of a caller: what is remembered per filter needs something that cannot change.
        for name in ("categories_any", "categories_none"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))

    @property
    def empty(self) -> bool:
        """Whether nothing is filtered."""
        return self is NO_FILTERS or self == NO_FILTERS


NO_FILTERS = Filters()


@dataclass(frozen=True, slots=True, eq=False)
class History:
    """What one user did, oldest first, in internal ids. Many at once are :class:`recsys.data.histories.Histories`."""

    item_idx: Int32Array
    """int32 [L]"""
    timestamp_ms: Int64Array
    """int64 [L], milliseconds since 1970 UTC; zeros where the data has order only"""

    def __len__(self) -> int:
        return len(self.item_idx)

    def last(self, max_length: int) -> Self:
        """The newest ``max_length`` (1 or more) entries."""
        return (
            self
            if len(self) <= max_length
            else type(self)(self.item_idx[-max_length:], self.timestamp_ms[-max_length:])
        )

    def then(self, later: Self) -> Self:
        """This one followed by what came ``later``."""
        return type(self)(
            np.concatenate([self.item_idx, later.item_idx]), np.concatenate([self.timestamp_ms, later.timestamp_ms])
        )


NO_HISTORY = History(np.zeros(0, np.int32), np.zeros(0, np.int64))


@dataclass(frozen=True, slots=True)
class HistoryItem:
    """Something a user did, as it is told from outside: with a request, or by a Bundle's golden query."""

    item_id: str
    timestamp_ms: int | None = None
    """milliseconds since 1970 UTC, 0 where the data has order only; None for just now"""
    event: str | None = None
    """an event name of the positive policy; None for a plain positive"""
    value: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """One recommendation to make, in internal ids. Built by the runner from a request and the user's state."""

    request_id: str
    bundle_id: str
    now_ms: int
    """the request's time, milliseconds since 1970 UTC"""
    history: History
    """positives; empty for a user nobody knows"""
    excluded_item_idx: Int32Array
    """int32: items that must not appear (seen, or named in the request)"""
    top_k: int
    num_candidates: int
    """how many candidates retrieval hands on, at least ``top_k``"""
    filters: Filters = NO_FILTERS
    diversity: float | None = None
    """0 (by score alone) to 1 (by novelty alone); None for the configured default"""


@dataclass(frozen=True, slots=True, eq=False)
class Removal:
    """Candidates taken out together, by which stage and why. One array, because a slate leaves hundreds behind."""

    item_idx: Int32Array
    """int32 [n]"""
    stage: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Candidates in order, best first, with where each came from and what each stage thought of it."""

    item_idx: Int32Array
    """int32 [C], no item twice"""
    score: FloatArray
    """float32 [C], the score of the last stage that scored, descending unless a reranker reordered on purpose"""
    sources: tuple[str, ...]
    """names of the sources; ``source_bits`` refers to them"""
    source_bits: NDArray[np.uint32]
    """uint32 [C]: bit ``s`` is set where ``sources[s]`` proposed the candidate"""
    stage_scores: Mapping[str, FloatArray] = field(default_factory=dict[str, FloatArray])
    """per stage that has scored, float32 [C]"""
    removed: tuple[Removal, ...] = ()
    """candidates that a hard rule took out (filtered)"""
    dropped: tuple[Removal, ...] = ()
    """candidates that lost: cut by rank or by a soft rule (not selected)"""

    def __len__(self) -> int:
        return len(self.item_idx)

    @classmethod
    def empty(cls) -> Self:
        return cls(np.zeros(0, np.int32), np.zeros(0, np.float32), (), np.zeros(0, np.uint32))

    @classmethod
    def from_source(cls, source: str, item_idx: Int32Array, score: FloatArray, *, stage: str) -> Self:
        """Candidates of one source, best first, scored by ``stage``."""
        return cls(item_idx, score, (source,), np.ones(len(item_idx), np.uint32), {stage: score})

    def then(self, other: Self) -> Self:
        """These candidates followed by those of ``other``, which shares no item with them.

        Scores of a stage that saw only one of the two parts are NaN for the other.
        """
        sources = self.sources + tuple(name for name in other.sources if name not in self.sources)
        bits = np.zeros(len(other), np.uint32)
        for bit, name in enumerate(other.sources):
            bits |= (other.source_bits >> np.uint32(bit) & np.uint32(1)) << np.uint32(sources.index(name))
        stage_scores = {
            stage: np.concatenate(
                [part.stage_scores.get(stage, np.full(len(part), np.nan, np.float32)) for part in (self, other)]
            )
            for stage in {**self.stage_scores, **other.stage_scores}
        }
        return replace(
            self,
            item_idx=np.concatenate([self.item_idx, other.item_idx]),
            score=np.concatenate([self.score, other.score]),
            sources=sources,
            source_bits=np.concatenate([self.source_bits, bits]),
            stage_scores=stage_scores,
            removed=self.removed + other.removed,
            dropped=self.dropped + other.dropped,
        )

    def take(self, rows: Int64Array) -> Self:
        """The candidates at ``rows``, in that order. What is left out must be accounted for by the caller."""
        scores = {stage: values[rows] for stage, values in self.stage_scores.items()}
        return replace(
            self,
            item_idx=self.item_idx[rows],
            score=self.score[rows],
            source_bits=self.source_bits[rows],
            stage_scores=scores,
        )

    def scored(self, stage: str, score: FloatArray) -> Self:
        """The same candidates with the scores of ``stage``, sorted by them (stable, descending)."""
        order = np.argsort(-score, kind="stable")
        return replace(self, stage_scores={**self.stage_scores, stage: score}, score=score).take(order)

    def sources_of(self, row: int) -> list[str]:
        """Names of the sources that proposed candidate ``row``."""
        return [name for bit, name in enumerate(self.sources) if self.source_bits[row] >> bit & 1]


@dataclass(frozen=True, slots=True, eq=False)
class Slate:
    """The outcome for one query. Every candidate that entered is in exactly one of selected, filtered, not selected."""

    query: Query
    selected: Candidates
    filtered: tuple[Removal, ...]
    not_selected: tuple[Removal, ...]
    degraded: tuple[str, ...]
    """names of the stages that were skipped"""
    failures: Mapping[str, str]
    """per skipped stage, why"""
    outcomes: Mapping[str, str]
    """per stage ``ok``, or the ``outcome`` of its :class:`~recsys.errors.StageError`"""
    provenance: Mapping[str, str]
    """per stage that answered, the ``bundle_id`` it answered from"""
    timings_ms: Mapping[str, float]
    """wall milliseconds per stage and ``total``"""
    busy_ms: Mapping[str, float]
    """milliseconds of compute per stage that answered, without queueing and transport"""

    def removals(self) -> list[Removal]:
        """Filtered and not selected, one entry per stage and reason."""
        together: dict[tuple[str, str], list[Int32Array]] = {}
        for each in (*self.filtered, *self.not_selected):
            together.setdefault((each.stage, each.reason), []).append(each.item_idx)
        return [Removal(np.concatenate(parts), stage, reason) for (stage, reason), parts in together.items()]
