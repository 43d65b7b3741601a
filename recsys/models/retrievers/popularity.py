"""The items most interacted with lately, the same for everybody.

The window matters as much as the counts: Ji, Sun, Zhang and Li, "A Re-visit of the Popularity Baseline in Recommender
Systems", SIGIR 2020.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field

from recsys.data.histories import Histories
from recsys.errors import EmptyDataError, NoTimeError
from recsys.models.base import FitData, Retriever, RetrieverConfig
from recsys.schema import DAY_MS
from recsys.training.checkpoint import load_tensors, save_tensors
from recsys.training.runtime import Runtime
from recsys.types import FloatArray, Int64Array


class Popularity(RetrieverConfig):
    """Weighted interaction counts, of all time or of a window that ends with the last interaction learned from."""

    kind: Literal["popularity"] = "popularity"
    window_days: float | None = Field(
        default=None, gt=0, description="days counted, up to the last interaction; null is all time"
    )

    reads_history: ClassVar[bool] = False
    min_ndcg: ClassVar[float] = 0.4

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls()

    def fit(self, data: FitData, runtime: Runtime) -> PopularityRetriever:
        """Count. Items equal within the window are ordered by their count of all time."""
        rows = data.histories.rows()
        if not len(rows):
            raise EmptyDataError("there is no positive interaction to count: check the positives' configuration")
        items, weights = data.histories.item_idx[rows], data.weights[rows]
        counts = np.bincount(items, weights, data.num_items)
        if self.window_days is not None:
            if data.histories.timestamp_ms is None:
                raise NoTimeError(
                    "popularity.window_days needs timestamps, and this data has order only: set it to null"
                )
            times = data.histories.timestamp_ms[rows]
            recent = times > times.max() - self.window_days * DAY_MS
            tie_break = counts / (counts.max() + 1) * weights.min()
            counts = np.bincount(items[recent], weights[recent], data.num_items) + tie_break
        return PopularityRetriever(self, counts.astype(np.float32))

    def load(self, folder: Path) -> PopularityRetriever:
        return PopularityRetriever(self, load_tensors(folder / "model.safetensors")["counts"].numpy())


class PopularityRetriever(Retriever):
    """A fitted :class:`Popularity`."""

    def __init__(self, config: Popularity, counts: FloatArray) -> None:
        self.config: Popularity = config
        self.counts = counts
        """float32 [N]"""
        self.num_items = len(counts)

    def score(self, histories: Histories, now_ms: Int64Array | None = None) -> FloatArray:
        """The counts, once per history."""
        return np.repeat(self.counts[None], len(histories), axis=0)

    def save_weights(self, folder: Path) -> None:
        save_tensors(folder / "model.safetensors", {"counts": torch.from_numpy(self.counts)})
