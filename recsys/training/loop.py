"""The training loop of all step-wise models: the same loss curve on one worker, on many, or with accumulation.

A step is a *global* batch with a known total weight. However many workers and accumulation rounds share it, each
part's summed loss is divided by that total, so the gradient is the same. Epochs and steps name their own seeds, so a
run restored from a checkpoint continues as if it had never stopped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import Field
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn

from recsys.config import StrictConfig
from recsys.data.dataset import Targets
from recsys.data.histories import Histories
from recsys.errors import ModelError
from recsys.ndcg import ndcg
from recsys.training.checkpoint import load_checkpoint, read_progress, save_checkpoint
from recsys.training.runtime import Runtime
from recsys.training.sampling import rng_for
from recsys.types import FloatArray, Int64Array

logger = logging.getLogger(__name__)
_VALIDATION_SCORES = 1 << 25
"""scores of validation that are held at once, however many items there are"""

Row = dict[str, float]
Score = Callable[[Histories, Int64Array | None], FloatArray]


class TrainConfig(StrictConfig):
    """How long and how fast to train."""

    epochs: int = Field(
        default=24, ge=1, le=10_000, description="epochs at most; exactly so many without validation data"
    )
    batch_tokens: int = Field(
        default=1024, ge=1, le=1 << 24, description="targets per optimizer step, over all workers"
    )
    accumulation: int = Field(
        default=1, ge=1, le=1024, description="parts a worker's share of a step is computed in, for memory"
    )
    learning_rate: float = Field(default=3e-3, gt=0, le=1, description="AdamW step size after warm-up")
    average_decay: float = Field(
        default=0.99, ge=0, lt=1, description="share kept per step in the running average of weights; 0 is no average"
    )
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="AdamW weight decay")
    warmup_steps: int = Field(default=50, ge=0, le=1_000_000, description="optimizer steps of linear warm-up")
    max_gradient_norm: float = Field(default=1.0, gt=0, description="gradients are scaled down to this norm")
    eval_every: int = Field(default=1, ge=1, le=10_000, description="epochs between validations")
    eval_max_queries: int = Field(default=20_000, ge=1, description="validation queries, a seeded sample of all")
    eval_exclude_seen: bool = Field(default=True, description="validation does not recommend what the user already has")
    patience: int = Field(
        default=4, ge=1, le=10_000, description="validations without a better NDCG@10 before stopping"
    )
    checkpoint_every: int = Field(
        default=1, ge=1, le=10_000, description="epochs between checkpoints of the running training"
    )


class Step(Protocol):
    """One optimizer step: a global batch, the same on every worker."""

    @property
    def weight(self) -> float:
        """What the summed loss of all parts is divided by, > 0."""
        ...

    @property
    def num_tokens(self) -> int:
        """Targets, for progress."""
        ...

    def part(self, index: int, num_parts: int, device: torch.device) -> Any:
        """What ``module.forward`` takes for part ``index``; its loss is a sum, weighted, not a mean."""
        ...


_BEST, _AVERAGE = "best.", "average."


class _Average:
    """A running average of the weights: what is validated and kept. Steps jump about; their average does not."""

    def __init__(self, module: nn.Module, decay: float, saved: Mapping[str, Tensor]) -> None:
        self._live = dict(module.named_parameters())
        self._decay = decay
        self._mean = {
            name: saved.get(_AVERAGE + name, p.detach()).to(p.device, copy=True) for name, p in self._live.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step``; the first steps are forgotten fast."""
        decay = min(self._decay, step / (step + 10))
        for name, parameter in self._live.items():
            self._mean[name].lerp_(parameter.detach(), 1 - decay)

    @contextmanager
    def in_place(self) -> Generator[None]:
        """Inside, the module holds the average."""
        live = {name: parameter.detach().clone() for name, parameter in self._live.items()}
        self.keep()
        yield
        self._write(live)

    def keep(self) -> None:
        """The module holds the average from now on."""
        self._write(self._mean)

    @torch.no_grad()
    def _write(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._live.items():
            parameter.copy_(values[name])

    def tensors(self) -> dict[str, Tensor]:
        """For the checkpoint."""
        return {_AVERAGE + name: tensor for name, tensor in self._mean.items()}


@dataclass
class _Progress:
    epoch: int = 0
    """epochs done"""
    step: int = 0
    """optimizer steps done"""
    best_epoch: int = 0
    best_metric: float = -1.0
    history: list[Row] = field(default_factory=list[Row])


def train(
    module: nn.Module,
    *,
    plan: Callable[[int], Sequence[Step]],
    validate: Callable[[], float] | None,
    config: TrainConfig,
    runtime: Runtime,
    seed: int,
    fingerprint: str,
) -> list[Row]:
    """Train ``module`` in place and return its learning curve, one row per epoch: ``epoch``, ``loss``, ``ndcg@10``.

    Args:
        module: ``module(part)`` returns the summed weighted loss of a part of a step.
        plan: the steps of an epoch (numbered from 0), the same on every worker.
        validate: the metric to choose the epoch by, higher is better, equal on every worker; None trains exactly
            ``config.epochs`` epochs. With it the weights of the best epoch are put back at the end.
        fingerprint: names the training; a checkpoint of another one is not restored.
    """
    module.to(runtime.device)
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98)
    )
    state, saved = _restore(module, optimizer, runtime, fingerprint)
    best = {name.removeprefix(_BEST): tensor for name, tensor in saved.items() if name.startswith(_BEST)}
    parallel = runtime.prepare(module)
    average = _Average(module, config.average_decay, saved)
    devices = [runtime.device] if runtime.device.type == "cuda" else []
    with torch.random.fork_rng(devices), _progress_bar(runtime) as advance:
        while state.epoch < config.epochs and not _is_over(state, config, validate is not None):
            torch.manual_seed(int(rng_for(seed, 1, state.epoch, runtime.rank).integers(1 << 62)))
            started = time.perf_counter()
            steps = plan(state.epoch)
            row: Row = {"epoch": state.epoch + 1}
            row["loss"] = _run_epoch(parallel, advance(state.epoch, steps), optimizer, average, state, config, runtime)
            state.epoch += 1
            last = state.epoch == config.epochs
            if validate is not None and (state.epoch % config.eval_every == 0 or last):
                module.eval()
                with average.in_place():
                    row["ndcg@10"] = validate()
                    if row["ndcg@10"] > state.best_metric:
                        state.best_metric, state.best_epoch = row["ndcg@10"], state.epoch
                        best = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
            state.history.append(row)
            _log(row, steps, config, time.perf_counter() - started, runtime)
            save = _checkpoint(module, optimizer, state, best, average, fingerprint)
            runtime.report(row, save if state.epoch % config.checkpoint_every == 0 and not last else None)
    average.keep()
    if best:
        module.load_state_dict(best)
    module.eval()
    return state.history


