"""Neural matrix factorisation (NeuMF: He et al., WWW 2017, arXiv 1708.05031).

A user and an item meet twice, as an elementwise product (GMF) and in a multilayer perceptron, and one layer weighs both
into a logit; trained by binary cross-entropy against sampled negatives. The score is no inner product, so every item is
scored. Deviations: a user has no vector of their own but a linear map of the mean of the history's item vectors (as in
FISM: Kabbur et al., KDD 2013), so that anybody with a history is answered; negatives are shared by a step, and weigh
``negatives_per_positive`` positives in all; both parts are trained at once.

Shape legend: B histories, L items read of each, N items, C candidates, D dim of each part, H hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from recsys.data.histories import Histories
from recsys.models.base import FitData
from recsys.models.layers.dropout import Dropout
from recsys.models.layers.items import ItemTower, ItemVectors
from recsys.models.retrievers.towers.base import (
    SAMPLE_TRAIN,
    NetworkRetriever,
    Plan,
    TowerConfig,
    TowerNetwork,
    has_interactions,
    saved_id_and_text,
    text_of,
)
from recsys.models.retrievers.towers.drawn_targets import PADDING, START, DrawnTargets, Part, newest_first
from recsys.types import FloatArray, Int64Array

_NUMBERS_AT_ONCE = 1 << 24
"""numbers of the hidden layer [B, C, H] held at a time"""


class NeuMF(TowerConfig):
    """Matrix factorisation and a perceptron over the same pair, fused."""

    kind: Literal["neumf"] = "neumf"
    dim: int = Field(default=32, ge=4, le=4096, description="size of the vectors of each of the two parts")
    num_negatives: int = Field(default=128, ge=1, le=1 << 22, description="negatives sampled per step")
    hidden_dims: tuple[int, ...] = Field(default=(32, 16), min_length=1, description="layers of the perceptron")
    negatives_per_positive: float = Field(default=4.0, gt=0, description="weight of all negatives of a positive")
    targets_per_user: int = Field(default=16, ge=1, le=65536, description="targets drawn from each history per epoch")

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls(dim=8, hidden_dims=(16, 8), num_negatives=16, max_length=10, dropout=0.0, train=SAMPLE_TRAIN)

    def items(self, data: FitData) -> ItemTower:
        return ItemVectors(has_interactions(data), text_of(data), 2 * self.dim, self.text_hidden_dim)

    def saved_items(self, tensors: Mapping[str, Tensor]) -> ItemTower:
        return saved_id_and_text(tensors, 2 * self.dim, self.text_hidden_dim)

    def plan(self, data: FitData) -> Plan:
        return DrawnTargets(self, data, self.targets_per_user)

    def network(self, items: ItemTower, plan: Plan | None) -> TowerNetwork:
        return _Fused(self, items)

    def retriever(self, network: TowerNetwork, num_items: int, item_vectors_NV: Tensor | None = None) -> NeuMFRetriever:
        assert isinstance(network, _Fused)
        return NeuMFRetriever(self, network, num_items, item_vectors_NV)


class NeuMFRetriever(NetworkRetriever):
    """A fitted :class:`NeuMF`."""

    def __init__(self, config: NeuMF, network: _Fused, num_items: int, item_vectors_NV: Tensor | None = None) -> None:
        super().__init__(config, network, num_items, item_vectors_NV)
        self._network: _Fused = network
        self._at_once = max(1, _NUMBERS_AT_ONCE // max(1, num_items * max(config.dim, *config.hidden_dims)))

    def score(self, histories: Histories, now_ms: Int64Array | None = None) -> FloatArray:
        """Logits of being taken next."""
        items_NV = self._items()
        scores = np.empty((len(histories), self.num_items), np.float32)
        for rows, part in histories.batches(self._at_once):
            item_BL = newest_first(part, self.config.max_length, self.num_items)
            with torch.inference_mode():
                token_BL = torch.from_numpy(item_BL).to(items_NV.device)
                user_BV = self._network.users(items_NV[token_BL.clamp(min=0)], token_BL)
                scores[rows] = self._network.logits(user_BV, items_NV).float().cpu().numpy()
        return scores


class _Fused(TowerNetwork):
    def __init__(self, config: NeuMF, items: ItemTower) -> None:
        super().__init__(items)
        self.dim, self.negatives_per_positive = config.dim, config.negatives_per_positive
        self.start = nn.Parameter(torch.randn(2 * config.dim) * (2 * config.dim) ** -0.5)
        self.user = nn.Linear(2 * config.dim, 2 * config.dim)
        self.dropout = Dropout(config.dropout)
        first, *rest = config.hidden_dims
        # The first layer is split: what it says of the user and of the item is computed once for all their pairs.
        self.user_first, self.item_first = nn.Linear(config.dim, first), nn.Linear(config.dim, first, bias=False)
        self.deeper = nn.ModuleList(
            [nn.Linear(before, after) for before, after in zip(config.hidden_dims, rest, strict=False)]
        )
        self.product_weight = nn.Parameter(torch.ones(config.dim))
        self.out = nn.Linear(config.hidden_dims[-1], 1)

    def users(self, input_BLV: Tensor, item_BL: Tensor) -> Tensor:
        """[B, 2 D]: user vectors, both parts."""
        input_BLV = torch.where((item_BL == START).unsqueeze(-1), self.start, input_BLV)
        real_BL1 = (item_BL != PADDING).unsqueeze(-1)
        mean_BV = (input_BLV * real_BL1).sum(1) / real_BL1.sum(1)
        return self.user(self.dropout(mean_BV))

    def logits(self, user_BV: Tensor, item_CV: Tensor) -> Tensor:
        """[B, C]: every user with every candidate."""
        user_BD, item_CD = user_BV[:, : self.dim], item_CV[:, : self.dim]
        product_BC = (user_BD * self.product_weight) @ item_CD.T
        hidden_BCH = self.user_first(user_BV[:, self.dim :]).unsqueeze(1) + self.item_first(item_CV[:, self.dim :])
        return product_BC + self._perceptron(hidden_BCH)

    def paired_logits(self, user_BV: Tensor, item_BV: Tensor) -> Tensor:
        """[B]: each user with the item beside it."""
        product_B = (user_BV[:, : self.dim] * self.product_weight * item_BV[:, : self.dim]).sum(-1)
        hidden_BH = self.user_first(user_BV[:, self.dim :]) + self.item_first(item_BV[:, self.dim :])
        return product_B + self._perceptron(hidden_BH)

    def _perceptron(self, hidden: Tensor) -> Tensor:
        hidden = hidden.relu()
        for layer in self.deeper:
            hidden = layer(hidden).relu()
        return self.out(hidden).squeeze(-1)

    def forward(self, part: Part) -> Tensor:
        assert part.candidate is not None
        flat_T = part.item_BL.clamp(min=0).flatten()
        input_TV, positive_BV, candidate_CV = self.look_up(flat_T, part.positive_B, part.candidate, part.id_keep)
        user_BV = self.users(input_TV.view(*part.item_BL.shape, -1), part.item_BL)
        positive_B = F.softplus(-self.paired_logits(user_BV, positive_BV))
        # A negative that is the positive itself does not count.
        counts_BC = part.candidate != part.positive_B.unsqueeze(1)
        negative_BC = F.softplus(self.logits(user_BV, candidate_CV)) * counts_BC
        share = self.negatives_per_positive / counts_BC.sum(1).clamp(min=1)
        return (part.weight_B * (positive_B + share * negative_BC.sum(1))).sum()
