"""The same stages behind plain FastAPI and uvicorn, as one would write it in an afternoon: the reference for ours.

python tests/benchmarks/plain_app.py runs/x/bundles events.sqlite 8020
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import typer

from serve.http import wire


def main(bundle: str, events: str, port: int, threads: int = 1, processes: int = 1) -> None:
    """Serve until killed."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch
    import uvicorn

    torch.set_num_threads(threads)
    os.environ["PLAIN_BUNDLE"], os.environ["PLAIN_EVENTS"] = bundle, events
    uvicorn.run(
        "plain_app:app", factory=True, port=port, workers=processes, access_log=False, log_level="warning",
        app_dir=str(Path(__file__).parent),
    )  # fmt: skip


def app() -> Any:
    """One process: a recommender with its threads, and one route."""
    from fastapi import FastAPI, Response

    from recsys.bundle import Bundle
    from recsys.events.sqlite import SqliteEventStoreConfig
    from recsys.pipeline.recommender import Recommender

    bundle = Bundle.open(os.environ["PLAIN_BUNDLE"])
    store = SqliteEventStoreConfig(path=os.environ["PLAIN_EVENTS"]).open()
    store.seed(bundle.bundle_id, bundle.histories(), bundle.manifest.events_watermark)
    recommender = Recommender.load(bundle.path, store)
    plain = FastAPI()

    @plain.post("/v1/recommend")
    async def recommend(body: wire.RecommendBody) -> Response:
        import orjson

        answer = await recommender.arecommend(wire.recommend_request(body, "0"))
        content = orjson.dumps(wire.recommend_answer(answer), option=orjson.OPT_SERIALIZE_NUMPY)
        return Response(content, media_type="application/json")

    return plain


if __name__ == "__main__":
    typer.run(main)
