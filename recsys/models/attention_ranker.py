"""A candidate-isolated ranker: every candidate attends to the user's history and meets its features in an MLP.

Target attention after DIN (Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018), with
multi-head scaled dot-product attention in place of DIN's activation unit, a learned null entry so that an empty
history is ordinary, additive biases by recency rank and age, and the retrieval score as a residual. Trained with a
listwise softmax over the retriever's own candidates (ListNet top-one, Cao et al., ICML 2007).

Items enter by content (text vector and categories), not by id: the weights stay valid when the retriever is
refitted, and a new item can be ranked at once. Every projection of an item alone is linear up to its use, so the
export computes it once per item and keeps it as an int8 row (:mod:`recsys.models.ranker_export`).

Shape legend: B queries, C candidates, L history, N items, E content dimension, D model dimension, H heads, M MLP width,
F features.
"""

from __future__ import annotations

import copy
import logging
import time
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from recsys.data.features import NUM_FEATURES, ItemFeatures, fixed_size_list, matrix
from recsys.errors import ModelError
from recsys.files import atomic_path, map_arrow, read_json, write_arrow, write_json
from recsys.models.ranking import PADDING, Ranker, RankerConfig, RankingBatch, RankingItems
from recsys.training.ranking_examples import RankingExamples
from recsys.training.runtime import Runtime

logger = logging.getLogger(__name__)

NUM_AGE_BUCKETS = 12
MASKED = -20.0
"""attention bias of an empty slot: nothing after the softmax, and small enough not to coarsen int8 steps"""
HOUR_MS = 3_600_000.0


class AttentionRankerConfig(RankerConfig):
    """Target attention over the history and an MLP over features."""

    kind: Literal["attention"] = "attention"
    dim: int = Field(default=32, ge=8, description="model dimension; a multiple of num_heads")
    num_heads: int = Field(default=2, ge=1, description="attention heads")
    hidden: int = Field(default=64, ge=8, description="width of the MLP's first layer; the second has half")
    dropout: float = Field(default=0.2, ge=0, lt=1, description="dropout of attention output and MLP, share of units")
    max_history: int = Field(default=50, ge=1, description="newest history entries looked at")
    num_negatives: int = Field(default=31, ge=1, description="candidates sampled beside the relevant ones per query")
    epochs: int = Field(default=8, ge=0, description="most passes over the queries; 0 keeps the retriever's order")
    patience: int = Field(default=3, ge=1, description="epochs without a better holdout NDCG@10 before training stops")
    batch_queries: int = Field(default=32, ge=1, description="queries per optimizer step, over all workers")
    learning_rate: float = Field(default=3e-3, gt=0, description="peak step size of AdamW")
    weight_decay: float = Field(default=0.05, ge=0, description="decoupled weight decay of AdamW")

    def load(self, folder: Path) -> AttentionRanker:
        return AttentionRanker.load(folder, self)


