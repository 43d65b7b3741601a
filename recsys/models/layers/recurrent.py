"""Recurrent cells over packed sequences.

Shape legend: T tokens, D dim, B sequences of one bucket, L their longest length.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recsys.models.layers.dropout import Dropout
from recsys.models.layers.encoder import Encoder
from recsys.models.layers.packing import PackedLayout


class RecurrentEncoder(Encoder):
    """``num_layers`` of GRU or LSTM cells, read bucket by bucket; padding stands at the end, where nothing reads it."""

    def __init__(
        self, cell: type[nn.GRU | nn.LSTM], dim: int, hidden_dim: int, num_layers: int, dropout: float
    ) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        between = dropout if num_layers > 1 else 0.0
        self.cells = cell(dim, hidden_dim, num_layers, batch_first=True, dropout=between)
        self.out = nn.Linear(hidden_dim, dim)

    def forward(self, input_TD: Tensor, layout: PackedLayout) -> Tensor:
        input_TD = self.dropout(input_TD)
        outputs: list[Tensor] = []
        for bucket in layout.buckets:
            # On the CPU in float32: oneDNN has no LSTM in bfloat16 without AVX-512, yet autocast asks it for one.
            with torch.autocast("cpu", enabled=False):
                input_BLD = input_TD[bucket]
                output_BLD, _ = self.cells(input_BLD if input_BLD.is_cuda else input_BLD.float())
            outputs.append(output_BLD.flatten(0, 1))
        return self.out(self.dropout(torch.cat(outputs).index_select(0, layout.unpad_T)))
