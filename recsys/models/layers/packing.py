"""Attention over sequences of different lengths that are laid end to end.

Everything but attention runs on the packed tensor ``[T, D]``, where padding does not exist. For attention the
sequences are grouped into buckets of similar length, and each bucket is one dense causal
``scaled_dot_product_attention``. Sequences are padded at their end there, where a causal mask already keeps every
real token from looking, so no mask tensor is needed and the fused kernels of CPU and GPU apply.

Shape legend: T tokens, B sequences, L length, D dim, H heads, E dim per head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recsys.types import Int64Array

_BUCKET_RATIO = 1.3
"""Longest over shortest sequence of one bucket: at most 30 % of a bucket is padding, on average far less."""


@dataclass(frozen=True)
class PackedLayout:
    """Where the sequences of a packed batch begin and end, prepared once and used by every block."""

    buckets: tuple[Tensor, ...]
    """int64 [B', L'] each: the token at every place of a bucket; padding repeats the sequence's last token"""
    unpad_T: Tensor
    """int64 [T]: where each token stands in the flattened buckets, one after the other"""
    position_T: Tensor
    """int64 [T]: 0 for the first token of each sequence"""
    time_T2: Tensor | None = None
    """int64 [T, 2], ms: when what a token read happened, and when its answer is asked for; None without times"""

    @classmethod
    def of(cls, lengths: Int64Array, time_T2: Int64Array | None = None) -> PackedLayout:
        """The layout of sequences of ``lengths`` (int64 [B], each at least 1) laid end to end in this order."""
        assert lengths.min(initial=1) > 0, "a packed sequence holds at least one token"
        starts = np.cumsum(lengths) - lengths
        position = np.arange(lengths.sum()) - np.repeat(starts, lengths)
        unpad = np.empty(lengths.sum(), np.int64)
        bucket_of = np.floor(np.log(lengths) / np.log(_BUCKET_RATIO)).astype(np.int64)
        buckets: list[Tensor] = []
        filled = 0
        for bucket in np.unique(bucket_of):
            rows = np.flatnonzero(bucket_of == bucket)
            longest = int(lengths[rows].max())
            place = np.minimum(np.arange(longest), lengths[rows, None] - 1)
            token = starts[rows, None] + place
            real = np.arange(longest) < lengths[rows, None]
            unpad[token[real]] = filled + np.flatnonzero(real)
            buckets.append(torch.from_numpy(token))
            filled += token.size
        times = None if time_T2 is None else torch.from_numpy(time_T2)
        return cls(tuple(buckets), torch.from_numpy(unpad), torch.from_numpy(position), times)

    def to(self, device: torch.device) -> PackedLayout:
        """The same layout on ``device``."""
        buckets = tuple(bucket.to(device, non_blocking=True) for bucket in self.buckets)
        times = None if self.time_T2 is None else self.time_T2.to(device)
        return PackedLayout(buckets, self.unpad_T.to(device), self.position_T.to(device), times)


def packed_attention(qkv_T3HE: Tensor, layout: PackedLayout, *, causal: bool = True) -> Tensor:
    """Attention within each sequence: ``[T, 3, H, E]`` (queries, keys, values) to ``[T, H * E]``.

    A token attends to itself and to what came before it in its own sequence, or to all of its sequence where not
    ``causal``; never to another sequence.
    """
    _, _, heads, dim = qkv_T3HE.shape
    outputs: list[Tensor] = []
    for bucket in layout.buckets:
        rows, longest = bucket.shape
        qkv = qkv_T3HE.index_select(0, bucket.flatten()).view(rows, longest, 3, heads, dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mask = None if causal else real_tokens(bucket)[:, None, None, :]
        attended_BHLE = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal)
        outputs.append(attended_BHLE.transpose(1, 2).reshape(rows * longest, heads * dim))
    return torch.cat(outputs).index_select(0, layout.unpad_T)


def real_tokens(bucket_BL: Tensor) -> Tensor:
    """bool [B, L]: the places of a bucket that are not padding."""
    first = torch.ones_like(bucket_BL[:, :1], dtype=torch.bool)
    return torch.cat([first, bucket_BL[:, 1:] != bucket_BL[:, :-1]], dim=1)
