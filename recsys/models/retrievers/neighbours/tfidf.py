"""Items whose words are like the words of the history's items (content-based filtering by TF-IDF).

After "Content-based Recommender Systems: State of the Art and Trends" (Lops et al., 2011, section 3.3): an item is its
words, weighed by how rare they are, and a user the sum of the items taken. It knows items nobody has touched.

Shape legend: N items, B histories, W words.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
import scipy.sparse as sp
import torch
from pydantic import Field

from recsys.data.histories import Histories
from recsys.errors import ConfigError
from recsys.libraries import library
from recsys.models.base import FitData, Retriever, RetrieverConfig, SampleReads
from recsys.models.retrievers.matrices.base import (
    Sparse,
    history_matrix,
    interaction_matrix,
    load_csr,
    popularity_of,
    save_csr,
    tie_break,
)
from recsys.models.text.encoder import TextEncoderConfig, TextField, item_texts
from recsys.training.checkpoint import load_tensors, save_tensors
from recsys.training.runtime import Runtime
from recsys.types import FloatArray, Int64Array


class TfIdf(RetrieverConfig):
    """Content-based: cosine of TF-IDF vectors."""

    kind: Literal["tfidf"] = "tfidf"
    fields: tuple[TextField, ...] = Field(
        default=("title", "description", "categories"), min_length=1, description="columns of the item table to read"
    )
    max_ngram: int = Field(default=2, ge=1, le=5, description="longest run of words that counts as a word of its own")
    min_items: int = Field(default=2, ge=1, description="a word of fewer items is left out")
    max_share: float = Field(default=0.5, gt=0, le=1, description="a word of a larger share of items is left out")
    half_life: float | None = Field(
        default=None,
        gt=0,
        description="an interaction this many places back counts half; null counts the whole history alike",
    )

    sample_reads: ClassVar[SampleReads] = "words"

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls()

    def fit(self, data: FitData, runtime: Runtime) -> TfIdfRetriever:
        """Read the catalogue; interactions give the order of what the words leave equal.

        :raises ConfigError: when the items have no words in ``fields``.
        """
        popularity = popularity_of(interaction_matrix(data))
        texts = item_texts(data.items, TextEncoderConfig(fields=self.fields))
        text = library("sklearn.feature_extraction.text", f"the kind {self.kind}", extra="classical")
        vectorizer = text.TfidfVectorizer(ngram_range=(1, self.max_ngram), min_df=self.min_items, max_df=self.max_share)
        try:
            words_NW = vectorizer.fit_transform(texts)
        except ValueError as error:
            raise ConfigError(f"tfidf.fields {', '.join(self.fields)}: {error}") from None
        return TfIdfRetriever(self, sp.csr_matrix(words_NW, dtype=np.float32), popularity)

    def load(self, folder: Path) -> TfIdfRetriever:
        tensors = load_tensors(folder / "model.safetensors")
        return TfIdfRetriever(self, load_csr(tensors, "words"), tensors["popularity"].numpy())


class TfIdfRetriever(Retriever):
    """A fitted :class:`TfIdf`."""

    def __init__(self, config: TfIdf, words_NW: Sparse, popularity: FloatArray) -> None:
        self.config: TfIdf = config
        self.num_items = words_NW.shape[0]
        self._words_NW = words_NW
        self._words_WN = words_NW.T.tocsr()
        self._popularity = popularity

    def score(self, histories: Histories, now_ms: Int64Array | None = None) -> FloatArray:
        """Cosine of the history's words and each item's, 0 to 1; popularity orders what that leaves equal."""
        users_BW = history_matrix(histories, self.num_items, self.config.half_life) @ self._words_NW
        length_B = np.sqrt(np.asarray(users_BW.multiply(users_BW).sum(axis=1))).ravel()
        scores = (users_BW @ self._words_WN).toarray() / np.maximum(length_B, 1e-12)[:, None]
        return scores.astype(np.float32) + tie_break(self._popularity)

    def save_weights(self, folder: Path) -> None:
        """Write the item vectors and the popularity."""
        tensors = {**save_csr(self._words_NW, "words"), "popularity": torch.from_numpy(self._popularity)}
        save_tensors(folder / "model.safetensors", tensors)
