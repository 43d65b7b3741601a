"""Judge the pipeline as it is served, stage by stage, and the baselines, on the TEST split."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.artifacts import Judged, Prepared, TrainedRanker, TrainedRetriever
from jobs.config import JobConfig
from jobs.steps import prepare, train_ranker, train_retriever
from jobs.steps.base import Step
from recsys.bundle.assemble import popular_items
from recsys.data.catalogue import Catalogue
from recsys.data.dataset import Split
from recsys.evaluation.protocol import RankFn, SystemResult, evaluate_ranker, retriever_ranker
from recsys.evaluation.report import build_report
from recsys.models.base import FitData, RetrieverConfig
from recsys.pipeline.build import Parts
from recsys.pipeline.offline import OfflinePipeline, retrieval_alone
from recsys.pipeline.stage import RETRIEVAL
from recsys.training.runtime import Runtime


def run(config: JobConfig, prepared: Prepared, retriever: TrainedRetriever, ranker: TrainedRanker) -> Judged:
    """Judge; beside the metrics there is ``report.md``."""

    def make(folder: Path) -> dict[str, Any]:
        dataset = prepared.dataset()
        targets = dataset.targets(Split.TEST)
        parts = Parts.of_models(
            Catalogue.build(dataset.items),
            retriever.load("judged"),
            config.index,
            ranker.load("judged"),
            popular_items(
                dataset, config.publish.popular, config.publish.num_popular, until=Split.VALID, seed=config.seed
            ),
        )
        hides = dataset.hides(config.data.positives)
        served = OfflinePipeline(parts, config.pipeline, hides=hides)
        retrieval = retrieval_alone(parts, config.pipeline, hides=hides)
        systems: dict[str, RankFn] = {
            name: functools.partial(pipeline.rank, depth=config.evaluation.depth)
            for name, pipeline in (("served", served), (RETRIEVAL, retrieval))
        }
        baselines: list[str] = []
        for baseline in config.baselines:
            # On TRAIN and VALID, as the judged models of the pipeline.
            fitted = baseline.fit(FitData.of(dataset, Split.VALID, seed=config.seed), Runtime("cpu"))
            baselines.append(label(baseline))
            systems[label(baseline)] = retriever_ranker(fitted, dataset, config.evaluation)
        results: list[SystemResult] = []
        for name, rank in systems.items():
            Console(stderr=True, markup=False).print(f"evaluating {name} on {len(targets)} queries", highlight=False)
            results.append(evaluate_ranker(name, rank, targets, dataset, config.evaluation))
        report = build_report(results, dataset, Split.TEST, config.evaluation, baselines=baselines)
        report.save(folder)
        report.print(Console(stderr=True, markup=False))
        Console(stderr=True, markup=False).print(f"report: {folder}/report.md", highlight=False, soft_wrap=True)
        return report.to_json()

    settings = {
        "evaluation": config.evaluation.model_dump(mode="json"),
        "pipeline": config.pipeline.model_dump(mode="json"),
        "baselines": [baseline.model_dump(mode="json") for baseline in config.baselines],
        "index": config.index.model_dump(mode="json"),
        "popular": [config.publish.popular.model_dump(mode="json"), config.publish.num_popular],
        "seed": config.seed,
    }
    return STEP.build(config, settings, (prepared, retriever, ranker), make)


def label(config: RetrieverConfig) -> str:
    """The kind, and what differs from its defaults."""
    changed = config.model_dump(exclude_defaults=True)
    changed.pop("kind", None)
    return " ".join([config.kind, *(f"{key}={value}" for key, value in changed.items())])


STEP = Step(
    "evaluate",
    "Judge the served pipeline and the baselines on the test split.",
    Judged,
    run,
    reads=(prepare.STEP, train_retriever.STEP, train_ranker.STEP),
    section="evaluation",
)
