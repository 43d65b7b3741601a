"""Assemble what was trained into a Bundle, prove it with the golden query, and point the store to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.artifacts import (
    Embedded,
    Judged,
    Prepared,
    Published,
    SlatesTable,
    TrainedEncoder,
    TrainedRanker,
    TrainedRetriever,
)
from jobs.config import JobConfig
from jobs.steps import embed, evaluate, prepare, recommend, train_encoder, train_ranker, train_retriever
from jobs.steps.base import Step
from recsys.bundle.assemble import BundleParts, assemble, popular_items
from recsys.bundle.golden import golden_question
from recsys.bundle.histories import histories_table
from recsys.bundle.store import BundleStore
from recsys.pipeline.golden import golden_answer

_TIMED = {"p50_ms", "speedup"}
"""of the record of an export, see recsys.models.rankers.export"""


def run(
    config: JobConfig,
    prepared: Prepared,
    encoder: TrainedEncoder | None,
    embedded: Embedded | None,
    retriever: TrainedRetriever,
    ranker: TrainedRanker,
    judged: Judged,
    slates: SlatesTable | None,
) -> Published:
    """Make a Bundle, add it to the store and, where the configuration says so, let it be the current one."""
    store = BundleStore(config.store)
    settings = config.of_bundle()

    def make(folder: Path) -> dict[str, Any]:
        dataset = prepared.dataset()
        current = store.current()
        parts = BundleParts(
            info=dataset.info,
            items=dataset.items,
            config=settings,
            retriever=retriever.folder("final"),
            ranker=ranker.folder("final"),
            index=settings.index,
            encoder=None if encoder is None else encoder.folder,
            text_vectors=embedded.vectors() if embedded is not None and config.publish.search else None,
            slates=None if slates is None else slates.table(),
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
    read = (prepared, encoder, embedded, retriever, ranker, judged, slates)
    published = STEP.build(config, depends_on, read, make)
    store.add(published.bundle())
    if config.publish.activate:
        point_to(config, published.bundle_id)
    return published


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


STEP = Step(
    "publish",
    "Write a Bundle and point the store to it.",
    Published,
    run,
    reads=(
        prepare.STEP,
        train_encoder.STEP,
        embed.STEP,
        train_retriever.STEP,
        train_ranker.STEP,
        evaluate.STEP,
        recommend.STEP,
    ),
    section="publish",
)
