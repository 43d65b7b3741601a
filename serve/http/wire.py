"""What goes over HTTP: requests, answers and errors, with the descriptions that ``/docs`` shows.

Bounds here are those that need no Bundle; what depends on one (the largest ``top_k``, an unknown category) is checked
by the recommender and answered as 422, too.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from recsys.bundle.rule_log import Note
from recsys.ids import Id
from recsys.moments import Moment, milliseconds
from recsys.pipeline.requests import (
    MAX_QUERY_LENGTH,
    Recommendation,
    RecommendedItem,
    RecommendRequest,
    SearchRequest,
    SimilarRequest,
)
from recsys.pipeline.rules import AnyRule, AnyRules
from recsys.pipeline.rules.changes import RuleHistory, RuleState
from recsys.types import NO_FILTERS, Filters, HistoryItem


class _Body(BaseModel):
    """Unknown keys are errors: a misspelt filter must not be dropped in silence."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class HistoryEntry(_Body):
    item_id: Id = Field(description="an item the catalogue lacks is ignored")
    timestamp: Moment | None = Field(None, description="ISO 8601 with zone; without one the order of the list counts")
    event: Id | None = Field(None, description="name of the event; without one the entry counts as a positive")
    value: float | None = Field(None, description="value of the event, such as the stars of a rating")


class FiltersBody(_Body):
    categories_any: tuple[str, ...] = Field((), description="keep items of at least one of these categories")
    categories_none: tuple[str, ...] = Field((), description="drop items of any of these categories")
    exclude_items: tuple[Id, ...] = Field((), description="drop these items")
    price_min: float | None = Field(None, description="lowest price; an item without a price fails it")
    price_max: float | None = Field(None, description="highest price; an item without a price fails it")


class ContextBody(_Body):
    surface: Id | None = Field(None, description="where the slate is shown")
    device: Id | None = None
    locale: Id | None = None


class RecommendBody(_Body):
    """A request for recommendations. All of it is optional: an empty object asks for what a stranger gets."""

    user_id: Id | None = Field(None, description="a user nobody knows is answered like a stranger")
    history: tuple[HistoryEntry, ...] = Field(
        (), description="interactions, oldest first, added to what is known of the user for this request only"
    )
    top_k: int = Field(10, ge=1, le=10_000, strict=True, description="items wanted; a Bundle may allow fewer")
    filters: FiltersBody | None = Field(None, description="hard rules of this request, never skipped")
    exclude_seen: bool = Field(True, description="leave out what the user has interacted with")
    diversity: float | None = Field(None, ge=0, le=1, description="0 orders by score alone, 1 by novelty alone")
    context: ContextBody | None = Field(None, description="where the request comes from")
    explain: bool = Field(False, description="give the reasons of each item")
    deadline_ms: float | None = Field(None, gt=0, le=60_000, description="answer within this time (milliseconds)")

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"user_id": "42", "top_k": 10},
                {
                    "history": [{"item_id": "1"}, {"item_id": "50", "timestamp": "2025-06-01T12:00:00Z"}],
                    "top_k": 5,
                    "filters": {"categories_any": ["Comedy"], "exclude_items": ["296"]},
                    "diversity": 0.3,
                },
            ]
        }
    )


class SimilarBody(_Body):
    """A request for items like one item."""

    item_id: Id = Field(description="an item of the catalogue")
    top_k: int = Field(10, ge=1, le=10_000, strict=True, description="items wanted; a Bundle may allow fewer")

    model_config = ConfigDict(json_schema_extra={"examples": [{"item_id": "1", "top_k": 10}]})


class SearchBody(_Body):
    """Items by words."""

    query: str = Field(min_length=1, max_length=MAX_QUERY_LENGTH, description="what is looked for, in plain words")
    top_k: int = Field(10, ge=1, le=10_000, strict=True, description="items wanted; a Bundle may allow fewer")
    filters: FiltersBody | None = Field(None, description="hard rules of this request")

    model_config = ConfigDict(json_schema_extra={"examples": [{"query": "a western with a long train ride"}]})


class EventBody(_Body):
    event_id: Id = Field(description="idempotency key: sending the same event again changes nothing")
    user_id: Id
    item_id: Id = Field(description="may be an item that the catalogue does not have yet")
    event: Id = Field(description="what happened, such as view, click, purchase, rating, hide or impression")
    timestamp: Moment = Field(description="when it happened, ISO 8601 with zone; late events land in place")
    value: float | None = Field(None, description="value of the event, such as the stars of a rating")
    request_id: Id | None = Field(None, description="the recommendation it followed from")
    position: int | None = Field(None, ge=0, lt=2**31, description="rank of the item in that recommendation, from 0")
    surface: Id | None = Field(None, description="where the slate was shown")


class EventsBody(_Body):
    """A batch of events, accepted as a whole or refused as a whole."""

    events: tuple[EventBody, ...] = Field(min_length=1)

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "events": [
                        {
                            "event_id": "8c6f1f6e",
                            "user_id": "42",
                            "item_id": "50",
                            "event": "click",
                            "timestamp": "2025-06-01T12:00:00Z",
                        }
                    ]
                }
            ]
        }
    )


