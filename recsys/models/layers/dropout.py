"""Dropout whose random numbers cost little on a CPU.

There a random number takes longer than all else that dropout does, and is drawn by one thread. Here one 64-bit number
decides over eight elements, a byte each, so the rate is a multiple of 1/256 (0.2 becomes 51/256). GPUs draw their own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS = 256


class Dropout(nn.Module):
    """Zeroes a share ``p`` (0 to 1) of the elements in training and scales the rest, so that the mean stays."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self._level = min(round(p * _LEVELS), _LEVELS - 1)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape and floating type, kept."""
        if not self.training or self._level == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(1 << 63), None)
        kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= self._level
        return x * (kept.to(x.dtype) * (_LEVELS / (_LEVELS - self._level)))

    def extra_repr(self) -> str:
        return f"p={self.p}"
