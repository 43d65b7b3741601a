"""How steps hand their results on: one folder per step and content key, complete once ``artifact.json`` is in it.

The key hashes the step's name, its configuration and the keys of what it reads, so a second run finds the folder and
does nothing, and a changed configuration lands in a new folder. A step that was interrupted finds its own unfinished
folder again and resumes from what is in it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recsys.files import read_json, write_json

FORMAT = 2
"""Raised when the meaning of what steps write changes, so that older folders are not reused."""


@dataclass(frozen=True)
class Artifact:
    """The complete result of a step."""

    step: str
    key: str
    path: Path
    reused: bool = False

    @property
    def metrics(self) -> dict[str, Any]:
        """What the step reported about itself."""
        return read_json(self.path / "artifact.json")["metrics"]

    @property
    def seconds(self) -> float:
        """How long the step took when it was made."""
        return read_json(self.path / "artifact.json")["seconds"]


def artifact_key(step: str, config: object, parents: Sequence[Artifact]) -> str:
    """16 hex digits that change with anything the step's result depends on."""
    tree = {"format": FORMAT, "step": step, "config": config, "parents": [[p.step, p.key] for p in parents]}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def build(
    workdir: str | Path,
    step: str,
    config: object,
    parents: Sequence[Artifact],
    make: Callable[[Path], dict[str, Any]],
) -> Artifact:
    """The artefact of ``step``: found, or made by ``make(folder)``, which writes into the folder and returns metrics.

    ``config`` is any JSON-able value that holds every setting the result depends on. ``folder`` may hold what an
    interrupted run left; ``make`` decides what of it is usable.
    """
    key = artifact_key(step, config, parents)
    path = Path(workdir).absolute() / step / key
    done = path / "artifact.json"
    if done.exists():
        return Artifact(step, key, path, reused=True)
    path.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    metrics = make(path)
    record = {
        "step": step,
        "key": key,
        "config": config,
        "parents": [{"step": p.step, "key": p.key} for p in parents],
        "seconds": round(time.perf_counter() - started, 3),
        "metrics": metrics,
    }
    write_json(done, record)
    return Artifact(step, key, path)
