"""Dropout drops its share, keeps the mean, and passes gradients to what it kept."""

from __future__ import annotations

import pytest
import torch

from recsys.models.layers.dropout import Dropout


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_the_share_and_the_mean(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 333)
    dropped = Dropout(p)(x)
    share = (dropped == 0).float().mean().item()
    assert abs(share - p) < 0.004
    assert abs(dropped.mean().item() - 1) < 0.01
    kept = dropped[dropped != 0]
    assert (kept == kept[0]).all() and abs(kept[0].item() * (1 - p) - 1) < 0.02
    # No element, byte of a word or row is favoured.
    for view in (dropped.flatten()[:332_992].view(-1, 8), dropped):
        assert ((view == 0).float().mean(0) - p).abs().max() < 0.07


def test_seeded_and_different_each_time() -> None:
    x, layer = torch.ones(64, 64), Dropout(0.5)
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first) and not torch.equal(first, second)


def test_gradients_reach_what_was_kept() -> None:
    x = torch.randn(50, 7, requires_grad=True)
    dropped = Dropout(0.3)(x)
    dropped.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x.detach(), dropped.detach())


@pytest.mark.parametrize("layer", [Dropout(0.0), Dropout(0.5).eval()], ids=["none", "eval"])
def test_nothing_happens_without_a_rate_or_outside_training(layer: Dropout) -> None:
    x = torch.randn(5, 3)
    assert layer(x) is x
