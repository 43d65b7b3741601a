"""Assemble what was trained into a Bundle, prove it with the golden query, and point the store to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

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
from jobs.popular import popular
from jobs.steps import embed, evaluate, prepare, recommend, train_encoder, train_ranker, train_retriever
from jobs.steps.base import Step
from recsys import schema
from recsys.arrow import pc
from recsys.bundle.golden import GoldenQuery
from recsys.bundle.reader import HISTORIES_SCHEMA, Bundle
from recsys.bundle.slates import SLATES_SCHEMA
from recsys.bundle.store import BundleStore
from recsys.bundle.writer import BundleWriter
from recsys.data.catalogue import Catalogue
from recsys.data.dataset import Dataset, Split
from recsys.data.features import matrix
from recsys.models import load_retriever
from recsys.models.base import VectorRetriever
from recsys.pipeline.recommender import Recommender
from recsys.types import Filters, HistoryItem

GOLDEN_HISTORY = 20
GOLDEN_TOP_K = 10
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
        dataset = Dataset.load(prepared.path)
        model = load_retriever(retriever.path / "final")
        with BundleWriter(folder) as writer:
            Catalogue.build(dataset.items).save(writer.part("items"))
            writer.add("retriever", retriever.path / "final")
            dim = 0
            if isinstance(model, VectorRetriever):
                vectors = model.item_vectors()
                dim = vectors.shape[1]
                config.index.build(vectors).save(writer.part("index"))
            writer.add("ranker", ranker.path / "final")
            if encoder is not None:
                writer.add("encoder", encoder.path / "model")
            if embedded is not None and config.publish.search:
                texts = matrix(pq.read_table(embedded.path / "item_text.parquet")["vector"])
                config.index.build(texts).save(writer.part("text_index"))
            if slates is not None:
                table = pq.read_table(slates.path / SlatesTable.FILE, columns=["user_id", "item_idx", "scores"])
                columns = [column.cast(field.type) for column, field in zip(table.columns, SLATES_SCHEMA, strict=True)]
                writer.add_slates(pa.table(columns, schema=SLATES_SCHEMA))
            writer.add_popular(*popular(settings, dataset))
            writer.add_histories(histories(dataset, config.publish.max_history))
            writer.add_config(settings)
            writer.add_metrics(
                {
                    "note": "quality was measured on the TEST split by models that had not seen it; the retriever "
                    "and the ranker of this Bundle were then refitted on all data with the same configuration, while "
                    "the text encoder knows TRAIN only",
                    "evaluation": judged.metrics,
                    "retriever": retriever.metrics,
                    "ranker": untimed(ranker.metrics),
                }
            )
            writer.add_golden(golden(writer.draft(dataset.info, embedding_dim=dim), dataset))
            current = store.current()
            bundle = writer.finish(
                dataset.info,
                embedding_dim=dim,
                parent=None if current is None else current.bundle_id,
                events_watermark=dataset.info.events_watermark,
            )
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


def histories(dataset: Dataset, max_history: int) -> pa.Table:
    """Per user the newest ``max_history`` interactions with string ids: what seeds the event store."""
    view = dataset.log.histories(Split.TEST).last(max_history)
    rows = np.repeat(view.stops - np.cumsum(view.lengths), view.lengths) + np.arange(view.lengths.sum())
    table = dataset.interactions.take(pa.array(rows))
    offsets = pa.array(np.concatenate([[0], np.cumsum(view.lengths)]).astype(np.int32))

    def lists(values: pa.ChunkedArray | pa.Array) -> pa.ListArray:
        values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        return pa.ListArray.from_arrays(offsets, values)

    columns = [
        dataset.users[schema.USER_ID].combine_chunks(),
        lists(dataset.items[schema.ITEM_ID].take(table[schema.ITEM_IDX])),
        lists(pc.fill_null(table[schema.TIMESTAMP].cast(pa.int64()), 0)),
        lists(table[schema.EVENT].cast(pa.string())),
        lists(pc.fill_null(table[schema.VALUE], float("nan"))),
    ]
    return pa.table(
        [column.cast(field.type) for column, field in zip(columns, HISTORIES_SCHEMA, strict=True)],
        schema=HISTORIES_SCHEMA,
    )


def golden(draft: Bundle, dataset: Dataset) -> GoldenQuery:
    """A user of middling activity, cut to a short history, and what the draft answers."""
    log = dataset.positives
    lengths = np.diff(log.user_offsets)
    user = int(np.argsort(lengths, kind="stable")[len(lengths) // 2])
    rows = np.arange(log.user_offsets[user], log.user_offsets[user + 1])[-GOLDEN_HISTORY:]
    ids = dataset.items[schema.ITEM_ID].take(pa.array(log.item_idx[rows])).to_pylist()
    times = [0] * len(rows) if log.timestamp_ms is None else log.timestamp_ms[rows].tolist()
    whole = dataset.interactions.filter(pc.greater(dataset.interactions[schema.WEIGHT], 0)).take(pa.array(rows))
    history = tuple(
        HistoryItem(item_id=item_id, event=event, timestamp_ms=time, value=value)
        for item_id, event, time, value in zip(
            ids, whole[schema.EVENT].to_pylist(), times, whole[schema.VALUE].to_pylist(), strict=True
        )
    )
    draft_query = GoldenQuery.model_construct(
        history=history, now_ms=max(times, default=0) + 60_000, top_k=GOLDEN_TOP_K, filters=Filters(), exclude_seen=True
    )
    slate = Recommender.of(draft).answer_golden(draft_query)
    return GoldenQuery(
        history=history,
        now_ms=draft_query.now_ms,
        top_k=GOLDEN_TOP_K,
        item_ids=tuple(item.item_id for item in slate.items),
        scores=tuple(item.score for item in slate.items),
    )


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
