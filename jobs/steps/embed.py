"""The step ``embed``: the vector of every item's text.

Texts are written out in parts, Ray Data streams the parts through a pool of actors that write parts of vectors, and
those are put together through a memory-mapped file: memory does not grow with the catalogue. A part is written whole or
not at all, so an interrupted run goes on with the parts that are missing. On several machines the work folder must be
one that all of them reach.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from jobs._parts import make_parts
from jobs._ray import ComputeConfig
from jobs.artifacts import Embedded, Prepared, TrainedEncoder
from jobs.config import JobConfig
from jobs.steps import prepare, train_encoder
from jobs.steps.base import Step
from recsys.errors import DataError
from recsys.files import atomic_path, write_parquet
from recsys.models.text.encoder import TextEncoder, TextEncoderConfig, item_texts
from recsys.schema import ITEM_IDX
from recsys.types import FloatArray

logger = logging.getLogger(__name__)

PART_ROWS, MAX_PART_ROWS, MAX_PARTS = 1024, 65536, 1000
"""Texts per part and per call of the encoder: bounds memory, and what a kill can lose. Parts grow with the catalogue
so that there are not too many files.
"""


def run(config: JobConfig, prepared: Prepared, encoder: TrainedEncoder) -> Embedded:
    """Embed the items of ``prepared`` with the model of ``encoder``."""
    settings = config.encoder
    assert settings is not None, "the pipeline skips this step for data without text"
    relevant = settings.model_dump(mode="json", exclude={"model", "train", "batch_tokens"})

    def make(folder: Path) -> dict[str, Any]:
        started = time.perf_counter()
        texts, vectors = folder / "texts", folder / "vectors"
        num_items = write_texts(prepared.items, texts, settings)
        embedder = {
            "config": settings,
            "model": encoder.folder,
            "target": vectors,
            "use_gpu": config.compute.use_gpu,
        }
        embed_parts(texts, vectors, embedder, config.compute)
        dim = consolidate(vectors, folder / Embedded.FILE, num_items)
        shutil.rmtree(texts)
        shutil.rmtree(vectors)
        seconds = time.perf_counter() - started
        logger.info("%d items embedded in %.1f s, %.0f items/s", num_items, seconds, num_items / seconds)
        return {"num_items": num_items, "dim": dim}

    return STEP.build(config, {"encoder": relevant}, (prepared, encoder), make)


class Embedder:
    """Turns parts of texts into parts of vectors; one per actor."""

    def __init__(
        self, config: TextEncoderConfig, model: Path, target: Path, use_gpu: bool, threads: int | None = None
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._encoder = TextEncoder.load(config, model, device="cuda" if use_gpu else "cpu")
        self._target = target

    def make(self, part: str) -> int:
        """Write the vectors of the texts at ``part`` under the same name; their number."""
        table = pq.read_table(part)
        vectors = self._encoder.encode(table["text"].to_pylist())
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        write_parquet(self._target / Path(part).name, pa.table({ITEM_IDX: table[ITEM_IDX], "vector": column}))
        return len(table)


def part_rows(num_items: int) -> int:
    """Texts per part."""
    return max(PART_ROWS, min(num_items // MAX_PARTS, MAX_PART_ROWS))


def write_texts(items: Path, folder: Path, config: TextEncoderConfig) -> int:
    """Write the items' texts as numbered parts; returns the number of items."""
    source, num_items = pq.ParquetFile(items), 0
    columns = list(config.fields)
    for part, batch in enumerate(source.iter_batches(part_rows(source.metadata.num_rows), columns=columns)):
        texts = item_texts(pa.Table.from_batches([batch]), config)
        item_idx = pa.array(np.arange(num_items, num_items + len(texts), dtype=np.int32))
        path = folder / f"part-{part:06d}.parquet"
        if not path.exists():
            write_parquet(path, pa.table({ITEM_IDX: item_idx, "text": pa.array(texts, pa.string())}))
        num_items += len(texts)
    return num_items


def embed_parts(texts: Path, vectors: Path, embedder: dict[str, Any], compute: ComputeConfig) -> None:
    """Embed the parts in ``texts`` that have none of the same name in ``vectors``."""
    missing = [path for path in sorted(texts.glob("*.parquet")) if not (vectors / path.name).exists()]
    num_missing = sum(pq.read_metadata(path).num_rows for path in missing)
    started, num_done = time.perf_counter(), 0
    for rows in make_parts(Embedder, [str(path) for path in missing], embedder, compute, gpu=True):
        num_done += rows
        rate = num_done / (time.perf_counter() - started)
        logger.info(
            "%d of %d items embedded, %.0f items/s, %.0f s left",
            num_done, num_missing, rate, (num_missing - num_done) / rate,
        )  # fmt: skip


def consolidate(parts: Path, target: Path, num_items: int) -> int:
    """Put the rows of ``parts`` in order of ``item_idx`` into one Parquet file; returns the dimension.

    A row that an interruption left in two parts counts once.

    :raises DataError: when an item has no vector.
    """
    paths = sorted(parts.glob("*.parquet"))
    if not paths:
        raise DataError(f"{parts}: no vectors were written", path=str(parts))
    dim: int = pq.read_schema(paths[0]).field("vector").type.list_size
    scratch = target.with_suffix(".scratch")
    seen = np.zeros(num_items, bool)
    try:
        rows = np.memmap(scratch, np.float32, "w+", shape=(num_items, dim))
        for path in paths:
            for batch in pq.ParquetFile(path).iter_batches(PART_ROWS):
                item_idx = batch[ITEM_IDX].to_numpy()
                rows[item_idx] = batch["vector"].values.to_numpy().reshape(-1, dim)
                seen[item_idx] = True
        if not seen.all():
            lost = int(np.argmin(seen))
            raise DataError(f"{parts}: item_idx {lost} has no vector; {int((~seen).sum())} are missing", item_idx=lost)
        schema = pa.schema([(ITEM_IDX, pa.int32()), ("vector", pa.list_(pa.float32(), dim))])
        with atomic_path(target) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            for batch in _in_order(rows, schema):
                writer.write_batch(batch)
    finally:
        scratch.unlink(missing_ok=True)
    return dim


def _in_order(rows: FloatArray, schema: pa.Schema, size: int = 65536) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(rows), size):
        block = np.array(rows[start : start + size])
        item_idx = pa.array(np.arange(start, start + len(block), dtype=np.int32))
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), rows.shape[1])
        yield pa.record_batch([item_idx, vectors], schema=schema)


STEP = Step(
    "embed",
    "Turn every item's text into a vector.",
    Embedded,
    run,
    reads=(prepare.STEP, train_encoder.STEP),
    section="encoder",
    left_out=train_encoder.STEP.left_out,
)
