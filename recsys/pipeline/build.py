"""The one place where a pipeline is put together from its parts.

Serving, evaluation, offline slates, updates, benchmarks and the notebook all ask here, so that what is judged is what
is served.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from recsys.bundle import Bundle
from recsys.bundle import manifest as layout
from recsys.data.catalogue import Catalogue
from recsys.errors import ConfigError
from recsys.index import IndexConfig, VectorIndex
from recsys.models.base import Retriever, VectorRetriever
from recsys.models.rankers.base import Ranker
from recsys.pipeline.config import PipelineConfig
from recsys.pipeline.hard_rules import HardRules
from recsys.pipeline.popular import PopularItems
from recsys.pipeline.runner import LocalStage, Runner
from recsys.pipeline.selection import Selection
from recsys.pipeline.stage import RANKING, RERANKING, RETRIEVAL, STAGES, AsyncStage, Stage
from recsys.pipeline.stages.ranking import RankingStage
from recsys.pipeline.stages.reranking import RerankingStage
from recsys.pipeline.stages.retrieval import RetrievalStage
from recsys.types import NO_HISTORY, Candidates, FloatArray, History, Int32Array, Query

Popular = tuple[Int32Array, FloatArray]
"""popular items, best first: int32 [P], and their scores float32 [P]"""
NO_POPULAR: Popular = (np.zeros(0, np.int32), np.zeros(0, np.float32))


@dataclass(frozen=True, eq=False)
class Parts:
    """What stages are made of. A part is loaded when a stage needs it: one stage alone costs what that one needs."""

    bundle_id: str
    """empty for models that belong to no Bundle"""
    catalogue: Catalogue
    retriever: Callable[[], Retriever]
    index: Callable[[], VectorIndex | None]
    """over the retriever's item vectors; None where it has none"""
    ranker: Callable[[], Ranker | None]
    popular: Callable[[], Popular]

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> Parts:
        """Those of ``bundle``."""
        return cls(
            bundle.bundle_id,
            bundle.catalogue(),
            bundle.retriever,
            lambda: bundle.index() if bundle.has(layout.INDEX) else None,
            lambda: bundle.ranker() if bundle.has(layout.RANKER) else None,
            lambda: bundle.popular() if bundle.has(layout.POPULAR) else NO_POPULAR,
        )

    @classmethod
    def of_models(
        cls,
        catalogue: Catalogue,
        retriever: Retriever,
        index: IndexConfig,
        ranker: Ranker | None = None,
        popular: Popular = NO_POPULAR,
    ) -> Parts:
        """Those of models in memory; the index is built when a stage first needs it."""

        @functools.cache
        def built() -> VectorIndex | None:
            return index.build(retriever.item_vectors()) if isinstance(retriever, VectorRetriever) else None

        return cls("", catalogue, lambda: retriever, built, lambda: ranker, lambda: popular)

    def item_embeddings(self) -> FloatArray | None:
        """float32 [N, D]: what items are compared by; None where the retriever has no vectors."""
        retriever = self.retriever()
        return retriever.item_embeddings() if isinstance(retriever, VectorRetriever) else None


def build_stage(name: str, parts: Parts, config: PipelineConfig) -> Stage | None:
    """The stage ``name`` (one of :data:`~recsys.pipeline.stage.STAGES`); None for ranking where there is no ranker.

    :raises ConfigError: for another name.
    """
    if name == RETRIEVAL:
        return RetrievalStage(
            parts.bundle_id,
            parts.retriever(),
            parts.index(),
            parts.catalogue,
            encoding_cache=config.encoding_cache,
        )
    if name == RANKING:
        ranker = parts.ranker()
        return None if ranker is None else RankingStage(parts.bundle_id, ranker)
    if name == RERANKING:
        return RerankingStage(parts.bundle_id, parts.catalogue, config.rules, parts.item_embeddings())
    raise ConfigError(f"there is no stage {name!r}; stages are {', '.join(STAGES)}", stage=name)


def build_stages(parts: Parts, config: PipelineConfig, names: Sequence[str] = STAGES) -> list[Stage]:
    """Those of ``names`` that there are, in order."""
    return [stage for name in names if (stage := build_stage(name, parts, config)) is not None]


def build_selection(parts: Parts) -> Selection:
    """What stands before and after the stages."""
    catalogue = parts.catalogue
    return Selection(HardRules(catalogue), PopularItems(len(catalogue), *parts.popular()))


def build_runner(parts: Parts, config: PipelineConfig, stages: Sequence[AsyncStage] | None = None) -> Runner:
    """The runner over ``stages``, local or remote; None computes all of them in the event loop."""
    if stages is None:
        stages = [local(stage, config, inline=True) for stage in build_stages(parts, config)]
    return Runner(stages, build_selection(parts), config)


def local(stage: Stage, config: PipelineConfig, *, inline: bool = False) -> LocalStage:
    """``stage`` in this process. Unless ``inline``, even the shortest is in a thread: one that hangs in the event loop
    would take everything with it.
    """
    return LocalStage(stage, threads=config.threads, max_queued=config.max_queued, inline=inline)


def warm_up(stages: Sequence[Stage]) -> None:
    """Run each stage for a user nobody knows and one with a history, so that the first request is not the slowest.

    :raises RecsysError: what a stage raises when it cannot work at all.
    """
    if not stages:
        return
    nobody = Query(
        request_id="warm-up",
        bundle_id=stages[0].bundle_id,
        now_ms=0,
        history=NO_HISTORY,
        excluded_item_idx=NO_HISTORY.item_idx,
        top_k=1,
        num_candidates=200,
    )
    somebody = replace(nobody, history=History(np.zeros(1, np.int32), np.zeros(1, np.int64)))
    for query in (nobody, somebody):
        candidates = Candidates.empty()
        for stage in stages:
            (candidates,) = stage.run_batch([query], [candidates])
