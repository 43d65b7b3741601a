"""Several retrievers as sources of one: each may fill its share of the candidates, and their rankings are fused.

An item's score is that of reciprocal rank fusion (Cormack et al., SIGIR 2009): the sum over sources of ``share / (60 +
rank)``, so that sources need not agree on what a score means. Served, each source proposes its best candidates, its
share of them is kept, the rest goes to the best by fused score, and every candidate says which sources proposed it
(:mod:`recsys.pipeline.stages.retrieval`).

Shape legend: B histories, N items.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, SerializeAsAny, StringConstraints, WithJsonSchema, field_validator

from recsys.config import StrictConfig
from recsys.data.histories import Histories
from recsys.models.base import FitData, Retriever, RetrieverConfig, UpdateConfig
from recsys.models.retrievers import KINDS, load_retriever
from recsys.types import FloatArray, Int64Array

if TYPE_CHECKING:
    from recsys.training.runtime import Runtime

RANK_OFFSET = 60
"""from the paper: the larger, the less the first places count over those after them"""
_ANY = {"type": "object", "properties": {"kind": {"type": "string"}}, "required": ["kind"]}


class SourceConfig(StrictConfig):
    """One source."""

    retriever: Annotated[SerializeAsAny[RetrieverConfig], WithJsonSchema(_ANY)] = Field(
        ..., description="any retriever but another blend"
    )
    share: float = Field(default=1.0, gt=0, description="share of the candidates, relative to those of the others")

    @field_validator("retriever", mode="before")
    @classmethod
    def _of_any_kind(cls, value: Any) -> RetrieverConfig:
        config = value if isinstance(value, RetrieverConfig) else KINDS.parse(value, where="retriever")
        if config.kind == "blend":
            raise ValueError("a source is no blend itself: name all sources in one")
        return config


SourceName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]


class Blend(RetrieverConfig):
    """Retrievers side by side."""

    kind: Literal["blend"] = "blend"
    sources: dict[SourceName, SourceConfig] = Field(
        ..., min_length=2, max_length=32, description="sources by their names: letters, digits, - and _"
    )

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls.parse(
            {
                "sources": {
                    "knn": {"retriever": KINDS.get("item_knn").sample(folder), "share": 2},
                    "sequence": {"retriever": KINDS.get("esasrec").sample(folder)},
                }
            },
            where="sample",
        )

    @property
    def shares(self) -> dict[str, float]:
        """The share of each source; together 1."""
        total = sum(source.share for source in self.sources.values())
        return {name: source.share / total for name, source in self.sources.items()}

    @property
    def learns_in_epochs(self) -> bool:
        return any(source.retriever.learns_in_epochs for source in self.sources.values())

    def fit(self, data: FitData, runtime: Runtime) -> BlendRetriever:
        """Fit one source after the other."""
        from recsys.models.retrievers.phases import Phase

        done: dict[str, Retriever] = {}
        for name, source in self.sources.items():
            phase = Phase(runtime, name, done)
            done[name] = phase.finished() or source.retriever.fit(data, phase)
        return BlendRetriever(self, done)

    def update(self, fitted: Retriever, data: FitData, runtime: Runtime, how: UpdateConfig) -> BlendRetriever:
        """Each source goes on as its kind does."""
        assert isinstance(fitted, BlendRetriever)
        from recsys.models.retrievers.phases import Phase

        done: dict[str, Retriever] = {}
        for name, source in self.sources.items():
            phase = Phase(runtime, name, done)
            done[name] = phase.finished() or source.retriever.update(fitted.parts[name], data, phase, how)
        return BlendRetriever(self, done)

    def load(self, folder: Path) -> BlendRetriever:
        """Read the sources from folders of their names."""
        return BlendRetriever(self, {name: load_retriever(folder / name) for name in self.sources})

    def refit(self, fitted: Retriever) -> Blend:
        assert isinstance(fitted, BlendRetriever)
        chosen = {
            name: source.model_copy(update={"retriever": source.retriever.refit(fitted.parts[name])})
            for name, source in self.sources.items()
        }
        return self.model_copy(update={"sources": chosen})


class BlendRetriever(Retriever):
    """A fitted :class:`Blend`."""

    def __init__(self, config: Blend, parts: Mapping[str, Retriever]) -> None:
        self.config: Blend = config
        self.parts = dict(parts)
        self.num_items = next(iter(self.parts.values())).num_items

    def score(self, histories: Histories, now_ms: Int64Array | None = None) -> FloatArray:
        """Fused over the ranks of all items; equal scores of a source rank in the order of ``item_idx``."""
        fused = np.zeros((len(histories), self.num_items))
        ranks = np.arange(1, self.num_items + 1)
        for name, share in self.config.shares.items():
            order = np.argsort(-self.parts[name].score(histories, now_ms), axis=1, kind="stable")
            gain = np.empty(order.shape)
            np.put_along_axis(gain, order, np.broadcast_to(share / (RANK_OFFSET + ranks), order.shape), axis=1)
            fused += gain
        return fused.astype(np.float32)

    def save_weights(self, folder: Path) -> None:
        """Each source in a folder of its name."""
        for name, part in self.parts.items():
            part.save(folder / name)
