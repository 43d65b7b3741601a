"""Items moved up or down."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field

from recsys.pipeline.rules.base import ItemRule, Resolved, Rule, RuleItems
from recsys.pipeline.rules.draft import Draft, ItemSet


class BoostRule(ItemRule):
    """Moves items up or down; the amounts of several rules add up."""

    kind: Literal["boost"] = "boost"
    amount: float = Field(
        default=0.2,
        ge=-1,
        le=1,
        description="added to relevance, which runs from 0 for the worst candidate to 1 for the best (-1 to 1)",
    )

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls(item_ids=("i5",), categories=("a",), amount=0.3)

    def resolve(self, items: RuleItems) -> Resolved:
        boosting = _Boosting(items.members(self.item_ids, self.categories), self.amount)
        return lambda _: boosting


class _Boosting(Rule):
    def __init__(self, members: ItemSet, amount: float) -> None:
        self._members = members
        self._amount = np.float32(amount)

    def begin(self, draft: Draft) -> None:
        draft.add(self._amount * draft.among(self._members))
