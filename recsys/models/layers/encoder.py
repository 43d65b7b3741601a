"""What reads a packed sequence.

Shape legend: T tokens, D dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from recsys.models.layers.packing import PackedLayout


class Encoder(nn.Module, ABC):
    """The part of a sequence model that tells it from the others."""

    @abstractmethod
    def forward(self, input_TD: Tensor, layout: PackedLayout) -> Tensor:
        """[T, D] vectors of what was read at each position to [T, D] user vectors. What is asked at a position
        may not look at a later one, unless the model blanks out what it asks for (BERT4Rec).
        """