def best_epoch(history: Sequence[Row]) -> int | None:
    """The epoch with the highest ``ndcg@10`` of a learning curve (the earliest of equals), None without validation."""
    judged = [row for row in history if "ndcg@10" in row]
    return int(max(judged, key=lambda row: row["ndcg@10"])["epoch"]) if judged else None


def _is_over(state: _Progress, config: TrainConfig, validated: bool) -> bool:
    return validated and state.epoch - state.best_epoch >= config.patience * config.eval_every


def _run_epoch(
    parallel: nn.Module,
    steps: Iterable[Step],
    optimizer: torch.optim.Optimizer,
    average: _Average,
    state: _Progress,
    config: TrainConfig,
    runtime: Runtime,
) -> float:
    """Mean loss of the epoch over the targets of all workers."""
    parallel.train()
    totals = torch.zeros(2, dtype=torch.float64, device=runtime.device)
    num_parts = runtime.world_size * config.accumulation
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (state.step + 1) / (config.warmup_steps + 1))
        optimizer.zero_grad(set_to_none=True)
        for turn in range(config.accumulation):
            part = step.part(turn * runtime.world_size + runtime.rank, num_parts, runtime.device)
            with _no_sync(parallel) if turn + 1 < config.accumulation else nullcontext():
                with runtime.mixed_precision():
                    loss_sum: Tensor = parallel(part)
                # Data-parallel workers average their gradients; the factor makes that the sum a single worker has.
                (loss_sum * (runtime.world_size / step.weight)).backward()
            totals[0] += loss_sum.detach()
        totals[1] += step.weight / runtime.world_size
        nn.utils.clip_grad_norm_(parallel.parameters(), config.max_gradient_norm)
        optimizer.step()
        state.step += 1
        average.update(state.step)
    loss, weight = runtime.all_reduce_sum(totals).tolist()
    if not weight:
        return 0.0  # there was nothing to learn
    if not np.isfinite(loss):
        raise ModelError(f"the loss became {loss} in epoch {state.epoch + 1}: lower train.learning_rate", loss=loss)
    return loss / weight


