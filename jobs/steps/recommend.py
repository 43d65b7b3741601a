"""The step ``recommend``: the best items of every user, offline.

What comes out is a Parquet file for whoever wants slates without asking a server, and a part of the Bundle: what a
user is shown while retrieval fails. Users are worked on in parts, and an interrupted run goes on with those that are
missing.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from jobs._parts import make_parts
from jobs.artifacts import Prepared, SlatesTable, TrainedRanker, TrainedRetriever
from jobs.config import JobConfig
from jobs.steps import prepare, train_ranker, train_retriever
from jobs.steps.base import Step
from recsys import schema
from recsys.data.catalogue import Catalogue
from recsys.files import atomic_path, write_parquet
from recsys.pipeline.build import Parts
from recsys.pipeline.offline import OfflinePipeline

PART_USERS = 2048
logger = logging.getLogger(__name__)


def run(config: JobConfig, prepared: Prepared, retriever: TrainedRetriever, ranker: TrainedRanker) -> SlatesTable:
    """Make the slates of all users."""

    def make(folder: Path) -> dict[str, Any]:
        started = time.perf_counter()
        num_users = prepared.num_users
        parts = folder / "parts"
        maker = {"config": config, "prepared": prepared, "retriever": retriever, "ranker": ranker, "target": parts}
        starts = range(0, num_users, PART_USERS)
        missing = [start for start in starts if not _part(parts, start).exists()]
        done = num_users - sum(min(PART_USERS, num_users - start) for start in missing)
        for rows in make_parts(SlateMaker, missing, maker, config.compute, gpu=False):
            done += rows
            logger.info("slates of %d of %d users", done, num_users)
        with atomic_path(folder / SlatesTable.FILE) as temporary:
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
    return STEP.build(config, settings, (prepared, retriever, ranker), make)


class SlateMaker:
    """Makes parts; one per actor."""

    def __init__(
        self,
        config: JobConfig,
        prepared: Prepared,
        retriever: TrainedRetriever,
        ranker: TrainedRanker,
        target: Path,
        threads: int | None = None,
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self._config, self._target = config, target
        self._dataset = prepared.dataset()
        parts = Parts.of_models(
            Catalogue.build(self._dataset.items), retriever.load("final"), config.index, ranker.load("final")
        )
        # What is kept for days must hang neither on one throw of the dice nor on the day on which it was made.
        rules = tuple(rule for rule in config.pipeline.rules if not (rule.live_only or rule.has_period))
        self._pipeline = OfflinePipeline(
            parts,
            config.pipeline.model_copy(update={"rules": rules}),
            hides=self._dataset.hides(config.data.positives),
        )
        self._everybody = self._dataset.everybody()

    def make(self, part: int) -> int:
        """Write the part of the users from number ``part`` on; how many they are."""
        users = self._everybody[part : part + PART_USERS]
        slates = self._pipeline.slates(users, self._config.slates.top_k)
        offsets = pa.array(np.cumsum([0, *map(len, slates)]), pa.int32())
        items = pa.array(np.concatenate([slate.item_idx for slate in slates]), pa.int32())
        scores = pa.array(np.concatenate([slate.score for slate in slates]), pa.float32())
        ids = self._dataset.items[schema.ITEM_ID].combine_chunks().take(items)
        lists = [pa.ListArray.from_arrays(offsets, values) for values in (ids, items, scores)]
        user_ids = self._dataset.users[schema.USER_ID].combine_chunks().take(pa.array(users.user_idx))
        table = pa.table([user_ids, *lists], names=[schema.USER_ID, "item_ids", schema.ITEM_IDX, "scores"])
        write_parquet(_part(self._target, part), table)
        return len(users)


def _part(folder: Path, start: int) -> Path:
    return folder / f"part-{start // PART_USERS:06d}.parquet"


STEP = Step(
    "recommend",
    "Make the best items of every user, offline.",
    SlatesTable,
    run,
    reads=(prepare.STEP, train_retriever.STEP, train_ranker.STEP),
    section="slates",
    left_out=lambda config: not config.slates.top_k,
)
