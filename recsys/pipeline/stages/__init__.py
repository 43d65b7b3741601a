"""Stages of the pipeline, one file each. All follow :class:`recsys.pipeline.stage.Stage`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recsys.errors import ConfigError

if TYPE_CHECKING:
    from recsys.bundle import Bundle
    from recsys.pipeline.config import PipelineConfig
    from recsys.pipeline.stage import Stage

STAGES = ("retrieval", "ranking", "reranking")
"""names of the stages, in the order in which they run"""


def build_stage(bundle: Bundle, name: str, config: PipelineConfig | None = None) -> Stage | None:
    """The stage ``name`` (one of :data:`STAGES`) of ``bundle``; None where it has no ranker to rank with.

    ``config`` None is the Bundle's own.
    """
    config = config or bundle.pipeline_config
    if name == "retrieval":
        from recsys.pipeline.stages.retrieval import RetrievalStage

        index = bundle.index() if bundle.has("index") else None
        remembered = config.encoding_cache
        return RetrievalStage(
            bundle.bundle_id, bundle.retriever(), index, bundle.catalogue(), encoding_cache=remembered
        )
    if name == "ranking":
        if not bundle.has("ranker"):
            return None
        from recsys.pipeline.stages.ranking import RankingStage

        return RankingStage(bundle.bundle_id, bundle.ranker())
    if name == "reranking":
        from recsys.pipeline.similarity import bundle_item_embeddings
        from recsys.pipeline.stages.reranking import RerankingStage

        embeddings = bundle_item_embeddings(bundle)
        return RerankingStage(bundle.bundle_id, bundle.catalogue(), config.rules, embeddings)
    raise ConfigError(f"there is no stage {name!r}; stages are {', '.join(STAGES)}", stage=name)
