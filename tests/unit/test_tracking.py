"""Learning curves reach TensorBoard and MLflow, and a training that is resumed goes on in its own."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from jobs._ray import ComputeConfig, fit_distributed
from jobs.tracking import TrackingConfig
from recsys.errors import ConfigError
from recsys.training.runtime import Runtime

CURVE = [{"epoch": 1, "loss": 2.0, "ndcg@10": 0.1}, {"epoch": 2, "loss": 1.5, "ndcg@10": 0.2}]


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """Out of TensorBoard's files: records of a length, its check sum, an event and its check sum."""
    found: list[tuple[str, int, float]] = []
    for path in sorted(folder.iterdir()):
        data, place = path.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack("<Q", data[place : place + 8])
            event = Event.FromString(data[place + 12 : place + 12 + length])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            place += length + 16
    return found


def train(curve, runtime: Runtime):
    for row in curve:
        runtime.report(row)
    return lambda folder: None


def fit(tracking: TrackingConfig, folder: Path, curve=CURVE) -> None:
    compute = ComputeConfig(num_workers=0, tracking=tracking)
    fit_distributed(train, curve, compute=compute, name="model-abc", storage=folder)


def test_tensorboard(tmp_path: Path) -> None:
    fit(TrackingConfig(kind="tensorboard", location=str(tmp_path / "board")), tmp_path / "fit")
    logged = scalars(tmp_path / "board" / "model-abc")
    assert [(tag, step) for tag, step, _ in logged] == [("loss", 1), ("ndcg_10", 1), ("loss", 2), ("ndcg_10", 2)]
    assert [value for *_, value in logged] == pytest.approx([2.0, 0.1, 1.5, 0.2])


def test_mlflow_and_a_training_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder in place of a server
    from mlflow.tracking import MlflowClient

    server = (tmp_path / "server").as_uri()
    tracking = TrackingConfig(kind="mlflow", location=server)
    fit(tracking, tmp_path / "first", CURVE[:1])
    fit(tracking, tmp_path / "second", CURVE[1:])
    client = MlflowClient(server)
    experiment = client.get_experiment_by_name("recsys")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("model-abc", "FINISHED")
    history = client.get_metric_history(run.info.run_id, "ndcg_at_10")
    assert [(point.step, point.value) for point in history] == [(1, 0.1), (2, 0.2)]


def test_none_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit(TrackingConfig(), tmp_path / "fit")
    assert [path.name for path in tmp_path.iterdir()] == ["fit"]


def test_mlflow_without_a_server_is_refused() -> None:
    with pytest.raises(ConfigError, match="URI of its server"):
        TrackingConfig.parse({"kind": "mlflow"}, where="test")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    with pytest.raises(ConfigError, match=r"recsys-ray\[tracking\]"):
        TrackingConfig(kind="tensorboard").open("x")
