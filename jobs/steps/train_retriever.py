"""Train the retriever on TRAIN, choosing on VALID; refit what was chosen on more data, all in one run.

Writes ``base`` (fitted on TRAIN: its candidates are what the ranker learns from), ``judged`` (refitted
on TRAIN and VALID: the one that TEST judges), ``final`` (refitted on all data: the one that is published) and
``history.json`` (the learning curve of each).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs._ray import discard, fit_distributed
from jobs.artifacts import REFITS, Embedded, Prepared, TrainedRetriever
from jobs.config import JobConfig
from jobs.steps import embed, prepare
from jobs.steps.base import Step
from recsys.data.dataset import Split
from recsys.files import link_or_copy, read_json, write_json
from recsys.models.base import FitData, Retriever, RetrieverConfig
from recsys.models.retrievers.phases import Phase
from recsys.training.loop import best_epoch
from recsys.training.runtime import Runtime


@dataclass(frozen=True)
class Payload:
    """What the workers need."""

    config: RetrieverConfig
    phases: Mapping[str, FitData]
    """``base`` first; the others are refitted with what it chose"""


def fit(payload: Payload, runtime: Runtime) -> Callable[[Path], None]:
    """Fit the first phase, choosing on VALID; then the others with what was chosen."""
    done: dict[str, Retriever] = {}
    for name, data in payload.phases.items():
        phase = Phase(runtime, name, done)
        config = payload.config.refit(done["base"]) if done else payload.config
        done[name] = phase.finished() or config.fit(data, phase)

    def save(folder: Path) -> None:
        for name, retriever in done.items():
            retriever.save(folder / name)
        write_json(folder / "history.json", {name: list(retriever.history) for name, retriever in done.items()})

    return save


def run(config: JobConfig, prepared: Prepared, embedded: Embedded | None) -> TrainedRetriever:
    """Fit all three; ``embedded`` is None for data without text."""
    settings = {
        "retriever": config.retriever.model_dump(mode="json"),
        "seed": config.seed,
        "num_workers": max(1, config.compute.num_workers),
    }

    def make(folder: Path) -> dict[str, Any]:
        dataset = prepared.dataset()
        text = embedded and embedded.vectors()
        base = FitData.of(dataset, Split.TRAIN, text_vectors=text, valid=dataset.targets(Split.VALID), seed=config.seed)
        refits = {
            name: replace(base, histories=dataset.positives.histories(until), valid=None)
            for name, until in REFITS.items()
        }
        result = fit_distributed(
            fit,
            Payload(config.retriever, {"base": base, **refits}),
            compute=config.compute,
            name=f"retriever-{folder.name}",
            storage=folder,
        )
        link_or_copy(result.path, folder)
        discard(result)
        return summary(read_json(folder / "history.json")["base"])

    return STEP.build(config, settings, (prepared, embedded), make)


def summary(history: list[dict[str, float]]) -> dict[str, Any]:
    """The epoch that was best on VALID, and how good it was there."""
    chosen = best_epoch(history)
    if chosen is None:
        return {}
    return {"epochs": chosen, "valid_ndcg@10": next(row["ndcg@10"] for row in history if row["epoch"] == chosen)}


STEP = Step(
    "train_retriever",
    "Train the retriever; refit it on all data.",
    TrainedRetriever,
    run,
    reads=(prepare.STEP, embed.STEP),
    section="retriever",
)
