"""A recurrent network reads the history (GRU4Rec: Hidasi et al., ICLR 2016, arXiv 1511.06939).

Deviations: whole histories packed by length instead of session-parallel batches, softmax over all or sampled items
instead of TOP1 or BPR, item vectors shared by input and output, and those of :mod:`.sequences.base`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from recsys.models.layers.encoder import Encoder
from recsys.models.layers.recurrent import RecurrentEncoder
from recsys.models.retrievers.sequences.base import SequenceConfig


class GRU4Rec(SequenceConfig):
    """Gated recurrent units over the history."""

    kind: Literal["gru4rec"] = "gru4rec"
    hidden_dim: int = Field(default=128, ge=4, le=65536, description="size of the recurrent state")
    num_layers: int = Field(default=1, ge=1, le=16, description="recurrent layers")

    def encoder(self) -> Encoder:
        return RecurrentEncoder(nn.GRU, self.dim, self.hidden_dim, self.num_layers, self.dropout)
