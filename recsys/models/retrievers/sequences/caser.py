"""Convolutions over the last few items, as over a small image (Caser: Tang and Wang, WSDM 2018, arXiv 1809.07426).

Horizontal filters look for patterns of consecutive items, vertical ones weigh the items of the window. Deviations: no
embedding per user, so that anybody with a history is answered; every position of a history is a training example of
one pass; softmax over items instead of binary cross-entropy; and those of :mod:`.sequences.base`.

Shape legend: T tokens, D dim, W items of the window, H filters per height, V vertical filters.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from recsys.models.layers.dropout import Dropout
from recsys.models.layers.encoder import Encoder
from recsys.models.layers.packing import PackedLayout
from recsys.models.retrievers.sequences.base import SequenceConfig


class Caser(SequenceConfig):
    """Convolutional sequence embedding."""

    kind: Literal["caser"] = "caser"
    window: int = Field(default=5, ge=1, le=64, description="newest items that are looked at")
    num_horizontal: int = Field(default=16, ge=1, le=4096, description="horizontal filters of each height")
    num_vertical: int = Field(default=4, ge=1, le=4096, description="vertical filters")

    def encoder(self) -> Encoder:
        return _Convolutions(self)


class _Convolutions(Encoder):
    def __init__(self, config: Caser) -> None:
        super().__init__()
        dim, self.window = config.dim, config.window
        self.horizontal = nn.ModuleList(
            [nn.Conv1d(dim, config.num_horizontal, height) for height in range(1, self.window + 1)]
        )
        self.vertical = nn.Linear(self.window, config.num_vertical, bias=False)
        self.dropout = Dropout(config.dropout)
        self.out = nn.Linear(self.window * config.num_horizontal + config.num_vertical * dim, dim)

    def forward(self, input_TD: Tensor, layout: PackedLayout) -> Tensor:
        back = torch.arange(self.window - 1, -1, -1, device=input_TD.device)
        token_TW = torch.arange(len(input_TD), device=input_TD.device)[:, None] - back
        # Before the start of a sequence there is nothing: zeros, not the end of the sequence packed before it.
        inside_TW = back <= layout.position_T[:, None]
        image_TWD = self.dropout(input_TD)[token_TW.clamp(min=0)] * inside_TW[:, :, None]
        image_TDW = image_TWD.transpose(1, 2)
        found = [F.relu(filters(image_TDW)).amax(-1) for filters in self.horizontal]
        weighed_TDV = self.vertical(image_TDW)
        return self.out(self.dropout(torch.cat([*found, weighed_TDV.flatten(1)], dim=1)))
