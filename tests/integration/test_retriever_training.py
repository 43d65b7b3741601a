"""A retriever on real workers: the loss curve of one process, and a worker killed in the middle of an epoch."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs._ray import ComputeConfig, fit_distributed
from recsys.data.config import DataConfig
from recsys.data.dataset import Dataset, Split
from recsys.data.prepare import prepare
from recsys.files import read_json, write_json
from recsys.models.base import FitData
from recsys.models.retrievers.sequences.esasrec import ESASRec
from recsys.training.runtime import Precision, Runtime

MODEL = ESASRec.parse(
    {
        "dim": 16,
        "num_blocks": 1,
        "hidden_dim": 16,
        "max_length": 20,
        "num_negatives": 0,
        "train": {"epochs": 4, "batch_tokens": 300, "warmup_steps": 5},
    },
    where="test",
)
STEPS_PER_EPOCH = 4
"""at least; the test checks it"""


@dataclass(frozen=True)
class Payload:
    """What a worker is given."""

    data: FitData
    model: ESASRec
    flag: Path | None
    """touched by the worker that dies, so that it dies once; None where none is to die"""


def fit(payload: Payload, runtime: Runtime) -> Callable[[Path], None]:
    """Train; the last worker kills itself in the third step of the third epoch, unless it has done so before."""
    epochs_done = [0]
    report, prepare_module = runtime.report, runtime.prepare

    def counted(metrics, save=None):
        epochs_done[0], steps[0] = int(metrics["epoch"]), 0
        report(metrics, save)

    steps, mixed = [0], [False]

    def prepared(module):
        module.register_forward_pre_hook(step)
        return prepare_module(module)

    def step(*_):
        steps[0] += 1
        mixed[0] = torch.is_autocast_enabled("cpu")
        dies = payload.flag is not None and not payload.flag.exists() and runtime.rank == runtime.world_size - 1
        if dies and epochs_done[0] == 2 and steps[0] == 3:
            payload.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    resumed = runtime.restore() is not None
    runtime.report, runtime.prepare = counted, prepared
    retriever = payload.model.fit(payload.data, runtime)

    def save(folder: Path) -> None:
        history = [dict(row) for row in retriever.history]
        done = {"history": history, "resumed": resumed, "size": runtime.world_size, "mixed": mixed[0]}
        write_json(folder / "done.json", done)

    return save


pytestmark = pytest.mark.usefixtures("travels_by_value")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    source = {"kind": "synthetic", "num_users": 100, "num_items": 60, "num_clusters": 5, "mean_length": 16}
    config = DataConfig.parse({"source": source, "split": {"kind": "leave_one_out"}}, where="test")
    return prepare(config, 0, tmp_path_factory.mktemp("data"))


@pytest.mark.timeout(400)
def test_workers_and_a_death_in_mid_epoch_leave_the_curve_as_it_is(local_ray, dataset, tmp_path):
    data = FitData.of(dataset, Split.TRAIN, valid=dataset.targets(Split.VALID), seed=5)
    assert data.histories.lengths.sum() > STEPS_PER_EPOCH * MODEL.train.batch_tokens

    def train(name: str, num_workers: int, model: ESASRec, flag: Path | None = None, precision: Precision = "auto"):
        compute = ComputeConfig(num_workers=num_workers, threads_per_worker=1, precision=precision)
        payload = Payload(data, model, flag)
        fitted = fit_distributed(fit, payload, compute=compute, name=name, storage=tmp_path / name)
        return read_json(fitted.path / "done.json")

    # Dropout is drawn per worker and round: without it, curves are equal however the batch is shared.
    plain = MODEL.model_copy(update={"dropout": 0.0})
    in_two_rounds = plain.model_copy(update={"train": plain.train.model_copy(update={"accumulation": 2})})
    alone, shared = train("alone", 0, plain), train("shared", 2, in_two_rounds)
    mixed = train("mixed", 2, plain, precision="bf16")
    together, broken = train("together", 2, MODEL), train("broken", 2, MODEL, tmp_path / "died")
    assert (tmp_path / "died").exists()
    assert (alone["size"], shared["size"], together["size"], broken["size"]) == (1, 2, 2, 2)
    assert (together["resumed"], broken["resumed"]) == (False, True)
    assert [one["mixed"] for one in (alone, shared, mixed)] == [False, False, True]
    names = {"alone": alone, "shared": shared, "mixed": mixed, "together": together, "broken": broken}
    curves = {name: [row["loss"] for row in one["history"]] for name, one in names.items()}
    assert len(curves["alone"]) == 4 and curves["alone"][-1] < curves["alone"][0]
    np.testing.assert_allclose(curves["shared"], curves["alone"], rtol=1e-3)
    np.testing.assert_allclose(curves["mixed"], curves["alone"], rtol=0.03)
    np.testing.assert_allclose(curves["broken"], curves["together"], rtol=1e-5)
    judged = [[row["ndcg@10"] for row in one["history"]] for one in (together, broken)]
    np.testing.assert_allclose(judged[1], judged[0], atol=1e-3)
