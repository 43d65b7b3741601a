"""The network of the attention ranker, and the fitted ranker that scores with it in float32.

Every projection of an item alone is linear up to its use: a fitted ranker keeps the content of each item projected, and
an export (:mod:`.export`) the query, key, value and first-layer terms.

Shape legend: B queries, C candidates, L history, N items, E content dimension, D model dimension, H heads, M MLP width,
F features, S slots (the null entry and the history).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from recsys.data.features import NUM_FEATURES, fixed_size_list
from recsys.errors import ModelError
from recsys.files import atomic_path, write_arrow, write_json
from recsys.models.rankers.base import Ranker, RankerConfig
from recsys.models.rankers.queries import (
    PADDING,
    RankingBatch,
    RankingCatalogue,
    RankingItems,
    save_ranking_items,
)
from recsys.types import FloatArray

NUM_AGE_BUCKETS = 12
MASKED = -20.0
"""attention bias of an empty slot: nothing after the softmax, and small enough not to coarsen int8 steps"""
HOUR_MS = 3_600_000.0


class RankerNetwork(nn.Module):
    """The trained weights. ``content`` is the item's raw content vector, projected by ``item``."""

    feature_mean: Tensor
    feature_scale: Tensor

    def __init__(
        self, content_dim: int, *, dim: int, num_heads: int, hidden: int, max_history: int, dropout: float
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ModelError(f"ranker.dim {dim} must be a multiple of ranker.num_heads {num_heads}")
        self.dim, self.num_heads, self.hidden = dim, num_heads, hidden
        self.item = nn.Linear(content_dim, dim)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.null_key = nn.Parameter(torch.zeros(dim))
        self.null_value = nn.Parameter(torch.zeros(dim))
        self.rank_bias = nn.Parameter(torch.zeros(max_history, num_heads))
        self.age_bias = nn.Parameter(torch.zeros(NUM_AGE_BUCKETS, num_heads))
        self.candidate = nn.Linear(dim, hidden, bias=False)
        self.attended = nn.Linear(dim, hidden, bias=False)
        self.features = nn.Linear(NUM_FEATURES, hidden)
        self.middle = nn.Linear(hidden, hidden // 2)
        self.out = nn.Linear(hidden // 2, 1)
        self.retrieval_weight = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(dropout)
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


class AttentionRanker(Ranker):
    """A fitted network with the projected content of the items it ranks: the fp32 reference of every export."""

    def __init__(
        self,
        config: RankerConfig,
        network: RankerNetwork,
        items: RankingItems,
        projected: FloatArray,
        history: Sequence[Mapping[str, float]] = (),
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
        self.history = history

    def with_items(self, catalogue: RankingCatalogue) -> AttentionRanker:
        projected = project(self.network, catalogue.content)
        return AttentionRanker(
            self.config, self.network, catalogue.items, projected, self.history, uses_time=self.uses_time
        )

    def score(self, batch: RankingBatch) -> FloatArray:
        with torch.inference_mode():
            return self.network.score(*inputs_of(batch, self.projected, self.network.null_key.device)).cpu().numpy()

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / "model.safetensors") as temporary:
            save_file({name: value.contiguous() for name, value in self.network.state_dict().items()}, temporary)
        save_ranking_items(self.items, folder)
        write_arrow(folder / "projected.arrow", pa.table({"vector": fixed_size_list(self.projected)}))
        write_json(folder / "fit.json", {"uses_time": self.uses_time, "history": [dict(row) for row in self.history]})
        write_json(folder / "config.json", self.config.model_dump(mode="json"))


@torch.inference_mode()
def project(network: RankerNetwork, content: FloatArray, chunk: int = 65536) -> FloatArray:
    """float32 [N, D]: ``network.item`` of every row of ``content``."""
    device = network.null_key.device
    parts = [network.item(torch.tensor(content[row : row + chunk]).to(device)) for row in range(0, len(content), chunk)]
    return torch.cat(parts).cpu().numpy()


def inputs_of(batch: RankingBatch, table: FloatArray, device: torch.device) -> tuple[Tensor, ...]:
    """The network's arguments for a batch, items looked up in ``table`` (which may be memory-mapped)."""
    tensors = (
        torch.from_numpy(table[np.maximum(batch.candidate_item_idx, 0)]),
        torch.from_numpy(table[np.maximum(batch.history_item_idx, 0)]),
        torch.tensor(batch.history_age_ms),  # a copy: what came through Ray's object store is read-only
        torch.from_numpy(batch.history_item_idx != PADDING),
        torch.tensor(batch.features),
    )
    return tuple(tensor.to(device) for tensor in tensors)
