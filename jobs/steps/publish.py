"""Assemble what was trained into a Bundle, prove it with the golden query, and point the store to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.artifacts import Artifact, build
from jobs.config import JobConfig
from jobs.steps import recommend
from jobs.steps.train_ranker import text_vectors
from recsys.bundle.assemble import BundleParts, assemble, popular_items
from recsys.bundle.golden import golden_question
from recsys.bundle.histories import histories_table
from recsys.bundle.reader import Bundle
from recsys.bundle.slates import SLATES_SCHEMA
from recsys.bundle.store import BundleStore
from recsys.data.dataset import Dataset
from recsys.pipeline.bundle_config import BundleConfig
from recsys.pipeline.golden import golden_answer

STEP = "publish"
_TIMED = {"p50_ms", "speedup"}
"""of the record of an export, see recsys.models.rankers.export"""


def run(
    config: JobConfig,
    prepared: Artifact,
    encoder: Artifact | None,
    embedded: Artifact | None,
    retriever: Artifact,
    ranker: Artifact,
    judged: Artifact,
    slates: Artifact | None,
) -> Artifact:
    """The artefact of this step; its metrics hold the ``bundle_id`` and the ``store``."""
    store = BundleStore(config.store)
    settings = bundle_config(config)

    def make(folder: Path) -> dict[str, Any]:
        dataset = Dataset.load(prepared.path)
        current = store.current()
        parts = BundleParts(
            info=dataset.info,
            items=dataset.items,
            config=settings,
            retriever=retriever.path / "final",
            ranker=ranker.path / "final",
            index=settings.index,
            encoder=None if encoder is None else encoder.path / "model",
            text_vectors=text_vectors(embedded) if config.publish.search else None,
            slates=None if slates is None else slates_table(slates),
            popular=popular_items(dataset, settings.popular, settings.num_popular, seed=settings.seed),
            histories=histories_table(dataset, settings.max_history),
            question=golden_question(dataset),
            metrics={
                "note": "quality was measured on the TEST split by models that had not seen it; the retriever "
                "and the ranker of this Bundle were then refitted on all data with the same configuration, while "
                "the text encoder knows TRAIN only",
                "evaluation": judged.metrics,
                "retriever": retriever.metrics,
                "ranker": untimed(ranker.metrics),
            },
            parent=None if current is None else current.bundle_id,
            events_watermark=dataset.info.events_watermark,
        )
        bundle = assemble(folder, parts, answer=golden_answer)
        return {"bundle_id": bundle.bundle_id, "store": str(store), "num_bytes": bundle.manifest.num_bytes}

    # A Bundle knows its parent, so that one of another store is another artefact.
    depends_on = {"bundle": settings.model_dump(mode="json"), "search": config.publish.search, "store": config.store}
    parents = [each for each in (prepared, encoder, embedded, retriever, ranker, judged, slates) if each is not None]
    artifact = build(config.workdir, STEP, depends_on, parents, make)
    bundle_id = artifact.metrics["bundle_id"]
    store.add(Bundle.open(artifact.path / bundle_id))
    if config.publish.activate:
        point_to(config, bundle_id)
    return artifact


def bundle_config(config: JobConfig) -> BundleConfig:
    """What the Bundle of a run says of itself."""
    return BundleConfig(
        positives=config.data.positives,
        protocol=config.data.split.protocol,
        encoder=None if config.encoder is None else config.encoder.encoding(),
        index=config.index,
        pipeline=config.pipeline,
        export=config.ranking.export,
        popular=config.publish.popular,
        num_popular=config.publish.num_popular,
        max_history=config.publish.max_history,
        evaluation=config.evaluation,
        seed=config.seed,
    )


def untimed(figures: Any) -> Any:
    """``figures`` without those of the clock, which no second run finds again: equal models are one Bundle."""
    if not isinstance(figures, dict):
        return figures
    return {name: untimed(value) for name, value in figures.items() if name not in _TIMED}


def point_to(config: JobConfig, bundle_id: str) -> None:
    """Point the store to a Bundle in it, unless it does so already, and remove old ones."""
    store = BundleStore(config.store)
    current = store.current()
    if current is None or current.bundle_id != bundle_id:
        store.activate(bundle_id, None if current is None else current.bundle_id)
    store.collect(config.publish.keep)


def slates_table(slates: Artifact) -> pa.Table:
    """What the step ``recommend`` made, as a Bundle holds it: :data:`~recsys.bundle.slates.SLATES_SCHEMA`."""
    table = pq.read_table(slates.path / recommend.FILE, columns=["user_id", "item_idx", "scores"])
    columns = [column.cast(field.type) for column, field in zip(table.columns, SLATES_SCHEMA, strict=True)]
    return pa.table(columns, schema=SLATES_SCHEMA)
