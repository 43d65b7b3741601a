"""Train the ranker on the retriever's own candidates, then compress it.

Without leakage: the retriever's weights and the item features that make the candidates come from TRAIN (VALID chose
the number of epochs), the queries are the targets of VALID (for the ranker that TEST judges) or of VALID and TEST (for
the published one).

Writes ``judged`` (over the items as the judged retriever knows them) and ``final`` (the same for the final one), each
with its export.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs._ray import discard, fit_distributed
from jobs.artifacts import REFITS, Embedded, Prepared, TrainedRanker, TrainedRetriever
from jobs.config import JobConfig
from jobs.steps import embed, prepare, train_retriever
from jobs.steps.base import Step
from recsys.data.catalogue import Catalogue
from recsys.data.dataset import Split
from recsys.data.features import ItemFeatures
from recsys.evaluation.protocol import sample_queries
from recsys.files import write_json
from recsys.models.base import Retriever, VectorRetriever
from recsys.models.rankers import load_ranker
from recsys.models.rankers.attention_network import AttentionRanker
from recsys.models.rankers.base import Ranker, RankerConfig
from recsys.models.rankers.examples import RankingExamples
from recsys.models.rankers.export import choose_export, export_ranker
from recsys.models.rankers.queries import RankingCatalogue, RankingItems, item_content
from recsys.pipeline.build import Parts
from recsys.pipeline.offline import retrieved_examples
from recsys.training.runtime import Runtime
from recsys.types import FloatArray

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Payload:
    """What the workers need."""

    config: RankerConfig
    catalogue: RankingCatalogue
    train: RankingExamples
    holdout: RankingExamples
    everything: RankingExamples
    seed: int
    num_missed: int = 0
    """queries of VALID whose target retrieval did not bring"""


def fit(payload: Payload, runtime: Runtime) -> Callable[[Path], None]:
    """Fit on VALID with a holdout of users; then, for as many epochs as were best, on VALID and TEST."""
    config, catalogue, seed = payload.config, payload.catalogue, payload.seed
    judged = config.fit(payload.train, catalogue, runtime, holdout=payload.holdout, seed=seed)
    final = config.refit(judged).fit(payload.everything, catalogue, runtime, holdout=None, seed=seed)

    def save(folder: Path) -> None:
        judged.save(folder / "judged")
        final.save(folder / "final")

    return save


def ranking_embeddings(retriever: Retriever, content: FloatArray) -> FloatArray:
    """The space in which the ranker measures similarity: the retriever's, or the items' content where it has none."""
    return retriever.item_embeddings() if isinstance(retriever, VectorRetriever) else content


def learned_from(
    config: JobConfig, prepared: Prepared, embedded: Embedded | None, retriever: TrainedRetriever, *, test: bool = False
) -> Payload:
    """What the ranker is taught; with ``test`` the queries of TEST are in ``everything``, too."""
    model = config.ranking.model
    dataset = prepared.dataset()
    base_retriever = retriever.load("base")
    features = ItemFeatures.of(dataset, Split.TRAIN)
    content = item_content(embedded and embedded.vectors(), features)
    items = RankingItems.of(features, ranking_embeddings(base_retriever, content))
    parts = Parts.of_models(Catalogue.build(dataset.items), base_retriever, config.index)
    pipeline = config.pipeline.model_copy(update={"num_candidates": config.ranking.num_candidates})
    sampling = config.evaluation.model_copy(update={"max_queries": config.ranking.max_queries, "seed": config.seed})

    def examples(split: Split) -> RankingExamples:
        targets = dataset.targets(split)
        asked = targets.select(sample_queries(targets, sampling))
        return retrieved_examples(parts, pipeline, asked, items, model.max_history)

    valid = examples(Split.VALID)
    everything = valid.concat(examples(Split.TEST)) if test else valid
    train, holdout = valid.split_by_user(config.ranking.holdout_share, config.seed)
    catalogue = RankingCatalogue(items, content, dataset.items)
    return Payload(model, catalogue, train, holdout, everything, config.seed, valid.num_missed)


def run(config: JobConfig, prepared: Prepared, embedded: Embedded | None, retriever: TrainedRetriever) -> TrainedRanker:
    """Fit both; ``embedded`` is None for data without text."""

    def make(folder: Path) -> dict[str, Any]:
        dataset = prepared.dataset()
        payload = learned_from(config, prepared, embedded, retriever, test=True)
        train, holdout, content = payload.train, payload.holdout, payload.catalogue.content
        fitted = fit_distributed(
            fit, payload, compute=config.compute, name=f"ranker-{folder.name}", storage=folder / "training"
        )
        metrics: dict[str, Any] = {
            "num_queries": {"train": len(train), "holdout": len(holdout), "final": len(payload.everything)},
            "num_missed": payload.num_missed,
        }
        for name, until in REFITS.items():
            vectors = ranking_embeddings(retriever.load(name), content)
            items = RankingItems.of(ItemFeatures.of(dataset, until), vectors)
            ranker = load_ranker(fitted.path / name).with_items(RankingCatalogue(items, content, dataset.items))
            served = _compressed(ranker, config, train, holdout, metrics, folder)
            shutil.rmtree(folder / name, ignore_errors=True)
            served.save(folder / name)
            metrics[name] = {"history": [dict(row) for row in ranker.history]}
        discard(fitted)
        return metrics

    settings = settings_of(config) | {"num_workers": max(1, config.compute.num_workers)}
    return STEP.build(config, settings, (prepared, embedded, retriever), make)


def settings_of(config: JobConfig) -> dict[str, Any]:
    """What decides the lesson of :func:`learned_from` and what a ranker makes of it, beside the steps it reads."""
    return {
        "ranking": config.ranking.model_dump(mode="json"),
        "index": config.index.model_dump(mode="json"),
        "max_history": config.pipeline.max_history,
        "seed": config.seed,
    }


def _compressed(
    ranker: Ranker,
    config: JobConfig,
    train: RankingExamples,
    holdout: RankingExamples,
    metrics: dict[str, Any],
    folder: Path,
) -> Ranker:
    """The form that is served: of the first ranker that comes here the gate chooses, and others follow it."""
    if not isinstance(ranker, AttentionRanker):
        return ranker
    export = config.ranking.export
    exported = export_ranker(ranker, export, train.batch)
    if "export" not in metrics:
        # The gate: users that training has not seen. What passes is what the published ranker is served as.
        served, metrics["export"] = choose_export(ranker, exported, holdout, export)
        write_json(folder / "export.json", metrics["export"])
        return served
    return next((form for form in exported if form.precision == metrics["export"]["served"]), ranker)


STEP = Step(
    "train_ranker",
    "Train the ranker on the retriever's candidates and compress it.",
    TrainedRanker,
    run,
    reads=(prepare.STEP, embed.STEP, train_retriever.STEP),
    section="ranking",
)
