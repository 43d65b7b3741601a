"""Several trainings that follow each other in one run, which can be stopped in any of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from recsys.models.base import Retriever
from recsys.models.retrievers import load_retriever
from recsys.training.runtime import Runtime

_RUNNING, _DONE = "running", "done"
"""folders of a checkpoint: of the phase that is being trained, and of the results of those before it"""


class Phase(Runtime):
    """One of several trainings that share a runtime. Checkpoints carry the results of those before."""

    def __init__(self, runtime: Runtime, name: str, done: Mapping[str, Retriever]) -> None:
        """``done`` are the results of the phases before this one, by their names."""
        self._runtime, self._name, self._done = runtime, name, dict(done)
        self.label = f"{runtime.label}{name}: "
        self.device, self.rank, self.world_size = runtime.device, runtime.rank, runtime.world_size
        self.prepare, self.all_reduce_sum = runtime.prepare, runtime.all_reduce_sum
        self.mixed_precision = runtime.mixed_precision

    def report(self, metrics: Mapping[str, float], save: Callable[[Path], None] | None = None) -> None:
        """Report under this phase's name."""

        def save_all(folder: Path) -> None:
            assert save is not None
            (folder / _RUNNING / self._name).mkdir(parents=True)
            save(folder / _RUNNING / self._name)
            for name, retriever in self._done.items():
                retriever.save(folder / _DONE / name)

        self._runtime.report(metrics, None if save is None else save_all)

    def restore(self) -> Path | None:
        """This phase's part of the newest checkpoint."""
        folder = self._runtime.restore()
        own = None if folder is None else folder / _RUNNING / self._name
        return own if own is not None and own.exists() else None

    def finished(self) -> Retriever | None:
        """What this phase left, where the newest checkpoint is of a later one."""
        folder = self._runtime.restore()
        if folder is None or not (folder / _DONE / self._name).exists():
            return None
        return load_retriever(folder / _DONE / self._name)
