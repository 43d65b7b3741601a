"""A small but complete Bundle: transformer of one epoch, index, untrained ranker, histories, golden query."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from recsys import schema
from recsys.bundle import HISTORIES_SCHEMA, Bundle, GoldenQuestion
from recsys.bundle.assemble import BundleParts, assemble
from recsys.data.dataset import DatasetInfo
from recsys.data.features import ItemFeatures
from recsys.data.histories import Histories
from recsys.data.id_map import fingerprint_ids
from recsys.data.positives import PositivePolicy
from recsys.evaluation.protocol import EvaluationConfig
from recsys.index.base import IndexConfig
from recsys.index.flat import FlatIndex
from recsys.models.base import FitData, RetrieverConfig, VectorRetriever
from recsys.models.rankers.attention import AttentionRankerConfig
from recsys.models.rankers.attention_network import AttentionRanker, project
from recsys.models.rankers.export import ExportConfig
from recsys.models.rankers.queries import RankingItems, item_content
from recsys.models.retrievers.popularity import Popularity
from recsys.models.retrievers.sequences.esasrec import ESASRec
from recsys.models.text.encoder import TextEncoder, TextEncoderConfig, item_texts
from recsys.pipeline.bundle_config import BundleConfig
from recsys.pipeline.config import PipelineConfig
from recsys.pipeline.golden import golden_answer
from recsys.testing.planted import random_numeric
from recsys.training.runtime import Runtime
from recsys.types import HistoryItem

START_MS = 1_700_000_000_000


@dataclass(frozen=True)
class Size:
    """How large a Bundle of random data is."""

    num_items: int = 300
    num_users: int = 40
    shortest: int = 3
    """interactions of the least active user"""
    longest: int = 12
    dim: int = 16
    ranker_dim: int = 16
    ranker_history: int = 8


TINY = Size()
NUM_ITEMS, NUM_USERS, DIM = TINY.num_items, TINY.num_users, TINY.dim


def make_bundle(
    parent: Path,
    pipeline: PipelineConfig | None = None,
    *,
    retriever: RetrieverConfig | None = None,
    size: Size = TINY,
    index: IndexConfig | None = None,
    seed: int = 0,
    titles: Sequence[str] | None = None,
    encoder: TextEncoderConfig | None = None,
) -> Bundle:
    """``parent/<bundle_id>``: users ``u0``, ``u1``, ... with ratings of items ``i0``, ``i1``, ...

    ``retriever`` None is a sequence model, ``index`` None an exact one, ``titles`` None count ``Item 0`` and on;
    with an ``encoder`` items are found by words, and models learn from their titles.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    items = pa.table(
        {
            "item_id": [f"i{row}" for row in range(size.num_items)],
            "title": list(titles) if titles else [f"Item {row}" for row in range(size.num_items)],
            "description": pa.nulls(size.num_items, pa.string()),
            "categories": [["even" if row % 2 == 0 else "odd"] for row in range(size.num_items)],
            "creator": [f"creator {row % 7}" for row in range(size.num_items)],
            "price": [float(row) for row in range(size.num_items)],
            "created_at": pa.nulls(size.num_items, schema.TIMESTAMP_TYPE),
            "available": [row != 13 for row in range(size.num_items)],
            "image": pa.nulls(size.num_items, pa.string()),
        }
    ).cast(schema.ITEMS)
    lengths = generator.integers(size.shortest, size.longest + 1, size.num_users)
    histories = [generator.choice(size.num_items, length, replace=False).tolist() for length in lengths]
    times = [[START_MS + 60_000 * place for place in range(length)] for length in lengths]
    counts = np.bincount(np.concatenate(histories), minlength=size.num_items).astype(np.float32)
    info = DatasetInfo(
        name="tiny",
        fingerprint="tiny",
        id_map_fingerprint=fingerprint_ids(items["item_id"]),
        has_time=True,
        protocol="rolling_next_item",
        num_users=size.num_users,
        num_items=size.num_items,
        num_interactions=int(lengths.sum()),
        num_positives=int(lengths.sum()),
        num_quarantined=0,
        counts_by_split={"train": int(lengths.sum())},
    )
    text = generator.normal(size=(size.num_items, size.dim)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    if encoder is not None:
        text = TextEncoder.load(encoder).encode(item_texts(items, encoder))
    log = Histories.from_lists(histories, times)
    settings = retriever or ESASRec.parse(
        {"dim": size.dim, "num_blocks": 1, "hidden_dim": size.dim, "train": {"epochs": 1}}, where="tiny bundle"
    )
    with tempfile.TemporaryDirectory() as checkpoints:
        fitted = settings.fit(
            FitData(log, np.ones(len(log.item_idx), np.float32), items, text, seed=seed),
            Runtime("cpu", checkpoints=checkpoints),
        )
    features = ItemFeatures(
        random_numeric(generator, size.num_items),
        np.eye(2, dtype=np.float32)[np.arange(size.num_items) % 2],
        (np.arange(size.num_items) % 7).astype(np.int32),
        np.full(size.num_items, START_MS),
    )
    shape = {
        "dim": size.ranker_dim, "num_heads": 2, "hidden": 2 * size.ranker_dim, "max_history": size.ranker_history
    }  # fmt: skip
    ranker_config = AttentionRankerConfig.parse(shape, where="tiny")
    network = ranker_config.network(2)
    content = item_content(None, features)
    ranker = AttentionRanker(
        ranker_config,
        network,
        RankingItems.of(features, fitted.item_embeddings() if isinstance(fitted, VectorRetriever) else content),
        project(network, content),
        uses_time=True,
    )
    best = np.argsort(-counts, kind="stable").astype(np.int32)
    columns = [
        [f"u{user}" for user in range(size.num_users)],
        [[f"i{item}" for item in history] for history in histories],
        times,
        [["rating"] * length for length in lengths],
        [[5.0] * length for length in lengths],
    ]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, HISTORIES_SCHEMA, strict=True)]
    config = BundleConfig(
        positives=PositivePolicy(),
        protocol=info.protocol,
        encoder=None if encoder is None else encoder.encoding(),
        index=index or FlatIndex(),
        pipeline=pipeline or PipelineConfig(),
        export=ExportConfig(),
        popular=Popularity(),
        num_popular=size.num_items,
        max_history=size.longest,
        evaluation=EvaluationConfig(),
        seed=seed,
    )
    question = GoldenQuestion(
        history=tuple(
            HistoryItem(item_id=f"i{item}", event="rating", timestamp_ms=time, value=5.0)
            for item, time in zip(histories[0], times[0], strict=True)
        ),
        now_ms=START_MS + 3_600_000,
        top_k=10,
    )
    parts = BundleParts(
        info=info,
        items=items,
        config=config,
        retriever=fitted,
        index=config.index,
        ranker=ranker,
        encoder=None if encoder is None else encoder.model_folder(),
        text_vectors=None if encoder is None else text,
        popular=(best, counts[best]),
        histories=pa.table(arrays, schema=HISTORIES_SCHEMA),
        question=question,
        metrics={},
    )
    return assemble(parent, parts, answer=golden_answer)
