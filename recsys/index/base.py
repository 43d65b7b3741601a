"""What every vector index is: inner-product search over item vectors, with hard rules applied inside the search.

Shape legend: N items, D dimensions, B queries, k results.
"""

from __future__ import annotations

import functools
import importlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from recsys.errors import ModelError, NotInstalledError
from recsys.files import atomic_path, write_json
from recsys.kinds import Kind
from recsys.libraries import library
from recsys.types import BoolArray, FloatArray, Int32Array, Int64Array

MAX_TIE = 4096
INDEX_FILE, INFO_FILE = "index.faiss", "index.json"


@functools.cache
def faiss() -> Any:
    """FAISS untyped: its own stubs lack most of what is used here. Ask :meth:`IndexConfig.check_installed` first."""
    return importlib.import_module("faiss")


class IndexConfig(Kind, ABC):
    """How vectors are indexed. Subclasses add ``kind: Literal["..."]``, build the FAISS index and say how to search it
    exhaustively.
    """

    kind: str
    min_recall: ClassVar[float] = 0.8
    """what the sample finds at least of the 20 nearest of 2,000 random vectors, share"""
    score_tolerance: ClassVar[float] = 1e-4
    """by how much the sample's scores may miss the inner product of unit vectors"""
    device: Literal["cpu", "gpu"] = Field(
        default="cpu",
        description="where unfiltered searches run; gpu needs a FAISS built for it. Filtered ones run on cpu",
    )

    @abstractmethod
    def build_faiss(self, vectors_ND: FloatArray) -> Any:
        """The trained and filled FAISS index; row i is item i."""

    @abstractmethod
    def exhaustive(self, index: Any, selector: Any) -> tuple[Any, Any]:
        """The FAISS index and the parameters with which a search visits every allowed item."""

    def build(self, vectors: FloatArray) -> VectorIndex:
        """Index ``vectors`` (float32 [N, D], finite, N > 0), in order of ``item_idx``.

        :raises NotInstalledError: see :meth:`check_installed`.
        :raises ModelError: when the vectors are not usable.
        """
        vectors_ND = np.ascontiguousarray(vectors, np.float32)
        if vectors_ND.ndim != 2 or 0 in vectors_ND.shape:
            raise ModelError(f"an index needs vectors of shape [items, dimensions], got {vectors_ND.shape}")
        finite = np.isfinite(vectors_ND).all(axis=1)
        if not finite.all():
            row = int(np.argmin(finite))
            raise ModelError(f"the vector of item_idx {row} is not finite", item_idx=row)
        return self.over(vectors_ND)

    def over(self, vectors_ND: FloatArray) -> VectorIndex:
        """See :meth:`build`; the vectors are usable."""
        self.check_installed()
        return VectorIndex(self, self.build_faiss(vectors_ND))

    def check_installed(self) -> None:
        """:raises NotInstalledError: where FAISS is not installed; it says what to do."""
        try:
            library("faiss", f"an index of kind {self.kind}", extra="gpu" if self.device == "gpu" else "cpu")
        except NotInstalledError as error:
            raise NotInstalledError(f"{error}, or use kind flat on cpu", **error.details) from error

    def read(self, path: Path) -> VectorIndex:
        """What :meth:`VectorIndex.write` wrote, memory-mapped.

        :raises NotInstalledError: see :meth:`check_installed`.
        :raises ModelError: when it cannot be read.
        """
        self.check_installed()
        try:
            return VectorIndex(self, faiss().read_index(str(path), faiss().IO_FLAG_MMAP_IFC))
        except RuntimeError as error:
            raise ModelError(f"{path}: not a readable FAISS index: {error}", path=str(path)) from error


class ApproximateIndexConfig(IndexConfig, ABC):
    """An index that normally looks at some of the items only."""

    exhaustive_below: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="a filter that allows less than this fraction of the items is searched exhaustively",
    )

    @abstractmethod
    def search_parameters(self, k: int, selector: Any) -> Any:
        """FAISS parameters of a normal search for ``k`` items."""


