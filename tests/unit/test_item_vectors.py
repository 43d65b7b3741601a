"""Item vectors begin from what the texts say."""

from __future__ import annotations

import pytest
import torch

from recsys import schema
from recsys.models.layers.items import ItemVectors

NO_ROWS = schema.ITEMS.empty_table()


def _texts(num: int = 200, dim: int = 12) -> torch.Tensor:
    """Crowded as text vectors are: far from the origin, most of the spread in few directions."""
    generator = torch.Generator().manual_seed(3)
    spread = torch.logspace(0, -2, dim)
    return torch.randn(num, dim, generator=generator) * spread + 5


def test_training_begins_from_uncorrelated_directions_of_the_texts() -> None:
    items = ItemVectors(torch.ones(200, dtype=torch.bool), _texts(), dim=4, text_hidden_dim=0)
    vectors = items().detach()
    torch.testing.assert_close(vectors.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(vectors.T @ vectors / 200, torch.eye(4) / 4, atol=1e-3, rtol=0)
    hidden = ItemVectors(torch.ones(200, dtype=torch.bool), _texts(), dim=4, text_hidden_dim=6)
    assert isinstance(hidden.text, torch.nn.Sequential)
    torch.testing.assert_close(hidden.text[0](_texts()).std(0), torch.ones(6), atol=1e-2, rtol=0)


def test_an_id_adds_nothing_before_it_has_learned_and_only_where_it_is_shown() -> None:
    has_id = torch.arange(200) < 150
    items = ItemVectors(has_id, _texts(), dim=4, text_hidden_dim=0)
    torch.testing.assert_close(items(), items.of_new(NO_ROWS, _texts()))
    with torch.no_grad():
        items.id_embedding.weight.fill_(1.0)
    keep = torch.arange(200) % 2 == 0
    added = (items(None, keep) - items.of_new(NO_ROWS, _texts()))[:, 0] > 0.5
    assert added.equal(has_id & keep)


@pytest.mark.parametrize("num", [1, 3])
def test_texts_that_span_fewer_directions_than_there_are_dimensions(num: int) -> None:
    """One text, or all alike, say nothing about what tells items apart; the rest stays random and finite."""
    alike = torch.ones(5, 12)
    alike[:num] += torch.eye(12)[:num]
    for texts in (alike, torch.ones(5, 12)):
        vectors = ItemVectors(torch.ones(5, dtype=torch.bool), texts, dim=8, text_hidden_dim=0)()
        assert torch.isfinite(vectors).all()
        assert vectors.abs().max() < 10
