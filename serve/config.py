"""Settings of the serving graph: where the stages run, how they scale and what a caller may ask for."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from recsys.config import StrictConfig
from recsys.events import AnyEventStore
from recsys.events.sqlite import SqliteEventStoreConfig
from recsys.pipeline.stage import RERANKING, StageName

LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
IMPRESSION = "impression"
"""the event that something was shown"""


class ScalingConfig(StrictConfig):
    """How many replicas of one deployment there are and what each gets."""

    min_replicas: int = Field(default=1, ge=1, le=10_000, description="replicas that always run")
    max_replicas: int = Field(default=4, ge=1, le=10_000, description="replicas at the highest load")
    target_ongoing_requests: float = Field(
        default=8.0, gt=0, le=10_000, description="requests in flight per replica that autoscaling aims at"
    )
    upscale_delay_s: float = Field(default=3.0, ge=0, le=3600, description="overload that long adds replicas (seconds)")
    downscale_delay_s: float = Field(
        default=120.0, ge=0, le=86_400, description="idleness that long removes some (seconds)"
    )
    num_cpus: float = Field(default=0.25, ge=0, le=1024, description="CPUs that Ray reserves per replica")
    threads: int = Field(default=1, ge=1, le=1024, description="threads of torch, OpenMP and FAISS per replica")
    max_ongoing_requests: int = Field(
        default=100, ge=1, le=100_000, description="requests in flight per replica, at most"
    )
    log_level: LogLevel = Field(default="INFO", description="least level that is logged, as JSON on standard error")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self

    def autoscaling(self) -> dict[str, Any]:
        """Ray Serve's ``autoscaling_config``."""
        return {
            "min_replicas": self.min_replicas,
            "initial_replicas": self.min_replicas,
            "max_replicas": self.max_replicas,
            "target_ongoing_requests": self.target_ongoing_requests,
            "upscale_delay_s": self.upscale_delay_s,
            "downscale_delay_s": self.downscale_delay_s,
            "metrics_interval_s": 1.0,
            "look_back_period_s": 3.0,
        }


class StageConfig(ScalingConfig):
    """One stage as a deployment of its own (``topology: graph``)."""

    max_batch_size: int = Field(
        default=16,
        ge=1,
        le=1024,
        description="queries that one call of the stage takes together, at most: those that arrived while the call "
        "before was computed",
    )


class GatewayConfig(ScalingConfig):
    """The gateway: HTTP, user state and the runner; in ``topology: fused`` the stages as well."""

    max_body_bytes: int = Field(default=1 << 20, ge=1024, le=1 << 28, description="largest request body (bytes)")
    max_lag_ms: float = Field(
        default=250.0,
        gt=0,
        le=60_000,
        description="while the event loop comes so late to what is due, twice in a row, requests are refused before "
        "anything is done for them (milliseconds)",
    )
    max_events: int = Field(default=1000, ge=1, le=100_000, description="events per call of /v1/events")
    max_items: int = Field(default=200, ge=1, le=10_000, description="items per call of PUT /v1/items")
    retry_after_s: int = Field(default=1, ge=1, le=3600, description="when a refused caller may come again (seconds)")
    event_threads: int = Field(
        default=16, ge=1, le=256, description="calls of /v1/events that wait for the disk together"
    )
    max_traces: int = Field(
        default=1000, ge=0, le=1_000_000, description="answers per replica whose trace can be asked for"
    )
    access_log: bool = Field(default=False, description="log a line for every request")
    log_impressions: bool = Field(
        default=False, description="record every item shown to a user in the event log, with place and propensity"
    )
    ready_timeout_s: float = Field(
        default=300.0, gt=0, le=3600, description="longest wait of a new gateway for the stages to come up (seconds)"
    )


class OpenAccess(StrictConfig):
    """Whoever reaches the port may do everything. Refused unless HTTP listens on the loopback interface alone."""

    kind: Literal["open"] = "open"


class KeyAccess(StrictConfig):
    """Every request shows an API key of ``file``, which ``recsys keys`` writes."""

    kind: Literal["keys"] = "keys"
    file: str = Field(min_length=1, description="JSON file of hashed keys that every gateway can read")
    open_probes: bool = Field(
        default=False, description="answer /healthz and /readyz without a key, for balancers that cannot send one"
    )


AnyAccess = Annotated[OpenAccess | KeyAccess, Field(discriminator="kind")]


class CanaryLimits(StrictConfig):
    """What a canary may do worse than the current Bundle before it is ended. Judged by every gateway."""

    min_answers: int = Field(default=200, ge=1, le=1_000_000, description="answers of it before it is judged")
    max_failed_share: float = Field(default=0.005, ge=0, le=1, description="share that fails beyond the current one's")
    max_degraded_share: float = Field(
        default=0.02, ge=0, le=1, description="share that is degraded beyond the current one's"
    )
    max_latency_ratio: float = Field(default=1.5, ge=1, le=100, description="p95 over the current one's")
    min_latency_ms: float = Field(default=20.0, ge=0, le=60_000, description="a p95 up to this is never too slow (ms)")


class ServeConfig(StrictConfig):
    """Arguments of ``serve.app:build``."""

    bundle_uri: str = Field(
        min_length=1, description="a Bundle, or a store whose pointer is followed: local folder or fsspec URI"
    )
    access: AnyAccess = Field(description="who may come in: API keys, or, on the loopback interface, everybody")
    poll_s: float = Field(
        default=1.0,
        gt=0,
        le=3600,
        description="how often a gateway looks what the store of Bundles points to, where bundle_uri is one (seconds)",
    )
    canary: CanaryLimits = Field(
        default=CanaryLimits(), description="when a Bundle that some of the users get is taken back"
    )
    topology: Literal["graph", "fused"] = Field(
        default="graph",
        description="graph: gateway and stages scale apart; fused: all of it in each replica of the gateway",
    )
    event_store: AnyEventStore = Field(
        default=SqliteEventStoreConfig(), description="where events and user state are kept"
    )
    gateway: GatewayConfig = Field(default=GatewayConfig(), description="the HTTP side")
    retrieval: StageConfig = Field(default=StageConfig(), description="finds candidates")
    ranking: StageConfig = Field(default=StageConfig(), description="scores candidates")
    reranking: StageConfig = Field(default=StageConfig(), description="orders the slate")
    local_stages: tuple[StageName, ...] = Field(
        default=(RERANKING,),
        description="stages that run inside the gateway in topology graph, too: they save a hop and do not scale "
        "alone; reranking takes a fraction of the time of a hop",
    )

    @model_validator(mode="after")
    def _showing_is_no_deed(self) -> Self:
        if self.gateway.log_impressions and IMPRESSION not in self.event_store.log_only:
            raise ValueError(f"gateway.log_impressions needs {IMPRESSION!r} in event_store.log_only, or all is seen")
        return self

    def is_local(self, stage: str) -> bool:
        """Whether ``stage`` runs inside the gateway."""
        return self.topology == "fused" or stage in self.local_stages

    def stage(self, name: str) -> StageConfig:
        """The settings of one stage."""
        return getattr(self, name)


class Application(StrictConfig, extra="allow"):
    """One application of a file for ``serve run`` and ``serve deploy``; other keys are Ray Serve's own."""

    args: ServeConfig = Field(description="arguments of serve.app:build")


class DeployFile(StrictConfig, extra="allow"):
    """A file for ``serve run`` and ``serve deploy``; other keys are Ray Serve's own."""

    applications: tuple[Application, ...] = Field(min_length=1, description="what is served")
