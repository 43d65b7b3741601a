"""A Serve graph of the same shape and settings as ours that does nothing: what Ray itself costs."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve.app import deployment
from serve.config import ScalingConfig

app = FastAPI()
_ONE = ScalingConfig(max_replicas=1, num_cpus=0.1)


class EmptyStage:
    """Answers at once."""

    async def run(self, _: Any) -> int:
        return 0


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
    stages = [deployment(EmptyStage, f"empty_{number}", _ONE).bind() for number in range(3)]
    return deployment(EmptyGateway, "empty", _ONE).bind(*stages)
