"""What every model of ratings is: fitted from rated histories, it foretells what a user would rate an item.

A user is their history, as for retrievers, so anybody with a history is answered and nobody needs training.

Shape legend: U users, N items, R rows of the log, Q questions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from recsys import schema
from recsys.data.dataset import Dataset, Split
from recsys.data.histories import Histories
from recsys.data.leaks import check_blind
from recsys.errors import DataError, EmptyDataError
from recsys.files import write_json
from recsys.kinds import Kind
from recsys.models.base import check_items
from recsys.models.retrievers.matrices.base import Sparse
from recsys.training.checkpoint import load_tensors, save_tensors
from recsys.types import FloatArray, Int32Array


@dataclass(frozen=True)
class Rated:
    """Histories with what was thought of each item."""

    histories: Histories
    values: FloatArray
    """float32 [R]: the rating of each row of ``histories``' log"""
    num_items: int

    @classmethod
    def of(cls, dataset: Dataset, until: Split) -> Rated:
        """One history per user: every rating up to and with the split ``until``.

        :raises DataError: when an interaction has no value.
        :raises LeakageError: when what is read depends on what came after.
        """

        def make(source: Dataset) -> Rated:
            return cls(source.log.histories(until), _values(source), source.num_items)

        return check_blind("ratings", make, dataset, until, read=lambda rated: rated.read())

    def read(self) -> dict[str, NDArray[Any]]:
        """All that a model may read."""
        rows = self.histories.rows()
        return {"items": self.histories.item_idx[rows], "values": self.values[rows], "lengths": self.histories.lengths}

    def matrix(self) -> Sparse:
        """float64 [B, N]: the newest rating of each user for each item; only rated places are stored.

        :raises ModelError: when a history holds an item that is not one of the N.
        """
        rows, lengths = self.histories.rows(), self.histories.lengths
        items = self.histories.item_idx[rows].astype(np.int64)
        check_items(items, self.num_items)
        pairs = np.repeat(np.arange(len(lengths)), lengths) * self.num_items + items
        newest = len(pairs) - 1 - np.unique(pairs[::-1], return_index=True)[1]
        user, item = np.divmod(pairs[newest], self.num_items)
        return sp.csr_matrix(
            (self.values[rows][newest].astype(np.float64), (user, item)), (len(lengths), self.num_items)
        )


@dataclass(frozen=True)
class RatingQuestions:
    """What would the user with this history rate this item?"""

    rated: Rated
    """histories, one per question"""
    item_idx: Int32Array
    """int32 [Q]"""
    answers: FloatArray
    """float32 [Q]: what was rated"""
    user_idx: Int32Array
    """int32 [Q]: intervals are clustered by it"""

    @classmethod
    def of(cls, dataset: Dataset, split: Split) -> RatingQuestions:
        """Every rating of ``split``, given all that its user had rated before it."""
        log, values = dataset.log, _values(dataset)
        rows = np.flatnonzero(log.split == split)
        histories = Histories(log.item_idx, log.user_offsets[log.user_idx[rows]], rows, log.timestamp_ms)
        rated = Rated(histories, values, dataset.num_items)
        return cls(rated, log.item_idx[rows], values[rows], log.user_idx[rows])


class RatingConfig(Kind, ABC):
    """Hyper-parameters of one family. Subclasses add ``kind: Literal["..."]``."""

    kind: str
    max_rmse: ClassVar[float] = 0.95
    """RMSE that the sample stays below on planted ratings: the mean alone has 1.1, users and items by themselves 0.9"""

    @abstractmethod
    def fit(self, data: Rated, seed: int = 0) -> RatingModel:
        """Train on ``data``.

        :raises EmptyDataError: when there is no rating.
        """

    @abstractmethod
    def load(self, folder: Path) -> RatingModel:
        """Read what :meth:`RatingModel.save` wrote with this very configuration."""


class RatingModel(ABC):
    """A fitted model."""

    config: RatingConfig
    num_items: int

    @abstractmethod
    def predict(self, rated: Rated, item_idx: Int32Array) -> FloatArray:
        """float32 [Q]: what the user of each history would rate the item (int32 [Q]) beside it; always finite."""

    @abstractmethod
    def tensors(self) -> dict[str, NDArray[Any]]:
        """The fitted state."""

    def save(self, folder: str | Path) -> None:
        """Write a self-describing folder; no pickle."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in self.tensors().items()}
        save_tensors(folder / "model.safetensors", arrays)
        write_json(folder / "config.json", self.config.model_dump(mode="json"))


def saved_arrays(folder: Path) -> dict[str, NDArray[Any]]:
    """What :meth:`RatingModel.tensors` gave."""
    return {name: tensor.numpy() for name, tensor in load_tensors(folder / "model.safetensors").items()}


def some_ratings(data: Rated) -> Sparse:
    """The matrix to learn from.

    :raises EmptyDataError: when there is no rating.
    """
    matrix = data.matrix()
    if not matrix.nnz:
        raise EmptyDataError("there is no rating to learn from: check the source's column of values")
    return matrix


def _values(dataset: Dataset) -> FloatArray:
    column = dataset.interactions[schema.VALUE]
    if column.null_count:
        row = int(np.argmax(np.asarray(column.is_null())))
        raise DataError(f"interaction {row} has no value: ratings need one in every row", row=row)
    return column.to_numpy().astype(np.float32)
