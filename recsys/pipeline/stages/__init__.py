"""Stages of the pipeline, one file each. All follow :class:`recsys.pipeline.stage.Stage`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recsys.errors import ConfigError

if TYPE_CHECKING:
    from recsys.bundle import Bundle
    from recsys.pipeline.stage import Stage

STAGES = ("retrieval", "ranking", "reranking")
"""names of the stages, in the order in which they run"""


def build_stage(bundle: Bundle, name: str) -> Stage | None:
    """The stage ``name`` (one of :data:`STAGES`) of ``bundle``; None where it has no ranker to rank with."""
    if name == "retrieval":
        from recsys.pipeline.stages.retrieval import RetrievalStage

        index = bundle.index() if bundle.has("index") else None
        remembered = bundle.pipeline_config.encoding_cache
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

        config = bundle.pipeline_config.reranking
        return RerankingStage(bundle.bundle_id, bundle.catalogue(), config, bundle_item_embeddings(bundle))
    raise ConfigError(f"there is no stage {name!r}; stages are {', '.join(STAGES)}", stage=name)
