"""What every retriever is, whatever its family: fitted from a dataset, it scores all items for a history.

A new family is one file with a :class:`RetrieverConfig` (its ``kind``, its hyper-parameters, how to fit and load)
and a :class:`Retriever`, plus its line in ``recsys/models/retrievers/__init__.py``. The contract tests pick it up from
there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from recsys.config import StrictConfig
from recsys.data.dataset import Dataset, Split, Targets
from recsys.data.histories import Histories
from recsys.data.leaks import check_blind
from recsys.errors import ModelError
from recsys.files import write_json
from recsys.kinds import Kind
from recsys.models.stand_in import StandIns
from recsys.types import BoolArray, FloatArray, Int32Array, Int64Array

if TYPE_CHECKING:
    from recsys.training.runtime import Runtime

SampleReads = Literal["ids", "text_vectors", "words"]
"""What tells the items of planted data apart: interactions alone, their text vectors, or the words of their titles."""


@dataclass(frozen=True)
class Lesson:
    """The part of a log that is learned when a model goes on from what it knows; all of it may be read."""

    histories: Histories
    """B stretches of the log"""
    heads: BoolArray
    """bool [B]: whether a stretch begins with its user's first interaction"""
    weight: FloatArray
    """float32 [R]: by what the weight of each row of the log is multiplied"""
    stand_ins: StandIns | None = None
    """known items as which new ones begin, where there is no text to begin from"""


@dataclass(frozen=True)
class FitData:
    """All that a retriever may learn from; nothing in it comes from after ``until``."""

    histories: Histories
    """positives, one history per user (B = num_users), oldest first"""
    weights: FloatArray
    """float32 [R]: weight of each row of ``histories``' log"""
    items: pa.Table
    """``ITEMS`` rows in order of ``item_idx``"""
    text_vectors: FloatArray | None = None
    """float32 [num_items, D_text], unit length, or None where items have no text"""
    valid: Targets | None = None
    """for choosing the number of epochs; None when refitting with a number already chosen"""
    seed: int = 0
    lesson: Lesson | None = None
    """what to learn of the histories; None for all"""

    @property
    def num_items(self) -> int:
        """N, the rows of ``items``."""
        return len(self.items)

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        until: Split,
        *,
        text_vectors: FloatArray | None = None,
        valid: Targets | None = None,
        seed: int = 0,
    ) -> FitData:
        """What may be learned from ``dataset`` up to and with the split ``until``.

        :raises LeakageError: when it depends on what came after.
        """

        def make(source: Dataset) -> FitData:
            log = source.positives
            return cls(log.histories(until), log.weight, source.items, text_vectors, valid, seed)

        return check_blind("training data", make, dataset, until, read=lambda data: data.learned_from())

    def learned_from(self) -> dict[str, NDArray[Any]]:
        """All of the log that a model may read."""
        packed, rows = self.histories.pack(), self.histories.rows()
        read: dict[str, NDArray[Any]] = {
            "items": packed.item_idx,
            "borders": packed.offsets,
            "weights": self.weights[rows],
        }
        return read if packed.timestamp_ms is None else {**read, "times": packed.timestamp_ms}


class UpdateConfig(StrictConfig):
    """How a fitted model goes on learning.

    The defaults are the best of twelve on eight weeks of Online Retail (``tests/benchmarks/online.py --tune``).
    """

    epochs: int = Field(default=1, ge=1, le=1000, description="passes over what is new and what is replayed")
    rate: float = Field(
        default=0.3, gt=0, le=1, description="step size, as a share of the one that the model was trained with"
    )
    replay: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="against forgetting: share of the loss that comes from interactions of before",
    )


class RetrieverConfig(Kind, ABC):
    """Hyper-parameters of one family. Subclasses add ``kind: Literal["..."]``."""

    kind: str
    reads_history: ClassVar[bool] = True
    """False for a family that answers everybody alike"""
    sample_reads: ClassVar[SampleReads] = "ids"
    min_ndcg: ClassVar[float] = 0.35
    """what the sample reaches at least on planted clusters, or on a planted fashion where it reads no history: NDCG@10;
    chance has about 0.1
    """

    @abstractmethod
    def fit(self, data: FitData, runtime: Runtime) -> Retriever:
        """Train on ``data``. Deterministic for one ``data.seed`` on one machine and world size."""

    @abstractmethod
    def load(self, folder: Path) -> Retriever:
        """Read what :meth:`Retriever.save` wrote with this very configuration."""

    def update(self, fitted: Retriever, data: FitData, runtime: Runtime, how: UpdateConfig) -> Retriever:
        """Go on from ``fitted`` with ``data``, whose first items are its items, in their order.

        A family that can continues with :attr:`FitData.lesson`; any other is fitted anew on all of ``data``.
        """
        return self.fit(replace(data, lesson=None), runtime)

    @property
    def learns_in_epochs(self) -> bool:
        """Whether workers can share the training, and there is a number of epochs to choose."""
        return "train" in type(self).model_fields

    def refit(self, fitted: Retriever) -> RetrieverConfig:
        """The configuration to fit all data with, once ``fitted`` has chosen on validation what it had to choose."""
        return self


