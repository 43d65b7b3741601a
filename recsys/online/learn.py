"""Retriever and ranker of a Bundle, taken on by what is new."""

from __future__ import annotations

from typing import Any

from recsys.data.dataset import Dataset, Split
from recsys.data.features import ItemFeatures
from recsys.evaluation.protocol import EvaluationConfig, sample_queries
from recsys.models.base import FitData, Retriever, RetrieverConfig, VectorRetriever
from recsys.models.rankers.attention_network import AttentionRanker
from recsys.models.rankers.base import Ranker
from recsys.models.rankers.examples import RankingExamples
from recsys.models.rankers.export import ExportConfig, ExportedRanker, export_ranker
from recsys.models.rankers.queries import RankingCatalogue, RankingItems, item_content
from recsys.models.stand_in import StandIns
from recsys.online.config import OnlineConfig
from recsys.online.replay import lesson_of
from recsys.pipeline.build import Parts
from recsys.pipeline.config import PipelineConfig
from recsys.pipeline.offline import retrieved_examples
from recsys.training.runtime import Runtime
from recsys.types import BoolArray, FloatArray


def lesson_data(
    config: RetrieverConfig,
    dataset: Dataset,
    split: Split,
    text: FloatArray | None,
    online: OnlineConfig,
    stand_ins: StandIns | None = None,
    late: BoolArray | None = None,
) -> FitData:
    """What a retriever learns when ``split`` is new to it and all before it is not, but the rows of the interactions
    that are ``late`` (bool [R]).
    """
    data = FitData.of(dataset, split, text_vectors=text, seed=online.seed)
    fresh = dataset.positives.split == split
    if late is not None:
        fresh = fresh | late[dataset.log.weight > 0]
    lesson = lesson_of(
        data.histories,
        fresh,
        max_length=int(getattr(config, "max_length", 0)) or 100,
        replay=online.learning.replay,
        seed=online.seed + int(split),
        stand_ins=stand_ins,
    )
    return FitData(data.histories, data.weights, data.items, text, None, online.seed, lesson)


def teach_retriever(
    config: RetrieverConfig, fitted: Retriever, data: FitData, runtime: Runtime, online: OnlineConfig
) -> Retriever:
    """``fitted`` and what ``data`` adds; as it is where there is nothing to learn."""
    assert data.lesson is not None
    if not data.lesson.histories.lengths.sum() and data.num_items == fitted.num_items:
        return fitted
    return config.update(fitted, data, runtime, online.learning)


def ranking_catalogue(
    dataset: Dataset,
    until: Split,
    embeddings: FloatArray | None,
    text: FloatArray | None,
    names: tuple[str, ...] | None,
) -> RankingCatalogue:
    """What a ranker may know of the items at the end of ``until``; ``names`` are the categories it was trained with.

    ``embeddings`` None compares items by what they are.
    """
    features = ItemFeatures.of(dataset, until, names)
    content = item_content(text, features)
    return RankingCatalogue(
        RankingItems.of(features, content if embeddings is None else embeddings), content, dataset.items
    )


def ranking_lesson(
    parts: Parts,
    dataset: Dataset,
    split: Split,
    catalogue: RankingCatalogue,
    pipeline: PipelineConfig,
    max_history: int,
    online: OnlineConfig,
) -> RankingExamples:
    """The new events of ``split`` among the candidates of ``parts`` that have not learned them."""
    targets = dataset.targets(split)
    some = EvaluationConfig(max_queries=online.max_ranking_queries, seed=online.seed)
    asked = targets.select(sample_queries(targets, some))
    return retrieved_examples(parts, pipeline, asked, catalogue.items, max_history)


def teach_ranker(
    fitted: Ranker, examples: RankingExamples, catalogue: RankingCatalogue, runtime: Runtime, online: OnlineConfig
) -> Ranker:
    """``fitted`` and what ``examples`` add, uncompressed."""
    base = fitted.reference if isinstance(fitted, ExportedRanker) else fitted
    return base.config.update(base, examples, catalogue, runtime, online.ranker, seed=online.seed)


def compressed_like(fitted: Ranker, ranker: Ranker, config: ExportConfig, examples: RankingExamples) -> Ranker:
    """``ranker`` in the form in which ``fitted`` is served, where this machine can make it."""
    if not isinstance(fitted, ExportedRanker) or not isinstance(ranker, AttentionRanker) or not len(examples):
        return ranker
    wanted = config.model_copy(update={"precisions": (fitted.precision,)})
    return next(iter(export_ranker(ranker, wanted, examples.batch)), ranker)


def embeddings_of(retriever: Retriever) -> FloatArray | None:
    """What items are compared by; None where the retriever has no vectors."""
    return retriever.item_embeddings() if isinstance(retriever, VectorRetriever) else None


def category_names(ranker: Ranker, items: Any) -> tuple[str, ...]:
    """The categories that the ranker's features have columns for; those of ``items`` where it does not say."""
    from recsys.data.features import category_columns

    names = ranker.items.features.category_names
    return category_columns(items["categories"].combine_chunks()) if names is None else names
