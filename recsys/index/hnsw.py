"""Approximate search by walking a navigable graph (Malkov and Yashunin, 2016)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from recsys.index.base import ApproximateIndexConfig, faiss
from recsys.types import FloatArray


class HnswIndex(ApproximateIndexConfig):
    """A layered neighbour graph over full vectors: fastest per query, most memory. Building it on several threads
    orders insertions by chance, so two builds may differ in a few neighbours.
    """

    kind: Literal["hnsw"] = "hnsw"
    num_neighbours: int = Field(default=32, ge=4, le=512, description="links per item (M); 8 bytes each")
    build_effort: int = Field(
        default=200, ge=8, le=10_000, description="candidates looked at per insertion (efConstruction)"
    )
    search_effort: int = Field(
        default=128, ge=1, le=100_000, description="candidates looked at per search (efSearch), at least k"
    )
    min_recall: ClassVar[float] = 0.95

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls()

    def build_faiss(self, vectors_ND: FloatArray) -> Any:
        index = faiss().IndexHNSWFlat(vectors_ND.shape[1], self.num_neighbours, faiss().METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = self.build_effort
        index.add(vectors_ND)
        return index

    def search_parameters(self, k: int, selector: Any) -> Any:
        return faiss().SearchParametersHNSW(sel=selector, efSearch=max(self.search_effort, k))

    def exhaustive(self, index: Any, selector: Any) -> tuple[Any, Any]:
        return faiss().downcast_index(index.storage), faiss().SearchParameters(sel=selector)
