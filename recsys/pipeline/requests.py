"""What a caller asks and what it is answered: the HTTP API's shapes as plain dataclasses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from recsys.errors import RequestError
from recsys.ids import id_problem, text_problem
from recsys.pipeline.config import PipelineConfig
from recsys.types import NO_FILTERS, Filters, HistoryItem, Slate

_LATEST_MS = 1 << 53
MAX_QUERY_LENGTH = 1000
"""longest text to search for (characters)"""


@dataclass(frozen=True, slots=True)
class RecommendRequest:
    """Recommend items to a user, to a history, or to both: ``history`` then counts after what is known of the user."""

    user_id: str | None = None
    history: Sequence[HistoryItem] = ()
    """oldest first, for this request only"""
    top_k: int = 10
    filters: Filters = NO_FILTERS
    exclude_items: Sequence[str] = ()
    """item ids that must not be shown; unknown ones are ignored"""
    exclude_seen: bool = True
    diversity: float | None = None
    """0 by score alone to 1 by novelty alone; None for the configured default"""
    context: Mapping[str, str] = field(default_factory=dict[str, str])
    """surface, device, locale: for the logs of requests and impressions; each value is an id"""
    explain: bool = False
    deadline_ms: float | None = None
    """milliseconds until the answer is worthless; None for the configured default"""
    request_id: str | None = None
    """None for a fresh one"""

    def check(self, config: PipelineConfig) -> None:
        """Raise :class:`~recsys.errors.RequestError`, its ``field`` named, for the first thing that is wrong."""
        _check_top_k(self.top_k, config)
        if self.user_id is not None:
            _check_id("user_id", self.user_id)
        _check_length("history", self.history, config)
        for row, item in enumerate(self.history):
            if not isinstance(item, HistoryItem):
                raise _bad(f"history[{row}]", f"must be a HistoryItem, not {item!r}")
            _check_id(f"history[{row}].item_id", item.item_id)
            if item.timestamp_ms is not None and not (
                _is_int(item.timestamp_ms) and 0 <= item.timestamp_ms < _LATEST_MS
            ):
                raise _bad(f"history[{row}].timestamp_ms", "must be milliseconds since 1970 as an integer")
            if item.event is not None:
                _check_id(f"history[{row}].event", item.event)
            if item.value is not None:
                _check_number(f"history[{row}].value", item.value)
        _check_filters(self.filters, self.exclude_items, config)
        for name, value in self.context.items():
            _check_id(f"context.{name}", value)
        if self.diversity is not None:
            _check_number("diversity", self.diversity, low=0, high=1)
        if self.deadline_ms is not None:
            _check_number("deadline_ms", self.deadline_ms, low=1, high=config.max_deadline_ms)


@dataclass(frozen=True, slots=True)
class SimilarRequest:
    """The items most like one item."""

    item_id: str
    top_k: int = 10
    request_id: str | None = None

    def check(self, config: PipelineConfig) -> None:
        """See :meth:`RecommendRequest.check`."""
        _check_id("item_id", self.item_id)
        _check_top_k(self.top_k, config)


@dataclass(frozen=True, slots=True)
class SearchRequest:
    """Items by words."""

    query: str
    top_k: int = 10
    filters: Filters = NO_FILTERS
    exclude_items: Sequence[str] = ()
    """item ids that must not be shown; unknown ones are ignored"""
    request_id: str | None = None

    def check(self, config: PipelineConfig) -> None:
        """See :meth:`RecommendRequest.check`."""
        if not isinstance(self.query, str) or not self.query.strip():
            raise _bad("query", "must be a text of one word or more")
        if why := text_problem(self.query):
            raise _bad("query", why)
        if len(self.query) > MAX_QUERY_LENGTH:
            raise _bad("query", f"is {len(self.query)} characters long, more than {MAX_QUERY_LENGTH}")
        _check_top_k(self.top_k, config)
        _check_filters(self.filters, self.exclude_items, config)


@dataclass(frozen=True, slots=True)
class RecommendedItem:
    """One place of a slate."""

    item_id: str
    title: str
    score: float
    """of the last stage that scored; comparable within one answer only"""
    rank: int
    """from 0"""
    sources: tuple[str, ...]
    stage_scores: Mapping[str, float]
    reasons: tuple[str, ...] | None = None
    """for people; None unless asked for"""


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The answer."""

    request_id: str
    bundle_id: str
    user_id: str | None
    items: tuple[RecommendedItem, ...]
    degraded: tuple[str, ...]
    """parts that were skipped: stages, or ``state`` where the event store could not answer"""
    timings_ms: Mapping[str, float]
    """wall milliseconds: total, state, and each stage"""
    unknown_items: int = 0
    """entries of the request's history that name no item of the catalogue; they were ignored"""
    slate: Slate | None = field(default=None, repr=False, compare=False)
    """how the items came about, in internal ids; None for similar items"""

    @property
    def item_ids(self) -> list[str]:
        """The ids of the items, best first."""
        return [item.item_id for item in self.items]

    @property
    def scores(self) -> list[float]:
        """The scores of the items, best first."""
        return [item.score for item in self.items]


def _check_filters(filters: Filters, exclude_items: Sequence[str], config: PipelineConfig) -> None:
    lists = {f"filters.{name}": getattr(filters, name) for name in ("categories_any", "categories_none")}
    for name, values in {**lists, "exclude_items": exclude_items}.items():
        _check_length(name, values, config)
        for row, value in enumerate(values):
            _check_id(f"{name}[{row}]", value)
    low, high = filters.price_min, filters.price_max
    for name, value in (("filters.price_min", low), ("filters.price_max", high)):
        if value is not None:
            _check_number(name, value)
    if low is not None and high is not None and low > high:
        raise _bad("filters.price_min", f"{low:g} is above price_max {high:g}")


def _check_top_k(top_k: Any, config: PipelineConfig) -> None:
    if not _is_int(top_k) or not 1 <= top_k <= config.max_top_k:
        raise _bad("top_k", f"must be an integer from 1 to {config.max_top_k}, not {top_k!r}")


def _check_id(name: str, value: Any) -> None:
    if why := id_problem(value):
        raise _bad(name, why)


def _check_length(name: str, values: Any, config: PipelineConfig) -> None:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise _bad(name, f"must be a list, not {values!r}")
    if len(values) > config.max_request_items:
        raise _bad(name, f"has {len(values)} entries, more than {config.max_request_items}")


def _check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= 3e38 or not low <= value <= high:
        bounds = "a finite number" if low == -math.inf else f"a number from {low:g} to {high:g}"
        raise _bad(name, f"must be {bounds}, not {value!r}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _bad(name: str, why: str) -> RequestError:
    return RequestError(f"{name} {why}", field=name)
