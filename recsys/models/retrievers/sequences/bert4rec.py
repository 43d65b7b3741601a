"""Attention in both directions, trained to fill in blanks (BERT4Rec: Sun et al., CIKM 2019, arXiv 1904.06690).

A random share of a history's items is hidden and foretold from the rest; a recommendation fills a blank after the last
item. Deviations: one blank vector serves as mask and start, no bias per item, no separate batches with the last item
hidden (in every window at least one item is), and those of :mod:`.sequences.base`.

Shape legend: T tokens, D dim, H heads, E dim per head.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys.models.layers.dropout import Dropout
from recsys.models.layers.encoder import Encoder
from recsys.models.layers.packing import PackedLayout, packed_attention
from recsys.models.retrievers.sequences.base import AttentionConfig
from recsys.models.retrievers.towers.base import SAMPLE_TRAIN
from recsys.training.sampling import PackedWindows
from recsys.types import BoolArray, Float64Array


class BERT4Rec(AttentionConfig):
    """Bidirectional sequence transformer."""

    kind: Literal["bert4rec"] = "bert4rec"
    objective: Literal["next_item"] = Field(default="next_item", description="it fills in blanks, one item each")
    blank_share: float = Field(default=0.2, gt=0, lt=1, description="share of a history's items hidden in a step")
    reads_both_ways: ClassVar[bool] = True

    sample_epochs: ClassVar[int] = 60
    """slow to find out what "the one before" is: by absolute positions, from a fifth of the targets"""

    @classmethod
    def sample(cls, folder: Path) -> Self:
        slow = {"dropout": 0.0, "train": SAMPLE_TRAIN.model_copy(update={"epochs": 20})}
        return super().sample(folder).model_copy(update=slow)

    @model_validator(mode="after")
    def _blank_has_a_place(self) -> Self:
        if self.max_length < 2:
            raise ValueError("max_length must be at least 2: the blank takes a place")
        return self

    def encoder(self) -> Encoder:
        return _BothWays(self)

    def blanks(self, windows: PackedWindows, chance: Float64Array) -> BoolArray:
        """A random share, and the last of a window where none was drawn."""
        blank = chance[windows.target_row] < self.blank_share
        ends = np.cumsum(windows.lengths)
        none_drawn = np.add.reduceat(blank, ends - windows.lengths) == 0
        blank[ends[none_drawn] - 1] = True
        return blank


class _BothWays(Encoder):
    def __init__(self, config: BERT4Rec) -> None:
        super().__init__()
        dim = config.dim
        self.position = nn.Embedding(config.max_length, dim)
        nn.init.normal_(self.position.weight, std=dim**-0.5)
        self.norm = nn.LayerNorm(dim)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList([_Block(dim, config.num_heads, config.dropout) for _ in range(config.num_blocks)])
        self.out = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim))

    def forward(self, input_TD: Tensor, layout: PackedLayout) -> Tensor:
        x_TD = self.dropout(self.norm(input_TD + self.position(layout.position_T)))
        for block in self.blocks:
            x_TD = block(x_TD, layout)
        return self.out(x_TD)


class _Block(nn.Module):
    """Attention over the whole sequence and a GELU layer four times as wide, each normed after it is added."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.attention_out = nn.Linear(dim, dim)
        self.attention_norm = nn.LayerNorm(dim)
        self.feed_in = nn.Linear(dim, 4 * dim)
        self.feed_out = nn.Linear(4 * dim, dim)
        self.feed_norm = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(self, x_TD: Tensor, layout: PackedLayout) -> Tensor:
        tokens, dim = x_TD.shape
        qkv_T3HE = self.qkv(x_TD).view(tokens, 3, self.num_heads, dim // self.num_heads)
        attended_TD = self.attention_out(packed_attention(qkv_T3HE, layout, causal=False))
        x_TD = self.attention_norm(x_TD + self.dropout(attended_TD))
        return self.feed_norm(x_TD + self.dropout(self.feed_out(F.gelu(self.feed_in(x_TD)))))
