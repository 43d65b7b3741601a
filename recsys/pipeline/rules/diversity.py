"""Different items: maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998).

The next item is the one with the highest ``(1 - strength) * relevance - strength * max similarity to what is above``.
Relevance is the score of the stage before, scaled to 0 (worst candidate) to 1 (best) so that one ``strength`` means the
same for every ranker; similarity is the cosine of item vectors, or of categories where there are none, and 0 where it
is negative.

Shape legend: C candidates, D dimensions.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from recsys.pipeline.rules.base import Resolved, Rule, RuleConfig, RuleItems
from recsys.pipeline.rules.draft import Draft
from recsys.types import BoolArray, Float64Array, Query


class DiversityRule(RuleConfig):
    """Prefers what is unlike the items above it. A request may give a strength of its own, with or without a rule; of
    several that hold the first counts.
    """

    alone: ClassVar[bool] = True

    kind: Literal["diversity"] = "diversity"
    strength: float = Field(
        ge=0, le=1, description="0 orders by score alone, 1 by novelty against what is above (0 to 1)"
    )

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls(strength=0.5)

    @classmethod
    def standing(cls) -> Self:
        return cls(strength=0)

    def resolve(self, items: RuleItems) -> Resolved:
        def rule(query: Query) -> Rule | None:
            strength = self.strength if query.diversity is None else query.diversity
            return _Diversifying(items, strength) if strength > 0 else None

        return rule


class _Diversifying(Rule):
    def __init__(self, items: RuleItems, strength: float) -> None:
        self._items = items
        self._strength = strength

    def begin(self, draft: Draft) -> None:
        self._vectors_CD = self._items.unit_vectors(draft.item_idx)
        self._nearest = np.zeros(len(draft.item_idx), np.float32)

    def value(self, draft: Draft, value_C: Float64Array) -> Float64Array:
        if draft.picks:
            vectors_CD = self._vectors_CD
            np.maximum(self._nearest, vectors_CD @ vectors_CD[draft.picks[-1]], out=self._nearest)
        return (1.0 - self._strength) * value_C - self._strength * self._nearest

    def left(self, draft: Draft) -> tuple[str, BoolArray]:
        among_best = np.zeros(len(draft.item_idx), np.bool_)
        among_best[np.argsort(-draft.relevance, kind="stable")[: len(draft.picks)]] = True
        return "diversity", among_best
