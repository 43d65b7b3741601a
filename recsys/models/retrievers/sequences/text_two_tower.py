"""Two towers over text vectors: what an item says, and what a user has read (DSSM: Huang et al., CIKM 2013).

Both towers end in vectors of unit length; their cosine over a temperature goes into a softmax whose sampled negatives
are corrected for how often they are drawn (Yi et al., "Sampling-Bias-Corrected Neural Modeling for Large Corpus Item
Recommendations", RecSys 2019). The user tower reads the mean of the history's item vectors beside the newest of them.
Nothing is known by its ID, so an item that nobody has touched is found as well as any other. The text vectors come
from the encoder of the suite or job, which can be fine-tuned before.

Shape legend: N items, n items asked for, X text dim, D dim, T tokens, B sequences of one bucket, L their length.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from recsys.errors import ModelError
from recsys.models.base import FitData, SampleReads
from recsys.models.layers.dropout import Dropout
from recsys.models.layers.encoder import Encoder
from recsys.models.layers.items import ItemTower, whiten
from recsys.models.layers.packing import PackedLayout
from recsys.models.retrievers.sequences.base import SequenceConfig
from recsys.models.retrievers.towers.base import SAMPLE_TRAIN, has_interactions, text_of


class TextTwoTower(SequenceConfig):
    """Cosine of a user vector and an item vector, both from texts."""

    kind: Literal["text_two_tower"] = "text_two_tower"
    text_hidden_dim: int = Field(default=256, ge=4, le=65536, description="hidden size of the item tower")
    id_dropout: float = Field(default=0.0, ge=0, le=0, description="there are no IDs to hide")
    hidden_dim: int = Field(default=256, ge=4, le=65536, description="hidden size of the user tower")
    temperature: float = Field(default=0.07, gt=0, le=10, description="cosines are divided by it")

    sample_reads: ClassVar[SampleReads] = "text_vectors"

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls(dim=16, hidden_dim=32, text_hidden_dim=16, max_length=10, num_negatives=0, train=SAMPLE_TRAIN)

    def items(self, data: FitData) -> ItemTower:
        text = text_of(data)
        if text is None:
            raise ModelError("text_two_tower knows items by their texts alone: give it text vectors (text: true)")
        return _TextTower(has_interactions(data), text, self.dim, self.text_hidden_dim)

    def saved_items(self, tensors: Mapping[str, Tensor]) -> ItemTower:
        text_dim = tensors["items.layers.0.weight"].shape[1]
        return _TextTower(tensors["items.has_id"], torch.zeros(0, text_dim), self.dim, self.text_hidden_dim)

    def encoder(self) -> Encoder:
        return _PooledEncoder(self)


class _TextTower(ItemTower):
    text_vectors: Tensor

    def __init__(self, has_id: Tensor, text_vectors: Tensor, dim: int, hidden_dim: int) -> None:
        super().__init__(has_id)
        first = nn.Linear(text_vectors.shape[1], hidden_dim)
        whiten(first, text_vectors, std=1.0)
        self.layers = nn.Sequential(first, nn.GELU(), nn.Linear(hidden_dim, dim))
        self.register_buffer("text_vectors", text_vectors, persistent=False)

    def forward(self, item_n: Tensor | None = None, id_keep: Tensor | None = None) -> Tensor:
        text = self.text_vectors if item_n is None else self.text_vectors[item_n]
        return F.normalize(self.layers(text), dim=-1)


class _PooledEncoder(Encoder):
    def __init__(self, config: TextTwoTower) -> None:
        super().__init__()
        self.temperature = config.temperature
        self.dropout = Dropout(config.dropout)
        self.layers = nn.Sequential(
            nn.Linear(2 * config.dim, config.hidden_dim), nn.GELU(), nn.Linear(config.hidden_dim, config.dim)
        )

    def forward(self, input_TD: Tensor, layout: PackedLayout) -> Tensor:
        input_TD = self.dropout(input_TD)
        # Bucket by bucket: one running sum over all tokens would carry rounding from sequence to sequence.
        sums = [input_TD[bucket_BL].cumsum(1).flatten(0, 1) for bucket_BL in layout.buckets]
        mean_TD = torch.cat(sums).index_select(0, layout.unpad_T) / (layout.position_T + 1).unsqueeze(1)
        return F.normalize(self.layers(torch.cat([mean_TD, input_TD], dim=1)), dim=-1) / self.temperature
