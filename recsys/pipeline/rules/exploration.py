"""Places that go to chance, so that more can be learned than what the models believe already.

Epsilon-greedy, place by place: with probability ``share`` a place goes to one of the candidates left, drawn evenly,
else to the best of them. The propensity of what is shown, given what is above it, stands among the stages' scores, so
that what is learned from clicks can be weighted by its inverse. What other rules hold back or have placed is not drawn.
The same request id draws the same slate.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from recsys.pipeline.rules.base import Resolved, Rule, RuleConfig, RuleItems
from recsys.pipeline.rules.draft import Draft
from recsys.types import FloatArray, Query

PROPENSITY = "propensity"
"""among the stages' scores: the probability with which the item came to its place, 0 to 1"""


class ExplorationRule(RuleConfig):
    """Leaves places to chance; of several rules that hold the first counts."""

    alone: ClassVar[bool] = True
    live_only: ClassVar[bool] = True

    kind: Literal["exploration"] = "exploration"
    share: float = Field(ge=0, le=1, description="probability that a place goes to any of the candidates left (0 to 1)")
    seed: int = Field(default=0, ge=0, description="with the request_id it decides what chance decides")

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls(share=0.5)

    def resolve(self, items: RuleItems) -> Resolved:
        return lambda query: _Exploring(self.share, self._chance(query)) if self.share else None

    def _chance(self, query: Query) -> np.random.Generator:
        digest = hashlib.sha256(query.request_id.encode("utf-8", "surrogatepass")).digest()
        return np.random.default_rng((self.seed, int.from_bytes(digest[:8], "big")))


class _Exploring(Rule):
    def __init__(self, share: float, chance: np.random.Generator) -> None:
        self._share = share
        self._chance = chance
        self._propensity = 1.0
        self._propensities: list[float] = []

    def choose(self, draft: Draft, row: int) -> int:
        drawable = draft.free_rows()
        if not len(drawable):
            return row
        chosen = int(self._chance.choice(drawable)) if self._chance.random() < self._share else row
        self._propensity = self._share / len(drawable) + (1 - self._share) * (chosen == row)
        return chosen

    def placed(self, draft: Draft, row: int) -> None:
        self._propensities.append(self._propensity)
        self._propensity = 1.0

    def scores(self) -> Mapping[str, FloatArray]:
        return {PROPENSITY: np.array(self._propensities, np.float32)}
