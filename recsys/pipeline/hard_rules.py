"""Hard rules: what a request must not be shown, whatever stage proposed it and whatever has failed.

They act twice. Retrieval masks by :meth:`HardRules.allowed`, so that good candidates are not lost to bad ones; and the
runner passes every slate, a fallback's too, through :meth:`HardRules.final_check`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from recsys.data.catalogue import Catalogue
from recsys.types import BoolArray, Candidates, Query, Removal

RULES = "rules"
"""the name under which removals by hard rules are recorded"""


class HardRules:
    """Availability, the filters of the request, and what it excludes (seen items, items it names)."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue

    def allowed(self, query: Query) -> BoolArray:
        """bool [N]: the items that ``query`` may be shown."""
        return self.catalogue.allowed(query.filters, query.excluded_item_idx)

    def final_check(self, query: Query, candidates: Candidates) -> Candidates:
        """``candidates`` without those that break a rule; each of these is recorded with its reason."""
        items = candidates.item_idx
        if not len(items):
            return candidates
        violations = self.catalogue.violations(items, query.filters, query.excluded_item_idx)
        if not violations:
            return candidates
        keep = np.ones(len(items), np.bool_)
        removed = candidates.removed
        for reason, concerned in violations:
            keep &= ~concerned
            removed += (Removal(items[concerned], RULES, reason),)
        return replace(candidates.take(np.flatnonzero(keep)), removed=removed)
