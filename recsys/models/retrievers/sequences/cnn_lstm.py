"""A convolutional tower over what is said of an item, joined with an LSTM over the history by inner product.

The item tower is that of Kim, "Convolutional Neural Networks for Sentence Classification" (EMNLP 2014) over the words
of the item's attributes: filters of several widths, each keeping the place where it answers most. The user tower is
the one of :mod:`.lstm`. Words are known by a hash of a fixed number of buckets, so there is no vocabulary to keep, and
an item that nobody has touched is found by its words.

Shape legend: N items, n items asked for, W words read of each, E word dim, D dim, K filters of one width.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.errors import ConfigError
from recsys.models.base import FitData, SampleReads
from recsys.models.layers.encoder import Encoder
from recsys.models.layers.items import ItemTower
from recsys.models.layers.recurrent import RecurrentEncoder
from recsys.models.retrievers.sequences.base import SequenceConfig
from recsys.models.retrievers.towers.base import SAMPLE_TRAIN, has_interactions
from recsys.models.text.encoder import TextEncoderConfig, TextField, item_texts

_WORD = re.compile(r"\w+")
_ITEMS_AT_ONCE = 16384
_NO_WORD = 0


class CNNLSTM(SequenceConfig):
    """Convolutions over item attributes, LSTM over the history."""

    kind: Literal["cnn_lstm"] = "cnn_lstm"
    id_dropout: float = Field(default=0.0, ge=0, le=0, description="there are no IDs to hide")
    text_hidden_dim: int = Field(default=0, ge=0, le=0, description="text vectors are not read")
    fields: tuple[TextField, ...] = Field(
        default=("title", "categories", "creator", "description"),
        min_length=1,
        description="columns of the item table whose words are read, in order",
    )
    max_words: int = Field(default=24, ge=1, le=1024, description="words read of each item")
    num_buckets: int = Field(default=1 << 14, ge=2, le=1 << 24, description="words are told apart by so many hashes")
    word_dim: int = Field(default=32, ge=1, le=4096, description="size of word vectors")
    widths: tuple[int, ...] = Field(default=(1, 2, 3), min_length=1, description="words that a filter spans")
    num_filters: int = Field(default=48, ge=1, le=4096, description="filters of each width")
    hidden_dim: int = Field(default=128, ge=4, le=65536, description="size of the recurrent state")
    num_layers: int = Field(default=1, ge=1, le=16, description="recurrent layers")

    sample_reads: ClassVar[SampleReads] = "words"

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls(dim=16, hidden_dim=16, word_dim=8, num_filters=8, max_length=10, num_negatives=0, train=SAMPLE_TRAIN)

    def items(self, data: FitData) -> ItemTower:
        word_NW = self.words(data.items)
        if not bool((word_NW != _NO_WORD).any()):
            raise ConfigError(f"cnn_lstm.fields {', '.join(self.fields)}: no item has a word in them")
        return _WordTower(self, has_interactions(data), word_NW)

    def saved_items(self, tensors: Mapping[str, Tensor]) -> ItemTower:
        return _WordTower(self, tensors["items.has_id"], tensors["items.word_NW"])

    def encoder(self) -> Encoder:
        return RecurrentEncoder(nn.LSTM, self.dim, self.hidden_dim, self.num_layers, self.dropout)

    def words(self, items: pa.Table) -> Tensor:
        """int32 [n, W]: the buckets of the words of ``ITEMS`` rows, padded at the end."""
        found = [self._buckets(text) for text in item_texts(items, TextEncoderConfig(fields=self.fields))]
        word_nW = torch.full((len(found), self.max_words), _NO_WORD, dtype=torch.int32)
        for row, buckets in enumerate(found):
            word_nW[row, : len(buckets)] = torch.tensor(buckets, dtype=torch.int32)
        return word_nW

    def _buckets(self, text: str) -> Sequence[int]:
        words = _WORD.findall(text.lower())[: self.max_words]
        return [1 + zlib.crc32(word.encode()) % (self.num_buckets - 1) for word in words]


class _WordTower(ItemTower):
    word_NW: Tensor

    def __init__(self, config: CNNLSTM, has_id: Tensor, word_NW: Tensor) -> None:
        super().__init__(has_id)
        self.embedding = nn.Embedding(config.num_buckets, config.word_dim, padding_idx=_NO_WORD)
        self.filters = nn.ModuleList(
            [nn.Conv1d(config.word_dim, config.num_filters, width, padding=width // 2) for width in config.widths]
        )
        self.out = nn.Linear(config.num_filters * len(config.widths), config.dim)
        self.register_buffer("word_NW", word_NW)

    def forward(self, item_n: Tensor | None = None, id_keep: Tensor | None = None) -> Tensor:
        return self._encode(self.word_NW if item_n is None else self.word_NW[item_n])

    def _encode(self, word_nW: Tensor) -> Tensor:
        return torch.cat([self._encode_chunk(chunk) for chunk in word_nW.split(_ITEMS_AT_ONCE)])

    def _encode_chunk(self, word_nW: Tensor) -> Tensor:
        word_nEW = self.embedding(word_nW).transpose(1, 2)
        found_nK = [filters(word_nEW).relu().amax(-1) for filters in self.filters]
        return self.out(torch.cat(found_nK, dim=1))
