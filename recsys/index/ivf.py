"""Approximate search by inverted lists: items are grouped around centroids and only the nearest groups are scored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from recsys.index.base import ApproximateIndexConfig, faiss
from recsys.types import FloatArray

VECTORS_PER_LIST = 39
"""k-means wants at least so many training vectors per centroid"""


class IvfIndex(ApproximateIndexConfig):
    """Inverted lists, memory by ``codec``: the kind for large catalogues."""

    kind: Literal["ivf"] = "ivf"
    num_lists: int = Field(
        default=0, ge=0, le=1 << 24, description="groups of items; 0 is 4 sqrt(items), with at least 39 items per group"
    )
    num_probes: int = Field(
        default=64, ge=1, le=1 << 24, description="groups scored per query; more is slower and finds more"
    )
    codec: Literal["sq8", "flat"] = Field(
        default="sq8", description="stored as: sq8, 1 byte per dimension; flat, 4 bytes"
    )
    train_sample: int = Field(
        default=1_000_000, ge=1, description="at most so many vectors, drawn at random, train the centroids"
    )
    seed: int = Field(default=0, ge=0, description="seed of the training sample and of k-means")
    min_recall: ClassVar[float] = 0.6
    score_tolerance: ClassVar[float] = 0.05

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls()

    def build_faiss(self, vectors_ND: FloatArray) -> Any:
        num_items, dim = vectors_ND.shape
        most = max(1, num_items // VECTORS_PER_LIST)
        num_lists = min(self.num_lists or round(4 * math.sqrt(num_items)), most)
        storage = "Flat" if self.codec == "flat" else "SQ8"
        index = faiss().index_factory(dim, f"IVF{num_lists},{storage}", faiss().METRIC_INNER_PRODUCT)
        index.cp.seed = self.seed
        sample = vectors_ND
        if num_items > self.train_sample:
            rows = np.random.default_rng(self.seed).choice(num_items, self.train_sample, replace=False)
            sample = vectors_ND[np.sort(rows)]
        index.train(sample)
        index.add(vectors_ND)
        index.nprobe = min(self.num_probes, num_lists)
        return index

    def search_parameters(self, k: int, selector: Any) -> Any:
        return faiss().SearchParametersIVF(sel=selector, nprobe=self.num_probes)

    def exhaustive(self, index: Any, selector: Any) -> tuple[Any, Any]:
        return index, faiss().SearchParametersIVF(sel=selector, nprobe=index.nlist)
