"""Exact search: every item is scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from recsys.index.base import IndexConfig, VectorIndex, faiss
from recsys.index.exact import ExactIndex
from recsys.libraries import installed
from recsys.types import FloatArray


class FlatIndex(IndexConfig):
    """Exact inner-product search, 4 bytes per dimension and item. The right kind up to some 100,000 items.

    Without FAISS NumPy does the same; either reads what the other wrote.
    """

    kind: Literal["flat"] = "flat"

    min_recall: ClassVar[float] = 1.0

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls()

    def over(self, vectors_ND: FloatArray) -> VectorIndex:
        return super().over(vectors_ND) if self._by_faiss() else ExactIndex(self, vectors_ND)

    def read(self, path: Path) -> VectorIndex:
        return super().read(path) if self._by_faiss() else ExactIndex.read(self, path)

    def _by_faiss(self) -> bool:
        return self.device == "gpu" or installed("faiss")

    def build_faiss(self, vectors_ND: FloatArray) -> Any:
        index = faiss().IndexFlatIP(vectors_ND.shape[1])
        index.add(vectors_ND)
        return index

    def exhaustive(self, index: Any, selector: Any) -> tuple[Any, Any]:
        return index, faiss().SearchParameters(sel=selector)
