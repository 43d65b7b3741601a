"""Item vectors: an ID embedding plus a projection of the item's text.

Shape legend: N items of the catalogue, n items asked for, D dim, X text dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ItemVectors(nn.Module):
    """``vector(i) = id(i) * has_id(i) + text(i)``.

    An item without interactions has no ID embedding (``has_id`` is False) and is known by its text alone. So that
    such vectors mean something, training hides the ID embedding of whole items at random (``id_keep``). Without
    text every item has its ID embedding.
    """

    has_id: Tensor
    text_vectors: Tensor | None

    def __init__(self, has_id: Tensor, text_vectors: Tensor | None, dim: int, text_hidden_dim: int) -> None:
        super().__init__()
        self.id_embedding = nn.Embedding(len(has_id), dim)
        nn.init.normal_(self.id_embedding.weight, std=dim**-0.5)
        self.text: nn.Module | None = None
        if text_vectors is None:
            has_id = torch.ones_like(has_id)
        else:
            text_dim = text_vectors.shape[1]
            hidden = text_hidden_dim or dim
            first = nn.Linear(text_dim, hidden)
            self.text = nn.Sequential(first, nn.GELU(), nn.Linear(hidden, dim)) if text_hidden_dim else first
        self.register_buffer("has_id", has_id)
        self.register_buffer("text_vectors", text_vectors, persistent=False)

    def from_text(self, text_vectors: Tensor) -> Tensor:
        """[n, X] to [n, D]: vectors of items known by their text alone."""
        assert self.text is not None, "this model was fitted without text"
        return self.text(text_vectors)

    def forward(self, item_n: Tensor | None = None, id_keep: Tensor | None = None) -> Tensor:
        """Vectors [n, D] of the items ``item_n`` (int64, None for all); ``id_keep`` (bool [N]) False hides an ID."""
        weight = self.id_embedding.weight
        ids = weight if item_n is None else self.id_embedding(item_n)
        if self.text is None or self.text_vectors is None:
            return ids
        shown = self.has_id if id_keep is None else self.has_id & id_keep
        if item_n is not None:
            shown = shown[item_n]
        text = self.text_vectors if item_n is None else self.text_vectors[item_n]
        return ids * shown.unsqueeze(-1) + self.from_text(text)
