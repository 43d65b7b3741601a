"""Reranking: from scored candidates to the slate. Diversity, a cap per creator, and rules that pin, boost or bury.

Diversity is maximal marginal relevance (Carbonell and Goldstein, SIGIR 1998): the next item is the one with the highest
``(1 - diversity) * relevance - diversity * max similarity to what is above``. Relevance is the score of the stage
before, scaled to 0 (worst candidate) to 1 (best) so that one ``diversity`` means the same for every ranker; similarity
is the cosine of item vectors, or of categories where there are none, and 0 where it is negative.

Exploration is epsilon-greedy, place by place: with probability ``exploration.share`` a place goes to one of the
candidates left, drawn evenly, else to the best of them. The propensity of what is shown, given what is above it, stands
among the stages' scores, so that what is learned from clicks can be weighted by its inverse. Neither what is buried nor
a creator over the cap is drawn. The same request id draws the same slate.

Shape legend: C candidates, D dimensions, N items.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from recsys.data.catalogue import Catalogue
from recsys.pipeline.config import ItemSelection, Pin, RerankingConfig
from recsys.pipeline.stage import RERANKING
from recsys.types import BoolArray, Candidates, FloatArray, Int32Array, Query, Removal

_CREATOR_HANDICAP = 1e3
"""larger than any relevance: a creator over the cap comes after everything else"""
_BURY_HANDICAP = 1e6
PINNED = "pinned"
PROPENSITY = "propensity"
"""among the stages' scores: the probability with which the item came to its place, 0 to 1"""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _ResolvedPin:
    position: int
    item_idx: Int32Array
    in_categories: BoolArray | None


