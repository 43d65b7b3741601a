"""How alike two items are: by the retriever's item vectors, or by categories where it has none."""

from __future__ import annotations

import numpy as np

from recsys.data.catalogue import Catalogue
from recsys.index import VectorIndex
from recsys.types import BoolArray, FloatArray, Int32Array

_OVERFETCH = 4
"""so many times ``k`` are fetched: the index finds by inner product, which favours long vectors, not by cosine"""


class ItemSimilarity:
    """Cosines between items."""

    def __init__(
        self, catalogue: Catalogue, item_embeddings: FloatArray | None = None, index: VectorIndex | None = None
    ) -> None:
        """``item_embeddings`` float32 [N, D] in order of ``item_idx``; ``index`` holds vectors that begin with them."""
        self.catalogue = catalogue
        self.item_embeddings = item_embeddings
        self._index = index if item_embeddings is not None else None

    def cosines(self, rows: Int32Array, columns: Int32Array) -> FloatArray:
        """float32 [rows, columns], -1 to 1 (0 to 1 by categories)."""
        units = self.catalogue.unit_vectors(np.concatenate([rows, columns]), self.item_embeddings)
        return units[: len(rows)] @ units[len(rows) :].T

    def neighbours(self, item_idx: int, k: int, allowed: BoolArray) -> tuple[Int32Array, FloatArray]:
        """The ``k`` allowed items most like ``item_idx``, and their cosines, descending. ``allowed`` is bool [N]."""
        if self._index is not None and self.item_embeddings is not None:
            # Dimensions beyond the embeddings say how much in demand an item is: zero there, they play no part.
            query = np.zeros((1, self._index.dim), np.float32)
            query[0, : self.item_embeddings.shape[1]] = self.item_embeddings[item_idx]
            _, found = self._index.search(query, min(_OVERFETCH * k, len(self.catalogue)), allowed)
            items = found[0][found[0] >= 0]
        else:
            items = np.flatnonzero(allowed).astype(np.int32)
        if not len(items):
            return items, np.zeros(0, np.float32)
        cosines = self.cosines(np.array([item_idx], np.int32), items)[0]
        order = np.lexsort((items, -cosines))[:k]
        return items[order], cosines[order]
