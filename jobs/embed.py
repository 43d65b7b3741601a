"""The step ``embed``: the vector of every item's text.

Texts are written out in parts, a pool of actors turns parts of texts into parts of vectors, and the parts are put in
order through a memory-mapped file: memory does not grow with the catalogue. An interrupted run goes on with the parts
that are missing. On several machines the work folder must be one that all of them reach.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from jobs._ray import ComputeConfig, ray_session
from jobs.artifacts import Artifact, build
from recsys.errors import DataError
from recsys.files import atomic_path, write_parquet
from recsys.models.text_encoder import TextEncoder, TextEncoderConfig, item_texts
from recsys.schema import ITEM_IDX

if TYPE_CHECKING:
    from jobs.config import JobConfig

logger = logging.getLogger(__name__)

PART_ROWS = 1024
"""texts per part and per call of the encoder: bounds memory, and what a kill can lose"""


def run(config: JobConfig, prepare: Artifact, encoder: Artifact) -> Artifact:
    """Embed the items of ``prepare`` with the model of ``encoder`` into ``item_text.parquet``.

    One row per item, sorted: ``item_idx`` int32, ``vector`` fixed-size list of float32, unit length.
    """
    settings = config.encoder
    assert settings is not None, "the pipeline skips this step for data without text"
    relevant = settings.model_dump(mode="json", exclude={"model", "train", "batch_tokens"})

    def make(folder: Path) -> dict[str, Any]:
        started = time.perf_counter()
        texts, vectors = folder / "texts", folder / "vectors"
        num_items = write_texts(prepare.path / "items.parquet", texts, settings)
        embedder = {"config": settings, "model": encoder.path / "model", "use_gpu": config.compute.use_gpu}
        if config.compute.num_workers:
            _embed_on_ray(texts, vectors, folder / "checkpoint", embedder, config.compute)
        else:
            _embed_here(texts, vectors, embedder)
        dim = consolidate(vectors, folder / "item_text.parquet", num_items)
        for done in (texts, vectors, folder / "checkpoint"):
            shutil.rmtree(done, ignore_errors=True)
        seconds = time.perf_counter() - started
        logger.info("%d items embedded in %.1f s, %.0f items/s", num_items, seconds, num_items / seconds)
        return {"num_items": num_items, "dim": dim}

    return build(config.workdir, "embed", {"encoder": relevant}, [prepare, encoder], make)


class Embedder:
    """Texts in, vectors out; one per actor."""

    def __init__(self, config: TextEncoderConfig, model: Path, use_gpu: bool, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._encoder = TextEncoder.load(config, model, device="cuda" if use_gpu else "cpu")

    def __call__(self, batch: pa.Table) -> pa.Table:
        """``item_idx``, ``text`` → ``item_idx``, ``vector``"""
        vectors = self._encoder.encode(batch["text"].to_pylist())
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        return pa.table({ITEM_IDX: batch[ITEM_IDX], "vector": column})


def write_texts(items: Path, folder: Path, config: TextEncoderConfig) -> int:
    """Write the items' texts as numbered parts of ``PART_ROWS`` rows; returns the number of items."""
    num_items = 0
    columns = list(config.fields)
    for part, batch in enumerate(pq.ParquetFile(items).iter_batches(PART_ROWS, columns=columns)):
        texts = item_texts(pa.Table.from_batches([batch]), config)
        item_idx = pa.array(np.arange(num_items, num_items + len(texts), dtype=np.int32))
        path = folder / f"part-{part:06d}.parquet"
        if not path.exists():
            write_parquet(path, pa.table({ITEM_IDX: item_idx, "text": pa.array(texts, pa.string())}))
        num_items += len(texts)
    return num_items


def _embed_here(texts: Path, vectors: Path, embedder: dict[str, Any]) -> None:
    missing = [path for path in sorted(texts.glob("*.parquet")) if not (vectors / path.name).exists()]
    embed = Embedder(**embedder)
    started = time.perf_counter()
    for done, path in enumerate(missing, start=1):
        write_parquet(vectors / path.name, embed(pq.read_table(path)))
        seconds = time.perf_counter() - started
        logger.info(
            "%d of %d parts embedded, %.0f items/s, %.0f s left",
            done, len(missing), done * PART_ROWS / seconds, (len(missing) - done) * seconds / done,
        )  # fmt: skip


def _embed_on_ray(
    texts: Path, vectors: Path, checkpoint: Path, embedder: dict[str, Any], compute: ComputeConfig
) -> None:
    with ray_session():
        import ray.data
        from ray.data.checkpoint import CheckpointConfig

        context = ray.data.DataContext.get_current()
        before = context.checkpoint_config
        # The parts of a finished run stay until they are consolidated, so what they contain must be known as long.
        context.checkpoint_config = CheckpointConfig(ITEM_IDX, str(checkpoint), delete_checkpoint_on_success=False)
        try:
            ray.data.read_parquet(str(texts)).map_batches(
                Embedder,
                fn_constructor_kwargs={**embedder, "threads": compute.threads},
                batch_format="pyarrow",
                batch_size=PART_ROWS,
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=compute.num_workers),
                num_cpus=compute.cpus_per_worker,
                num_gpus=1 if compute.use_gpu else 0,
            ).write_parquet(str(vectors))
        finally:
            context.checkpoint_config = before


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


def _in_order(rows: NDArray[np.float32], schema: pa.Schema, size: int = 65536) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(rows), size):
        block = np.array(rows[start : start + size])
        item_idx = pa.array(np.arange(start, start + len(block), dtype=np.int32))
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(block.ravel()), rows.shape[1])
        yield pa.record_batch([item_idx, vectors], schema=schema)


if __name__ == "__main__":
    from jobs.cli import main

    main("embed")
