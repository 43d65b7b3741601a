"""What every reranking rule is: a configuration, which becomes a rule over a catalogue, which works on one slate.

::

    config = BuryRule(categories=("sold out soon",))
    resolved = config.resolve(RuleItems(catalogue, item_embeddings))     # once: names become items
    rule = resolved(query)                                               # per query; None where it has nothing to do

Shape legend: C candidates, D dimensions, N items.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self, TypeAlias

import numpy as np
from pydantic import Field, model_validator

from recsys.ids import Id
from recsys.kinds import Kind
from recsys.moments import Moment, milliseconds
from recsys.pipeline.rules.draft import Draft, ItemSet
from recsys.types import BoolArray, Float64Array, FloatArray, Int32Array, Query

if TYPE_CHECKING:
    from recsys.data.catalogue import Catalogue

_ROUND_UP = timedelta(microseconds=999)
_HOOKS = ("enter", "begin", "value", "choose", "placed", "left", "scores")
_log = logging.getLogger(__name__)


class Rule:
    """A rule at work on one slate. No hook does anything unless a kind says so; rules take turns in their order."""

    tier: ClassVar[float] = 0.0
    """the handicap that it gives; of several reasons why an item is left, that of the highest tier is told"""

    hooks: ClassVar[frozenset[str]] = frozenset()
    """names of those that do something"""

    def __init_subclass__(cls) -> None:
        cls.hooks = frozenset(name for name in _HOOKS if getattr(cls, name) is not getattr(Rule, name))

    def enter(self, draft: Draft) -> None:
        """First: bring in items that retrieval did not find, and give places away."""

    def begin(self, draft: Draft) -> None:
        """Once the candidates are known: add to relevance, hold some back."""

    def value(self, draft: Draft, value_C: Float64Array) -> Float64Array:
        """Before each place: what each candidate is worth there (float64 [C], not to be written to), given what it is
        worth to the rules before. The best one gets the place.
        """
        return value_C

    def choose(self, draft: Draft, row: int) -> int:
        """At each place that is not given away: the row that gets it, where by the rules before it is ``row``."""
        return row

    def placed(self, draft: Draft, row: int) -> None:
        """After each place, given away or not."""

    def left(self, draft: Draft) -> tuple[str, BoolArray] | None:
        """At the end: a reason, and a bool [C] of those that it keeps from the slate. None where there is no reason."""
        return None

    def scores(self) -> Mapping[str, FloatArray]:
        """At the end: float32 per place, by the name under which they stand among the stages' scores."""
        return {}


Resolved: TypeAlias = Callable[[Query], Rule | None]
"""a rule whose items are known: what works on the slate of a query, or None. Must not depend on other queries"""


class RuleConfig(Kind, ABC):
    """A rule and the time in which it holds. Subclasses add ``kind: Literal["..."]`` and :meth:`resolve`."""

    alone: ClassVar[bool] = False
    """of those that hold, only the first acts"""
    live_only: ClassVar[bool] = False
    """for answers alone: slates that are kept for days are made without it"""

    kind: str
    starts_at: Moment | None = Field(
        default=None, description="the rule holds from this moment on (ISO 8601 with zone; null: it always has)"
    )
    ends_at: Moment | None = Field(
        default=None, description="and not any more from this one on (ISO 8601 with zone; null: it always will)"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.starts_at is not None and self.ends_at is not None and self.starts_at >= self.ends_at:
            raise ValueError("ends_at must be after starts_at")
        return self

    @classmethod
    @abstractmethod
    def sample(cls, folder: Path) -> Self:
        """A small one for the contract tests, about items ``i0``, ``i1``, ... of categories ``a`` and ``b``. What
        it reads it writes into ``folder``.
        """

    @classmethod
    def standing(cls) -> Self | None:
        """The rule that works where none of this kind holds, as requests may ask for what it does; None: no rule."""
        return None

    @abstractmethod
    def resolve(self, items: RuleItems) -> Resolved:
        """The rule over these items. Called once; what it returns is called for every query."""

    def unknown(self, catalogue: Catalogue) -> tuple[list[str], list[str]]:
        """Ids of items and names of categories that it speaks of and that ``catalogue`` lacks."""
        return [], []

    @property
    def period_ms(self) -> tuple[float, float]:
        """First moment in which it holds and first in which it does not any more, milliseconds since 1970 UTC. What has
        a period does not hold at 0, which stands for a time that is not known.
        """
        if not self.has_period:
            return -math.inf, math.inf
        start_ms = 1 if self.starts_at is None else milliseconds(self.starts_at + _ROUND_UP)
        return start_ms, math.inf if self.ends_at is None else milliseconds(self.ends_at + _ROUND_UP)

    @property
    def has_period(self) -> bool:
        """Whether it holds for a time only."""
        return self.starts_at is not None or self.ends_at is not None


class ItemRule(RuleConfig, ABC):
    """A rule about items that are named by id, by category, or both."""

    item_ids: tuple[Id, ...] = Field(
        default=(), description="items of the rule; one that the catalogue lacks is ignored"
    )
    categories: tuple[Id, ...] = Field(default=(), description="every item of these categories is in the rule, too")

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if not self.item_ids and not self.categories:
            raise ValueError("name at least one of item_ids and categories")
        return self

    def unknown(self, catalogue: Catalogue) -> tuple[list[str], list[str]]:
        rows = catalogue.id_map.rows(self.item_ids).tolist()
        return (
            [item_id for item_id, row in zip(self.item_ids, rows, strict=True) if row < 0],
            [name for name in self.categories if not len(catalogue.in_category(name))],
        )


class RuleItems:
    """The items of a catalogue, as rules name and compare them."""

    def __init__(self, catalogue: Catalogue, item_embeddings: FloatArray | None = None) -> None:
        """``item_embeddings`` float32 [N, D] of any length; None compares items by their categories."""
        self.catalogue = catalogue
        self.item_embeddings = item_embeddings

    def rows(self, item_ids: Sequence[str]) -> Int32Array:
        """The items of these ids that the catalogue has, in their order, each once."""
        rows = self.catalogue.id_map.rows(item_ids)
        unknown = [item_id for item_id, row in zip(item_ids, rows.tolist(), strict=True) if row < 0]
        if unknown:
            _log.warning("rules name %d item(s) that the catalogue lacks: %s", len(unknown), ", ".join(unknown[:5]))
        return np.array(list(dict.fromkeys(rows[rows >= 0].tolist())), np.int32)

    def members(self, item_ids: Sequence[str], categories: Sequence[str]) -> ItemSet:
        """All items with these ids or of these categories."""
        mask = np.zeros(len(self.catalogue), np.bool_)
        for category in categories:
            mask[self.catalogue.in_category(category)] = True
        mask[self.rows(item_ids)] = True
        return ItemSet(mask)

    def unit_vectors(self, item_idx: Int32Array) -> FloatArray:
        """float32 [n, D]: rows whose inner products say how alike items are, 1 for the same (or zero rows)."""
        return self.catalogue.unit_vectors(item_idx, self.item_embeddings)
