"""Items at fixed places."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from recsys.pipeline.rules.base import ItemRule, Resolved, Rule, RuleItems
from recsys.pipeline.rules.draft import Draft, ItemSet
from recsys.types import Int32Array

PINNED = "pinned"
"""the source of items that retrieval did not find"""


class PinRule(ItemRule):
    """Puts items at a place of the slate: those of ``item_ids`` even where retrieval did not find them, and the best
    candidate of ``categories``. A pinned item still obeys the hard rules; where two rules want one place the first
    has it, and the second the next.
    """

    kind: Literal["pin"] = "pin"
    position: int = Field(
        default=0, ge=0, le=999, description="place of the first pinned item, 0 is the top; others follow it"
    )

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls(item_ids=("i3", "i1"), categories=("b",), position=1)

    def resolve(self, items: RuleItems) -> Resolved:
        in_categories = items.members((), self.categories) if self.categories else None
        pinning = _Pinning(items.rows(self.item_ids), in_categories, self.position)
        return lambda _: pinning


class _Pinning(Rule):
    def __init__(self, item_idx: Int32Array, in_categories: ItemSet | None, position: int) -> None:
        self._item_idx = item_idx
        self._in_categories = in_categories
        self._position = position

    def enter(self, draft: Draft) -> None:
        items = draft.admit(self._item_idx, PINNED)
        if self._in_categories is not None:
            best = draft.best_without_place(self._in_categories)
            items += [] if best is None else [best]
        for item in items:
            draft.reserve(item, self._position, PINNED)
