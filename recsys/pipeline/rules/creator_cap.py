"""Not too much of one creator."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field

from recsys.pipeline.rules.base import Resolved, Rule, RuleConfig, RuleItems
from recsys.pipeline.rules.draft import LATE, Draft
from recsys.types import BoolArray, Int32Array


class CreatorCapRule(RuleConfig):
    """Shows so many items of one creator, and more only before the slate gets short. An item without a creator is
    spared.
    """

    kind: Literal["creator_cap"] = "creator_cap"
    num_items: int = Field(ge=1, le=10_000, description="items of one creator in a slate (1 to 10000)")

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls(num_items=1)

    def resolve(self, items: RuleItems) -> Resolved:
        creators_N = items.catalogue.creator_codes
        return lambda _: _Capping(creators_N, self.num_items)


class _Capping(Rule):
    tier = LATE

    def __init__(self, creators_N: Int32Array, num_items: int) -> None:
        self._creators_N = creators_N
        self._num_items = num_items
        self._shown: dict[int, int] = {}

    def begin(self, draft: Draft) -> None:
        self._creators = self._creators_N[draft.item_idx]
        self._over = np.zeros(len(self._creators), np.bool_)

    def placed(self, draft: Draft, row: int) -> None:
        creator = int(self._creators[row])
        if creator < 0:
            return
        shown = self._shown[creator] = self._shown.get(creator, 0) + 1
        if shown == self._num_items:
            same = self._creators == creator
            draft.handicap[same] += self.tier  # what is held back already comes after what is not
            self._over |= same

    def left(self, draft: Draft) -> tuple[str, BoolArray]:
        return "creator_cap", self._over
