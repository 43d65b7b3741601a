"""Follows the pointer of a store of Bundles: a new Bundle is loaded beside the old, proven, and only then answers.

Each gateway pins one Bundle per request. It turns to a new one when every replica of every stage has it and the golden
query is answered as it must be; the old one answers what it has begun and is then let go. A Bundle that cannot be
loaded or proven is refused, and the old one stays.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol

from recsys.bundle.store import BundleStore, Pointer
from recsys.errors import BundleError, PointerConflictError, RecsysError
from recsys.events import EventStore
from recsys.pipeline.stage import AsyncStage
from serve.canary import Tally, worse
from serve.config import ServeConfig
from serve.service import Generation, Service, Trial
from serve.shelf import StageInfo, is_store, open_bundle, wanted

_PAUSE_S = 0.2
_HOLD_EVERY_S = 5.0
_RETRY_S = 60.0
_LINGER_S = 1.0
"""how long a Bundle stays after its last request: one may have been given to it in this moment"""
_log = logging.getLogger(__name__)


class HeldStage(AsyncStage, Protocol):
    """A stage in processes of its own, which are told what to keep loaded."""

    async def hold(self, bundle_ids: Sequence[str]) -> list[dict[str, StageInfo]]:
        """Ask every replica to have these Bundles loaded, and how far each is."""
        ...


class Switch:
    """Opens the Bundles of one gateway, in its event loop."""

    def __init__(self, config: ServeConfig, store: EventStore, remote: Mapping[str, HeldStage]) -> None:
        self._config = config
        self._store = store
        self._remote = remote
        self._follows = is_store(config.bundle_uri)
        self._refused_at: dict[str, float] = {}
        self._number = 0
        self._idle_since: dict[str, float] = {}

    async def start(self) -> Service:
        """The service with what the store points to; where that is no good, with what it pointed to before.

        :raises BundleError: when nothing is.
        """
        first: RecsysError | None = None
        for bundle_id in await asyncio.to_thread(wanted, self._config.bundle_uri):
            try:
                service = Service(self._store, await self._prepare(bundle_id))
            except RecsysError as error:
                _log.exception("Bundle %s is refused", bundle_id)
                self._refused_at[bundle_id] = time.monotonic()
                first = first or error
            else:
                if first is not None:
                    service.refused = dict.fromkeys(self._refused_at, "see the log of this gateway")
                return service
        assert first is not None, "a store points to something"
        raise first

    async def follow(self, service: Service) -> None:
        """Look at the store again and again, until cancelled. A Bundle that is fixed needs no look."""
        if self._follows:
            # Apart from each other: while a large Bundle is opened here, stages must not forget the one that answers.
            await asyncio.gather(
                self._again(self.step, service, self._config.poll_s), self._again(self._hold, service, _HOLD_EVERY_S)
            )

    async def _again(
        self, what: Callable[[Service], Coroutine[Any, Any, None]], service: Service, pause_s: float
    ) -> None:
        while True:
            await asyncio.sleep(pause_s)
            try:
                await what(service)
            except Exception:  # noqa: BLE001 what is open answers on, whatever becomes of the store
                _log.exception("the store of Bundles cannot be followed; once more in %g s", pause_s)

    async def step(self, service: Service) -> None:
        """One look at the store, and all that follows from it."""
        pointer = await asyncio.to_thread(BundleStore(self._config.bundle_uri).current)
        if pointer is not None:
            if pointer.number != self._number:
                self._refused_at.clear()  # somebody wants something: what was refused may be tried once more
                self._number = pointer.number
            await self._turn_to(service, pointer)
            await self._try_out(service, pointer)
            asked = {pointer.bundle_id, pointer.canary and pointer.canary.bundle_id}
            service.refused = {each: why for each, why in service.refused.items() if each in asked}
        await self._judge(service)
        self._let_go(service)

    async def _turn_to(self, service: Service, pointer: Pointer) -> None:
        if pointer.bundle_id == service.current.bundle_id:
            return
        generation = await self._made(service, pointer.bundle_id)
        if generation is None:
            return
        before, service.current = service.current, generation
        self._bring_back(service, generation)
        service.retired.append(before)
        if service.trial is not None and service.trial.generation is generation:
            service.trial = None
        gc.freeze()  # what is loaded stays, see settle_memory
        _log.info("Bundle %s answers, after %s", generation.bundle_id, before.bundle_id)

    async def _try_out(self, service: Service, pointer: Pointer) -> None:
        wished, trial = pointer.canary, service.trial
        if trial is not None and (wished is None or wished.bundle_id != trial.generation.bundle_id):
            service.trial = None
            service.retired.append(trial.generation)
            _log.info("Bundle %s is on trial no more: %s", trial.generation.bundle_id, pointer.reason)
        if wished is None or wished.bundle_id == service.current.bundle_id:
            return
        if service.trial is None and (generation := await self._made(service, wished.bundle_id)) is not None:
            self._bring_back(service, generation)
            generation.tally, service.current.tally = Tally(), Tally()
            service.trial = Trial(generation, wished.share)
            _log.info("Bundle %s is on trial with %g of the users", wished.bundle_id, wished.share)
        if service.trial is not None:
            service.trial.share = wished.share

    async def _judge(self, service: Service) -> None:
        trial = service.trial
        if trial is None:
            return
        reason = worse(trial.generation.tally, service.current.tally, self._config.canary)
        if reason is None:
            return
        bundle_id = trial.generation.bundle_id
        _log.error("Bundle %s is taken back: %s", bundle_id, reason)
        service.trial = None
        service.retired.append(trial.generation)
        service.refused[bundle_id] = reason
        self._refused_at[bundle_id] = float("inf")
        try:
            await asyncio.to_thread(BundleStore(self._config.bundle_uri).withdraw, bundle_id, reason=reason)
        except (PointerConflictError, BundleError) as error:  # another gateway was first
            _log.info("Bundle %s was taken back already: %s", bundle_id, error)

    async def _made(self, service: Service, bundle_id: str) -> Generation | None:
        """The generation of a Bundle, open or opened now; None where it is refused."""
        for generation in service.generations:
            if generation.bundle_id == bundle_id:
                return generation
        if time.monotonic() < self._refused_at.get(bundle_id, -_RETRY_S) + _RETRY_S:
            return None
        try:
            generation = await self._prepare(bundle_id, [each.bundle_id for each in service.generations])
        except Exception as error:  # noqa: BLE001 whatever is wrong with it, the old one stays
            service.refused[bundle_id] = f"{type(error).__name__}: {error}"
            self._refused_at[bundle_id] = time.monotonic()
            _log.error("Bundle %s is refused: %s", bundle_id, error, exc_info=error)
            return None
        self._refused_at.pop(bundle_id, None)
        service.refused.pop(bundle_id, None)
        return generation

    async def _prepare(self, bundle_id: str, beside: Sequence[str] = ()) -> Generation:
        """Open a Bundle here and in every stage, and prove it."""
        timeout_s = self._config.gateway.ready_timeout_s
        present: dict[str, AsyncStage] = {}
        absent: list[str] = []
        async with asyncio.timeout(timeout_s):
            for name, stage in self._remote.items():
                info = await _loaded(stage, bundle_id, beside)
                if info.state == "failed":
                    raise BundleError(f"{name}: {info.problem}", bundle_id=bundle_id)
                if info.present:
                    present[name] = stage
                else:
                    absent.append(name)
        bundle = await asyncio.to_thread(open_bundle, self._config.bundle_uri, bundle_id)
        generation = await asyncio.to_thread(Generation.open, bundle, self._store, present, absent)
        try:
            await generation.prove(timeout_s)
        except BaseException:
            generation.recommender.close()
            raise
        return generation

    def _bring_back(self, service: Service, generation: Generation) -> None:
        if generation in service.retired:
            service.retired.remove(generation)
            self._idle_since.pop(generation.bundle_id, None)

    def _let_go(self, service: Service) -> None:
        now = time.monotonic()
        for generation in list(service.retired):
            idle_since = self._idle_since.setdefault(generation.bundle_id, now)
            if generation.num_in_flight:
                self._idle_since[generation.bundle_id] = now
            elif now - idle_since > _LINGER_S:
                service.retired.remove(generation)
                del self._idle_since[generation.bundle_id]
                generation.recommender.close()

    async def _hold(self, service: Service) -> None:
        """Stages forget what no gateway names."""
        bundle_ids = [each.bundle_id for each in service.generations]
        await asyncio.gather(*(stage.hold(bundle_ids) for stage in self._remote.values()))


async def _loaded(stage: HeldStage, bundle_id: str, beside: Sequence[str]) -> StageInfo:
    while True:
        info = _together(await stage.hold([bundle_id, *beside]), bundle_id)
        if info.state != "loading":
            return info
        await asyncio.sleep(_PAUSE_S)


def _together(infos: Sequence[Mapping[str, StageInfo]], bundle_id: str) -> StageInfo:
    """The state of all replicas: the worst of any. None running is loading."""
    found = [info[bundle_id] for info in infos]
    order = ("failed", "loading", "ready")
    return min(found, key=lambda info: order.index(info.state), default=StageInfo("", bundle_id, "loading"))
