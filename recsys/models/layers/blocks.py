"""The gated pre-norm transformer block ("LiGR").

After "From Features to Transformers: Redefining Ranking for Scalable Impact" (arXiv 2502.03417), in the form
eSASRec uses (arXiv 2508.06450): ``x + F(norm(x)) * sigmoid(G x)`` for attention and for a SwiGLU feed-forward.
Deviations: no dropout on attention weights (the fused kernels of the CPU have none), no biases in the projections.

Shape legend: T tokens, D dim, H heads, E dim per head, F hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.models.layers.dropout import Dropout
from recsys.models.layers.packing import PackedLayout, packed_attention
from recsys.models.layers.rotary import rotate


class GatedBlock(nn.Module):
    """Attention and SwiGLU, each behind a layer norm and a learned gate on what it adds."""

    def __init__(self, dim: int, num_heads: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.attention_out = nn.Linear(dim, dim, bias=False)
        self.attention_gate = nn.Linear(dim, dim)
        self.feed_norm = nn.LayerNorm(dim)
        self.feed_in = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.feed_out = nn.Linear(hidden_dim, dim, bias=False)
        self.feed_gate = nn.Linear(dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x_TD: Tensor, layout: PackedLayout, rotation_2TE: Tensor) -> Tensor:
        """float [T, D] to float [T, D]; ``rotation_2TE`` as :func:`recsys.models.layers.rotary.rotation` makes it."""
        tokens, dim = x_TD.shape
        qkv = self.qkv(self.attention_norm(x_TD)).view(tokens, 3, self.num_heads, dim // self.num_heads)
        qkv = torch.cat([rotate(qkv[:, :2], rotation_2TE), qkv[:, 2:]], dim=1)
        attended = self.attention_out(packed_attention(qkv, layout))
        x_TD = x_TD + self.dropout(attended * torch.sigmoid(self.attention_gate(x_TD)))
        value, gate = self.feed_in(self.feed_norm(x_TD)).chunk(2, dim=-1)
        fed = self.feed_out(value * F.silu(gate))
        return x_TD + self.dropout(fed * torch.sigmoid(self.feed_gate(x_TD)))
