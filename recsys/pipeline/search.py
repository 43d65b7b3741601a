"""Items by words: a query and the items' texts, encoded by the same encoder, and the nearest of them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from recsys.types import BoolArray, FloatArray, Int32Array

if TYPE_CHECKING:
    from recsys.index import VectorIndex
    from recsys.models.text.encoder import TextEncoder, TextEncoderConfig

SEARCH = "search"


class Words:
    """A Bundle's encoder, loaded when the first text comes. Safe to use from many threads."""

    def __init__(self, encoder: Path, config: TextEncoderConfig) -> None:
        """``encoder`` is a Hugging Face folder."""
        self.config = config
        self._folder = encoder
        self._encoder: TextEncoder | None = None
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """float32 [B, D], unit length."""
        from recsys.models.text.encoder import TextEncoder

        with self._lock:  # a tokenizer is for one thread at a time
            if self._encoder is None:
                self._encoder = TextEncoder.load(self.config, self._folder)
            return np.ascontiguousarray(self._encoder.encode(texts))


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
