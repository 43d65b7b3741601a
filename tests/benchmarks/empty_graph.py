"""A Serve graph of the same shape as ours that does nothing: what Ray itself costs."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

app = FastAPI()


@serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=100)
class EmptyStage:
    """Answers at once."""

    async def run(self, _: Any) -> int:
        return 0


@serve.deployment(ray_actor_options={"num_cpus": 0.1}, max_ongoing_requests=100)
@serve.ingress(app)
class EmptyGateway:
    """Asks each stage in turn."""

    def __init__(self, *stages: DeploymentHandle[Any]) -> None:
        self._stages = stages

    @app.post("/recommend")
    async def recommend(self) -> dict[str, int]:
        """Three hops."""
        total = 0
        for stage in self._stages:
            total += await stage.run.remote(total)
        return {"total": total}


def empty_graph() -> serve.Application:
    """An ingress and three stages."""
    stages = [EmptyStage.options(name=f"empty_{number}").bind() for number in range(3)]
    return EmptyGateway.bind(*stages)
