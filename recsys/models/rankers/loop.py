"""The training loop of rankers: queries with known answers, stopped by the NDCG@10 of users that it does not see.

Shape legend: B queries, C candidates.
"""

from __future__ import annotations

import copy
import logging
import time
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from recsys.models.rankers.base import RankerConfig
from recsys.models.rankers.examples import RankingExamples
from recsys.models.rankers.queries import PADDING, RankingBatch
from recsys.training.freezing import freeze_unreached
from recsys.training.runtime import Runtime
from recsys.types import BoolArray, FloatArray

logger = logging.getLogger(__name__)
_QUERIES_AT_ONCE = 128

Loss = Callable[[nn.Module, RankingBatch, BoolArray], Tensor]
"""The mean loss of a batch, given the network (data-parallel where there are several workers) and who was chosen"""


def train_ranker(
    network: nn.Module,
    examples: RankingExamples,
    *,
    loss: Loss,
    scorer: Callable[[], Callable[[RankingBatch], FloatArray]],
    config: RankerConfig,
    runtime: Runtime,
    holdout: RankingExamples | None,
    seed: int,
) -> list[dict[str, float]]:
    """Train ``network`` in place, its best weights put back at the end; the learning curve.

    Args:
        loss: what is made small; the relevant candidates of each query and ``config.num_negatives`` others are drawn
            anew each epoch.
        scorer: what scores the holdout (float32 [B, C]) with the network as it is, wherever it is.
        config: epochs, patience, queries per step, step size.
        holdout: queries of other users, or None to run exactly ``config.epochs`` epochs.
    """

    def holdout_ndcg() -> float:
        assert holdout is not None
        score = scorer()
        parts = [score(holdout.batch[at : at + _QUERIES_AT_ONCE]) for at in range(0, len(holdout), _QUERIES_AT_ONCE)]
        return float(holdout.ndcg10(np.concatenate(parts)).mean())

    # Once it is data-parallel it must not move between devices: its gradients would no longer be summed.
    network.to(runtime.device).eval()
    best_state, best_ndcg, history = copy.deepcopy(network.state_dict()), -1.0, list[dict[str, float]]()
    if holdout is not None and len(holdout):
        best_ndcg = holdout_ndcg()
        history.append({"epoch": 0, "loss": 0.0, "ndcg@10": best_ndcg})
    if len(examples) == 0 or config.epochs == 0:
        network.to("cpu")
        return history
    probe = examples.sample(np.arange(1), config.num_negatives, np.random.default_rng([seed, 0]))
    freeze_unreached(network, loss(network, *probe))
    model = runtime.prepare(network)
    by_rate: defaultdict[float, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            by_rate[config.learning_rate_of(name)].append(parameter)
    groups = [{"params": parameters, "lr": rate} for rate, parameters in by_rate.items()]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    learning = [parameter for parameters in by_rate.values() for parameter in parameters]
    started = time.perf_counter()
    per_worker = max(1, config.batch_queries // runtime.world_size)
    steps_per_epoch = -(-len(examples) // (per_worker * runtime.world_size))
    schedule = one_cycle(optimizer, list(by_rate), config.epochs * steps_per_epoch)

    def run_epoch(epoch: int) -> float:
        """The mean loss."""
        network.train()
        # The order is the same on every worker, the negatives and the dropout are each worker's own.
        order = np.random.default_rng([seed, epoch]).permutation(len(examples))
        torch.manual_seed(int(np.random.SeedSequence([seed, epoch, runtime.rank]).generate_state(1)[0]))
        total = 0.0
        for step in range(steps_per_epoch):
            rows = order[step * per_worker * runtime.world_size :][: per_worker * runtime.world_size]
            # Workers take interleaved queries of one global batch; a short last batch wraps so that none is idle.
            mine = np.resize(rows, max(len(rows), runtime.world_size))[runtime.rank :: runtime.world_size]
            draws = np.random.default_rng([seed, epoch, step, runtime.rank])
            batch, relevant = examples.sample(mine, config.num_negatives, draws)
            with runtime.mixed_precision():
                value = loss(model, batch, relevant)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            schedule.step()
            total += float(value.detach())
        network.eval()
        return total / steps_per_epoch

    for epoch in range(1, config.epochs + 1):
        with torch.random.fork_rng(devices=[runtime.device] if runtime.device.type == "cuda" else []):
            row = {"epoch": float(epoch), "loss": run_epoch(epoch)}
        if holdout is not None and len(holdout):
            row["ndcg@10"] = holdout_ndcg()
        history.append(row)
        runtime.report(row)
        if runtime.rank == 0:
            judged = f", holdout ndcg@10 {row['ndcg@10']:.4f}" if "ndcg@10" in row else ""
            seconds_left = (config.epochs - epoch) * (time.perf_counter() - started) / epoch
            logger.info(
                "ranker epoch %d of at most %d: loss %.4f%s, %.0f queries/s, at most %.0f s left",
                epoch, config.epochs, row["loss"], judged,
                epoch * len(examples) / (time.perf_counter() - started), seconds_left,
            )  # fmt: skip
        if "ndcg@10" not in row or row["ndcg@10"] > best_ndcg:
            best_ndcg, best_state = row.get("ndcg@10", best_ndcg), copy.deepcopy(network.state_dict())
        elif epoch - max(history, key=lambda entry: entry["ndcg@10"])["epoch"] >= config.patience:
            break
    network.load_state_dict(best_state)
    network.to("cpu").eval()
    return history


def one_cycle(
    optimizer: torch.optim.Optimizer, peak_rates: list[float], num_steps: int
) -> torch.optim.lr_scheduler.OneCycleLR:
    """Up for a tenth of ``num_steps`` (at least 1), then down: the step size of each group of parameters."""
    total = num_steps + 1
    # The library divides by the length of the way up, which is pct_start * total - 1.
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rates, total_steps=total, pct_start=max(0.1, 2 / total))


def listwise_loss(scores_BC: Tensor, batch: RankingBatch, relevant_BC: BoolArray) -> Tensor:
    """Softmax over the candidates of a query (ListNet top-one, Cao et al., ICML 2007), the mean over queries."""
    padded = torch.from_numpy(batch.candidate_item_idx == PADDING).to(scores_BC.device)
    target = torch.from_numpy(relevant_BC).to(scores_BC.device).float()
    log_probability = torch.log_softmax(scores_BC.float().masked_fill(padded, -1e4), dim=1)
    return -(target * log_probability).sum(1).div(target.sum(1)).mean()