class Retriever(ABC):
    """A fitted model that scores every item for a history."""

    config: RetrieverConfig
    num_items: int
    history: Sequence[Mapping[str, float]] = ()
    """the learning curve, one row per epoch; empty for families without epochs and after loading"""

    @abstractmethod
    def score(self, histories: Histories, now_ms: Int64Array | None = None) -> FloatArray:
        """float32 [B, num_items]: higher is better; finite for every history, the empty one included.

        ``now_ms`` (int64 [B]) is the time of the request; families that do not use time ignore it.
        """

    @abstractmethod
    def save_weights(self, folder: Path) -> None:
        """Write the fitted state into ``folder`` (safetensors, Arrow or JSON; never pickle)."""

    def save(self, folder: str | Path) -> None:
        """Write a self-describing folder: ``config.json`` (with the kind) and the fitted state."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_weights(folder)
        write_json(folder / "config.json", self.config.model_dump(mode="json"))


@dataclass(frozen=True)
class ItemBonus:
    """What the scores of a few items of each user have beyond the inner product; those of all others have nothing."""

    item_idx: Int32Array
    """int32 [E]: ``offsets[b]`` to ``offsets[b + 1]`` are the items of user ``b``, each once"""
    offsets: Int64Array
    """int64 [B + 1]"""
    bonus: FloatArray
    """float32 [E], of either sign"""

    def of(self, row: int) -> tuple[Int32Array, FloatArray]:
        """Items (int32) and bonuses (float32) of user ``row``."""
        part = slice(self.offsets[row], self.offsets[row + 1])
        return self.item_idx[part], self.bonus[part]

    def add_to(self, scores_BN: FloatArray) -> None:
        """Add each bonus to its score, in place."""
        rows = np.repeat(np.arange(len(scores_BN)), np.diff(self.offsets))
        scores_BN[rows, self.item_idx] += self.bonus


class VectorRetriever(Retriever):
    """A retriever whose score is the inner product of a user vector and an item vector, so that FAISS can search it.

    A family may add to the scores of the items that a user knows (:meth:`bonus`); those are few, and scored apart.
    """

    num_vectors: int = 1
    """K, the vectors per user"""

    @property
    def reads_clock(self) -> bool:
        """Whether :meth:`encode_users` gives other vectors for the same history at another time."""
        return False

    @abstractmethod
    def encode_users(self, histories: Histories, now_ms: Int64Array | None = None) -> FloatArray:
        """float32 [B, K, D]: K vectors per user (1 for most families)."""

    @abstractmethod
    def item_vectors(self) -> FloatArray:
        """float32 [num_items, D], in order of ``item_idx``."""

    def item_embeddings(self) -> FloatArray:
        """float32 [num_items, E]: what two items are compared by, the first E dimensions of the item vectors.

        Dimensions that say how much in demand an item is, not what it is, come after them.
        """
        return self.item_vectors()

    def bonus(self, histories: Histories, users_BKD: FloatArray, now_ms: Int64Array | None = None) -> ItemBonus | None:
        """What is added to inner products, given what :meth:`encode_users` said; None for a family without it."""
        return None

    def score(self, histories: Histories, now_ms: Int64Array | None = None) -> FloatArray:
        """The best inner product over the user's K vectors, and the bonus."""
        users = self.encode_users(histories, now_ms)
        batch, vectors, dim = users.shape
        scores = (users.reshape(batch * vectors, dim) @ self.item_vectors().T).reshape(batch, vectors, self.num_items)
        best = scores.max(axis=1)
        bonus = self.bonus(histories, users, now_ms)
        if bonus is not None:
            bonus.add_to(best)
        return best


def check_items(item_idx: NDArray[np.integer[Any]], num_items: int, what: str = "a history holds") -> None:
    """Refuse items that a model does not know; ``what`` begins the message.

    :raises ModelError: when one is outside 0 to ``num_items`` - 1.
    """
    if item_idx.size and not 0 <= item_idx.min() <= item_idx.max() < num_items:
        raise ModelError(f"{what} an item_idx outside 0..{num_items - 1}")