class RankerNetwork(nn.Module):
    """The trained weights. ``content`` is the item's raw content vector, projected by ``item``."""

    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(self, config: AttentionRankerConfig, content_dim: int) -> None:
        super().__init__()
        if config.dim % config.num_heads:
            raise ModelError(f"ranker.dim {config.dim} must be a multiple of ranker.num_heads {config.num_heads}")
        dim, heads, hidden = config.dim, config.num_heads, config.hidden
        self.num_heads = heads
        self.item = nn.Linear(content_dim, dim)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.null_key = nn.Parameter(torch.zeros(dim))
        self.null_value = nn.Parameter(torch.zeros(dim))
        self.rank_bias = nn.Parameter(torch.zeros(config.max_history, heads))
        self.age_bias = nn.Parameter(torch.zeros(NUM_AGE_BUCKETS, heads))
        self.candidate = nn.Linear(dim, hidden, bias=False)
        self.attended = nn.Linear(dim, hidden, bias=False)
        self.features = nn.Linear(NUM_FEATURES, hidden)
        self.middle = nn.Linear(hidden, hidden // 2)
        self.out = nn.Linear(hidden // 2, 1)
        self.retrieval_weight = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(config.dropout)
        self.register_buffer("feature_mean", torch.zeros(NUM_FEATURES))
        self.register_buffer("feature_scale", torch.ones(NUM_FEATURES))
        # A fresh ranker keeps the retriever's order; training only has to improve on it.
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def history_bias(self, age_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Additive attention bias [B, L, H]; ``MASKED`` where the slot is empty."""
        bucket = torch.log2(age_BL / HOUR_MS + 1.0).long().clamp(max=NUM_AGE_BUCKETS - 1)
        bias_BLH = self.rank_bias + self.age_bias[bucket]
        return bias_BLH.masked_fill(~mask_BL.unsqueeze(-1), MASKED)

    def forward(
        self, content_BCE: Tensor, history_BLE: Tensor, age_BL: Tensor, mask_BL: Tensor, features_BCF: Tensor
    ) -> Tensor:
        """Scores [B, C] from raw content: the form that is trained."""
        return self.score(self.item(content_BCE), self.item(history_BLE), age_BL, mask_BL, features_BCF)

    def score(
        self, candidate_BCD: Tensor, history_BLD: Tensor, age_BL: Tensor, mask_BL: Tensor, features_BCF: Tensor
    ) -> Tensor:
        """Scores [B, C] from projected items."""
        return self.head(
            self.query(candidate_BCD),
            self.candidate(candidate_BCD),
            self.key(history_BLD),
            self.value(history_BLD),
            self.history_bias(age_BL, mask_BL),
            features_BCF,
        )

    def head(
        self,
        query_BCD: Tensor,
        candidate_BCM: Tensor,
        key_BLD: Tensor,
        value_BLD: Tensor,
        bias_BLH: Tensor,
        features_BCF: Tensor,
    ) -> Tensor:
        """Scores [B, C] from what each item gives by itself; this part runs per request."""
        heads = self.num_heads
        null_key, null_value = (vector.expand(key_BLD.shape[0], 1, -1) for vector in (self.null_key, self.null_value))
        key_BHKD = _split(torch.cat([null_key, key_BLD], 1), heads)
        value_BHKD = _split(torch.cat([null_value, value_BLD], 1), heads)
        bias_BHK = functional.pad(bias_BLH.transpose(1, 2), (1, 0))
        query_BHCD = _split(query_BCD, heads) * (query_BCD.shape[-1] // heads) ** -0.5
        weights_BHCK = torch.softmax(query_BHCD @ key_BHKD.transpose(-1, -2) + bias_BHK.unsqueeze(2), dim=-1)
        attended_BCD = (weights_BHCK @ value_BHKD).transpose(1, 2).flatten(2)
        normalised_BCF = (features_BCF - self.feature_mean) * self.feature_scale
        hidden_BCM = candidate_BCM + self.attended(self.dropout(attended_BCD)) + self.features(normalised_BCF)
        hidden_BCM = self.dropout(functional.relu(hidden_BCM))
        hidden_BCM = self.dropout(functional.relu(self.middle(hidden_BCM)))
        return self.out(hidden_BCM).squeeze(-1) + self.retrieval_weight * features_BCF[..., 0]


def _split(x: Tensor, heads: int) -> Tensor:
    """[B, S, D] to [B, H, S, D / H]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def item_content(text_vectors: NDArray[np.float32] | None, features: ItemFeatures) -> NDArray[np.float32]:
    """float32 [N, E]: text vector (unit length, where items have text) beside the category row."""
    if text_vectors is None:
        return features.categories
    return np.concatenate([text_vectors, features.categories], axis=1)


class AttentionRanker(Ranker):
    """A fitted network with the projected content of the items it ranks: the fp32 reference of every export."""

    config: AttentionRankerConfig

    def __init__(
        self,
        config: AttentionRankerConfig,
        network: RankerNetwork,
        items: RankingItems,
        projected: NDArray[np.float32],
        history: list[dict[str, float]] | None = None,
        *,
        uses_time: bool,
    ) -> None:
        self.config = config
        self.network = network.eval()
        self.items = items
        self.projected = projected
        """float32 [N, D]: ``network.item`` of every item's content"""
        self.max_history = config.max_history
        self.uses_time = uses_time
        self.history = history or []
        """per epoch: training loss and holdout NDCG@10"""

    @property
    def num_epochs(self) -> int:
        """The number of epochs that was best on the holdout."""
        if not self.history:
            return 0
        best = max(range(len(self.history)), key=lambda epoch: self.history[epoch].get("ndcg@10", float(epoch)))
        return int(self.history[best]["epoch"])

    def with_items(self, items: RankingItems, content: NDArray[np.float32]) -> AttentionRanker:
        """The same weights over another Bundle's items; ``content`` as in :func:`item_content`."""
        return AttentionRanker(
            self.config, self.network, items, project(self.network, content), self.history, uses_time=self.uses_time
        )

    def score(self, batch: RankingBatch) -> NDArray[np.float32]:
        with torch.inference_mode():
            return self.network.score(*_inputs(batch, self.projected)).numpy()

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / "model.safetensors") as temporary:
            save_file({name: value.contiguous() for name, value in self.network.state_dict().items()}, temporary)
        self.items.features.save(folder / "features.arrow")
        write_arrow(folder / "vectors.arrow", _table(self.items.unit_vectors))
        write_arrow(folder / "projected.arrow", _table(self.projected))
        write_json(folder / "fit.json", {"uses_time": self.uses_time, "history": self.history})
        write_json(folder / "config.json", self.config.model_dump(mode="json"))

    @classmethod
    def load(cls, folder: str | Path, config: AttentionRankerConfig) -> AttentionRanker:
        folder = Path(folder)
        weights = load_file(folder / "model.safetensors")
        network = RankerNetwork(config, weights["item.weight"].shape[1])
        network.load_state_dict(weights)
        projected = matrix(map_arrow(folder / "projected.arrow")["vector"])
        vectors = matrix(map_arrow(folder / "vectors.arrow")["vector"])
        items = RankingItems(ItemFeatures.load(folder / "features.arrow"), vectors)
        fit = read_json(folder / "fit.json")
        return cls(config, network, items, projected, fit["history"], uses_time=fit["uses_time"])


@torch.inference_mode()
def project(network: RankerNetwork, content: NDArray[np.float32], chunk: int = 65536) -> NDArray[np.float32]:
    """float32 [N, D]: ``network.item`` of every row of ``content``."""
    parts = [network.item(torch.tensor(content[row : row + chunk])) for row in range(0, len(content), chunk)]
    return torch.cat(parts).numpy()


def _inputs(batch: RankingBatch, table: NDArray[np.float32], device: torch.device | None = None) -> tuple[Tensor, ...]:
    """The network's arguments for a batch, items looked up in ``table`` (which may be memory-mapped)."""
    tensors = (
        torch.from_numpy(table[np.maximum(batch.candidate_item_idx, 0)]),
        torch.from_numpy(table[np.maximum(batch.history_item_idx, 0)]),
        torch.tensor(batch.history_age_ms),  # a copy: what came through Ray's object store is read-only
        torch.from_numpy(batch.history_item_idx != PADDING),
        torch.tensor(batch.features),
    )
    return tensors if device is None else tuple(tensor.to(device) for tensor in tensors)


def _table(values: NDArray[np.float32]) -> pa.Table:
    return pa.table({"vector": fixed_size_list(values)})


def fit_ranker(
    config: AttentionRankerConfig,
    examples: RankingExamples,
    items: RankingItems,
    content: NDArray[np.float32],
    runtime: Runtime,
    *,
    holdout: RankingExamples | None,
    seed: int,
) -> AttentionRanker:
    """Train on ``examples``; with a ``holdout`` stop at its best NDCG@10, else run ``config.epochs`` epochs."""
    torch.manual_seed(seed)
    network = RankerNetwork(config, content.shape[1])
    used = examples.batch.candidate_item_idx != PADDING
    values = examples.batch.features[used] if used.any() else np.zeros((1, NUM_FEATURES), np.float32)
    network.feature_mean.copy_(torch.from_numpy(values.mean(axis=0)))
    spread = values.std(axis=0)
    # A feature that was constant in training tells nothing, and must not shout when it varies in serving.
    network.feature_scale.copy_(torch.from_numpy(np.where(spread > 1e-3, 1.0 / np.maximum(spread, 1e-3), 0.0)))

    def holdout_ndcg() -> float:
        assert holdout is not None
        ranker = AttentionRanker(config, network, items, project(network, content), uses_time=examples.uses_time)
        return float(holdout.ndcg10(_score_in_batches(ranker, holdout.batch)).mean())

    best_state, best_ndcg, history = copy.deepcopy(network.state_dict()), -1.0, list[dict[str, float]]()
    if holdout is not None and len(holdout):
        best_ndcg = holdout_ndcg()
        history.append({"epoch": 0, "loss": 0.0, "ndcg@10": best_ndcg})
    if len(examples) == 0 or config.epochs == 0:
        return AttentionRanker(config, network, items, project(network, content), history, uses_time=examples.uses_time)
    model = runtime.prepare(network)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    started = time.perf_counter()
    per_worker = max(1, config.batch_queries // runtime.world_size)
    steps_per_epoch = -(-len(examples) // (per_worker * runtime.world_size))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.epochs * steps_per_epoch + 1, pct_start=0.1
    )
    for epoch in range(1, config.epochs + 1):
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
            inputs = _inputs(batch, content, runtime.device)
            scores = model(*inputs)
            loss = _listwise_loss(scores, batch, relevant, runtime.device)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        network.eval()
        row = {"epoch": float(epoch), "loss": total / steps_per_epoch}
        if holdout is not None and len(holdout):
            network.to("cpu")
            row["ndcg@10"] = holdout_ndcg()
            network.to(runtime.device)
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
    network = network.to("cpu").eval()
    return AttentionRanker(config, network, items, project(network, content), history, uses_time=examples.uses_time)


def _score_in_batches(ranker: AttentionRanker, batch: RankingBatch, size: int = 128) -> NDArray[np.float32]:
    parts = [ranker.score(batch[start : start + size]) for start in range(0, len(batch), size)]
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)


def _listwise_loss(scores: Tensor, batch: RankingBatch, relevant: NDArray[np.bool_], device: torch.device) -> Tensor:
    padded = torch.from_numpy(batch.candidate_item_idx == PADDING).to(device)
    target = torch.from_numpy(relevant).to(device).float()
    log_probability = torch.log_softmax(scores.float().masked_fill(padded, -1e4), dim=1)
    return -(target * log_probability).sum(1).div(target.sum(1)).mean()
