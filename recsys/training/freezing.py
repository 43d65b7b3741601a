"""Which weights of a network learn."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def learn_top_layers(network: nn.Module, transformer: Any, num_layers: int) -> None:
    """Of all ``network``, let only the topmost ``num_layers`` layers of ``transformer`` learn; 0 changes nothing."""
    stacks = (child for child in transformer.modules() if isinstance(child, nn.ModuleList))
    layers = max(stacks, key=len, default=None)
    if not num_layers or layers is None:
        return
    network.requires_grad_(False)
    for layer in list(layers)[-num_layers:]:
        layer.requires_grad_(True)


def freeze_unreached(network: nn.Module, loss: Tensor) -> None:
    """Freeze what ``loss``, a result of ``network``, does not depend on; all gradients are None afterwards.

    Data-parallel training waits for a gradient of everything that learns, and a network may hold parts that a loss does
    not use, such as the pooler of BERT.
    """
    loss.backward()
    for parameter in network.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None
