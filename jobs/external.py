"""Systems of other libraries in a suite: a program, of whatever environment, that fits and ranks by itself.

The program is started with a folder as its last argument. It finds there

* ``task.json``: ``num_items``, ``depth`` (items per ranking), ``seed``, ``exclude_seen`` (whether the headline leaves
  out what the user has seen);
* ``train.parquet``: ``user_idx``, ``item_idx``, ``weight``, ``timestamp_ms`` (null without time): the positives of
  TRAIN, in order within each user;
* ``valid.parquet`` and ``test.parquet``: one row per query with ``history``, ``seen`` (lists of ``item_idx``, oldest
  first) and ``now_ms``; ``valid`` has ``relevant`` too, ``test`` has not.

and leaves there ``ranked.parquet``, one row per row of ``test`` with two lists of ``item_idx``, best first, -1 where
there is nothing more: ``ranked`` of all items and ``ranked_new`` without those seen; and ``training.json``:
``train_seconds``, ``peak_memory_bytes``, ``num_parameters``, ``num_workers``, ``curve``.
"""

from __future__ import annotations

import logging
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys.data.dataset import Dataset, Split, Targets
from recsys.data.histories import Histories
from recsys.errors import ConfigError, ModelError
from recsys.evaluation.protocol import EvaluationConfig, RankFn
from recsys.files import read_json, write_json, write_parquet
from recsys.types import Int32Array, Int64Array

logger = logging.getLogger(__name__)


def run_program(
    command: str, dataset: Dataset, config: EvaluationConfig, seed: int, folder: Path
) -> tuple[RankFn, dict[str, Any]]:
    """Run ``command`` on ``folder``; its rankings of TEST, and what it says of its training.

    :raises ConfigError: when the program cannot be started.
    :raises ModelError: when it fails, or leaves rankings that do not fit.
    """
    test = dataset.targets(Split.TEST)
    export(dataset, config, seed, folder)
    words = [*shlex.split(command), str(folder)]
    try:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise ConfigError(f"cannot start {words[0]}: {error.strerror}; is its environment installed?") from error
    said: list[str] = []
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            said = [*said[-19:], line.rstrip()]
            logger.info("%s", line.rstrip())
    if process.returncode:
        raise ModelError(f"`{command}` ended with {process.returncode}:\n" + "\n".join(said), command=command)
    return ranker(test, pq.read_table(folder / "ranked.parquet"), command), read_json(folder / "training.json")


def export(dataset: Dataset, config: EvaluationConfig, seed: int, folder: Path) -> None:
    """Write what a program is given. The relevant items of TEST are not among it."""
    log = dataset.positives
    train = log.split == Split.TRAIN
    times = None if log.timestamp_ms is None else log.timestamp_ms[train]
    columns: dict[str, Any] = {
        "user_idx": log.user_idx[train],
        "item_idx": log.item_idx[train],
        "weight": log.weight[train],
        "timestamp_ms": pa.nulls(int(train.sum()), pa.int64()) if times is None else times,
    }
    write_parquet(folder / "train.parquet", pa.table(columns))
    valid = dataset.targets(Split.VALID)
    relevant = _column(valid.relevant_item_idx, valid.relevant_offsets)
    write_parquet(folder / "valid.parquet", _queries(valid).append_column("relevant", relevant))
    write_parquet(folder / "test.parquet", _queries(dataset.targets(Split.TEST)))
    task = {
        "num_items": dataset.num_items,
        "depth": config.depth,
        "seed": seed,
        "exclude_seen": dataset.info.protocol != "next_basket" and config.exclude_seen,
    }
    write_json(folder / "task.json", task)


def ranker(targets: Targets, ranked: pa.Table, command: str) -> RankFn:
    """The system that answers from ``ranked``, one row per query of ``targets``.

    :raises ModelError: when there are more or fewer rows.
    """
    if len(ranked) != len(targets):
        raise ModelError(f"`{command}` ranked {len(ranked)} of {len(targets)} queries", command=command)
    every, new = (np.stack(ranked[name].to_numpy()).astype(np.int32) for name in ("ranked", "ranked_new"))
    row_of = {int(stop): row for row, stop in enumerate(targets.histories.stops)}  # a query is where its history ends

    def rank(batch: Targets) -> Int32Array:
        rows = np.array([row_of[int(stop)] for stop in batch.histories.stops], np.int64)
        # Nothing is left out for a user who has seen nothing, or where repeats are asked for.
        return np.where(batch.left_out.lengths[:, None] > 0, new[rows], every[rows])

    return rank


def _queries(targets: Targets) -> pa.Table:
    now = pa.nulls(len(targets), pa.int64()) if targets.now_ms is None else pa.array(targets.now_ms)
    return pa.table({"history": _lists(targets.histories), "seen": _lists(targets.seen), "now_ms": now})


def _lists(histories: Histories) -> pa.Array:
    packed = histories.pack()
    return _column(packed.item_idx, packed.offsets)


def _column(values: Int32Array, offsets: Int64Array) -> pa.Array:
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values))
