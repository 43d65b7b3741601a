"""Settings of the pipeline that answers requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from recsys.config import StrictConfig
from recsys.pipeline.rules import AnyRules
from recsys.pipeline.stage import STAGES

if TYPE_CHECKING:
    from recsys.bundle import Bundle


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

    @property
    def stages(self) -> float:
        """What all stages may take together (milliseconds)."""
        return sum(getattr(self, name) for name in STAGES)


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
    rules: AnyRules = Field(
        default=(), description="reranking rules, in the order in which they take turns (up to 200)"
    )

    @model_validator(mode="after")
    def _times_fit(self) -> Self:
        total = self.budgets_ms.stages
        if total > self.deadline_ms:
            # A stage whose budget the usual deadline cuts short would never be found guilty of being slow.
            raise ValueError(f"budgets_ms add up to {total:g}, more than deadline_ms {self.deadline_ms:g}")
        if self.deadline_ms > self.max_deadline_ms:
            raise ValueError(f"deadline_ms {self.deadline_ms:g} is above max_deadline_ms {self.max_deadline_ms:g}")
        return self


def pipeline_config(bundle: Bundle) -> PipelineConfig:
    """How the stages of ``bundle`` are put together."""
    return bundle.section(PipelineConfig, "pipeline")
