"""One deployment per stage, and the proxy through which the gateway's runner calls it."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.context import _get_global_client  # pyright: ignore[reportPrivateUsage] nothing public tells the host
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from recsys.bundle import Bundle
from recsys.errors import ConfigError, StageError, StageOverloadedError
from recsys.libraries import installed
from recsys.pipeline.build import Parts, build_stage
from recsys.pipeline.config import pipeline_config
from recsys.pipeline.stage import Stage, StageOutput
from recsys.types import Candidates, Query
from serve.config import OpenAccess, ServeConfig, StageConfig
from serve.graph.batching import Batcher
from serve.graph.frames import Frame, pack_call, pack_output, unpack_call, unpack_output
from serve.http.routes import http_app
from serve.live.shelf import Shelf, StageInfo
from serve.live.switch import Switch
from serve.observe.logs import log_as_json
from serve.observe.metrics import Meters, ray_sink
from serve.observe.observer import Observer, watch_encodings


class StageDeployment:
    """Wraps a plain stage of one Bundle or several: batches queries, and computes with all that the replica has.

    A stage that hangs holds the replica's event loop, where :meth:`check_health` runs too, so Serve finds out and
    replaces the replica; in a thread it would hang unseen.
    """

    def __init__(self, name: str, bundle_uri: str, config: Mapping[str, Any]) -> None:
        settings = StageConfig.parse(config, where=f"deployment {name}")
        log_as_json(settings.log_level, deployment=name)
        limit_threads(settings.threads)
        self._name = name

        def build(bundle: Bundle) -> Stage | None:
            return build_stage(name, Parts.of_bundle(bundle), pipeline_config(bundle))

        self._shelf = Shelf(name, bundle_uri, build)
        self._batcher = Batcher(self._compute, settings.max_batch_size)
        self._meters = Meters(ray_sink())
        self._meters.watch(lambda: self._meters.gauge("recsys_queue", self._batcher.num_waiting, name))
        watch_encodings(self._meters, lambda: self._shelf.stages)
        settle_memory()

    async def run(self, call: Frame) -> Frame:
        """One query and its candidates, see :mod:`serve.graph.frames`."""
        return await self._batcher.submit(call)

    async def hold(self, bundle_ids: Sequence[str]) -> dict[str, StageInfo]:
        """See :meth:`serve.live.shelf.Shelf.hold`."""
        return self._shelf.hold(bundle_ids)

    async def check_health(self) -> None:
        """Answered between two batches. Without it Serve asks a loop of its own, which no stage can hold.

        It comes every few seconds, so the metrics leave with it.
        """
        self._meters.flush()

    def _compute(self, calls: list[Frame]) -> list[Frame | Exception]:
        try:
            return [*self._run_batch(calls)]
        except Exception as error:  # noqa: BLE001 raised to the call that is to blame
            if len(calls) == 1:
                return [error]
            # One call that cannot be answered, such as one for another Bundle, must not take the others with it.
            return [answer for call in calls for answer in self._compute([call])]

    def _run_batch(self, calls: list[Frame]) -> list[Frame]:
        asked = [unpack_call(call) for call in calls]
        answers: dict[int, Frame] = {}
        # Several Bundles at once while one takes over from another, or is a canary.
        for bundle_id in dict.fromkeys(query.bundle_id for query, _ in asked):
            rows = [row for row, (query, _) in enumerate(asked) if query.bundle_id == bundle_id]
            started = time.perf_counter()
            stage = self._shelf.get(bundle_id)
            if stage is None:
                raise StageError(f"{self._name} does not serve Bundle {bundle_id}", stage=self._name)
            self._meters.observe("recsys_batch_size", len(rows), self._name)
            results = stage.run_batch([asked[row][0] for row in rows], [asked[row][1] for row in rows])
            busy_ms = (time.perf_counter() - started) * 1e3
            for row, result in zip(rows, results, strict=True):
                answers[row] = pack_output(StageOutput(result, bundle_id, busy_ms))
        return [answers[row] for row in range(len(calls))]


class RemoteStage:
    """A stage that runs in a deployment; for the runner it is an async stage like any other."""

    def __init__(self, name: str, handle: DeploymentHandle[Any]) -> None:
        self.name = name
        # What crosses is made of plain values: pickle is enough, and faster than cloudpickle.
        self._handle = handle.options(request_serialization="pickle", response_serialization="pickle")
        self._run = self._handle.options(method_name="run")

    async def run(self, query: Query, candidates: Candidates) -> StageOutput:
        """One hop. Whatever Ray reports becomes a :class:`~recsys.errors.StageError`, which the runner survives."""
        try:
            return unpack_output(await self._run.remote(pack_call(query, candidates)))
        except BackPressureError as error:
            raise StageOverloadedError(f"{self.name}: its queue is full", stage=self.name) from error
        except (RayError, RayServeException) as error:
            raise StageError(f"{self.name}: {type(error).__name__}: {error}", stage=self.name) from error

    async def hold(self, bundle_ids: Sequence[str]) -> list[dict[str, StageInfo]]:
        """Have these Bundles loaded in every replica, and how far each of them is. A replica that does not answer is
        still loading, for all one knows; empty while none runs.
        """
        try:
            async with asyncio.timeout(_HOLD_TIMEOUT_S):
                answers = await self._handle.broadcast("hold", list(bundle_ids)).results_async(return_exceptions=True)
        except (RayError, RayServeException, TimeoutError) as error:
            _log.info("%s: no replica says what it has loaded: %s: %s", self.name, type(error).__name__, error)
            return []
        unknown = {each: StageInfo(self.name, each, "loading") for each in bundle_ids}
        return [answer if isinstance(answer, dict) else unknown for answer in answers]


_HOLD_TIMEOUT_S = 30.0
_log = logging.getLogger(__name__)


@serve.ingress()  # pyright: ignore[reportUntypedClassDecorator]
class Gateway:
    """One replica of the gateway: HTTP, user state, the runner, and those stages that are local."""

    async def __init__(self, config: Mapping[str, Any], remote: Mapping[str, DeploymentHandle[Any]]) -> None:
        """Returns, and so lets Serve send traffic, only once the Bundle's golden query was answered as it must be."""
        self._config = ServeConfig.parse(config, where="deployment gateway")
        if isinstance(self._config.access, OpenAccess):
            client = _get_global_client()
            refuse_open_network(None if client is None else client.http_config.host)
        log_as_json(self._config.gateway.log_level, deployment="gateway")
        limit_threads(self._config.gateway.threads)
        stages = {name: RemoteStage(name, handle) for name, handle in remote.items()}
        switch = Switch(self._config, self._config.event_store.open(), stages)
        self._service = await switch.start()
        self._following = asyncio.create_task(switch.follow(self._service))
        self._meters = Meters(ray_sink())
        self._observer = Observer(self._service, self._config.gateway, self._meters)
        settle_memory()

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        return http_app(self._service, self._config.gateway, self._config.access, self._observer, _ask_all_gateways)

    async def trace(self, request_id: str) -> dict[str, Any] | None:
        """The trace of a request that this replica answered, or None."""
        return self._observer.trace(request_id)

    async def check_health(self) -> None:
        """Serve replaces a replica whose own event store cannot be read; where all read the same one on another
        machine, that would help nobody. It asks often, so the metrics leave with it.
        """
        self._meters.flush()
        if not self._service.store.is_remote:
            await asyncio.to_thread(self._service.store.watermark)


async def _ask_all_gateways(request_id: str) -> dict[str, Any] | None:
    here = serve.get_replica_context()
    gateways = serve.get_deployment_handle(here.deployment, here.app_name)
    answers = await gateways.broadcast("trace", request_id).results_async(return_exceptions=True)
    return next((answer for answer in answers if isinstance(answer, dict)), None)


def refuse_open_network(host: str | None) -> None:
    """An API without keys is for the machine it runs on.

    :raises ConfigError: when HTTP listens at ``host``, which others may reach.
    """
    if host not in _LOOPBACK:
        raise ConfigError(
            f"access {{kind: open}} asks for no API key, and HTTP listens at {host}: use access {{kind: keys}}, or "
            "http_options {host: 127.0.0.1}"
        )


_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


def limit_threads(threads: int) -> None:
    """Threads of torch, FAISS and whatever else reads ``OMP_NUM_THREADS`` in this process."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    if installed("faiss"):
        import faiss

        faiss.omp_set_num_threads(threads)


def settle_memory() -> None:
    """What is loaded stays: the garbage collector need not look through it again while requests wait."""
    gc.collect()
    gc.freeze()
