"""Rotary positions (RoFormer, arXiv 2104.09864): attention sees how far apart two tokens are, not where they are.

Histories are cut to windows at random in training and slide in serving, so a place in the window means nothing, and
"the item before this one" is learned once for every place.

Shape legend: T tokens, H heads, E dim per head.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LONGEST_WAVE = 1000.0
"""tokens (over 2 pi): histories are hundreds long, not tens of thousands as texts are"""


def rotation(position_T: Tensor, dim: int) -> Tensor:
    """float32 [2, T, E / 2]: cosine and sine of every token's angles, for heads of size ``dim`` (even)."""
    wave = _LONGEST_WAVE ** (torch.arange(0, dim, 2, device=position_T.device) / dim)
    angle = position_T.unsqueeze(-1) / wave
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x_TKHE: Tensor, rotation_2TE: Tensor) -> Tensor:
    """Turn queries or keys ([T, K, H, E]) by their token's angles."""
    cos, sin = rotation_2TE[:, :, None, None].to(x_TKHE.dtype)
    first, second = x_TKHE.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