class MergeBody(_Body):
    """Somebody who was known under another id."""

    from_user_id: Id = Field(description="the id they had before, such as that of a visitor who has now signed in")

    model_config = ConfigDict(json_schema_extra={"examples": [{"from_user_id": "visitor-8c6f1f6e"}]})


class ItemBody(_Body):
    item_id: Id
    title: str = Field(min_length=1, max_length=1000)
    description: str | None = Field(None, max_length=20_000)
    categories: tuple[Id, ...] = Field((), max_length=100)
    creator: Id | None = Field(None, description="who made it: author, artist, studio, brand")
    price: float | None = Field(None, ge=0, le=1e30, description="in the catalogue's own unit")
    created_at: Moment | None = Field(None, description="ISO 8601 with zone, of the years 1000 to 2999")
    available: bool = Field(True, description="false: known, but not shown")
    image: str | None = Field(None, max_length=2048)


class ItemsBody(_Body):
    """New items, and items that are different now: each as a whole."""

    items: tuple[ItemBody, ...] = Field(min_length=1)

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"items": [{"item_id": "new-1", "title": "A film of today", "categories": ["Comedy"]}]}]
        }
    )


class RulesBody(_Body):
    """All rules, in the order in which they take turns."""

    rules: AnyRules = Field(description="they take the place of those before; one may hold for a time only")
    after: int = Field(
        ge=0,
        lt=10**8,
        strict=True,
        description="`version` of the rules that the caller has seen; 409 where somebody has changed them since",
    )
    note: Note | None = Field(None, description="why; kept with the change")

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "rules": [
                        {"kind": "pin", "item_ids": ["50"], "ends_at": "2026-12-24T18:00:00Z"},
                        {"kind": "bury", "categories": ["Horror"]},
                        {"kind": "diversity", "strength": 0.3},
                    ],
                    "after": 0,
                    "note": "Advent",
                }
            ]
        }
    )


class ItemAnswer(BaseModel):
    item_id: str
    title: str
    score: float = Field(description="score of the last stage that scored; comparable within one answer only")
    rank: int = Field(description="place in the slate, from 0: what an event reports as its position")
    sources: list[str] = Field(description="what proposed the item")
    stage_scores: dict[str, float] = Field(description="what each stage that saw the item thought of it")
    reasons: list[str] | None = Field(None, description="with explain only")


class RemovedAnswer(BaseModel):
    stage: str = Field(description="who took the items out")
    reason: str
    num_items: int


class RecommendAnswer(BaseModel):
    request_id: str = Field(description="quote it in events that follow from this slate")
    bundle_id: str = Field(
        description="the Bundle that answered; `+N` changes of its catalogue, `+N.R` and R of the rules"
    )
    user_id: str | None = None
    items: list[ItemAnswer]
    degraded: list[str] = Field(description="parts that were skipped to answer in time; empty when all is well")
    timings_ms: dict[str, float] = Field(description="wall milliseconds: total, state, and each stage")
    unknown_items: int = Field(
        description="entries of the history that are no item of the catalogue; they were ignored"
    )
    removed: list[RemovedAnswer] | None = Field(
        None, description="with explain only: what was under consideration and is not shown"
    )


class TraceStage(BaseModel):
    stage: str
    outcome: str = Field(description="ok, timeout, overloaded, failed, skipped or unasked (of a newcomer)")
    bundle_id: str | None = Field(description="the Bundle the stage answered from")
    total_ms: float | None = Field(description="as the gateway waited for it")
    compute_ms: float | None = Field(description="inside the stage")
    failure: str | None


class TraceItem(BaseModel):
    item_id: str
    rank: int
    score: float
    sources: list[str]
    stage_scores: dict[str, float]


class TraceRemoved(BaseModel):
    stage: str
    reason: str
    item_ids: list[str]


class TraceAnswer(BaseModel):
    """How one answer came about. Every item that was under consideration is in `items` or in `removed`, once."""

    request_id: str
    bundle_id: str
    user_id: str | None
    now_ms: int = Field(description="time of the request, milliseconds since 1970 UTC")
    history: list[str] = Field(description="what the models saw of the user, oldest first")
    degraded: list[str]
    stages: list[TraceStage]
    items: list[TraceItem]
    removed: list[TraceRemoved]


class EventsAnswer(BaseModel):
    """Given only once the events are durable."""

    accepted: int
    duplicates: int = Field(description="events whose event_id was known already")


class ItemsAnswer(BaseModel):
    """Given only once the change is durable."""

    version: int = Field(description="of the catalogue: `+N` at the end of a `bundle_id` that has the change")


class RuleAnswer(BaseModel):
    rule: AnyRule
    state: RuleState = Field(description="whether it holds now; one that this server does not know is unusable")


class RuleChangeAnswer(BaseModel):
    version: int
    at: str = Field(description="when it was made, ISO 8601")
    by: str = Field(description="name of the API key that made it, or what else did")
    note: str | None = Field(description="why")
    num_rules: int | None = Field(description="rules from then on; null: those of the Bundle")


