"""Several vectors per user, one per interest, by dynamic routing (MIND: Li et al., CIKM 2019, arXiv 1904.08030).

The items of a history are routed to K interest capsules; each searches on its own, and an item's score is that of the
interest that likes it best. Deviations: the starting logits of the routing are drawn once, per place counted from the
newest item, and kept, so that one history always gives the same vectors; the label-aware attention gives a target to
one interest alone (the paper's power of infinity) and judges negatives, too, by the interest that likes them best, as
retrieval does; a learned start vector stands before the first item and answers the empty history; and those of
:mod:`.base`.

Shape legend: B histories, L items read of each (padded at the end, newest first), D dim, K interests, N items.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.data.histories import Histories
from recsys.models.base import FitData
from recsys.models.layers.dropout import Dropout
from recsys.models.layers.items import ItemTower
from recsys.models.retrievers.towers.base import SAMPLE_TRAIN, Plan, TowerConfig, TowerNetwork, TowerRetriever
from recsys.models.retrievers.towers.drawn_targets import PADDING, START, DrawnTargets, Part, newest_first
from recsys.training.losses import interests_softmax_loss
from recsys.types import FloatArray, Int64Array

_HISTORIES_AT_ONCE = 2048


class MIND(TowerConfig):
    """Multi-interest network with dynamic routing."""

    kind: Literal["mind"] = "mind"
    num_interests: int = Field(default=4, ge=1, le=64, description="vectors per user (K), for a long history")
    num_iterations: int = Field(default=3, ge=1, le=10, description="rounds of routing")
    hidden_dim: int = Field(default=128, ge=4, le=65536, description="hidden size of the layer after the capsules")
    targets_per_user: int = Field(
        default=8, ge=1, le=65536, description="targets drawn from each history per epoch; each is routed anew"
    )

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls(dim=16, num_interests=3, max_length=10, dropout=0.1, num_negatives=0, train=SAMPLE_TRAIN)

    def plan(self, data: FitData) -> Plan:
        return DrawnTargets(self, data, self.targets_per_user)

    def network(self, items: ItemTower, plan: Plan | None) -> TowerNetwork:
        return _Interests(self, items)

    def retriever(self, network: TowerNetwork, num_items: int, item_vectors_NV: Tensor | None = None) -> TowerRetriever:
        assert isinstance(network, _Interests)
        return MINDRetriever(self, network, num_items, item_vectors_NV)


class MINDRetriever(TowerRetriever):
    """A fitted :class:`MIND`."""

    def __init__(
        self, config: MIND, network: _Interests, num_items: int, item_vectors_NV: Tensor | None = None
    ) -> None:
        super().__init__(config, network, num_items, item_vectors_NV)
        self._network: _Interests = network
        self._max_length = config.max_length
        self.num_vectors = config.num_interests

    def encode_users(self, histories: Histories, now_ms: Int64Array | None = None) -> FloatArray:
        """float32 [B, K, D]; a short history has fewer interests, and its first one several times."""
        items_ND = self._items()
        users = np.empty((len(histories), self.num_vectors, items_ND.shape[1]), np.float32)
        order = np.argsort(histories.lengths, kind="stable")
        for start in range(0, len(order), _HISTORIES_AT_ONCE):
            rows = order[start : start + _HISTORIES_AT_ONCE]
            item_BL = newest_first(histories[rows], self._max_length, self.num_items)
            with torch.inference_mode():
                token_BL = torch.from_numpy(item_BL).to(items_ND.device)
                interests_BKD, active_BK = self._network.interests(items_ND[token_BL.clamp(min=0)], token_BL)
                interests_BKD = torch.where(active_BK.unsqueeze(-1), interests_BKD, interests_BKD[:, :1])
                users[rows] = interests_BKD.float().cpu().numpy()
        return users


class _Interests(TowerNetwork):
    first_logit_KL: Tensor

    def __init__(self, config: MIND, items: ItemTower) -> None:
        super().__init__(items)
        dim = config.dim
        self.num_iterations = config.num_iterations
        self.start = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.dropout = Dropout(config.dropout)
        self.bilinear = nn.Linear(dim, dim, bias=False)
        self.out = nn.Sequential(nn.Linear(dim, config.hidden_dim), nn.ReLU(), nn.Linear(config.hidden_dim, dim))
        self.register_buffer("first_logit_KL", torch.randn(config.num_interests, config.max_length))

    def interests(self, input_BLD: Tensor, item_BL: Tensor) -> tuple[Tensor, Tensor]:
        """[B, K, D], and bool [B, K]: which of them the length of the history allows (``log2``, the paper's eq. 9)."""
        input_BLD = self.dropout(torch.where((item_BL == START).unsqueeze(-1), self.start, input_BLD))
        real_BL = item_BL != PADDING
        num_interests = len(self.first_logit_KL)
        allowed_B = real_BL.sum(1).float().log2().floor().clamp(1, num_interests)
        active_BK = torch.arange(num_interests, device=item_BL.device) < allowed_B.unsqueeze(1)
        behaviour_BLD = self.bilinear(input_BLD)
        fixed_BLD = behaviour_BLD.detach()
        logit_BKL = self.first_logit_KL[:, : item_BL.shape[1]].expand(len(item_BL), -1, -1)
        for _ in range(self.num_iterations - 1):
            capsule_BKD = _squash(_shares(logit_BKL, active_BK, real_BL) @ fixed_BLD)
            logit_BKL = logit_BKL + capsule_BKD.detach() @ fixed_BLD.mT
        # Gradients flow through the last round alone, as in the authors' code.
        capsule_BKD = _squash(_shares(logit_BKL, active_BK, real_BL) @ behaviour_BLD)
        return capsule_BKD + self.out(capsule_BKD), active_BK

    def forward(self, part: Part) -> Tensor:
        flat_T = part.item_BL.clamp(min=0).flatten()
        input_TD, positive_BD, candidate_CD = self.look_up(flat_T, part.positive_B, part.candidate, part.id_keep)
        interests_BKD, active_BK = self.interests(input_TD.view(*part.item_BL.shape, -1), part.item_BL)
        return interests_softmax_loss(
            interests_BKD,
            active_BK,
            positive_BD.to(interests_BKD.dtype),
            candidate_CD.to(interests_BKD.dtype),
            positive_T=part.positive_B,
            weight_T=part.weight_B,
            candidate_C=part.candidate,
            log_correction_C=self.correction(part.log_correction),
        )


def _shares(logit_BKL: Tensor, active_BK: Tensor, real_BL: Tensor) -> Tensor:
    """[B, K, L]: how each item is dealt out to the active interests."""
    return logit_BKL.masked_fill(~active_BK.unsqueeze(-1), -torch.inf).softmax(1) * real_BL.unsqueeze(1)


def _squash(x: Tensor) -> Tensor:
    """Keeps the direction and turns the length ``n`` into ``n^2 / (1 + n^2)``."""
    square = x.square().sum(-1, keepdim=True)
    return x * (square / (1 + square) * (square + 1e-9).rsqrt())
