"""The one configuration file of all jobs: what is read, how it is trained, what is published."""

from __future__ import annotations

from pydantic import Field

from jobs._ray import ComputeConfig
from recsys.config import StrictConfig
from recsys.data.config import DataConfig
from recsys.evaluation.protocol import EvaluationConfig
from recsys.index import AnyIndex
from recsys.index.flat import FlatIndex
from recsys.models.rankers import AnyRanker
from recsys.models.rankers.attention import AttentionRankerConfig
from recsys.models.rankers.export import ExportConfig
from recsys.models.retrievers import AnyRetriever
from recsys.models.retrievers.neighbours.item_knn import ItemKNN
from recsys.models.retrievers.popularity import Popularity
from recsys.models.retrievers.sequences.esasrec import ESASRec
from recsys.models.text.encoder import TextEncoderConfig
from recsys.pipeline.bundle_config import BundleConfig
from recsys.pipeline.config import PipelineConfig


class RankingConfig(StrictConfig):
    """How the ranker is trained and compressed."""

    model: AnyRanker = Field(default=AttentionRankerConfig(), description="the ranker and its hyper-parameters")
    num_candidates: int = Field(default=200, ge=2, description="retriever candidates per training query")
    max_queries: int = Field(
        default=10_000, ge=1, description="training queries, a seeded sample of users where there are more"
    )
    holdout_share: float = Field(
        default=0.2, gt=0, lt=1, description="share of users kept apart for early stopping and the gate"
    )
    export: ExportConfig = Field(default=ExportConfig(), description="the compressed form that is served")


class PublishConfig(StrictConfig):
    """Where Bundles go."""

    store: str | None = Field(
        default=None, description="folder or fsspec URI of the Bundle store; null: bundles/ in the run's own folder"
    )
    activate: bool = Field(default=True, description="move the store's pointer to the new Bundle")
    keep: int = Field(default=3, ge=1, description="Bundles kept in the store besides those still pointed to")
    popular: Popularity = Field(default=Popularity(), description="what popular means when all else fails")
    num_popular: int = Field(default=1000, ge=1, description="popular items in the Bundle, the last resort")
    max_history: int = Field(default=500, ge=1, description="newest interactions per user that seed the user state")
    search: bool = Field(default=True, description="an index over item texts, for search by words; needs an encoder")


class SlatesConfig(StrictConfig):
    """The best items of every user, made offline."""

    top_k: int = Field(default=20, ge=0, le=10_000, description="items per user; 0 leaves the step out (items)")


class JobConfig(StrictConfig):
    """Everything that the jobs read."""

    name: str = Field(..., pattern=r"^[A-Za-z0-9_-]+$", description="name of the run: letters, digits, - and _")
    seed: int = Field(default=0, ge=0, description="seed of every random choice")
    workdir: str = Field(default="runs", description="folder of the steps' results, shared by all runs")
    data: DataConfig = Field(..., description="source, positives, filters, split")
    encoder: TextEncoderConfig | None = Field(default=None, description="text encoder; null for data without text")
    index: AnyIndex = Field(default=FlatIndex(), description="index over item vectors")
    retriever: AnyRetriever = Field(default=ESASRec(), description="the model that finds candidates")
    ranking: RankingConfig = Field(default=RankingConfig(), description="the model that orders candidates")
    pipeline: PipelineConfig = Field(default=PipelineConfig(), description="how requests are answered")
    baselines: tuple[AnyRetriever, ...] = Field(
        default=(Popularity(), ItemKNN()), description="models that the pipeline is judged against"
    )
    evaluation: EvaluationConfig = Field(default=EvaluationConfig(), description="metrics and intervals")
    slates: SlatesConfig = Field(default=SlatesConfig(), description="the best items of every user, made offline")
    publish: PublishConfig = Field(default=PublishConfig(), description="the Bundle store")
    compute: ComputeConfig = Field(default=ComputeConfig(), description="workers, devices, failures")

    @property
    def home(self) -> str:
        """The run's own folder: Bundle store, event store, logs."""
        return f"{self.workdir}/{self.name}"

    @property
    def store(self) -> str:
        """Where Bundles go."""
        return self.publish.store or f"{self.home}/bundles"

    def of_bundle(self) -> BundleConfig:
        """What the Bundle of a run says of itself."""
        return BundleConfig(
            positives=self.data.positives,
            protocol=self.data.split.protocol,
            encoder=None if self.encoder is None else self.encoder.encoding(),
            index=self.index,
            pipeline=self.pipeline,
            export=self.ranking.export,
            popular=self.publish.popular,
            num_popular=self.publish.num_popular,
            max_history=self.publish.max_history,
            evaluation=self.evaluation,
            seed=self.seed,
        )
