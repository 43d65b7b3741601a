"""Causal self-attention over the history (SASRec: Kang and McAuley, ICDM 2018, arXiv 1808.09781).

Deviations: softmax over all or sampled items instead of one negative per positive (after "Turning Dross Into Gold
Loss", arXiv 2309.07602, which shows that to be what BERT4Rec's lead was made of), positions counted from the start
of what is read, no dropout on attention weights, and those of :mod:`.sequences.base`.

Shape legend: T tokens, D dim, H heads, E dim per head.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from recsys.models.layers.dropout import Dropout
from recsys.models.layers.encoder import Encoder
from recsys.models.layers.packing import PackedLayout, packed_attention
from recsys.models.retrievers.sequences.base import AttentionConfig


class SASRec(AttentionConfig):
    """The plain sequence transformer."""

    kind: Literal["sasrec"] = "sasrec"
    num_heads: int = Field(default=1, ge=1, le=64, description="attention heads; divides dim")

    def encoder(self) -> Encoder:
        return _Transformer(self)


class _Transformer(Encoder):
    def __init__(self, config: SASRec) -> None:
        super().__init__()
        self.position = nn.Embedding(config.max_length, config.dim)
        nn.init.normal_(self.position.weight, std=config.dim**-0.5)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            [_Block(config.dim, config.num_heads, config.dropout) for _ in range(config.num_blocks)]
        )
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, input_TD: Tensor, layout: PackedLayout) -> Tensor:
        x_TD = self.dropout(input_TD + self.position(layout.position_T))
        for block in self.blocks:
            x_TD = block(x_TD, layout)
        return self.norm(x_TD)


class _Block(nn.Module):
    """Attention whose queries alone are normed, as in the authors' code, and a ReLU layer of the same width."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.attention_out = nn.Linear(dim, dim)
        self.feed_norm = nn.LayerNorm(dim)
        self.feed_in = nn.Linear(dim, dim)
        self.feed_out = nn.Linear(dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x_TD: Tensor, layout: PackedLayout) -> Tensor:
        tokens, dim = x_TD.shape
        query_TD = self.attention_norm(x_TD)
        qkv_T3D = torch.cat([self.query(query_TD), self.key_value(x_TD)], dim=1)
        qkv_T3HE = qkv_T3D.view(tokens, 3, self.num_heads, dim // self.num_heads)
        x_TD = query_TD + self.dropout(self.attention_out(packed_attention(qkv_T3HE, layout)))
        normed_TD = self.feed_norm(x_TD)
        return normed_TD + self.dropout(self.feed_out(self.dropout(F.relu(self.feed_in(normed_TD)))))
