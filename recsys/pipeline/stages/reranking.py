"""Reranking: from scored candidates to the slate, place by place, by those of :mod:`recsys.pipeline.rules` that hold.

Without any the order of the stage before stands. Every rule gives way before a slate gets short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any, Self

import numpy as np

from recsys.data.catalogue import Catalogue
from recsys.pipeline.rules import KINDS
from recsys.pipeline.rules.base import Resolved, Rule, RuleConfig, RuleItems
from recsys.pipeline.rules.draft import Draft
from recsys.pipeline.stage import RERANKING
from recsys.types import BoolArray, Candidates, FloatArray, Query, Removal

_tier = attrgetter("tier")


@dataclass(frozen=True, slots=True)
class _Timed:
    kind: str
    yields: bool
    """to any of its kind that holds and stands before it"""
    start_ms: float
    end_ms: float
    on: Resolved

    @classmethod
    def of(cls, rule: RuleConfig, items: RuleItems, *, standing: bool = False) -> Self:
        return cls(rule.kind, rule.alone or standing, *rule.period_ms, rule.resolve(items))


class RerankingStage:
    """Cuts the candidates to ``top_k`` in their final order."""

    name = RERANKING

    def __init__(
        self,
        bundle_id: str,
        catalogue: Catalogue,
        rules: Sequence[RuleConfig] = (),
        item_embeddings: FloatArray | None = None,
    ) -> None:
        """``item_embeddings`` float32 [N, D] of any length; None compares items by their categories."""
        self.bundle_id = bundle_id
        self.catalogue = catalogue
        items = RuleItems(catalogue, item_embeddings)
        standing = [rule for kind in KINDS.classes if (rule := kind.standing()) is not None]
        self._rules = [_Timed.of(rule, items) for rule in rules]
        self._rules += [_Timed.of(rule, items, standing=True) for rule in standing]

    def run_batch(self, queries: Sequence[Query], candidates: Sequence[Candidates]) -> list[Candidates]:
        """Each query's slate. What did not make it is in ``dropped``, with the reason; what a rule brought and a hard
        rule refused, in ``removed``.
        """
        return [self._rerank(query, found) for query, found in zip(queries, candidates, strict=True)]

    def _rerank(self, query: Query, candidates: Candidates) -> Candidates:
        rules = self._at_work(query)
        draft = Draft(query, candidates, self.catalogue)
        for enter in _hooks(rules, "enter"):
            enter(draft)
        draft.open(self.name)
        size = min(query.top_k, len(draft.candidates))
        if not size:
            return draft.candidates
        for begin in _hooks(rules, "begin"):
            begin(draft)
        draft.settle()
        weigh, choose, placed = (_hooks(rules, name) for name in ("value", "choose", "placed"))
        values: list[float] = []
        while len(values) < size:
            value = draft.relevance
            for hook in weigh:
                value = hook(draft, value)
            row = draft.reserved_row()
            if row is None:
                row = int((value - draft.handicap).argmax())
                for hook in choose:
                    row = hook(draft, row)
            draft.place(row)
            values.append(float(value[row]))
            for hook in placed:
                hook(draft, row)
        dropped = self._dropped(draft, rules)
        selected = draft.candidates.take(np.array(draft.picks))
        scores = {**selected.stage_scores, self.name: np.array(values, np.float32)}
        for made in _hooks(rules, "scores"):
            scores.update(made())
        return replace(selected, stage_scores=scores, dropped=selected.dropped + dropped)

    def _at_work(self, query: Query) -> list[Rule]:
        """The rules that hold at the time of the query and have something to do."""
        found: list[Rule] = []
        kinds: set[str] = set()
        for each in self._rules:
            if each.start_ms <= query.now_ms < each.end_ms and not (each.yields and each.kind in kinds):
                kinds.add(each.kind)
                if (rule := each.on(query)) is not None:
                    found.append(rule)
        return found

    def _dropped(self, draft: Draft, rules: Sequence[Rule]) -> tuple[Removal, ...]:
        items = draft.item_idx
        left = np.ones(len(items), np.bool_)
        left[draft.picks] = False
        reasons: dict[str, BoolArray] = {}
        for kept_out in _hooks(sorted(rules, key=_tier, reverse=True), "left"):
            if (found := kept_out(draft)) is not None:
                reason, concerned = found
                reasons[reason] = reasons[reason] | concerned if reason in reasons else concerned
        dropped: list[Removal] = []
        for reason, concerned in reasons.items():
            concerned = concerned & left
            if concerned.any():
                dropped.append(Removal(items[concerned], self.name, reason))
                left &= ~concerned
        if left.any():
            dropped.append(Removal(items[left], self.name, "below_top_k"))
        return tuple(dropped)


def _hooks(rules: Sequence[Rule], name: str) -> list[Any]:
    """The hooks of this name that do something, in the order of the rules."""
    return [getattr(rule, name) for rule in rules if name in rule.hooks]
