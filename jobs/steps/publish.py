"""Assemble what was trained into a Bundle, prove it with the golden query, and point the store to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.artifacts import Artifact, build
from jobs.config import JobConfig
from jobs.steps import recommend
from recsys import schema
from recsys.arrow import pc
from recsys.bundle.golden import GoldenEvent, GoldenQuery
from recsys.bundle.reader import HISTORIES_SCHEMA, Bundle
from recsys.bundle.slates import SLATES_SCHEMA
from recsys.bundle.store import BundleStore
from recsys.bundle.writer import BundleWriter
from recsys.data.catalogue import Catalogue
from recsys.data.dataset import Dataset, Split
from recsys.data.features import matrix
from recsys.models.base import FitData, VectorRetriever
from recsys.models.retrievers import load_retriever
from recsys.pipeline.recommender import Recommender
from recsys.training.runtime import Runtime
from recsys.types import Filters

STEP = "publish"
GOLDEN_HISTORY = 20
GOLDEN_TOP_K = 10


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
                table = pq.read_table(slates.path / recommend.FILE, columns=["user_id", "item_idx", "scores"])
                columns = [column.cast(field.type) for column, field in zip(table.columns, SLATES_SCHEMA, strict=True)]
                writer.add_slates(pa.table(columns, schema=SLATES_SCHEMA))
            writer.add_popular(*popular(config, dataset))
            writer.add_histories(histories(dataset, config.publish.max_history))
            writer.add_config(config)
            writer.add_metrics(
                {
                    "note": "quality was measured on the TEST split by models that had not seen it; the retriever "
                    "and the ranker of this Bundle were then refitted on all data with the same configuration, while "
                    "the text encoder knows TRAIN only",
                    "evaluation": judged.metrics,
                    "retriever": retriever.metrics,
                    "ranker": ranker.metrics,
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

    settings = {"config": config.model_dump(mode="json")}
    parents = [each for each in (prepared, encoder, embedded, retriever, ranker, judged, slates) if each is not None]
    artifact = build(config.workdir, STEP, settings, parents, make)
    bundle_id = artifact.metrics["bundle_id"]
    store.add(Bundle.open(artifact.path / bundle_id))
    if config.publish.activate:
        point_to(config, bundle_id)
    return artifact


def point_to(config: JobConfig, bundle_id: str) -> None:
    """Point the store to a Bundle in it, unless it does so already, and remove old ones."""
    store = BundleStore(config.store)
    current = store.current()
    if current is None or current.bundle_id != bundle_id:
        store.activate(bundle_id, None if current is None else current.bundle_id)
    store.collect(config.publish.keep)


def popular(config: JobConfig, dataset: Dataset, until: Split = Split.TEST) -> tuple[np.ndarray, np.ndarray]:
    """The most popular items up to and with ``until``, best first: int32 [P] and float32 [P]."""
    fitted = config.publish.popular.fit(FitData.of(dataset, until, seed=config.seed), Runtime("cpu"))
    scores = fitted.score(dataset.positives.histories(until)[:1])[0]
    best = np.argsort(-scores, kind="stable")[: config.publish.num_popular]
    best = best[scores[best] > 0]
    return best.astype(np.int32), scores[best].astype(np.float32)


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
        GoldenEvent(item_id=item_id, event=event, timestamp_ms=time, value=value)
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