def _no_sync(parallel: nn.Module) -> AbstractContextManager[None]:
    return parallel.no_sync() if isinstance(parallel, nn.parallel.DistributedDataParallel) else nullcontext()


def _checkpoint(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: _Progress,
    best: dict[str, Tensor],
    average: _Average,
    fingerprint: str,
) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        progress = {"fingerprint": fingerprint, **vars(state)}
        extra = {**{_BEST + name: tensor for name, tensor in best.items()}, **average.tensors()}
        save_checkpoint(folder, module=module, optimizer=optimizer, progress=progress, extra=extra)

    return save


def _restore(
    module: nn.Module, optimizer: torch.optim.Optimizer, runtime: Runtime, fingerprint: str
) -> tuple[_Progress, dict[str, Tensor]]:
    folder = runtime.restore()
    if folder is None:
        return _Progress(), {}
    progress = read_progress(folder)
    if progress.pop("fingerprint") != fingerprint:
        logger.warning("%s holds the checkpoint of another training: starting afresh", folder)
        return _Progress(), {}
    logger.info("continuing after epoch %d from %s", progress["epoch"], folder)
    return _Progress(**progress), load_checkpoint(folder, module=module, optimizer=optimizer)


@contextmanager
def _progress_bar(runtime: Runtime) -> Generator[Callable[[int, Sequence[Step]], Iterator[Step]]]:
    """A live bar on a terminal (rank 0); elsewhere the log line of each epoch tells the same."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(show_speed=True))
    with Progress(*columns, MofNCompleteColumn(), TimeRemainingColumn(), transient=True) as progress:
        progress.disable = runtime.rank != 0 or not progress.console.is_terminal

        def advance(epoch: int, steps: Sequence[Step]) -> Iterator[Step]:
            task = progress.add_task(f"epoch {epoch + 1} (targets)", total=sum(step.num_tokens for step in steps))
            for step in steps:
                yield step
                progress.advance(task, step.num_tokens)
            progress.remove_task(task)

        yield advance


def _log(row: Row, steps: Sequence[Step], config: TrainConfig, seconds: float, runtime: Runtime) -> None:
    if runtime.rank == 0:
        values = ", ".join(f"{name} {value:.4f}" for name, value in row.items() if name != "epoch")
        rate = sum(step.num_tokens for step in steps) / seconds
        left = (config.epochs - row["epoch"]) * seconds
        logger.info(
            "%sepoch %d of at most %d: %s, %.0f targets/s, at most %.0f s left",
            runtime.label, row["epoch"], config.epochs, values, rate, left,
        )  # fmt: skip


def sample_targets(targets: Targets, max_queries: int, seed: int) -> Targets:
    """A seeded sample of ``max_queries`` queries, in their order."""
    if len(targets) <= max_queries:
        return targets
    return targets.select(np.sort(rng_for(seed, 2).choice(len(targets), max_queries, replace=False)))


def validation_ndcg(
    score: Score,
    targets: Targets,
    runtime: Runtime,
    *,
    num_items: int,
    exclude_seen: bool = True,
    k: int = 10,
) -> float:
    """Mean NDCG@k over the queries of ``targets``, shared among the workers; equal on every worker."""
    totals = np.zeros(2)
    batch_size = max(1, min(1024, _VALIDATION_SCORES // num_items))
    for start in range(runtime.rank * batch_size, len(targets), batch_size * runtime.world_size):
        batch = targets[start : start + batch_size]
        scores = score(batch.histories, batch.now_ms)
        if exclude_seen:
            scores[np.repeat(np.arange(len(batch)), batch.seen.lengths), batch.seen.pack().item_idx] = -np.inf
        best = torch.from_numpy(scores).topk(min(k, scores.shape[1]), dim=1).indices.numpy()
        counts = np.diff(batch.relevant_offsets)
        relevant = np.zeros(scores.shape, bool)
        relevant[np.repeat(np.arange(len(batch)), counts), batch.relevant_item_idx] = True
        totals += [ndcg(np.take_along_axis(relevant, best, axis=1), counts, best.shape[1]).sum(), len(batch)]
    summed = runtime.all_reduce_sum(torch.from_numpy(totals).to(runtime.device)).tolist()
    return summed[0] / summed[1] if summed[1] else 0.0
