"""Items by words: a query and the items' texts, encoded by the same encoder, and the nearest of them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from recsys.pipeline.catalogue import BoolArray
from recsys.pipeline.types import FloatArray, Int32Array

if TYPE_CHECKING:
    from recsys.bundle import Bundle
    from recsys.index import VectorIndex
    from recsys.models.text_encoder import TextEncoder, TextEncoderConfig

SEARCH = "search"


class TextSearch:
    """The encoder is loaded when the first query comes. Safe to use from many threads."""

    def __init__(self, index: VectorIndex, encoder: Path, config: TextEncoderConfig) -> None:
        """``index`` holds the vector of every item's text, of unit length; ``encoder`` is a Hugging Face folder."""
        self._index = index
        self._folder = encoder
        self._config = config
        self._encoder: TextEncoder | None = None
        self._lock = threading.Lock()

    @classmethod
    def of(cls, bundle: Bundle) -> TextSearch | None:
        """What ``bundle`` offers; None where it was trained on ids alone."""
        if not (bundle.has("text_index") and bundle.has("encoder")):
            return None
        from recsys.models.text_encoder import TextEncoderConfig

        config = TextEncoderConfig.parse(bundle.config["encoder"], where="encoder")
        return cls(bundle.text_index(), bundle.part("encoder"), config)

    def find(self, words: str, k: int, allowed: BoolArray) -> tuple[Int32Array, FloatArray]:
        """The ``k`` allowed items (bool [N]) whose texts are nearest to ``words``, and their cosines, descending."""
        score, found = self._index.search(self._vector(words), min(k, self._index.num_items), allowed)
        there = found[0] >= 0
        return found[0][there], score[0][there]

    def _vector(self, words: str) -> FloatArray:
        from recsys.models.text_encoder import TextEncoder

        with self._lock:  # a tokenizer is for one thread at a time
            if self._encoder is None:
                self._encoder = TextEncoder.load(self._config, self._folder)
            return np.ascontiguousarray(self._encoder.encode([words]))
