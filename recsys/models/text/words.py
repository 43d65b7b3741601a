"""A Bundle's text encoder as servers use it: one for all threads, read when the first text comes."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from recsys.models.text.encoder import EncodingConfig, TextEncoder
from recsys.types import FloatArray


class Words:
    """An encoder that is loaded when the first text comes. Safe to use from many threads."""

    def __init__(self, encoder: Path, config: EncodingConfig) -> None:
        """``encoder`` is a Hugging Face folder."""
        self.config = config
        self._folder = encoder
        self._encoder: TextEncoder | None = None
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """float32 [B, D], unit length."""
        with self._lock:  # a tokenizer is for one thread at a time
            if self._encoder is None:
                self._encoder = TextEncoder.load(self.config, self._folder)
            return np.ascontiguousarray(self._encoder.encode(texts))
