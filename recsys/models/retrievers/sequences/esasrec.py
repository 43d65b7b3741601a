"""A sequence transformer, after eSASRec (arXiv 2508.06450): causal attention in gated pre-norm ("LiGR") blocks.

Deviations: positions are rotary (relative) instead of learned, and those of :mod:`.sequences.base`.

Shape legend: T tokens, D dim, E dim per head.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from recsys.models.layers.blocks import GatedBlock
from recsys.models.layers.dropout import Dropout
from recsys.models.layers.encoder import Encoder
from recsys.models.layers.packing import PackedLayout
from recsys.models.layers.rotary import rotation
from recsys.models.retrievers.sequences.base import AttentionConfig


class ESASRec(AttentionConfig):
    """Sequence transformer with text-aware item vectors."""

    kind: Literal["esasrec"] = "esasrec"
    hidden_dim: int = Field(default=128, ge=4, le=65536, description="hidden size of the feed-forward part")

    head_dim_multiple: ClassVar[int] = 2
    """positions turn its dimensions in pairs"""

    def encoder(self) -> Encoder:
        return _GatedTransformer(self)


class _GatedTransformer(Encoder):
    def __init__(self, config: ESASRec) -> None:
        super().__init__()
        dim = config.dim
        self.head_dim = dim // config.num_heads
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            [GatedBlock(dim, config.num_heads, config.hidden_dim, config.dropout) for _ in range(config.num_blocks)]
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, input_TD: Tensor, layout: PackedLayout) -> Tensor:
        x_TD = self.dropout(input_TD)
        rotation_2TE = rotation(layout.position_T, self.head_dim)
        for block in self.blocks:
            x_TD = block(x_TD, layout, rotation_2TE)
        return self.norm(x_TD)
