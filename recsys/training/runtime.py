"""Where a training runs. The library knows one process; ``jobs/`` gives it Ray Train through the same five calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Runtime:
    """One process on one device. Subclasses place the same training on many (see ``jobs/_ray.py``)."""

    rank: int = 0
    world_size: int = 1
    label: str = ""
    """names this training in its log, where several follow each other"""

    def __init__(
        self,
        device: str | None = None,
        *,
        checkpoints: str | Path | None = None,
        report: Callable[[Mapping[str, float]], None] | None = None,
    ) -> None:
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._checkpoints = Path(checkpoints) if checkpoints is not None else None
        self._report = report

    def prepare(self, module: ModuleT) -> ModuleT:
        """Move ``module`` to the device and, where there are several workers, make it data-parallel (DDP)."""
        return module.to(self.device)

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
            _remove(fresh)
            fresh.mkdir(parents=True)
            save(fresh)
            old = self._checkpoints / "old"
            _remove(old)
            if final.exists():
                final.rename(old)
            fresh.rename(final)
            _remove(old)

    def restore(self) -> Path | None:
        """Folder of the newest complete checkpoint of this very training, or None to start fresh."""
        if self._checkpoints is None:
            return None
        for name in ("latest", "old"):
            if (self._checkpoints / name).exists():
                return self._checkpoints / name
        return None


def _remove(folder: Path) -> None:
    import shutil

    if folder.exists():
        shutil.rmtree(folder)
