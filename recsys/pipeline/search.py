"""Items by words: a query and the items' texts, encoded by the same encoder, and the nearest of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recsys.types import BoolArray, FloatArray, Int32Array

if TYPE_CHECKING:
    from recsys.index import VectorIndex
    from recsys.models.text.words import Words

SEARCH = "search"


class TextSearch:
    """Words and the index that is searched with them."""

    def __init__(self, index: VectorIndex, words: Words) -> None:
        """``index`` holds the vector of every item's text, of unit length."""
        self._index = index
        self._words = words

    def find(self, words: str, k: int, allowed: BoolArray) -> tuple[Int32Array, FloatArray]:
        """The ``k`` allowed items (bool [N]) whose texts are nearest to ``words``, and their cosines, descending."""
        vector = self._words.encode([words])
        score, found = self._index.search(vector, min(k, self._index.num_items), allowed)
        there = found[0] >= 0
        return found[0][there], score[0][there]
