"""What a Bundle says of itself, for serving and updating.

It names kinds of models, so importing it loads torch; :mod:`recsys.pipeline.config` does not.
"""

from __future__ import annotations

from pydantic import Field

from recsys.config import StrictConfig
from recsys.data.positives import PositivePolicy
from recsys.evaluation.protocol import EvaluationConfig
from recsys.index import AnyIndex
from recsys.models.rankers.export import ExportConfig
from recsys.models.retrievers.popularity import Popularity
from recsys.models.text.encoder import EncodingConfig
from recsys.pipeline.config import PipelineConfig


class BundleConfig(StrictConfig):
    """``config.yaml`` of a Bundle. Nothing here says where it was made, under which name or on how many machines: the
    same models from the same data are the same Bundle.
    """

    positives: PositivePolicy = Field(description="which events count as positives, and how much")
    protocol: str = Field(description="how its data was split and judged, see recsys.data.dataset.DatasetInfo")
    encoder: EncodingConfig | None = Field(default=None, description="how texts are read; null without texts")
    index: AnyIndex = Field(description="index over item vectors")
    pipeline: PipelineConfig = Field(description="how requests are answered")
    export: ExportConfig = Field(description="the compressed form in which an updated ranker is served")
    popular: Popularity = Field(description="what popular means")
    num_popular: int = Field(ge=1, description="popular items in the Bundle")
    max_history: int = Field(ge=1, description="newest interactions per user in the Bundle")
    evaluation: EvaluationConfig = Field(description="how an update is judged")
    seed: int = Field(ge=0, description="seed of the training that made it")
