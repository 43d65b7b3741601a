"""Item towers: vectors of items, from their IDs, or from what is known of them, or both.

Shape legend: N items of the catalogue, n items asked for, D dim, X text dim.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

_MIN_VARIANCE = 1e-6
"""share of the largest component's variance below which a direction of the texts counts as empty"""


class ItemTower(nn.Module, ABC):
    """Makes the vectors of the items of a catalogue."""

    has_id: Tensor
    """bool [N]: items that training has met"""

    def __init__(self, has_id: Tensor) -> None:
        super().__init__()
        self.register_buffer("has_id", has_id)

    @property
    def num_items(self) -> int:
        """N, the size of the catalogue."""
        return len(self.has_id)

    @abstractmethod
    def forward(self, item_n: Tensor | None = None, id_keep: Tensor | None = None) -> Tensor:
        """Vectors [n, D] of the items ``item_n`` (int64, None for all); ``id_keep`` (bool [N]) False hides an ID."""


class ItemVectors(ItemTower):
    """``vector(i) = id(i) * has_id(i) + text(i)``.

    An item without interactions has no ID embedding (``has_id`` is False) and is known by its text alone. So that
    such vectors mean something, training hides the ID embedding of whole items at random (``id_keep``). Without
    text every item has its ID embedding.

    With text, training begins from what the texts say: the projection is their whitened principal components, which
    spread items over all dimensions where raw text vectors crowd into few, and ID embeddings begin at zero, as what
    is to be learned beyond the text.
    """

    text_vectors: Tensor | None

    def __init__(self, has_id: Tensor, text_vectors: Tensor | None, dim: int, text_hidden_dim: int) -> None:
        super().__init__(torch.ones_like(has_id) if text_vectors is None else has_id)
        self.id_embedding = nn.Embedding(len(has_id), dim)
        self.text: nn.Module | None = None
        if text_vectors is None:
            nn.init.normal_(self.id_embedding.weight, std=dim**-0.5)
        else:
            nn.init.zeros_(self.id_embedding.weight)
            text_dim = text_vectors.shape[1]
            first = nn.Linear(text_dim, text_hidden_dim or dim)
            # A hidden layer wants inputs of about 1; item vectors want a length of about 1.
            whiten(first, text_vectors, std=1.0 if text_hidden_dim else dim**-0.5)
            self.text = nn.Sequential(first, nn.GELU(), nn.Linear(text_hidden_dim, dim)) if text_hidden_dim else first
        self.register_buffer("text_vectors", text_vectors, persistent=False)

    def forward(self, item_n: Tensor | None = None, id_keep: Tensor | None = None) -> Tensor:
        weight = self.id_embedding.weight
        ids = weight if item_n is None else self.id_embedding(item_n)
        if self.text is None or self.text_vectors is None:
            return ids
        shown = self.has_id if id_keep is None else self.has_id & id_keep
        if item_n is not None:
            shown = shown[item_n]
        text = self.text_vectors if item_n is None else self.text_vectors[item_n]
        return ids * shown.unsqueeze(-1) + self.text(text)


@torch.no_grad()
def whiten(linear: nn.Linear, text_vectors: Tensor, std: float) -> None:
    """Outputs become the leading principal components of the texts, uncorrelated, of mean 0 and deviation ``std``.

    Outputs beyond the number of directions that the texts span keep their random weights.
    """
    if not len(text_vectors):
        return
    mean_X = text_vectors.double().mean(0)
    centred_NX = text_vectors.double() - mean_X
    variance_X, direction_XX = torch.linalg.eigh(centred_NX.T @ centred_NX / len(text_vectors))
    variance_X, direction_XX = variance_X.flip(0), direction_XX.flip(1)
    spanned = int((variance_X > _MIN_VARIANCE * variance_X[0].clamp(min=1e-12)).sum())
    num = min(linear.out_features, spanned)
    rows_nX = (direction_XX[:, :num] * (std * variance_X[:num].rsqrt())).T
    linear.weight[:num] = rows_nX.float()
    linear.bias.zero_()
    linear.bias[:num] = -(rows_nX @ mean_X).float()
