"""A long short-term memory reads the history (Hochreiter and Schmidhuber, Neural Computation 9(8), 1997).

As next-item model after "Improved Recurrent Neural Networks for Session-based Recommendations" (arXiv 1606.08117),
with the training of :mod:`.sequences.base`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from recsys.models.layers.encoder import Encoder
from recsys.models.layers.recurrent import RecurrentEncoder
from recsys.models.retrievers.sequences.base import SequenceConfig


class LSTM(SequenceConfig):
    """Long short-term memory over the history."""

    kind: Literal["lstm"] = "lstm"
    hidden_dim: int = Field(default=128, ge=4, le=65536, description="size of the recurrent state")
    num_layers: int = Field(default=1, ge=1, le=16, description="recurrent layers")

    def encoder(self) -> Encoder:
        return RecurrentEncoder(nn.LSTM, self.dim, self.hidden_dim, self.num_layers, self.dropout)
