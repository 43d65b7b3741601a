"""How jobs use Ray: start or join it, and place one training on many workers.

A training is a plain function of ``recsys`` that takes a :class:`~recsys.training.runtime.Runtime`; here it is run
by Ray Train on several workers, or with ``num_workers: 0`` in this very process, with the same result folder.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from pydantic import Field

from jobs.tracking import Tracker, TrackingConfig
from recsys.config import StrictConfig
from recsys.errors import RecsysError
from recsys.files import link_or_copy, read_json, write_json
from recsys.libraries import need
from recsys.training.runtime import ModuleT, Precision, Runtime

PayloadT = TypeVar("PayloadT")
SaveResult = Callable[[Path], None]
TrainFunction = Callable[[PayloadT, Runtime], SaveResult]

_LOOPBACK = "127.0.0.1"
_STATE, _RESULT, _METRICS = "state", "result", "metrics.json"


class ComputeConfig(StrictConfig):
    """Where heavy work runs."""

    num_workers: int = Field(
        default=2, ge=0, le=4096, description="Ray workers per job; 0 runs in this process without Ray"
    )
    cpus_per_worker: float = Field(
        default=0.5,
        gt=0,
        le=1024,
        description="CPUs reserved per worker; below 1 leaves room for Ray's own tasks on small machines",
    )
    threads_per_worker: int = Field(
        default=0,
        ge=0,
        le=1024,
        description="torch threads per worker; 0 shares a machine's cores between its workers",
    )
    use_gpu: bool = Field(default=False, description="one GPU per worker, and nccl; false is gloo on CPU")
    precision: Precision = Field(
        default="auto",
        description="of matrix products in trainings: fp32, bf16, or auto: bf16 on a GPU that computes it, else fp32",
    )
    max_failures: int = Field(
        default=2, ge=0, le=1000, description="worker failures survived per training before giving up"
    )
    storage_path: str | None = Field(
        default=None,
        description="folder or URI that all nodes reach, for checkpoints of running trainings; null: beside the result",
    )
    tracking: TrackingConfig = Field(default=TrackingConfig(), description="learning curves in TensorBoard or MLflow")

    def runtime(
        self, *, checkpoints: Path | None = None, report: Callable[[Mapping[str, float]], None] | None = None
    ) -> Runtime:
        """For a training in this very process."""
        device = "cuda" if self.use_gpu else "cpu"
        return Runtime(device, precision=self.precision, checkpoints=checkpoints, report=report)

    @property
    def threads(self) -> int:
        """torch threads per worker."""
        return self.threads_per_worker or max(1, (os.cpu_count() or 1) // max(1, self.num_workers))


@contextmanager
def ray_session() -> Generator[None]:
    """Ray is usable inside: the caller's own, the cluster of ``RAY_ADDRESS`` (set inside a submitted job), or a local
    one that is started here and stopped at the end.

    :raises NotInstalledError: where Ray is not installed.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        # Said aloud and before Ray is imported: ray.init() and `ray start` choose differently where it is unset.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    need("ray", "work on Ray", extra="ray")
    import ray

    if ray.is_initialized():
        yield
        return
    before: str | None = None
    if address:
        ray.init()
    else:
        # The dashboard holds the state API, without which Ray Train's own watchers complain every second. They look for
        # it on the one Ray of the machine, and print a traceback where there are two, unless they are told where it is.
        port, before = _free_port(), os.environ.get("RAY_API_SERVER_ADDRESS")
        os.environ["RAY_API_SERVER_ADDRESS"] = f"http://{_LOOPBACK}:{port}"
        ray.init(
            address="local",  # not one that somebody else has left running on this machine
            include_dashboard=True,
            dashboard_host=_LOOPBACK,
            dashboard_port=port,
            log_to_driver=True,
            logging_level=logging.WARNING,
        )
    try:
        yield
    finally:
        ray.shutdown()
        if before is not None:
            os.environ["RAY_API_SERVER_ADDRESS"] = before
        elif not address:
            os.environ.pop("RAY_API_SERVER_ADDRESS", None)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((_LOOPBACK, 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class FitResult:
    """What a distributed training left behind."""

    path: Path
    """local folder with what the training function's ``save`` wrote"""
    metrics: Mapping[str, float]
    """the last metrics reported"""


class RayRuntime(Runtime):
    """One worker of a Ray Train run."""

    def __init__(self, precision: Precision, tracking: TrackingConfig, name: str) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        super().__init__(str(ray.train.torch.get_device()), precision=precision)
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self._metrics: dict[str, float] = {}
        self._tracker = tracking.open(name) if self.rank == 0 else Tracker()
        self._open = ExitStack()

    def prepare(self, module: ModuleT) -> ModuleT:
        """Move ``module`` to the worker's device and wrap it in DistributedDataParallel when there are several."""
        import ray.train.torch

        # Buffers are constants that every worker made alike (texts, trends): to send them each step costs more than it.
        options = {"broadcast_buffers": False}
        return cast(ModuleT, ray.train.torch.prepare_model(module, parallel_strategy_kwargs=options))

    def all_reduce_sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum of ``value`` over all workers."""
        if self.world_size == 1:
            return value
        value = value.clone()
        torch.distributed.all_reduce(value)
        return value

    def report(self, metrics: Mapping[str, float], save: SaveResult | None = None) -> None:
        """Report to Ray Train; the checkpoint of rank 0 is uploaded before this returns."""
        self._metrics = dict(metrics)
        self._tracker.log(metrics)
        self._report_folder(_STATE, save)

    def finish(self, save: SaveResult) -> None:
        """Report the result of the whole training."""
        self._open.close()
        self._tracker.close()
        self._report_folder(_RESULT, save)

    def _report_folder(self, name: str, save: SaveResult | None) -> None:
        import ray.train

        if save is None or self.rank != 0:
            ray.train.report(self._metrics)
            return
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / name).mkdir()
            save(Path(scratch) / name)
            write_json(Path(scratch) / _METRICS, self._metrics)
            ray.train.report(self._metrics, checkpoint=ray.train.Checkpoint.from_directory(scratch))

    def restore(self) -> Path | None:
        """The newest complete checkpoint of this run, on local disk until :meth:`finish`."""
        return self._newest(_STATE)

    @property
    def finished(self) -> bool:
        """Whether an earlier attempt already reported the result."""
        return self._newest(_RESULT) is not None

    def _newest(self, name: str) -> Path | None:
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        folder = Path(self._open.enter_context(checkpoint.as_directory())) / name
        return folder if folder.exists() else None


def fit_distributed(
    fn: TrainFunction[PayloadT], payload: PayloadT, *, compute: ComputeConfig, name: str, storage: str | Path
) -> FitResult:
    """Run ``fn(payload, runtime)`` on ``compute.num_workers`` workers and fetch what it trained.

    ``fn`` is a module-level function; it returns ``save(folder)``, which writes the trained model and is called on
    rank 0 only. ``payload`` is shipped once through the object store. ``storage`` is this training's own local folder
    and ``name`` must be unique to it (put the artefact's key in): a run with a known name resumes from its newest
    checkpoint, and one that had finished is not run again. The result is in ``storage/name/result``.
    """
    home = Path(storage).absolute() / name
    if not (home / _METRICS).exists():
        shutil.rmtree(home / _RESULT, ignore_errors=True)
        if compute.num_workers:
            metrics = _fit_on_ray(fn, payload, compute, name, home)
        else:
            metrics = _fit_here(fn, payload, compute, name, home)
        write_json(home / _METRICS, metrics)
    return FitResult(home / _RESULT, read_json(home / _METRICS))


def discard(result: FitResult) -> None:
    """Remove a training's folder once its result was linked; one that is only half gone is not taken for complete."""
    (result.path.parent / _METRICS).unlink(missing_ok=True)
    shutil.rmtree(result.path.parent)


def _fit_here(
    fn: TrainFunction[Any], payload: Any, compute: ComputeConfig, name: str, home: Path
) -> Mapping[str, float]:
    last: dict[str, float] = {}
    tracker = compute.tracking.open(name)

    def report(metrics: Mapping[str, float]) -> None:
        last.update(metrics)
        tracker.log(metrics)

    save = fn(payload, compute.runtime(checkpoints=home / "checkpoints", report=report))
    tracker.close()
    (home / _RESULT).mkdir(parents=True)
    save(home / _RESULT)
    shutil.rmtree(home / "checkpoints", ignore_errors=True)
    return last


def _fit_on_ray(
    fn: TrainFunction[Any], payload: Any, compute: ComputeConfig, name: str, home: Path
) -> Mapping[str, float]:
    storage = compute.storage_path or str(home / "ray")
    with ray_session():  # before Ray is imported: it reads its settings then
        import ray
        from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
        from ray.train.v2.api.config import LoggingConfig
        from ray.train.v2.api.exceptions import TrainingFailedError

        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "fn": fn,
                "payload": ray.put(payload),
                "threads": compute.threads_per_worker,
                "precision": compute.precision,
                "tracking": compute.tracking,
                "name": name,
            },
            scaling_config=ScalingConfig(
                num_workers=compute.num_workers,
                use_gpu=compute.use_gpu,
                resources_per_worker={"CPU": compute.cpus_per_worker, **({"GPU": 1} if compute.use_gpu else {})},
            ),
            run_config=RunConfig(
                name=name,
                storage_path=storage,
                failure_config=FailureConfig(max_failures=compute.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=2),
                logging_config=LoggingConfig(log_level="WARNING"),  # the trainings tell their own progress
            ),
        )
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            raise _own_error(error) or error from error
        assert result.checkpoint is not None, "every worker ends by reporting the result"
        with result.checkpoint.as_directory() as folder:
            link_or_copy(Path(folder) / _RESULT, home / _RESULT)
            metrics = read_json(Path(folder) / _METRICS)
    if compute.storage_path is None:
        shutil.rmtree(storage, ignore_errors=True)
    return metrics


def _own_error(error: BaseException) -> RecsysError | None:
    """The error of ours that made workers fail, out of what Ray wrapped around it."""
    found: list[BaseException | None] = [error]
    while found:
        one = found.pop()
        if isinstance(one, RecsysError):
            return one
        if one is not None:
            found += [one.__cause__, getattr(one, "cause", None), getattr(one, "_base_exc", None)]
            found += list(getattr(one, "worker_failures", {}).values())
    return None


def _worker(config: dict[str, Any]) -> None:
    import ray
    import ray.train

    runtime = RayRuntime(config["precision"], config["tracking"], config["name"])
    # Counted where the worker runs: on a cluster the driver's machine may be another one.
    workers_here = ray.train.get_context().get_local_world_size()
    torch.set_num_threads(config["threads"] or max(1, (os.cpu_count() or 1) // workers_here))
    for name in list(logging.root.manager.loggerDict):
        if name == "ray.train" or "/ray/train/" in name:  # some of Ray's loggers are named by their file
            logging.getLogger(name).setLevel(logging.WARNING)
    if runtime.rank == 0:
        logging.basicConfig(format="%(message)s")
        logging.getLogger("recsys").setLevel(logging.INFO)
    if not runtime.finished:
        runtime.finish(config["fn"](ray.get(config["payload"]), runtime))
