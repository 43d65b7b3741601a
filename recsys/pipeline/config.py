"""Settings of the pipeline that answers requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from recsys.config import StrictConfig

if TYPE_CHECKING:
    from recsys.bundle import Bundle


class ItemSelection(StrictConfig):
    """Items named by id, by category, or both."""

    item_ids: tuple[str, ...] = Field(
        default=(), description="items of the rule; one that the catalogue lacks is ignored"
    )
    categories: tuple[str, ...] = Field(default=(), description="every item of these categories is in the rule, too")

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.item_ids and not self.categories:
            raise ValueError("name at least one of item_ids and categories")
        return self


class Pin(ItemSelection):
    """Puts items at a place of the slate: those of ``item_ids`` even where retrieval did not find them, and the best
    candidate of ``categories``. A pinned item still obeys the hard rules.
    """

    position: int = Field(
        default=0, ge=0, le=999, description="place of the first pinned item, 0 is the top; others follow it"
    )


class Boost(ItemSelection):
    """Moves items up or down."""

    amount: float = Field(
        default=0.2,
        ge=-1,
        le=1,
        description="added to relevance, which runs from 0 for the worst candidate to 1 for the best (-1 to 1)",
    )


class Bury(ItemSelection):
    """Shows items only when nothing else is left."""


class ExplorationConfig(StrictConfig):
    """Places of a slate that go to chance, so that more can be learned than what the models believe already."""

    share: float = Field(
        default=0.0, ge=0, le=1, description="probability that a place goes to any of the candidates left (0 to 1)"
    )
    seed: int = Field(default=0, ge=0, description="with the request_id it decides what chance decides")


class RerankingConfig(StrictConfig):
    """How the final order is made from scores."""

    diversity: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="0 orders by score alone, 1 by novelty against what is above; a request may give its own (0 to 1)",
    )
    max_per_creator: int = Field(
        default=0,
        ge=0,
        description="items of one creator in a slate, relaxed before it gets short; 0 is unlimited (items)",
    )
    pins: tuple[Pin, ...] = Field(
        default=(), description="items at fixed places; where two want one place the first rule wins"
    )
    boosts: tuple[Boost, ...] = Field(default=(), description="items moved up or down; amounts add up")
    buries: tuple[Bury, ...] = Field(default=(), description="items shown only when nothing else is left")
    exploration: ExplorationConfig = Field(default=ExplorationConfig(), description="places that go to chance")


class BudgetsConfig(StrictConfig):
    """The longest each stage may take before it is skipped, beside what those before it have left of their time."""

    state: float = Field(
        default=50.0,
        gt=0,
        le=60_000,
        description="longest wait for an event store on another machine, where the request's deadline leaves no more "
        "than the other budgets (milliseconds)",
    )
    retrieval: float = Field(default=150.0, gt=0, le=60_000, description="budget of retrieval (milliseconds)")
    ranking: float = Field(default=250.0, gt=0, le=60_000, description="budget of ranking (milliseconds)")
    reranking: float = Field(default=50.0, gt=0, le=60_000, description="budget of reranking (milliseconds)")


class BreakerConfig(StrictConfig):
    """When a failing stage is left alone."""

    failures: int = Field(
        default=5, ge=1, le=1000, description="failures in a row that open the circuit breaker (1 to 1000)"
    )
    open_s: float = Field(
        default=5.0, gt=0, le=3600, description="how long it stays open before one request probes (seconds)"
    )


class PipelineConfig(StrictConfig):
    """Sizes, times and rules of answering one request."""

    num_candidates: int = Field(
        default=200, ge=1, le=10_000, description="candidates retrieval hands to ranking (1 to 10000)"
    )
    max_history: int = Field(
        default=200, ge=1, le=10_000, description="newest positives of a user that the models see (interactions)"
    )
    newcomers: Literal["models", "popular"] = Field(
        default="models",
        description="what answers for a user without history: the models, which have learned what users begin with, or "
        "the popular items, for callers who are no beginners but whose history is not told",
    )
    repeat_after_days: float | None = Field(
        default=None,
        ge=0,
        le=36_500,
        description="an item may be recommended again when the user met it so long ago (days; 0 at once, null never)",
    )
    max_top_k: int = Field(default=1000, ge=1, le=10_000, description="largest top_k a request may ask for (items)")
    max_request_items: int = Field(
        default=10_000,
        ge=1,
        le=1_000_000,
        description="longest history, exclude_items or category list in a request (entries)",
    )
    deadline_ms: float = Field(
        default=500.0, gt=0, le=60_000, description="time to answer in where a request does not say (milliseconds)"
    )
    max_deadline_ms: float = Field(
        default=10_000.0, gt=0, le=60_000, description="longest a request may give (milliseconds)"
    )
    budgets_ms: BudgetsConfig = Field(default=BudgetsConfig(), description="longest time per stage")
    breaker: BreakerConfig = Field(
        default=BreakerConfig(), description="when a failing stage is left alone for a while"
    )
    threads: int = Field(default=2, ge=1, le=256, description="threads per stage that runs in this process")
    max_queued: int = Field(
        default=64, ge=0, le=100_000, description="requests waiting per stage of this process before more are refused"
    )
    user_cache: int = Field(default=10_000, ge=0, description="users whose resolved history is kept in memory (users)")
    encoding_cache: int = Field(
        default=10_000, ge=0, description="histories whose encoded vectors retrieval keeps in memory (histories)"
    )
    reranking: RerankingConfig = Field(default=RerankingConfig(), description="diversity, creator cap and rules")

    @model_validator(mode="after")
    def _times_fit(self) -> Self:
        budgets = self.budgets_ms
        total = budgets.retrieval + budgets.ranking + budgets.reranking
        if total > self.deadline_ms:
            # A stage whose budget the usual deadline cuts short would never be found guilty of being slow.
            raise ValueError(f"budgets_ms add up to {total:g}, more than deadline_ms {self.deadline_ms:g}")
        if self.deadline_ms > self.max_deadline_ms:
            raise ValueError(f"deadline_ms {self.deadline_ms:g} is above max_deadline_ms {self.max_deadline_ms:g}")
        return self


def pipeline_config(bundle: Bundle) -> PipelineConfig:
    """How the stages of ``bundle`` are put together."""
    return bundle.section(PipelineConfig, "pipeline")
