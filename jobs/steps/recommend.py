"""The step ``recommend``: the best items of every user, offline.

What comes out is a Parquet file for whoever wants slates without asking a server, and a part of the Bundle: what a
user is shown while retrieval fails. Users are worked on in parts, and an interrupted run goes on with those that are
missing.
"""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from jobs._parts import make_parts
from jobs.artifacts import Artifact, build
from jobs.config import JobConfig
from recsys import schema
from recsys.data.catalogue import Catalogue
from recsys.data.dataset import Dataset
from recsys.files import atomic_path, write_parquet
from recsys.models.base import VectorRetriever
from recsys.models.rankers import load_ranker
from recsys.models.retrievers import load_retriever
from recsys.pipeline.config import ExplorationConfig
from recsys.pipeline.offline import queries_of, retrieval_stage, run_stages
from recsys.pipeline.stage import Stage
from recsys.pipeline.stages.ranking import RankingStage
from recsys.pipeline.stages.reranking import RerankingStage
from recsys.pipeline.users import Profile
from recsys.types import Int32Array

STEP = "recommend"
FILE = "slates.parquet"
PART_USERS = 2048
logger = logging.getLogger(__name__)


def run(config: JobConfig, prepared: Artifact, retriever: Artifact, ranker: Artifact) -> Artifact:
    """The artefact of this step: ``slates.parquet``, one row per user in order of ``user_idx``.

    Columns: ``user_id``, and best first ``item_ids``, ``item_idx`` and ``scores``.
    """

    def make(folder: Path) -> dict[str, Any]:
        started = time.perf_counter()
        num_users = pq.read_metadata(prepared.path / "users.parquet").num_rows
        parts = folder / "parts"
        paths = (prepared.path, retriever.path / "final", ranker.path / "final")
        maker = {"config": config, "paths": paths, "target": parts}
        starts = range(0, num_users, PART_USERS)
        missing = [start for start in starts if not _part(parts, start).exists()]
        done = num_users - sum(min(PART_USERS, num_users - start) for start in missing)
        for rows in make_parts(SlateMaker, missing, maker, config.compute, gpu=False):
            done += rows
            logger.info("slates of %d of %d users", done, num_users)
        with atomic_path(folder / FILE) as temporary:
            writer: pq.ParquetWriter | None = None
            for start in starts:
                table = pq.read_table(_part(parts, start))
                writer = writer or pq.ParquetWriter(temporary, table.schema)
                writer.write_table(table)
            assert writer is not None, "a dataset has users"
            writer.close()
        shutil.rmtree(parts)
        return {"num_users": num_users, "users_per_s": num_users / (time.perf_counter() - started)}

    settings = {
        "slates": config.slates.model_dump(mode="json"),
        "pipeline": config.pipeline.model_dump(mode="json"),
        "index": config.index.model_dump(mode="json"),
    }
    return build(config.workdir, STEP, settings, [prepared, retriever, ranker], make)


class SlateMaker:
    """Makes parts; one per actor."""

    def __init__(
        self, config: JobConfig, paths: tuple[Path, Path, Path], target: Path, threads: int | None = None
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        prepared, retriever, ranker = paths
        self._config, self._target = config, target
        self._dataset = Dataset.load(prepared)
        model = load_retriever(retriever)
        embeddings = model.item_embeddings() if isinstance(model, VectorRetriever) else None
        # What is kept for days must not hang on one throw of the dice.
        reranking = config.pipeline.reranking.model_copy(update={"exploration": ExplorationConfig()})
        self._stages: list[Stage] = [
            retrieval_stage(config.index, self._dataset, model),
            RankingStage("", load_ranker(ranker)),
            RerankingStage("", Catalogue.build(self._dataset.items), reranking, item_embeddings=embeddings),
        ]
        self._everybody = self._dataset.everybody()

    def make(self, part: int) -> int:
        """Write the part of the users from number ``part`` on; how many they are."""
        users = self._everybody[part : part + PART_USERS]
        pipeline = self._config.pipeline
        queries = queries_of(
            users,
            num_candidates=max(pipeline.num_candidates, self._config.slates.top_k),
            max_history=pipeline.max_history,
            top_k=self._config.slates.top_k,
        )
        if pipeline.repeat_after_days is not None:
            queries = [
                replace(query, excluded_item_idx=self._excluded(user, query.now_ms))
                for user, query in zip(users.user_idx.tolist(), queries, strict=True)
            ]
        slates = run_stages(self._stages, queries)
        offsets = pa.array(np.cumsum([0, *map(len, slates)]), pa.int32())
        items = pa.array(np.concatenate([slate.item_idx for slate in slates]), pa.int32())
        scores = pa.array(np.concatenate([slate.score for slate in slates]), pa.float32())
        ids = self._dataset.items[schema.ITEM_ID].combine_chunks().take(items)
        lists = [pa.ListArray.from_arrays(offsets, values) for values in (ids, items, scores)]
        user_ids = self._dataset.users[schema.USER_ID].combine_chunks().take(pa.array(users.user_idx))
        table = pa.table([user_ids, *lists], names=[schema.USER_ID, "item_ids", schema.ITEM_IDX, "scores"])
        write_parquet(_part(self._target, part), table)
        return len(users)

    def _excluded(self, user: int, now_ms: int) -> Int32Array:
        """What a server would leave out: hidden items, and those met too short a time ago."""
        log, pipeline = self._dataset.log, self._config.pipeline
        rows = slice(int(log.user_offsets[user]), int(log.user_offsets[user + 1]))
        told = self._dataset.interactions[rows.start : rows.stop]
        weights, negative = self._config.data.positives.judge(told[schema.EVENT], told[schema.VALUE])
        times = np.zeros(len(told), np.int64) if log.timestamp_ms is None else log.timestamp_ms[rows]
        profile = Profile.resolve(log.item_idx[rows], times, weights > 0, negative, pipeline.max_history)
        return profile.excluded(now_ms, pipeline.repeat_after_days)


def _part(folder: Path, start: int) -> Path:
    return folder / f"part-{start // PART_USERS:06d}.parquet"
