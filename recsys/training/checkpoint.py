"""Checkpoints of an unfinished training: safetensors and JSON, optimizer state included, no pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recsys.errors import ModelError
from recsys.files import read_json, write_json


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors (copied to the CPU, contiguous, shared storage untied)."""
    save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, path)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; a :class:`ModelError` names a file that is missing."""
    if not path.exists():
        raise ModelError(f"{path}: the file with the weights is missing", path=str(path))
    return load_file(path)


def save_checkpoint(
    folder: Path,
    *,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Mapping[str, Any],
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Write module, optimizer, ``extra`` tensors and the JSON-able ``progress`` into ``folder``."""
    save_tensors(folder / "module.safetensors", module.state_dict())
    state = optimizer.state_dict()["state"]
    flat = {f"{index}.{name}": torch.as_tensor(value) for index, slot in state.items() for name, value in slot.items()}
    save_tensors(folder / "optimizer.safetensors", flat)
    save_tensors(folder / "extra.safetensors", extra or {})
    write_json(folder / "progress.json", dict(progress))


def read_progress(folder: Path) -> dict[str, Any]:
    """What :func:`save_checkpoint` was given as ``progress``."""
    return read_json(folder / "progress.json")


def load_checkpoint(folder: Path, *, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Put back what :func:`save_checkpoint` wrote and return ``extra``."""
    module.load_state_dict(load_tensors(folder / "module.safetensors"))
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in load_tensors(folder / "optimizer.safetensors").items():
        index, name = key.split(".", 1)
        slots.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
    return load_tensors(folder / "extra.safetensors")