class RerankingStage:
    """Cuts the candidates to ``top_k`` in their final order. Every soft rule gives way before a slate gets short."""

    name = RERANKING

    def __init__(
        self,
        bundle_id: str,
        catalogue: Catalogue,
        config: RerankingConfig | None = None,
        item_embeddings: FloatArray | None = None,
    ) -> None:
        """``item_embeddings`` float32 [N, D] of any length; None compares items by their categories."""
        self.bundle_id = bundle_id
        self.catalogue = catalogue
        self.config = config or RerankingConfig()
        self.item_embeddings = item_embeddings
        self._pins = [self._resolve_pin(pin) for pin in self.config.pins]
        self._boost: FloatArray | None = None
        for boost in self.config.boosts:
            self._boost = np.zeros(len(catalogue), np.float32) if self._boost is None else self._boost
            self._boost += np.float32(boost.amount) * self._members(boost)
        self._buried: BoolArray | None = None
        for bury in self.config.buries:
            members = self._members(bury)
            self._buried = members if self._buried is None else self._buried | members

    def run_batch(self, queries: Sequence[Query], candidates: Sequence[Candidates]) -> list[Candidates]:
        """Each query's slate. What did not make it is in ``dropped``, with the reason; pins refused, in ``removed``."""
        return [self._rerank(query, found) for query, found in zip(queries, candidates, strict=True)]

    def _rerank(self, query: Query, candidates: Candidates) -> Candidates:
        pinned: list[tuple[int, int]] = []
        if self._pins:
            candidates, pinned = self._pin(query, candidates)
        size = min(query.top_k, len(candidates))
        if size == 0:
            return candidates
        items = candidates.item_idx
        diversity = self.config.diversity if query.diversity is None else query.diversity
        relevance = _relevance(candidates.score)
        if self._boost is not None:
            relevance += self._boost[items]
        handicap = np.zeros(len(items))
        buried = None if self._buried is None else self._buried[items]
        if buried is not None:
            handicap[buried] = _BURY_HANDICAP
        handicap[[row for _, row in pinned]] = np.inf
        cap = self.config.max_per_creator
        creators = self.catalogue.creator_codes[items] if cap else None
        over_cap = np.zeros(len(items), np.bool_)
        creator_counts: dict[int, int] = {}
        vectors_CD = self._unit_vectors(items) if diversity > 0 else None
        nearest = np.zeros(len(items), np.float32)
        merit = (1.0 - diversity) * relevance

        share = self.config.exploration.share
        chance = self._chance(query) if share else None
        picks: list[int] = []
        values: list[float] = []
        propensities: list[float] = []
        num_free = len(items) - len(pinned)
        while len(picks) < size:
            value = merit - diversity * nearest
            propensity = 1.0
            if pinned and (pinned[0][0] <= len(picks) or not num_free):
                row = pinned.pop(0)[1]
            else:
                row = best = int(np.argmax(value - handicap))
                num_free -= 1
                if chance is not None and len(drawable := np.flatnonzero(handicap < _CREATOR_HANDICAP)):
                    if chance.random() < share:
                        row = int(chance.choice(drawable))
                    propensity = share / len(drawable) + (1 - share) * (row == best)
            propensities.append(propensity)
            picks.append(row)
            values.append(float(value[row]))
            handicap[row] = np.inf
            if vectors_CD is not None:
                np.maximum(nearest, vectors_CD @ vectors_CD[row], out=nearest)
            if creators is not None and (creator := int(creators[row])) >= 0:
                creator_counts[creator] = creator_counts.get(creator, 0) + 1
                if creator_counts[creator] == cap:
                    same = creators == creator
                    handicap[same] += _CREATOR_HANDICAP
                    over_cap |= same

        dropped = self._dropped(items, picks, relevance, buried, over_cap, diversity)
        selected = candidates.take(np.array(picks))
        scores = {**selected.stage_scores, self.name: np.array(values, np.float32)}
        if chance is not None:
            scores[PROPENSITY] = np.array(propensities, np.float32)
        return replace(selected, stage_scores=scores, dropped=selected.dropped + dropped)

    def _chance(self, query: Query) -> np.random.Generator:
        digest = hashlib.sha256(query.request_id.encode("utf-8", "surrogatepass")).digest()
        return np.random.default_rng((self.config.exploration.seed, int.from_bytes(digest[:8], "big")))

    def _dropped(
        self,
        items: Int32Array,
        picks: list[int],
        relevance: NDArray[np.float64],
        buried: BoolArray | None,
        over_cap: BoolArray,
        diversity: float,
    ) -> tuple[Removal, ...]:
        left = np.ones(len(items), np.bool_)
        left[picks] = False
        reasons: list[tuple[str, BoolArray]] = []
        if buried is not None:
            reasons.append(("buried", buried))
        reasons.append(("creator_cap", over_cap))
        if diversity > 0:
            among_best = np.zeros(len(items), np.bool_)
            among_best[np.argsort(-relevance, kind="stable")[: len(picks)]] = True
            reasons.append(("diversity", among_best))
        dropped: list[Removal] = []
        for reason, concerned in reasons:
            concerned = concerned & left
            if concerned.any():
                dropped.append(Removal(items[concerned], self.name, reason))
                left &= ~concerned
        if left.any():
            dropped.append(Removal(items[left], self.name, "below_top_k"))
        return tuple(dropped)

    def _pin(self, query: Query, candidates: Candidates) -> tuple[Candidates, list[tuple[int, int]]]:
        """The candidates with the pinned items among them, and (place, row) of each pin, by place."""
        row_of = {item: row for row, item in enumerate(candidates.item_idx.tolist())}
        named = np.unique(np.concatenate([pin.item_idx for pin in self._pins]))
        absent = np.array([item for item in named.tolist() if item not in row_of], np.int32)
        refused: list[Removal] = []
        for reason, concerned in self.catalogue.violations(absent, query.filters, query.excluded_item_idx):
            refused.append(Removal(absent[concerned], self.name, f"pinned_but_{reason}"))
        bad = {item for removal in refused for item in removal.item_idx.tolist()}
        place_of: dict[int, int] = {}
        for pin in self._pins:
            members: list[int] = [item for item in pin.item_idx.tolist() if item not in bad]
            if pin.in_categories is not None:
                rows = np.flatnonzero(pin.in_categories[candidates.item_idx])
                members += [item for item in candidates.item_idx[rows].tolist() if item not in place_of][:1]
            place = pin.position
            for item in members:
                if item in place_of:
                    continue
                while place in place_of.values():
                    place += 1
                if place < query.top_k:
                    place_of[item] = place
        fresh = np.array([item for item in place_of if item not in row_of], np.int32)
        if len(fresh):
            row_of |= {item: len(candidates) + row for row, item in enumerate(fresh.tolist())}
            lowest = candidates.score.min(initial=0.0)
            added = Candidates.from_source(PINNED, fresh, np.full(len(fresh), lowest, np.float32), stage=PINNED)
            candidates = candidates.then(replace(added, stage_scores={}))
        candidates = replace(candidates, removed=(*candidates.removed, *refused))
        return candidates, sorted((place, row_of[item]) for item, place in place_of.items())

    def _unit_vectors(self, items: Int32Array) -> FloatArray:
        if self.item_embeddings is None:
            return self.catalogue.category_rows(items)
        vectors_CD = self.item_embeddings[items]
        norms_C1 = np.sqrt(np.einsum("cd,cd->c", vectors_CD, vectors_CD))[:, None]
        return vectors_CD / np.maximum(norms_C1, np.float32(1e-12))

    def _resolve(self, selection: ItemSelection) -> Int32Array:
        rows = self.catalogue.id_map.rows(selection.item_ids)
        unknown = [item_id for item_id, row in zip(selection.item_ids, rows.tolist(), strict=True) if row < 0]
        if unknown:
            _log.warning(
                "reranking rules name %d item(s) the catalogue lacks: %s", len(unknown), ", ".join(unknown[:5])
            )
        return rows[rows >= 0]

    def _categories(self, selection: ItemSelection) -> BoolArray:
        mask = np.zeros(len(self.catalogue), np.bool_)
        for category in selection.categories:
            mask[self.catalogue.in_category(category)] = True
        return mask

    def _members(self, selection: ItemSelection) -> BoolArray:
        mask = self._categories(selection)
        mask[self._resolve(selection)] = True
        return mask

    def _resolve_pin(self, pin: Pin) -> _ResolvedPin:
        return _ResolvedPin(pin.position, self._resolve(pin), self._categories(pin) if pin.categories else None)


def _relevance(score: FloatArray) -> NDArray[np.float64]:
    """float64 [C]: 0 for the worst to 1 for the best; 1 for all where they are equal."""
    wide = score.astype(np.float64)
    low, high = wide.min(), wide.max()
    return (wide - low) / (high - low) if high > low else np.ones(len(wide))
