"""Judge the pipeline as it is served, stage by stage, and the baselines, on the TEST split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.artifacts import Artifact, build
from jobs.config import JobConfig
from jobs.steps.publish import popular
from recsys.data.catalogue import Catalogue
from recsys.data.dataset import Dataset, Split
from recsys.evaluation.protocol import RankFn, SystemResult, evaluate_ranker, retriever_ranker
from recsys.evaluation.report import build_report
from recsys.models.base import FitData, RetrieverConfig, VectorRetriever
from recsys.models.rankers import load_ranker
from recsys.models.retrievers import load_retriever
from recsys.pipeline.offline import retrieval_stage, staged
from recsys.pipeline.popular import PopularItems
from recsys.pipeline.stage import Stage
from recsys.pipeline.stages.ranking import RankingStage
from recsys.pipeline.stages.reranking import RerankingStage
from recsys.training.runtime import Runtime

STEP = "evaluate"


def run(config: JobConfig, prepared: Artifact, retriever: Artifact, ranker: Artifact) -> Artifact:
    """The artefact of this step: ``metrics.json`` and ``report.md``."""

    def make(folder: Path) -> dict[str, Any]:
        dataset = Dataset.load(prepared.path)
        targets = dataset.targets(Split.TEST)
        model = load_retriever(retriever.path / "judged")
        stages: list[Stage] = [retrieval_stage(config.index, dataset, model)]
        stages.append(RankingStage("", load_ranker(ranker.path / "judged")))
        catalogue = Catalogue.build(dataset.items)
        embeddings = model.item_embeddings() if isinstance(model, VectorRetriever) else None
        served = [*stages, RerankingStage("", catalogue, config.pipeline.reranking, item_embeddings=embeddings)]
        asked = {
            "num_candidates": config.pipeline.num_candidates,
            "max_history": config.pipeline.max_history,
            "depth": config.evaluation.depth,
        }
        newcomers: PopularItems | None = None
        if config.pipeline.newcomers == "popular":
            newcomers = PopularItems(dataset.num_items, *popular(config, dataset, Split.VALID))
        systems: dict[str, RankFn] = {
            "served": staged(served, newcomers, **asked),
            "retrieval": staged(stages[:1], **asked),
        }
        baselines: list[str] = []
        for baseline in config.baselines:
            # On TRAIN and VALID, as the judged models of the pipeline.
            fitted = baseline.fit(FitData.of(dataset, Split.VALID, seed=config.seed), Runtime("cpu"))
            baselines.append(label(baseline))
            systems[label(baseline)] = retriever_ranker(fitted, dataset, config.evaluation)
        results: list[SystemResult] = []
        for name, rank in systems.items():
            Console(stderr=True).print(f"evaluating {name} on {len(targets)} queries", highlight=False)
            results.append(evaluate_ranker(name, rank, targets, dataset, config.evaluation))
        report = build_report(results, dataset, Split.TEST, config.evaluation, baselines=baselines)
        report.save(folder)
        report.print(Console(stderr=True))
        Console(stderr=True).print(f"report: {folder}/report.md", highlight=False, soft_wrap=True)
        return report.to_json()

    settings = {
        "evaluation": config.evaluation.model_dump(mode="json"),
        "pipeline": config.pipeline.model_dump(mode="json"),
        "baselines": [baseline.model_dump(mode="json") for baseline in config.baselines],
        "index": config.index.model_dump(mode="json"),
        "popular": [config.publish.popular.model_dump(mode="json"), config.publish.num_popular],
        "seed": config.seed,
    }
    return build(config.workdir, STEP, settings, [prepared, retriever, ranker], make)


def label(config: RetrieverConfig) -> str:
    """The kind, and what differs from its defaults."""
    changed = config.model_dump(exclude_defaults=True)
    changed.pop("kind", None)
    return " ".join([config.kind, *(f"{key}={value}" for key, value in changed.items())])
