"""A stage that hangs holds its replica's loop; Serve notices by the health check and starts another replica."""

from __future__ import annotations

import os
import time

import pytest
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from serve.graph.batching import Batcher
from serve.graph.deployments import StageDeployment
from serve.observe.metrics import Meters, no_sink


@pytest.mark.timeout(300)
def test_a_replica_whose_stage_hangs_is_replaced(local_ray):
    class Hanging(StageDeployment):
        def __init__(self) -> None:
            def compute(calls):
                if "hang" in calls:
                    time.sleep(600)
                return [os.getpid() for _ in calls]

            self._batcher = Batcher(compute, 4)
            self._meters = Meters(no_sink)

    application = serve.deployment(
        Hanging,
        name="hanging",
        health_check_period_s=0.5,
        health_check_timeout_s=1.0,
        graceful_shutdown_timeout_s=0.1,
        ray_actor_options={"num_cpus": 0.1},
    ).bind()
    handle = serve.run(application, name="hanging", route_prefix=None).options(method_name="run")
    try:
        first = handle.remote("who").result(timeout_s=60)
        handle.remote("hang")
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                found = handle.remote("who").result(timeout_s=2)
            except (TimeoutError, RayError, RayServeException):  # the old replica hangs, or is gone
                time.sleep(0.2)
                continue
            assert found != first
            return
        raise AssertionError("nobody replaced the replica")
    finally:
        serve.delete("hanging")
