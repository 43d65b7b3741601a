"""Learning curves as they are made, in TensorBoard or MLflow: ``--set compute.tracking.kind=tensorboard``.

Both are optional (the extra ``tracking``); what the jobs themselves write does not depend on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from recsys.config import StrictConfig
from recsys.libraries import library

_EXPERIMENT = "recsys"


class TrackingConfig(StrictConfig):
    """Where the metrics of every epoch go, besides the log."""

    kind: Literal["none", "tensorboard", "mlflow"] = Field(default="none", description="none, tensorboard or mlflow")
    location: str | None = Field(
        default=None,
        description="tensorboard: folder or URI of the event files (null: runs/tensorboard); mlflow: URI of the server",
    )

    @model_validator(mode="after")
    def _mlflow_needs_a_server(self) -> TrackingConfig:
        if self.kind == "mlflow" and self.location is None:
            raise ValueError("tracking by mlflow needs location, the URI of its server, such as http://127.0.0.1:5000")
        return self

    def open(self, name: str) -> Tracker:
        """The tracker of the training ``name``; one that was begun before goes on.

        :raises NotInstalledError: when its package is not installed.
        """
        if self.kind == "none":
            return Tracker()
        if self.kind == "tensorboard":
            return _TensorBoard(self.location or "runs/tensorboard", name)
        return _MLflow(self.location or "", name)


class Tracker:
    """Takes the metrics of one training, epoch by epoch. This one forgets them."""

    def log(self, metrics: Mapping[str, float]) -> None:
        """The row of one epoch; ``epoch`` numbers it."""

    def close(self) -> None:
        """The training is over."""


class _TensorBoard(Tracker):
    def __init__(self, location: str, name: str) -> None:
        tensorboard = library("tensorboardX", "tracking by tensorboard", extra="tracking")
        # One folder per training: several of them, or one that was resumed, are told apart by the viewer.
        self._writer: Any = tensorboard.SummaryWriter(f"{location}/{name}")

    def log(self, metrics: Mapping[str, float]) -> None:
        for metric, value in metrics.items():
            if metric != "epoch":
                self._writer.add_scalar(metric, value, int(metrics["epoch"]))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _MLflow(Tracker):
    def __init__(self, location: str, name: str) -> None:
        mlflow = library("mlflow.tracking", "tracking by mlflow", extra="tracking")
        self._client: Any = mlflow.MlflowClient(location)
        experiment = self._client.get_experiment_by_name(_EXPERIMENT)
        number = self._client.create_experiment(_EXPERIMENT) if experiment is None else experiment.experiment_id
        known = self._client.search_runs([number], f"attributes.run_name = '{name}'", max_results=1)
        run = known[0] if known else self._client.create_run(number, run_name=name)
        self._run_id: str = run.info.run_id

    def log(self, metrics: Mapping[str, float]) -> None:
        for metric, value in metrics.items():
            if metric != "epoch":
                # MLflow takes letters, digits and a few signs, of which @ is none.
                self._client.log_metric(self._run_id, metric.replace("@", "_at_"), value, step=int(metrics["epoch"]))

    def close(self) -> None:
        self._client.set_terminated(self._run_id)
