"""Builds the serving graph: ``serve run serve.app:build bundle_uri=...``, or a file of ``configs/serve``.

``topology: graph`` is a gateway and one deployment per stage that is not among ``local_stages``, each scaling by
itself; ``topology: fused`` is the same gateway with all stages inside. The runner lives in the gateway either way.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.schema import LoggingConfig

from recsys.bundle.pointer import locate
from recsys.pipeline.stage import STAGES
from serve.config import ScalingConfig, ServeConfig
from serve.graph.deployments import Gateway, StageDeployment

APP_NAME = "recsys"


def build(args: dict[str, Any]) -> Application:
    """The application for ``args``, which are the keys of :class:`~serve.config.ServeConfig`."""
    config = ServeConfig.parse(args, where="arguments of serve.app:build")
    locate(config.bundle_uri)  # raises now where there is none, and not in every replica
    remote = {
        name: deployment(StageDeployment, name, config.stage(name)).bind(
            name, config.bundle_uri, config.stage(name).model_dump(mode="json")
        )
        for name in STAGES
        if not config.is_local(name)
    }
    return deployment(Gateway, "gateway", config.gateway).bind(config.model_dump(mode="json"), remote)


def deployment(code: Any, name: str, scaling: ScalingConfig) -> Any:
    """The class ``code`` as a Serve deployment, with the settings that all of ours share."""
    return serve.deployment(
        name=name,
        autoscaling_config=scaling.autoscaling(),
        max_ongoing_requests=scaling.max_ongoing_requests + _SPARE_REQUESTS,
        max_queued_requests=scaling.max_ongoing_requests,
        backpressure_config={"status_code": 503, "retry_after_s": 1},
        ray_actor_options={
            "num_cpus": scaling.num_cpus,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(scaling.threads), "TOKENIZERS_PARALLELISM": "false"}},
        },
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_timeout_s=10.0,
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=3,
        logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
    )(code)


_SPARE_REQUESTS = 16
"""What Serve lets through beyond the gateway's own limit, where HAProxy does not keep to that: its refusals carry a
request id, and probes always pass."""
