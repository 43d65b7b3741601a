"""How a Bundle is updated from the event log, and when the result may take over."""

from __future__ import annotations

from pydantic import Field

from recsys.config import StrictConfig
from recsys.models.base import UpdateConfig


class GateConfig(StrictConfig):
    """What the updated models must pass. They are judged on events that neither they nor the parent have learned."""

    judge_share: float = Field(
        default=0.3, gt=0, lt=1, description="share of the new positives, the newest, that judge before they teach"
    )
    min_queries: int = Field(default=50, ge=1, description="fewer judging queries than this settle nothing")
    max_queries: int = Field(default=2000, ge=1, description="judging queries, all of a seeded sample of users")
    max_loss: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="largest relative loss of the main metric that is accepted where it is within the noise",
    )
    min_overlap: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="drift: share of the ten best items that parent and child must have in common, on average",
    )
    max_miscalibration: float = Field(
        default=2.0,
        ge=1,
        description="calibration: how much further from the truth than the parent's the child's promise may be (x)",
    )


class OnlineConfig(StrictConfig):
    """Arguments of ``jobs.update``."""

    learning: UpdateConfig = Field(default=UpdateConfig(), description="how models go on learning")
    ranker: UpdateConfig = Field(
        default=UpdateConfig(epochs=2), description="the same for the ranker; it replays nothing"
    )
    max_ranking_queries: int = Field(default=2000, ge=1, description="new events that the ranker learns from, at most")
    gate: GateConfig = Field(default=GateConfig(), description="when the result may take over")
    min_events: int = Field(default=100, ge=1, description="fewer new events than this are left for the next time")
    seed: int = Field(default=0, ge=0, description="seed of every random choice")
