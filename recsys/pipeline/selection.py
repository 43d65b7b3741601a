"""From the last stage's candidates to the slate: the hard rules once more, the cut to ``top_k``, and the top-up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import numpy as np

from recsys.bundle.slates import SLATES
from recsys.data.catalogue import contains
from recsys.pipeline.hard_rules import HardRules
from recsys.pipeline.popular import POPULAR, PopularItems
from recsys.types import Candidates, Query, Removal

Spare: TypeAlias = Callable[[], Candidates]
RUNNER = "runner"
"""the name under which candidates that were cut here are recorded"""


class Selection:
    """What stands before and after the stages, whoever runs them."""

    def __init__(self, rules: HardRules, popular: PopularItems) -> None:
        self.rules = rules
        self.popular = popular

    def without_retrieval(self, query: Query, spare: Spare | None, provenance: dict[str, str]) -> Candidates:
        """Candidates in the place of retrieval's: the items that ``spare`` gives for this user, else popular ones."""
        if spare is not None:
            own = spare()
            own = own.take(np.flatnonzero(self.rules.allowed(query)[own.item_idx]))
            if len(own):
                provenance[SLATES] = query.bundle_id
                return own  # popular items fill up what is short
        return self._popular(query, provenance)

    def _popular(self, query: Query, provenance: dict[str, str]) -> Candidates:
        provenance[POPULAR] = query.bundle_id
        return self.popular.best(query.num_candidates, self.rules.allowed(query))

    def finish(
        self, query: Query, candidates: Candidates, before: Candidates, provenance: dict[str, str]
    ) -> tuple[Candidates, tuple[Removal, ...], tuple[Removal, ...]]:
        """The last check of the hard rules, the cut to ``top_k``, and, where it is short, the top-up."""
        checked = self.rules.final_check(query, candidates)
        selected, dropped = checked, checked.dropped
        if len(checked) > query.top_k:
            selected = checked.take(np.arange(query.top_k))
            dropped += (Removal(checked.item_idx[query.top_k :], RUNNER, "below_top_k"),)
        if len(selected) < query.top_k:
            selected = self._top_up(query, selected, before, provenance)
            dropped = _without(dropped, selected)
        return replace(selected, removed=(), dropped=()), checked.removed, dropped

    def _top_up(self, query: Query, selected: Candidates, before: Candidates, provenance: dict[str, str]) -> Candidates:
        """``selected`` followed by the best of what the last stage was given, then by popular items."""
        missing = query.top_k - len(selected)
        spare = self.rules.final_check(query, before)
        rows = np.flatnonzero(~contains(selected.item_idx, spare.item_idx))[:missing]
        if len(rows):
            selected = selected.then(replace(spare.take(rows), removed=(), dropped=()))
        missing = query.top_k - len(selected)
        if missing:
            allowed = self.rules.allowed(query)
            allowed[selected.item_idx] = False
            popular = self.popular.best(missing, allowed)
            if len(popular):
                provenance[POPULAR] = query.bundle_id
                selected = selected.then(popular)
        return selected


def _without(removals: tuple[Removal, ...], selected: Candidates) -> tuple[Removal, ...]:
    """``removals`` less the items that were selected after all."""
    kept = (replace(r, item_idx=r.item_idx[~contains(selected.item_idx, r.item_idx)]) for r in removals)
    return tuple(removal for removal in kept if len(removal.item_idx))
