"""How steps hand their results on: one folder per step and content key, complete once ``artifact.json`` is in it.

The key hashes the step's name, its configuration and the keys of what it reads, so a second run finds the folder and
does nothing, and a changed configuration lands in a new folder. A step that was interrupted finds its own unfinished
folder again and resumes from what is in it.

What a folder holds, and under which names, the class of its artefact knows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq

from recsys.bundle.reader import Bundle
from recsys.bundle.slates import SLATES_SCHEMA
from recsys.data.dataset import ITEMS_FILE, Dataset, Split
from recsys.data.features import matrix
from recsys.files import fingerprint, read_json, write_json
from recsys.models.base import Retriever
from recsys.models.rankers import load_ranker
from recsys.models.rankers.base import Ranker
from recsys.models.retrievers import load_retriever
from recsys.types import FloatArray

FORMAT = 2
"""Raised when the meaning of what steps write changes, so that older folders are not reused."""
_RECORD = "artifact.json"


@dataclass(frozen=True)
class Artifact:
    """The complete result of a step."""

    step: str
    key: str
    path: Path
    reused: bool = False

    @classmethod
    def build(
        cls,
        workdir: str | Path,
        step: str,
        config: object,
        parents: Sequence[Artifact],
        make: Callable[[Path], dict[str, Any]],
    ) -> Self:
        """The artefact of ``step``: found, or made by ``make(folder)``, which writes into it and returns metrics.

        ``config`` is any JSON-able value that holds every setting the result depends on. ``folder`` may hold what an
        interrupted run left; ``make`` decides what of it is usable.
        """
        key = artifact_key(step, config, parents)
        path = Path(workdir).absolute() / step / key
        if (path / _RECORD).exists():
            return cls(step, key, path, reused=True)
        path.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        metrics = make(path)
        record = {
            "step": step,
            "key": key,
            "config": config,
            "parents": [{"step": p.step, "key": p.key} for p in parents],
            "seconds": round(time.perf_counter() - started, 3),
            "metrics": metrics,
        }
        write_json(path / _RECORD, record)
        return cls(step, key, path)

    @property
    def metrics(self) -> dict[str, Any]:
        """What the step reported about itself."""
        return read_json(self.path / _RECORD)["metrics"]

    @property
    def seconds(self) -> float:
        """How long the step took when it was made."""
        return read_json(self.path / _RECORD)["seconds"]


def artifact_key(step: str, config: object, parents: Sequence[Artifact]) -> str:
    """16 hex digits that change with anything the step's result depends on."""
    tree = {"format": FORMAT, "step": step, "config": config, "parents": [[p.step, p.key] for p in parents]}
    return fingerprint(tree)[:16]


class Prepared(Artifact):
    """A dataset, validated and split, with the quarantine beside it."""

    def dataset(self) -> Dataset:
        """All of it, in memory."""
        return Dataset.load(self.path)

    @property
    def num_users(self) -> int:
        return self.metrics["num_users"]

    @property
    def items(self) -> Path:
        """The Parquet file of the items, for whoever reads it in parts."""
        return self.path / ITEMS_FILE


class TrainedEncoder(Artifact):
    """A text encoder."""

    FOLDER: ClassVar = "model"

    @property
    def folder(self) -> Path:
        """It, as a Hugging Face folder."""
        return self.path / self.FOLDER


class Embedded(Artifact):
    """The vector of every item's text."""

    FILE: ClassVar = "item_text.parquet"
    """``item_idx`` int32, in order, and ``vector``, a fixed-size list of float32, of unit length"""

    def vectors(self) -> FloatArray:
        """float32 [N, D], row = ``item_idx``."""
        return matrix(pq.read_table(self.path / self.FILE)["vector"])


Fit = Literal["base", "judged", "final"]
REFITS: Mapping[Fit, Split] = {"judged": Split.VALID, "final": Split.TEST}
"""The last split that each knows: TEST judges ``judged``, and ``final`` is published. ``base`` knows TRAIN alone: its
candidates are what rankers learn from.
"""


class Fitted(Artifact):
    """A model, fitted more than once, and each time on more."""

    def folder(self, fit: Fit) -> Path:
        """What the model of one fit was saved into."""
        return self.path / fit


class TrainedRetriever(Fitted):
    """Three fits of the retriever."""

    def load(self, fit: Fit) -> Retriever:
        """One of them."""
        return load_retriever(self.folder(fit))


class TrainedRanker(Fitted):
    """Two fits of the ranker, ``judged`` and ``final``."""

    def load(self, fit: Fit) -> Ranker:
        """One of them, in the form that is served."""
        return load_ranker(self.folder(fit))


class Judged(Artifact):
    """What the pipeline is worth on TEST; its metrics are the report's."""


class SlatesTable(Artifact):
    """The best items of every user."""

    FILE: ClassVar = "slates.parquet"
    """one row per user in order of ``user_idx``: ``user_id``, and best first ``item_ids``, ``item_idx``, ``scores``"""

    def table(self) -> pa.Table:
        """As a Bundle holds them: :data:`~recsys.bundle.slates.SLATES_SCHEMA`."""
        table = pq.read_table(self.path / self.FILE, columns=["user_id", "item_idx", "scores"])
        columns = [column.cast(field.type) for column, field in zip(table.columns, SLATES_SCHEMA, strict=True)]
        return pa.table(columns, schema=SLATES_SCHEMA)


class Published(Artifact):
    """A Bundle, and the store that it was added to."""

    @property
    def bundle_id(self) -> str:
        return self.metrics["bundle_id"]

    @property
    def store(self) -> str:
        """Folder or URI."""
        return self.metrics["store"]

    def bundle(self) -> Bundle:
        """The Bundle as it was written, in the step's own folder."""
        return Bundle.open(self.path / self.bundle_id)