class VectorIndex:
    """A built index. Searching is safe from several threads at once."""

    def __init__(self, config: IndexConfig, index: Any) -> None:
        self.config = config
        self._index = index
        self._gpu: Any = None
        if config.device == "gpu":
            if getattr(faiss(), "get_num_gpus", int)() == 0:
                raise ModelError("index.device is gpu, but FAISS sees no GPU: install faiss-gpu or set it to cpu")
            self._gpu = faiss().index_cpu_to_all_gpus(index)

    @property
    def num_items(self) -> int:
        """N, the vectors that are indexed."""
        return self._index.ntotal

    @property
    def dim(self) -> int:
        """D, the dimensions of a vector."""
        return self._index.d

    def search(self, queries: FloatArray, k: int, allowed: BoolArray | None = None) -> tuple[FloatArray, Int32Array]:
        """The ``k`` items with the highest inner product: scores float32 [B, k] descending, item_idx int32 [B, k].

        ``allowed`` (bool [N]) limits the items. Where fewer than ``k`` items are allowed the rest is item_idx -1 with
        score -inf; while allowed items remain, none is missing: an approximate search that comes up short is repeated
        exhaustively. Equal scores are ordered by item_idx, and a search that is exhaustive also cuts them in that order
        (unless more than ``MAX_TIE`` items are tied).

        :raises ModelError: when shapes do not fit the index.
        """
        queries_BD = np.ascontiguousarray(queries, np.float32)
        if queries_BD.ndim != 2 or queries_BD.shape[1] != self.dim:
            raise ModelError(f"queries of shape {queries_BD.shape} do not fit an index of dimension {self.dim}")
        if k < 1:
            raise ModelError(f"k must be at least 1, got {k}")
        num_queries, num_items = len(queries_BD), self.num_items
        scores_Bk = np.full((num_queries, k), -np.inf, np.float32)
        items_Bk = np.full((num_queries, k), -1, np.int32)
        if allowed is not None and (allowed.dtype != np.bool_ or allowed.shape != (num_items,)):
            raise ModelError(f"a mask of {allowed.dtype} {allowed.shape} does not fit: give bool [{num_items}]")
        num_allowed = num_items if allowed is None else int(np.count_nonzero(allowed))
        wanted = min(k, num_allowed)
        if wanted == 0 or num_queries == 0:
            return scores_Bk, items_Bk
        found_scores, found_items = self._find(queries_BD, wanted, allowed, num_allowed)
        order = np.lexsort((found_items, -found_scores))
        scores_Bk[:, :wanted] = np.take_along_axis(found_scores, order, axis=1)[:, :wanted]
        items_Bk[:, :wanted] = np.take_along_axis(found_items, order, axis=1)[:, :wanted]
        return scores_Bk, items_Bk

    def _find(
        self, queries_BD: FloatArray, k: int, allowed: BoolArray | None, num_allowed: int
    ) -> tuple[FloatArray, Int64Array]:
        """At least ``k`` items per query with their scores, in any order; ``k`` is at most ``num_allowed``."""
        bits = None if allowed is None else np.packbits(allowed, bitorder="little")
        selector = None if bits is None else faiss().IDSelectorBitmap(bits)
        config = self.config
        if not isinstance(config, ApproximateIndexConfig) or num_allowed < config.exhaustive_below * self.num_items:
            return self._exhaustive(queries_BD, k, num_allowed, selector)
        if selector is None and self._gpu is not None:
            scores, items = self._gpu.search(queries_BD, k)
        else:
            scores, items = self._index.search(queries_BD, k, params=config.search_parameters(k, selector))
        short = np.flatnonzero((items < 0).any(axis=1))
        if len(short):
            again = self._exhaustive(queries_BD[short], k, num_allowed, selector)
            scores[short], items[short] = (found[:, :k] for found in again)
        return scores, items

    def _exhaustive(
        self, queries_BD: FloatArray, k: int, num_allowed: int, selector: Any
    ) -> tuple[FloatArray, Int64Array]:
        """The ``k`` best allowed items, and more where a tie goes on beyond them, so that the caller can order it."""
        index, parameters = self.config.exhaustive(self._index, selector)
        if selector is None and self._gpu is not None:
            index, parameters = self._gpu, None
        ask = min(k + 1, num_allowed)
        while True:
            scores, items = index.search(queries_BD, ask, params=parameters)
            tied = (scores[:, k - 1] == scores[:, -1]).any()
            if ask == num_allowed or not tied or ask >= MAX_TIE:
                return scores, items
            ask = min(4 * ask, num_allowed)

    def vectors(self) -> FloatArray | None:
        """float32 [N, D] as they were indexed; None where the index holds them less exactly, or not in order."""
        if not isinstance(self._index, faiss().IndexFlat):
            return None
        return self._index.reconstruct_n(0, self.num_items)

    def write(self, path: Path) -> None:
        """Write the file that :meth:`IndexConfig.read` reads."""
        faiss().write_index(self._index, str(path))

    def save(self, folder: str | Path) -> None:
        """Write ``index.faiss`` and, last, ``index.json``."""
        folder = Path(folder)
        with atomic_path(folder / INDEX_FILE) as temporary:
            self.write(temporary)
        info = {
            "config": self.config.model_dump(mode="json"),
            "dim": self.dim,
            "num_items": self.num_items,
            "metric": "inner_product",
        }
        write_json(folder / INFO_FILE, info)
