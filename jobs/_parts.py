"""Work that is cut into parts, each written whole or not at all: here, or by a pool of Ray Data actors."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from jobs._ray import ComputeConfig, ray_session


class PartWorker(Protocol):
    """One per actor; what it loads, it loads once."""

    def make(self, part: Any) -> int:
        """Write one part; the number of rows in it. It may be called again for a part that was begun."""
        ...


def make_parts(
    worker: Callable[..., PartWorker],
    parts: Sequence[Any],
    settings: dict[str, Any],
    compute: ComputeConfig,
    *,
    gpu: bool,
) -> Iterator[int]:
    """The rows of each of ``parts`` (plain values), as they get done; with ``gpu``, on GPUs where they are used.

    ``worker`` is called with ``settings`` and ``threads`` (of torch; None leaves them as they are).
    """
    if not parts:
        return
    if not compute.num_workers:
        yield from map(worker(**settings, threads=compute.threads_per_worker or None).make, parts)
        return
    with ray_session():
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.WARNING)
        # It warns that its bars are off; they are, because whoever asks tells of progress.
        logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
        num_workers = min(compute.num_workers, len(parts))
        # One block per part: it is what an actor takes, writes and, when it dies, what is done again.
        done = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts)).map_batches(
            _Actor,
            fn_constructor_kwargs={"worker": worker, "settings": {**settings, "threads": compute.threads}},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, initial_size=num_workers, max_size=num_workers),
            num_cpus=compute.cpus_per_worker,
            num_gpus=1 if gpu and compute.use_gpu else 0,
        )
        yield from (int(row["rows"]) for row in done.iter_rows())


class _Actor:
    def __init__(self, worker: Callable[..., PartWorker], settings: dict[str, Any]) -> None:
        self._worker = worker(**settings)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"rows": np.array([self._worker.make(part) for part in batch["part"].tolist()])}
