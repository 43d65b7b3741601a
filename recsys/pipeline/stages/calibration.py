"""A slate that is made of the categories of the user's history, in about the same shares, the newest counting most.

After Steck, "Calibrated recommendations" (RecSys 2018): of the slates that are nearly as relevant, the one is wanted
whose distribution over categories ``q`` has the least divergence ``KL(p || (1 - a) q + a p)`` from that of the history
``p`` (eq. 4 and 5), found greedily (eq. 6). Deviation: ``p`` fades with the number of later entries (a half-life)
instead of with time, so that data with order only has it too, and a change of mind shows at once.

Shape legend: C candidates, L entries of the history, G categories of the history.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from recsys.pipeline.catalogue import Catalogue
from recsys.pipeline.types import Int32Array

_SMOOTHING = 0.01
"""``a``: a category that the slate lacks costs much, and not infinitely so"""
_HALF_LIVES = 20
"""older entries weigh less than a millionth and are not read"""


class Calibration:
    """How far a slate is from the history while it is filled, and how far with each candidate in its next place."""

    def __init__(
        self,
        catalogue: Catalogue,
        history_item_idx: Int32Array,
        candidate_item_idx: Int32Array,
        *,
        weight: float,
        half_life: float,
    ) -> None:
        """``weight`` 0 to 1 is the part of nearness to the history (eq. 6's lambda), and 0 where there is none."""
        self.weight = weight if len(history_item_idx) else 0.0
        if not self.weight:
            return
        newest = history_item_idx[-max(1, round(half_life * _HALF_LIVES)) :]
        rows = catalogue.category_rows(np.concatenate([newest, candidate_item_idx])).astype(np.float64)
        shares = rows**2  # of each item, adding up to 1: its categories weigh the same
        weight_L = 0.5 ** (np.arange(len(newest))[::-1] / half_life)
        wanted = weight_L @ shares[: len(newest)]
        known = wanted > 0
        self._wanted_G: NDArray[np.float64] = wanted[known] / max(1e-12, wanted.sum())
        self._shares_CG = shares[len(newest) :, known]
        self._slate_G = np.zeros(len(self._wanted_G))
        self._size = 0

    def mixed(self, value_C: NDArray[np.float64]) -> NDArray[np.float64]:
        """float64 [C]: ``value_C`` and how near the slate is to the history with each candidate, in their parts."""
        if not self.weight:
            return value_C
        slate_CG = (self._slate_G + self._shares_CG) / (self._size + 1)
        smoothed_CG = (1 - _SMOOTHING) * slate_CG + _SMOOTHING * self._wanted_G
        divergence_C = (self._wanted_G * np.log(self._wanted_G / smoothed_CG)).sum(axis=1)
        return (1 - self.weight) * value_C - self.weight * divergence_C

    def take(self, row: int) -> None:
        """Candidate ``row`` is in the slate."""
        if self.weight:
            self._slate_G += self._shares_CG[row]
            self._size += 1
