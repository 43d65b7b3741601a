"""Makes a Bundle of its parts, whoever has made those: the one place that knows which parts belong together.

::

    bundle = assemble(folder, BundleParts(info=dataset.info, items=dataset.items, ...), answer=golden_answer)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from recsys.bundle import manifest as layout
from recsys.bundle.golden import GoldenQuery, GoldenQuestion
from recsys.bundle.reader import Bundle
from recsys.bundle.writer import BundleWriter
from recsys.config import StrictConfig, to_yaml
from recsys.data.catalogue import Catalogue
from recsys.data.dataset import Dataset, DatasetInfo, Split
from recsys.files import write_arrow, write_json
from recsys.index.base import IndexConfig
from recsys.models.base import FitData, Retriever, VectorRetriever
from recsys.models.rankers.base import Ranker
from recsys.models.retrievers import load_retriever
from recsys.models.retrievers.popularity import Popularity
from recsys.training.runtime import Runtime
from recsys.types import FloatArray, Int32Array


@dataclass(frozen=True, kw_only=True)
class BundleParts:
    """What a Bundle is made of. A path names a file or folder that is taken as it is."""

    info: DatasetInfo
    """of the data that the models were trained on"""
    items: pa.Table
    """:data:`recsys.schema.ITEMS`, in order of ``item_idx``"""
    config: StrictConfig
    """what serving and updating need, see :mod:`recsys.pipeline.bundle_config`"""
    retriever: Retriever | Path
    index: IndexConfig
    """of item vectors, where the retriever has any, and of ``text_vectors``"""
    popular: tuple[Int32Array, FloatArray]
    """fallback candidates, best first: ``item_idx`` [P] and score [P]"""
    histories: pa.Table
    """:data:`recsys.bundle.histories.HISTORIES_SCHEMA`"""
    question: GoldenQuestion
    """what a replica is asked before it takes traffic"""
    metrics: Mapping[str, Any]
    """how good the models are; nothing that differs from run to run, like seconds"""
    ranker: Ranker | Path | None = None
    encoder: Path | None = None
    """a Hugging Face folder"""
    text_vectors: FloatArray | None = None
    """float32 [N, E] of the items' texts, for search by words"""
    slates: pa.Table | Path | None = None
    """:data:`recsys.bundle.slates.SLATES_SCHEMA`, or a file of it"""
    parent: str | None = None
    """``bundle_id`` of the one it comes after"""
    events_watermark: str | None = None
    """up to where the event log is contained; None for none of it"""


def assemble(
    folder: str | Path, parts: BundleParts, *, answer: Callable[[Bundle, GoldenQuestion], GoldenQuery]
) -> Bundle:
    """Write ``folder/<bundle_id>``, whole or not at all.

    ``answer`` is asked the golden question of what will be published.

    :raises BundleMismatchError: when parts disagree.
    :raises BundleError: when a file could hold a pickle.
    """
    retriever = load_retriever(parts.retriever) if isinstance(parts.retriever, Path) else parts.retriever
    vectors = retriever.item_vectors() if isinstance(retriever, VectorRetriever) else None
    dim = 0 if vectors is None else vectors.shape[1]
    with BundleWriter(folder) as writer:
        Catalogue.build(parts.items).save(writer.part(layout.ITEMS))
        for name, model in ((layout.RETRIEVER, parts.retriever), (layout.RANKER, parts.ranker)):
            if isinstance(model, Path):
                writer.add(name, model)
            elif model is not None:
                model.save(writer.part(name))
        for name, indexed in ((layout.INDEX, vectors), (layout.TEXT_INDEX, parts.text_vectors)):
            if indexed is not None:
                parts.index.build(indexed).save(writer.part(name))
        if parts.encoder is not None:
            writer.add(layout.ENCODER, parts.encoder)
        if isinstance(parts.slates, Path):
            writer.add(layout.SLATES, parts.slates)
        elif parts.slates is not None:
            write_arrow(writer.part(layout.SLATES), parts.slates)
        writer.add_popular(*parts.popular)
        writer.add_histories(parts.histories)
        writer.part(layout.CONFIG).write_text(to_yaml(parts.config))
        write_json(writer.part(layout.METRICS), parts.metrics)
        golden = answer(writer.draft(parts.info, embedding_dim=dim), parts.question)
        write_json(writer.part(layout.GOLDEN), golden.model_dump(mode="json"))
        return writer.finish(
            parts.info, embedding_dim=dim, parent=parts.parent, events_watermark=parts.events_watermark
        )


def popular_items(
    dataset: Dataset, popularity: Popularity, num_items: int, *, until: Split = Split.TEST, seed: int = 0
) -> tuple[Int32Array, FloatArray]:
    """The ``num_items`` most popular items up to and with ``until``, best first: ``item_idx`` [P] and score [P]."""
    fitted = popularity.fit(FitData.of(dataset, until, seed=seed), Runtime("cpu"))
    scores = fitted.score(dataset.positives.histories(until)[:1])[0]
    best = np.argsort(-scores, kind="stable")[:num_items]
    best = best[scores[best] > 0]
    return best.astype(np.int32), scores[best].astype(np.float32)