class RulesAnswer(BaseModel):
    version: int = Field(description="of these rules; 0: those of the Bundle, never changed")
    answering: int = Field(description="version by which this server answers: it follows within seconds")
    rules: list[RuleAnswer] = Field(description="in the order in which they take turns")
    changes: list[RuleChangeAnswer] = Field(description="the newest of all, the last one first")


class RulesChangedAnswer(BaseModel):
    """Given only once the change is durable."""

    version: int = Field(description="of the rules: `.R` at the end of a `bundle_id` that goes by them")
    unknown_items: list[str] = Field(description="items of the rules that the catalogue lacks; they are ignored")
    unknown_categories: list[str] = Field(description="categories likewise")


class HistoryAnswer(BaseModel):
    item_id: str
    title: str | None = Field(description="null for an item that the catalogue does not have")
    event: str
    timestamp: str | None = Field(description="null where the data has order only")
    value: float | None


class UserAnswer(BaseModel):
    user_id: str
    version: int = Field(description="changes whenever the state does")
    history: list[HistoryAnswer] = Field(description="newest interactions, oldest first")


class CatalogueItemAnswer(BaseModel):
    item_id: str
    title: str
    description: str | None
    categories: list[str]
    creator: str | None
    price: float | None
    created_at: str | None
    available: bool
    image: str | None


class CanaryAnswer(BaseModel):
    bundle_id: str
    share: float = Field(description="of the users who get it")


class BundleAnswer(BaseModel):
    bundle_id: str
    manifest: dict[str, Any] = Field(description="what the Bundle says of itself")
    canary: CanaryAnswer | None = Field(None, description="the Bundle that some of the users get")
    refused: dict[str, str] = Field(description="Bundles that the store points to and that are not served, and why")


class HealthAnswer(BaseModel):
    status: str


class Problem(BaseModel):
    """RFC 9457."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    request_id: str
    errors: list[dict[str, Any]] | None = Field(None, description="for 422: each field at fault")


def recommend_request(body: RecommendBody, request_id: str) -> RecommendRequest:
    """The request as the pipeline knows it."""
    filters, exclude_items = _filters(body.filters)
    return RecommendRequest(
        user_id=body.user_id,
        history=[
            HistoryItem(h.item_id, None if h.timestamp is None else milliseconds(h.timestamp), h.event, h.value)
            for h in body.history
        ],
        top_k=body.top_k,
        filters=filters,
        exclude_items=exclude_items,
        exclude_seen=body.exclude_seen,
        diversity=body.diversity,
        context={} if body.context is None else body.context.model_dump(exclude_none=True),
        explain=body.explain,
        deadline_ms=body.deadline_ms,
        request_id=request_id,
    )


def similar_request(body: SimilarBody, request_id: str) -> SimilarRequest:
    """The request as the pipeline knows it."""
    return SimilarRequest(body.item_id, body.top_k, request_id)


def search_request(body: SearchBody, request_id: str) -> SearchRequest:
    """The request as the pipeline knows it."""
    filters, exclude_items = _filters(body.filters)
    return SearchRequest(body.query, body.top_k, filters, exclude_items, request_id)


def _filters(body: FiltersBody | None) -> tuple[Filters, tuple[str, ...]]:
    if body is None:
        return NO_FILTERS, ()
    return Filters(body.categories_any, body.categories_none, body.price_min, body.price_max), body.exclude_items


def recommend_answer(answer: Recommendation, *, explain: bool = False) -> dict[str, Any]:
    """The answer as plain values, in the form of :class:`RecommendAnswer`."""
    values = {
        "request_id": answer.request_id,
        "bundle_id": answer.bundle_id,
        "user_id": answer.user_id,
        "items": [_item(item) for item in answer.items],
        "degraded": answer.degraded,
        "timings_ms": {name: round(value, 3) for name, value in answer.timings_ms.items()},
        "unknown_items": answer.unknown_items,
    }
    if explain and answer.slate is not None:
        values["removed"] = [
            {"stage": each.stage, "reason": each.reason, "num_items": len(each.item_idx)}
            for each in answer.slate.removals()
        ]
    return values


def rules_answer(history: RuleHistory, answering: int) -> dict[str, Any]:
    """The answer as plain values, in the form of :class:`RulesAnswer`."""
    return {
        "version": history.version,
        "answering": answering,
        "rules": [{"rule": rule, "state": state} for rule, state in zip(history.rules, history.states, strict=True)],
        "changes": [
            {
                "version": change.version,
                "at": change.at.isoformat(),
                "by": change.by,
                "note": change.note,
                "num_rules": None if change.rules is None else len(change.rules),
            }
            for change in history.changes
        ],
    }


def _item(item: RecommendedItem) -> dict[str, Any]:
    values = {
        "item_id": item.item_id,
        "title": item.title,
        "score": item.score,
        "rank": item.rank,
        "sources": item.sources,
        "stage_scores": item.stage_scores,
    }
    return values if item.reasons is None else values | {"reasons": item.reasons}
