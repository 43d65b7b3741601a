"""The configuration of data preparation."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import Field

from recsys.config import StrictConfig
from recsys.data.positives import PositivePolicy
from recsys.data.sources import AnySource
from recsys.data.sources.movielens_small import MovielensSmallSource
from recsys.data.splits import AnySplit
from recsys.data.splits.global_time import GlobalTimeSplit


class FilterConfig(StrictConfig):
    """What of the accepted interactions is left out on purpose. By default nothing; what is left out is counted."""

    user_fraction: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of users to keep (0 to 1), drawn with the run's seed; for quick trials.",
    )
    min_user_interactions: int = Field(
        default=1,
        ge=1,
        description="Users with fewer interactions are left out (k-core: repeated until both bounds hold).",
    )
    min_item_interactions: int = Field(
        default=1, ge=1, description="Interactions with items that have fewer of them are left out (k-core, as above)."
    )


class DataConfig(StrictConfig):
    """From a source to a :class:`~recsys.data.dataset.Dataset`."""

    name: str | None = Field(default=None, description="Name of the dataset in reports; null for the source's kind.")
    source: AnySource = Field(default=MovielensSmallSource(), description="Where interactions and items come from.")
    positives: PositivePolicy = Field(
        default=PositivePolicy(), description="Which events count as positives, and how much."
    )
    filters: FilterConfig = Field(default=FilterConfig(), description="What is left out on purpose.")
    split: AnySplit = Field(default=GlobalTimeSplit(), description="How train, validation and test are cut.")
    catalogue: Literal["all", "interacted"] = Field(
        default="all",
        description="all: every item, with or without interactions; interacted: only items with some left.",
    )
    latest: datetime | None = Field(
        default=None,
        description="Later timestamps are quarantined as future (ISO 8601; UTC without a zone); null for now.",
    )

    @property
    def has_time(self) -> bool:
        """False where the source has order only."""
        return self.source.has_time
