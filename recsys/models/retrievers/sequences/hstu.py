"""Pointwise gated attention that knows how long ago things happened (HSTU: Zhai et al., ICML 2024, arXiv 2402.17152).

Attention weights are ``silu(q k + position bias + time bias) / max_length``, not a softmax, so that how much of
something there was is not lost. The time that counts is that between an interaction and the moment the answer is asked
for: in training the target's, when serving the request's. Data with order only is read without it. Deviations:
relative positions for all distances up to ``max_length``, and those of :mod:`.sequences.base`.

Shape legend: T tokens, D dim, H heads, E dim per head, B sequences of one bucket, L their longest length.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.models.layers.dropout import Dropout
from recsys.models.layers.encoder import Encoder
from recsys.models.layers.items import ItemTower
from recsys.models.layers.packing import PackedLayout
from recsys.models.retrievers.sequences.base import AttentionConfig, SequenceNetwork, SequencePlan
from recsys.models.retrievers.towers.base import Plan

_TIME_BUCKETS = 64
_BUCKETS_PER_E = 1 / 0.301
"""the authors': a bucket is a factor of about 1.35, so 64 reach over six years"""


class HSTU(AttentionConfig):
    """Hierarchical sequential transduction unit, time-aware."""

    kind: Literal["hstu"] = "hstu"
    reads_time: ClassVar[bool] = True

    def encoder(self) -> Encoder:
        return _Transducer(self)

    def network(self, items: ItemTower, plan: Plan | None) -> SequenceNetwork:
        network = super().network(items, plan)
        if isinstance(plan, SequencePlan) and plan.data.histories.timestamp_ms is None:
            # What learns nothing about time says nothing about it where serving gives times.
            for name, parameter in network.named_parameters():
                if name.endswith("time_bias"):
                    nn.init.zeros_(parameter.requires_grad_(False))
        return network


class _Transducer(Encoder):
    def __init__(self, config: HSTU) -> None:
        super().__init__()
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            [_Block(config.dim, config.num_heads, config.max_length, config.dropout) for _ in range(config.num_blocks)]
        )
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, input_TD: Tensor, layout: PackedLayout) -> Tensor:
        x_TD = self.dropout(input_TD)
        for block in self.blocks:
            x_TD = block(x_TD, layout)
        return self.norm(x_TD)


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, max_length: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.max_length = num_heads, max_length
        self.norm = nn.LayerNorm(dim)
        self.uvqk = nn.Linear(dim, 4 * dim, bias=False)
        self.position_bias = nn.Parameter(torch.randn(max_length) * 0.02)
        self.time_bias = nn.Parameter(torch.randn(_TIME_BUCKETS) * 0.02)
        self.attended_norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x_TD: Tensor, layout: PackedLayout) -> Tensor:
        tokens, dim = x_TD.shape
        gate_TD, vqk_T3D = F.silu(self.uvqk(self.norm(x_TD))).split([dim, 3 * dim], dim=1)
        vqk_T3HE = vqk_T3D.view(tokens, 3, self.num_heads, dim // self.num_heads)
        attended = torch.cat([self._attend(vqk_T3HE, layout, bucket) for bucket in layout.buckets])
        attended_TD = attended.index_select(0, layout.unpad_T)
        return x_TD + self.out(self.dropout(self.attended_norm(attended_TD) * gate_TD))

    def _attend(self, vqk_T3HE: Tensor, layout: PackedLayout, bucket: Tensor) -> Tensor:
        """[B * L, D] of one bucket."""
        rows, longest = bucket.shape
        value, query, key = vqk_T3HE[bucket].permute(2, 0, 3, 1, 4).unbind(0)
        place = torch.arange(longest, device=bucket.device)
        distance_LL = place[:, None] - place
        logit_BHLL = query @ key.mT + self.position_bias[distance_LL.clamp(0, self.max_length - 1)]
        if layout.time_T2 is not None:
            read_BL, asked_BL = layout.time_T2[bucket].unbind(-1)
            seconds_BLL = (asked_BL[:, :, None] - read_BL[:, None, :]).clamp(min=1000).float() / 1000
            bucket_BLL = (seconds_BLL.log() * _BUCKETS_PER_E).long().clamp(max=_TIME_BUCKETS - 1)
            logit_BHLL = logit_BHLL + self.time_bias[bucket_BLL].unsqueeze(1)
        weight_BHLL = F.silu(logit_BHLL) / self.max_length * (distance_LL >= 0)
        return (weight_BHLL @ value).transpose(1, 2).reshape(rows * longest, -1)
