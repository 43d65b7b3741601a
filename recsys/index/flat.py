"""Exact search: every item is scored."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from recsys.index.base import IndexConfig, faiss
from recsys.types import FloatArray


class FlatIndex(IndexConfig):
    """Exact inner-product search, 4 bytes per dimension and item. The right kind up to some 100,000 items."""

    kind: Literal["flat"] = "flat"

    min_recall: ClassVar[float] = 1.0

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls()

    def build_faiss(self, vectors_ND: FloatArray) -> Any:
        index = faiss.IndexFlatIP(vectors_ND.shape[1])
        index.add(vectors_ND)
        return index

    def exhaustive(self, index: Any, selector: Any) -> tuple[Any, Any]:
        return index, faiss.SearchParameters(sel=selector)
