"""Items by words: a query and the items' texts, encoded by the same encoder, and the nearest of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recsys.data.catalogue import BoolArray
from recsys.types import FloatArray, Int32Array

if TYPE_CHECKING:
    from recsys.bundle import Bundle
    from recsys.index import VectorIndex
    from recsys.models.text.words import Words

SEARCH = "search"


class TextSearch:
    """Words and the index that is searched with them."""

    def __init__(self, index: VectorIndex, words: Words) -> None:
        """``index`` holds the vector of every item's text, of unit length."""
        self._index = index
        self._words = words

    @classmethod
    def of(cls, bundle: Bundle) -> TextSearch | None:
        """What ``bundle`` offers; None where it was trained on ids alone."""
        return cls(bundle.text_index(), bundle.words()) if bundle.knows_words else None

    def find(self, words: str, k: int, allowed: BoolArray) -> tuple[Int32Array, FloatArray]:
        """The ``k`` allowed items (bool [N]) whose texts are nearest to ``words``, and their cosines, descending."""
        vector = self._words.encode([words])
        score, found = self._index.search(vector, min(k, self._index.num_items), allowed)
        there = found[0] >= 0
        return found[0][there], score[0][there]
