"""A Bundle and what was changed since: in the catalogue, and in the rules by which it answers.

The parts are the same, grown by the new items, none fitted anew. Its id is that of the Bundle, ``+``, the version of
the catalogue and, where rules were changed, ``.`` and that of the rules, so that whatever pins one Bundle per request
pins the changes with it: ``ID+7``, ``ID+7.2``, ``ID+0.2``.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import pyarrow as pa

from recsys.bundle import manifest as layout
from recsys.bundle.reader import Bundle
from recsys.types import FloatArray, Int32Array

if TYPE_CHECKING:
    from pathlib import Path

    from recsys.bundle.golden import GoldenQuery
    from recsys.bundle.rule_log import RuleChange
    from recsys.data.catalogue import Catalogue
    from recsys.data.changed_catalogue import ChangedCatalogue
    from recsys.index import VectorIndex
    from recsys.models.base import Retriever
    from recsys.models.rankers.base import Ranker
    from recsys.models.stand_in import StandIns
    from recsys.models.text.words import Words

NUM_STAND_INS = 10
_PLUS, _DOT = "+", "."


class Version(NamedTuple):
    """Of what was changed since a Bundle was made; 0 for nothing."""

    items: int = 0
    rules: int = 0


def live_id(bundle_id: str, items: int, rules: int = 0) -> str:
    """The id of a Bundle with the changes up to these versions."""
    if rules:
        return f"{bundle_id}{_PLUS}{items}{_DOT}{rules}"
    return f"{bundle_id}{_PLUS}{items}" if items else bundle_id


def split_id(bundle_id: str) -> tuple[str, Version]:
    """The Bundle and the versions of the changes that an id names."""
    base, _, versions = bundle_id.partition(_PLUS)
    items, _, rules = versions.partition(_DOT)
    return base, Version(int(items or 0), int(rules or 0))


def beneath(bundle_id: str) -> str | None:
    """The id of what one with changes lies on: the same without its rules, then without its items; None for a Bundle
    itself.
    """
    base, version = split_id(bundle_id)
    if version.rules:
        return live_id(base, version.items)
    return base if version.items else None


class LiveBundle(Bundle):
    """Parts are made when they are asked for, and cached."""

    def __init__(self, base: Bundle, changes: pa.Table, version: int) -> None:
        """``changes`` as :meth:`recsys.bundle.changes.ItemLog.read` gives them for ``version``."""
        super().__init__(base.path, base.manifest)
        self.base = base
        self._changes = changes
        self.version = version

    @property
    def bundle_id(self) -> str:
        return live_id(self.base.bundle_id, self.version)

    @property
    def golden(self) -> GoldenQuery | None:
        """None: other items are another answer. The Bundle itself was proven."""
        return None

    def catalogue(self) -> Catalogue:
        """See :meth:`Bundle.catalogue`; the new items follow on those of the Bundle."""
        return self._changed()

    @property
    def changed_item_idx(self) -> Int32Array:
        """int32 [C]: the items that were put or removed."""
        return self._changed().changed_item_idx

    def _changed(self) -> ChangedCatalogue:
        from recsys.data.changed_catalogue import ChangedCatalogue

        return self._load(layout.ITEMS, lambda _: ChangedCatalogue(self.base.catalogue(), self._changes))

    def retriever(self) -> Retriever:
        from recsys.models.extended import with_new_items

        if not len(self.stand_ins()):
            return self.base.retriever()
        return self._load(layout.RETRIEVER, lambda _: with_new_items(self.base.retriever(), self.stand_ins()))

    def index(self) -> VectorIndex:
        from recsys.index.extended import ExtendedIndex
        from recsys.models.extended import StandInVectors

        if not len(self.stand_ins()):
            return self.base.index()

        def extend(_: Path) -> ExtendedIndex:
            retriever = cast(StandInVectors, self.retriever())  # only vectors have an index
            known = self.base.catalogue().num_items
            item_idx = np.arange(known, retriever.num_items, dtype=np.int32)
            return ExtendedIndex(self.base.index(), item_idx, retriever.new_vectors, retriever.num_items)

        return self._load(layout.INDEX, extend)

    def text_index(self) -> VectorIndex:
        """See :meth:`Bundle.text_index`; changed texts are found by what they say now."""
        from recsys.index.extended import ExtendedIndex

        def extend(_: Path) -> ExtendedIndex:
            catalogue = self._changed()
            vectors = self._text_vectors()
            return ExtendedIndex(self.base.text_index(), catalogue.changed_item_idx, vectors, len(catalogue))

        return self._load(layout.TEXT_INDEX, extend)

    def words(self) -> Words:
        """See :meth:`Bundle.words`; loaded once for all versions."""
        return self.base.words()

    def ranker(self) -> Ranker:
        from recsys.models.extended import StandInRanker

        if not len(self.stand_ins()):
            return self.base.ranker()
        return self._load(layout.RANKER, lambda _: StandInRanker(self.base.ranker(), self.stand_ins()))

    def stand_ins(self) -> StandIns:
        """The items of the Bundle that are most like each new one."""
        return self._load(layout.ITEMS, lambda _: self._found_stand_ins(), "stand-ins")

    def _found_stand_ins(self) -> StandIns:
        from recsys.models.stand_in import StandIns

        base, catalogue = self.base.catalogue(), self._changed()
        known = len(base)
        new = np.flatnonzero(catalogue.changed_item_idx >= known)
        k = min(NUM_STAND_INS, known)
        if self.knows_words:
            likeness, found = self.base.text_index().search(self._text_vectors()[new], k)
        else:
            likeness, found = _by_categories(
                base, catalogue, catalogue.changed_item_idx[new], k, self._demand(known), self.base.remembered
            )
        return StandIns.by_likeness(likeness.reshape(-1, k), found.reshape(-1, k), known)

    def _demand(self, num_items: int) -> FloatArray:
        demand = np.zeros(num_items, np.float32)
        if self.has(layout.POPULAR):
            item_idx, score = self.base.popular()
            demand[item_idx] = score
        return demand

    def _text_vectors(self) -> FloatArray:
        """float32 [C, E]: of the texts of the changed items; as they came, or made here where they are another
        encoder's.
        """
        return self._load(layout.ENCODER, lambda _: self._made_text_vectors(), "changed texts")

    def _made_text_vectors(self) -> FloatArray:
        from recsys.models.text.encoder import item_texts

        words = self.base.words()
        vectors_CE = np.zeros((len(self._changes), self.base.text_index().dim), np.float32)
        own = np.array([name == self.base.encoder_id for name in self._changes["encoder"].to_pylist()], np.bool_)
        given = self._changes["text_vector"].filter(pa.array(own)).combine_chunks()
        if len(given):
            vectors_CE[own] = given.flatten().to_numpy().reshape(len(given), -1)
        others = np.flatnonzero(~own)
        if len(others):
            vectors_CE[others] = words.encode(item_texts(self._changes.take(pa.array(others)), words.config))
        return vectors_CE


class RuledBundle(Bundle):
    """A Bundle, with changes of its catalogue or without, that answers by other rules than its own."""

    def __init__(self, base: Bundle, change: RuleChange) -> None:
        """All parts are those of ``base``."""
        super().__init__(base.path, base.manifest)
        self.base = base
        self._change = change
        self.remembered = base.remembered
        self.catalogue, self.popular, self.slates = base.catalogue, base.popular, base.slates
        self.retriever, self.index, self.ranker = base.retriever, base.index, base.ranker
        self.text_index, self.words = base.text_index, base.words

    @property
    def bundle_id(self) -> str:
        base_id, version = split_id(self.base.bundle_id)
        return live_id(base_id, version.items, self._change.version)

    @property
    def golden(self) -> GoldenQuery | None:
        """None: other rules are another answer. The Bundle itself was proven."""
        return None

    @cached_property
    def config(self) -> dict[str, Any]:
        if self._change.rules is None:
            return self.base.config
        return self.base.config | {"pipeline": self.base.config["pipeline"] | {"rules": list(self._change.rules)}}


def _by_categories(
    base: Catalogue,
    catalogue: Catalogue,
    new_item_idx: Int32Array,
    k: int,
    demand: FloatArray,
    known: dict[tuple[str, ...], tuple[FloatArray, Int32Array]],
) -> tuple[FloatArray, Int32Array]:
    """For each new item the ``k`` of ``base`` that share most of its categories, of equals those in most demand: how
    alike they are (0 to 1), float32 [M, k], and which, int32 [M, k]. ``known`` remembers what was found.
    """
    likeness_Mk = np.zeros((len(new_item_idx), k), np.float32)
    found_Mk = np.zeros((len(new_item_idx), k), np.int32)
    for row, item_idx in enumerate(new_item_idx.tolist()):
        names = tuple(sorted(set(catalogue.item(item_idx)["categories"])))
        if names not in known:
            known[names] = _most_alike(base, names, k, demand)
        likeness_Mk[row], found_Mk[row] = known[names]
    return likeness_Mk, found_Mk


def _most_alike(base: Catalogue, names: tuple[str, ...], k: int, demand: FloatArray) -> tuple[FloatArray, Int32Array]:
    shared = [base.in_category(name) for name in names]
    rows, number = np.unique(np.concatenate([np.zeros(0, np.int32), *shared]), return_counts=True)
    alike = (number / np.sqrt(np.maximum(base.num_categories(rows), 1) * max(1, len(names)))).astype(np.float32)
    best = np.lexsort((-demand[rows], -alike))[:k]
    found, likeness = rows[best].astype(np.int32), alike[best]
    if len(found) < k:  # too few have any of them: what most people like stands in as well
        popular = np.argsort(-demand, kind="stable")[: k + len(found)].astype(np.int32)
        popular = popular[~np.isin(popular, found)][: k - len(found)]
        found = np.concatenate([found, popular])
        likeness = np.concatenate([likeness, np.zeros(len(popular), np.float32)])
    return likeness, found
