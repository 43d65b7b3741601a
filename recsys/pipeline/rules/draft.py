"""A slate in the making: what rules read and change.

Shape legend: C candidates.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from recsys.types import BoolArray, Candidates, Float64Array, FloatArray, Int32Array, Int64Array, Query, Removal

if TYPE_CHECKING:
    from recsys.data.catalogue import Catalogue

LATE = 1e3
"""handicap of what comes after everything else: larger than any relevance"""
LAST = 1e6
"""handicap of what comes after that, too"""
_ADMITTED, _REFUSED = -1, -2
_BIT = np.array([1 << bit for bit in range(8)], np.uint8)


class ItemSet:
    """Some of the items. One bit per item: there may be many rules about many items."""

    def __init__(self, mask_N: BoolArray) -> None:
        """``mask_N``: bool [N]."""
        self.bits = np.packbits(mask_N, bitorder="little")


class Draft:
    """One query's candidates on their way to a slate. A row is a candidate's number among them.

    First rules bring in items and give places away, then :meth:`open` fixes the candidates, rules add to relevance and
    hold some back, :meth:`settle` ends that too, and place by place a row is chosen.
    """

    __slots__ = (
        "_bits", "_boost", "_brought", "_catalogue", "_num_free", "_place_of", "_refused", "_reserved", "_row_of",
        "candidates", "handicap", "item_idx", "picks", "query", "relevance",
    )  # fmt: skip

    def __init__(self, query: Query, candidates: Candidates, catalogue: Catalogue) -> None:
        self.query = query
        self.candidates = candidates
        self.item_idx: Int32Array = candidates.item_idx
        """int32 [C]"""
        self.picks: list[int] = []
        """rows of the slate so far, from the top"""
        self._catalogue = catalogue
        self._bits: tuple[Int32Array, NDArray[np.uint8]] | None = None
        self._row_of: dict[int, int] | None = None
        self._brought: dict[str, list[int]] = {}
        self._refused: dict[str, list[int]] = {}
        self._place_of: dict[int, int] = {}
        self._reserved: list[tuple[int, int]] = []
        self._boost: FloatArray | None = None

    def among(self, items: ItemSet) -> BoolArray:
        """bool [C]: which candidates are in ``items``."""
        if self._bits is None:
            self._bits = self.item_idx >> 3, _BIT[self.item_idx & 7]
        byte, bit = self._bits
        return (items.bits.take(byte) & bit).astype(np.bool_)

    # While rules enter

    def admit(self, item_idx: Int32Array, source: str) -> list[int]:
        """Those of ``item_idx`` that may be shown, in their order: candidates, and what no hard rule forbids. What one
        does is removed, as ``SOURCE_but_REASON``.
        """
        rows, items = self._rows(), item_idx.tolist()
        absent = np.array([item for item in dict.fromkeys(items) if item not in rows], np.int32)
        if len(absent):
            rows.update(dict.fromkeys(absent.tolist(), _ADMITTED))
            query = self.query
            for reason, concerned in self._catalogue.violations(absent, query.filters, query.excluded_item_idx):
                refused = absent[concerned].tolist()
                rows.update(dict.fromkeys(refused, _REFUSED))
                self._refused.setdefault(f"{source}_but_{reason}", []).extend(refused)
        return [item for item in items if rows[item] != _REFUSED]

    def reserve(self, item: int, place: int, source: str) -> None:
        """Give ``item``, a candidate or admitted, the first place from ``place`` on that is not given away. One that is
        no candidate becomes one, found by ``source``. Beyond the slate's end there is no place, and an item has one at
        most.
        """
        rows = self._rows()
        if item in self._place_of or rows[item] == _REFUSED:
            return
        taken = self._place_of.values()
        while place in taken:
            place += 1
        if place < self.query.top_k:
            self._place_of[item] = place
            if rows[item] == _ADMITTED:
                self._brought.setdefault(source, []).append(item)

    def best_without_place(self, items: ItemSet) -> int | None:
        """The best candidate in ``items`` that has no place of its own."""
        found = self.item_idx[self.among(items)].tolist()
        return next((item for item in found if item not in self._place_of), None)

    def open(self, stage: str) -> None:
        """All candidates are there; ``stage`` says who refused some."""
        if self._place_of:
            self._bring_in()
        if self._refused:
            refused = (Removal(np.array(items, np.int32), stage, why) for why, items in self._refused.items())
            self.candidates = replace(self.candidates, removed=(*self.candidates.removed, *refused))
        self.relevance = _relevance(self.candidates.score)
        """float64 [C]: 0 for the worst candidate to 1 for the best, and what rules add"""
        self.handicap: Float64Array = np.zeros(len(self.item_idx))
        """float64 [C], taken off when the best is sought; infinite for what has its place"""

    def _bring_in(self) -> None:
        rows = self._rows()
        lowest = self.candidates.score.min(initial=0.0)
        for source, items in self._brought.items():
            rows.update({item: len(self.candidates) + row for row, item in enumerate(items)})
            scores = np.full(len(items), lowest, np.float32)
            added = Candidates.from_source(source, np.array(items, np.int32), scores, stage=source)
            self.candidates = self.candidates.then(replace(added, stage_scores={}))
        self._reserved = sorted(((place, rows[item]) for item, place in self._place_of.items()), reverse=True)
        if self._brought:
            self.item_idx, self._bits = self.candidates.item_idx, None

    def _rows(self) -> dict[int, int]:
        if self._row_of is None:
            self._row_of = {item: row for row, item in enumerate(self.item_idx.tolist())}
        return self._row_of

    # While they begin

    def add(self, amounts: FloatArray) -> None:
        """Add ``amounts`` (float32 [C]) to relevance."""
        self._boost = amounts if self._boost is None else self._boost + amounts

    def hold_back(self, members: BoolArray, handicap: float) -> None:
        """Give those whom ``members`` (bool [C]) marks at least this handicap."""
        self.handicap[members] = np.maximum(self.handicap[members], handicap)

    def settle(self) -> None:
        """Relevance is final."""
        if self._boost is not None:
            self.relevance += self._boost
        if self._reserved:
            self.handicap[[row for _, row in self._reserved]] = np.inf
        self._num_free = len(self.item_idx) - len(self._reserved)

    # Place by place

    def reserved_row(self) -> int | None:
        """The row whose place comes next, or that is left when all others have one; None where the place is free."""
        if self._reserved and (self._reserved[-1][0] <= len(self.picks) or not self._num_free):
            return self._reserved.pop()[1]
        self._num_free -= 1
        return None

    def free_rows(self) -> Int64Array:
        """int64, ascending: the rows that have no place and are not held back."""
        return (self.handicap < LATE).nonzero()[0]

    def place(self, row: int) -> None:
        """Give the next place to ``row``."""
        self.picks.append(row)
        self.handicap[row] = np.inf


def _relevance(score: FloatArray) -> Float64Array:
    """float64 [C]: 0 for the worst to 1 for the best; 1 for all where they are equal."""
    wide = score.astype(np.float64)
    if not len(wide):
        return wide
    low, high = wide.min(), wide.max()
    return (wide - low) / (high - low) if high > low else np.ones(len(wide))
