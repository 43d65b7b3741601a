"""What one gateway replica holds: the Bundle, the event store, the recommender, and the proof that they work."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Self

import numpy as np

from recsys.bundle import Bundle
from recsys.errors import BundleError
from recsys.events import EventStore
from recsys.pipeline.catalogue import Catalogue
from recsys.pipeline.recommender import Recommender, golden_request, warm_up
from recsys.pipeline.runner import LocalStage
from recsys.pipeline.stage import AsyncStage, Stage
from recsys.pipeline.stages import STAGES, build_stage
from serve.config import INLINE, ServeConfig

_PROOF_PAUSE_S = 0.2
_log = logging.getLogger(__name__)


@dataclass
class Service:
    """Everything the routes need; made by :meth:`open`."""

    bundle: Bundle
    store: EventStore
    recommender: Recommender
    proven: bool = field(default=False, init=False)
    """whether the golden query was answered as it must be"""

    @classmethod
    def open(cls, config: ServeConfig, remote: Mapping[str, AsyncStage], absent: Sequence[str] = ()) -> Self:
        """Open Bundle and event store, seed the one from the other, and build the stages that are not ``remote``.

        ``absent`` names stages that were looked for elsewhere and that the Bundle does not have.

        :raises BundleError: when there is no usable Bundle.
        :raises EventStoreError: when the store refuses.
        """
        bundle = Bundle.open(config.bundle_uri)
        settings = bundle.pipeline_config
        stages: list[AsyncStage] = []
        local: list[Stage] = []
        for name in STAGES:
            if name in remote:
                stages.append(remote[name])
            elif name not in absent and (stage := build_stage(bundle, name)) is not None:
                local.append(stage)
                stages.append(
                    LocalStage(stage, threads=settings.threads, max_queued=settings.max_queued, inline=name in INLINE)
                )
        if not remote:
            warm_up(local)
        store = config.event_store.open()
        if bundle.has("histories.parquet"):
            store.seed(bundle.bundle_id, bundle.histories(), bundle.manifest.events_watermark)
        return cls(bundle, store, Recommender.of(bundle, stages, store))

    @property
    def bundle_id(self) -> str:
        return self.bundle.bundle_id

    @property
    def catalogue(self) -> Catalogue:
        return self.recommender.catalogue

    @property
    def manifest(self) -> dict[str, Any]:
        """The Bundle's manifest as plain values, without the list of files."""
        return self.bundle.manifest.model_dump(mode="json", exclude={"files"})

    @property
    def version(self) -> str:
        """Of this package."""
        try:
            return version("recsys")
        except PackageNotFoundError:  # run from a checkout
            return "0"

    def titles(self, item_ids: Sequence[str]) -> list[str | None]:
        """The title of each item, None for one the catalogue does not have."""
        rows = self.catalogue.id_map.rows(item_ids)
        known = np.flatnonzero(rows >= 0)
        titles: list[str | None] = [None] * len(item_ids)
        for row, title in zip(known.tolist(), self.catalogue.titles(rows[known]), strict=True):
            titles[row] = title
        return titles

    async def prove(self, timeout_s: float) -> None:
        """Ask the Bundle's golden query until no stage is skipped any more, and compare the answer.

        The first calls of a fresh graph may be slow, and a circuit breaker may have opened meanwhile.

        :raises BundleMismatchError: when the answer is wrong.
        :raises BundleError: when stages are still skipped after ``timeout_s`` seconds.
        """
        golden = self.bundle.golden
        if golden is None:
            _log.warning("Bundle %s has no golden query: nothing to prove", self.bundle_id)
            self.proven = True
            return
        request = golden_request(golden, self.recommender.config)
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while (answer := await self.recommender.arecommend(request, now_ms=golden.now_ms)).degraded:
            if loop.time() > end:
                raise BundleError(
                    f"the golden query of Bundle {self.bundle_id} is still answered without {answer.degraded}"
                )
            await asyncio.sleep(_PROOF_PAUSE_S)
        golden.check([item.item_id for item in answer.items], [item.score for item in answer.items])
        self.proven = True

    def close(self) -> None:
        """Release threads and store."""
        self.recommender.close()
        self.store.close()
