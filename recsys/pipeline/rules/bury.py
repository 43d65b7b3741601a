"""Items that come last."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from recsys.pipeline.rules.base import ItemRule, Resolved, Rule, RuleItems
from recsys.pipeline.rules.draft import LAST, Draft, ItemSet
from recsys.types import BoolArray


class BuryRule(ItemRule):
    """Shows items only when nothing else is left."""

    kind: Literal["bury"] = "bury"

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls(item_ids=("i2",), categories=("a",))

    def resolve(self, items: RuleItems) -> Resolved:
        members = items.members(self.item_ids, self.categories)
        return lambda _: _Burying(members)


class _Burying(Rule):
    tier = LAST

    def __init__(self, members: ItemSet) -> None:
        self._members = members

    def begin(self, draft: Draft) -> None:
        self._buried = draft.among(self._members)
        draft.hold_back(self._buried, self.tier)

    def left(self, draft: Draft) -> tuple[str, BoolArray]:
        return "buried", self._buried
