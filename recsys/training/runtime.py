"""Where a training runs. The library knows one process; ``jobs/`` gives it Ray Train through the same five calls."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Precision = Literal["auto", "fp32", "bf16"]


class Runtime:
    """One process on one device. Subclasses place the same training on many (see ``jobs/_ray.py``).

    Args:
        device: where to train, e.g. ``cpu`` or ``cuda:0``; None is a GPU where there is one.
        precision: of matrix products, ``bf16`` or ``fp32``; ``auto`` is bf16 on a GPU that computes it, else fp32.
        checkpoints: folder of the running training's checkpoints; None keeps none.
        report: called with the metrics of every epoch.
    """

    rank: int = 0
    world_size: int = 1
    label: str = ""
    """names this training in its log, where several follow each other"""

    def __init__(
        self,
        device: str | None = None,
        *,
        precision: Precision = "auto",
        checkpoints: str | Path | None = None,
        report: Callable[[Mapping[str, float]], None] | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        # On a CPU it is the caller's choice: what it gains depends on instructions and on how large the products are.
        native = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        self._is_bf16 = precision == "bf16" or (precision == "auto" and native)
        self._checkpoints = Path(checkpoints) if checkpoints is not None else None
        self._report = report

    def prepare(self, module: ModuleT) -> ModuleT:
        """Move ``module`` to the device and, where there are several workers, make it data-parallel (DDP)."""
        return module.to(self.device)

    def mixed_precision(self) -> torch.autocast:
        """Inside, matrix products are computed in bfloat16 where ``precision`` says so; weights stay float32.

        For forward passes (Micikevicius et al., 2018); bfloat16 has the range of float32, so no loss is scaled.
        """
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._is_bf16)

    def all_reduce_sum(self, value: torch.Tensor) -> torch.Tensor:
        """Sum of ``value`` over all workers."""
        return value

    def report(self, metrics: Mapping[str, float], save: Callable[[Path], None] | None = None) -> None:
        """Report progress after an epoch; ``save(folder)`` writes a checkpoint (called on rank 0 only).

        Every worker must call it. A checkpoint counts only once it is complete.
        """
        if self._report is not None:
            self._report(metrics)
        if save is not None and self._checkpoints is not None:
            final = self._checkpoints / "latest"
            fresh = self._checkpoints / "writing"
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
            save(fresh)
            old = self._checkpoints / "old"
            shutil.rmtree(old, ignore_errors=True)
            if final.exists():
                final.rename(old)
            fresh.rename(final)
            shutil.rmtree(old, ignore_errors=True)

    def restore(self) -> Path | None:
        """Folder of the newest complete checkpoint of this very training, or None to start fresh."""
        if self._checkpoints is None:
            return None
        for name in ("latest", "old"):
            if (self._checkpoints / name).exists():
                return self._checkpoints / name
        return None
