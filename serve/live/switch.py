"""Follows the pointer of a store of Bundles: a new Bundle is loaded beside the old, proven, and only then answers.

Each gateway pins one Bundle per request. It turns to a new one when every replica of every stage has it and the golden
query is answered as it must be; the old one answers what it has begun and is then let go. A Bundle that cannot be
loaded or proven is refused, and the old one stays.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol

from recsys.bundle.live import Version, live_id, split_id
from recsys.bundle.pointer import Canary, Pointer
from recsys.bundle.store import BundleStore
from recsys.errors import BundleError, PointerConflictError
from recsys.events import EventStore
from recsys.pipeline.stage import AsyncStage
from serve.config import ServeConfig
from serve.live.canary import Tally, worse
from serve.live.service import CanaryGeneration, Generation, Service
from serve.live.shelf import StageInfo, fallbacks, is_store, open_bundle, wanted

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
        self._problems: dict[str, str] = {}
        self._proven: set[str] = set()
        self._number = 0
        self._idle_since: dict[str, float] = {}
        self._in_hand: set[str] = set()
        """Bundles that were put aside and that a step in progress may turn to again"""

    async def start(self) -> Service:
        """The service with what the store points to; where that is no good, with the newest before it that is.

        :raises BundleError: when nothing is.
        """
        first: Exception | None = None
        uri = self._config.bundle_uri
        found = [*await asyncio.to_thread(wanted, uri), *await asyncio.to_thread(fallbacks, uri)]
        base_ids = dict.fromkeys(split_id(each)[0] for each in found)
        version = await asyncio.to_thread(BundleStore(uri).version) if self._follows else Version()
        # Each with all changes first, then without those of the rules, then as it was made.
        tiers = (version, Version(version.items), Version())
        bundle_ids = [live_id(base_id, *tier) for base_id in base_ids for tier in tiers]
        if self._follows and (pointer := await asyncio.to_thread(BundleStore(uri).current)) is not None:
            self._number = pointer.number
        for bundle_id in dict.fromkeys(bundle_ids):
            try:
                generation = await self._prepare(bundle_id)
                await asyncio.to_thread(generation.seed, self._store)
            except Exception as error:  # noqa: BLE001 whatever is wrong with it, one before may answer
                self._refuse(bundle_id, error)
                first = first or error
            else:
                service = Service(self._store, generation)
                if self._follows:
                    service.items, service.rules = BundleStore(uri).items, BundleStore(uri).rules
                service.refused = dict(self._problems)
                return service
        assert first is not None, "a store points to something"
        raise first

    async def follow(self, service: Service) -> None:
        """Look at the store again and again, until cancelled. A Bundle that is fixed needs no look."""
        if self._follows:
            # Apart from each other: a large Bundle takes its time to open.
            await asyncio.gather(
                self._again(self.step, service, self._config.poll_s),
                self._again(self.tidy, service, self._config.poll_s),
                self._again(self.hold, service, _HOLD_EVERY_S),
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
        if pointer is None:
            return
        if pointer.number != self._number:
            # Somebody wants something: what was refused may be tried once more.
            self._refused_at.clear()
            self._problems.clear()
            self._number = pointer.number
        version = await asyncio.to_thread(BundleStore(self._config.bundle_uri).version)
        self._end_canary(service, pointer)
        try:
            await self._turn_to(service, pointer, version)
            await self._start_canary(service, pointer, version)
        finally:
            self._in_hand.clear()
        bases = {pointer.bundle_id, pointer.canary and pointer.canary.bundle_id} - {None}
        asked = bases | {live_id(each, *version) for each in bases if each}
        service.refused = {each: why for each, why in self._problems.items() if each in asked}

    async def tidy(self, service: Service) -> None:
        """End a canary that does badly, and let go of what answers no more."""
        self._let_go(service)
        canary = service.canary
        reason = canary and worse(canary.generation.tally, service.current.tally, self._config.canary)
        if canary is None or reason is None:
            return
        bundle_id = canary.generation.base_id
        _log.error("Bundle %s is taken back: %s", bundle_id, reason)
        self._retire(service, canary)
        self._refuse(bundle_id, BundleError(reason), log=False)
        wished = Canary(bundle_id=bundle_id, share=canary.share, token=canary.token)
        await asyncio.to_thread(self._withdraw, wished, reason)

    async def hold(self, service: Service) -> None:
        """Stages forget what no gateway names."""
        bundle_ids = [each.bundle_id for each in service.generations]
        await asyncio.gather(*(stage.hold(bundle_ids) for stage in self._remote.values()))

    async def _turn_to(self, service: Service, pointer: Pointer, version: Version) -> None:
        generation: Generation | None = None
        # Where the Bundle is no good, the one that answers goes on, with the catalogue as it is now; where this library
        # does not know the rules, those go on that it answers by.
        rules = split_id(service.current.bundle_id)[1].rules
        bases = (pointer.bundle_id, service.current.base_id)
        targets = [live_id(base, *each) for base in bases for each in (version, version._replace(rules=rules))]
        for target in dict.fromkeys(targets):
            if target == service.current.bundle_id:
                return
            if (generation := await self._made(service, target)) is not None:
                break
        if generation is None or not await self._still(service, generation, pointer):
            return
        if generation.base_id != service.current.base_id:
            try:
                await asyncio.to_thread(generation.seed, self._store)
            except Exception as error:  # noqa: BLE001 without its histories it does not answer
                self._refuse(generation.bundle_id, error)
                self._put_aside(service, generation)
                return
        else:
            generation.tally = service.current.tally
        before, service.current = service.current, generation
        self._bring_back(service, generation)
        service.retired.append(before)
        canary = service.canary
        if canary is not None and canary.generation.base_id == generation.base_id:
            service.canary = None
            self._put_aside(service, canary.generation)
        _log.info("Bundle %s answers, after %s", generation.bundle_id, before.bundle_id)

    def _end_canary(self, service: Service, pointer: Pointer) -> None:
        canary, wished = service.canary, pointer.canary
        if canary is None or canary.generation.base_id == pointer.bundle_id:
            return  # none, or the one that becomes the current one
        if wished is None or wished.token != canary.token:
            self._retire(service, canary)
            _log.info("Bundle %s is the canary no more: %s", canary.generation.bundle_id, pointer.reason)

    async def _start_canary(self, service: Service, pointer: Pointer, version: Version) -> None:
        wished, canary = pointer.canary, service.canary
        if wished is None or wished.bundle_id == service.current.base_id:
            return
        rules = split_id(service.current.bundle_id)[1].rules  # both by the same
        target = live_id(wished.bundle_id, version.items, rules)
        if canary is not None and canary.generation.bundle_id == target:
            return
        generation = await self._made(service, target)
        if generation is None:
            # Nobody shall take it for one that goes well.
            why = self._problems.get(target) or self._problems.get(wished.bundle_id) or "it cannot be served"
            await asyncio.to_thread(self._withdraw, wished, why)
            return
        if not await self._still(service, generation, pointer):
            return
        self._bring_back(service, generation)
        if canary is None:
            generation.tally, service.current.tally = Tally(), Tally()
        else:  # the same Bundle with another catalogue: what is known of it stays
            generation.tally = canary.generation.tally
        service.canary = CanaryGeneration(generation, wished.share, wished.token)
        if canary is not None:
            self._put_aside(service, canary.generation)
        _log.info("Bundle %s is the canary for %g of the users", wished.bundle_id, wished.share)

    async def _still(self, service: Service, generation: Generation, pointer: Pointer) -> bool:
        """Whether the pointer is as it was before the Bundle was opened, which takes a while; else it is put aside."""
        now = await asyncio.to_thread(BundleStore(self._config.bundle_uri).current)
        if now == pointer:
            return True
        self._put_aside(service, generation)
        return False

    def _withdraw(self, canary: Canary, reason: str) -> None:
        """End the canary in the store, unless somebody has done so."""
        store = BundleStore(self._config.bundle_uri)
        while (pointer := store.current()) and pointer.canary is not None and pointer.canary.token == canary.token:
            try:
                store.withdraw(canary.bundle_id, reason=reason)
            except PointerConflictError:
                continue  # somebody moved it at the same time, perhaps for another reason
            except BundleError:
                return  # somebody has ended it at the same time

    async def _made(self, service: Service, bundle_id: str) -> Generation | None:
        """The generation of a Bundle, open or opened now; None where it is refused."""
        refused_at = max(self._refused_at.get(each, -_RETRY_S) for each in (bundle_id, split_id(bundle_id)[0]))
        if time.monotonic() < refused_at + _RETRY_S:
            return None
        for generation in service.generations:
            if generation.bundle_id == bundle_id:
                self._in_hand.add(bundle_id)
                return generation
        try:
            generation = await self._prepare(bundle_id, [each.bundle_id for each in service.generations])
        except Exception as error:  # noqa: BLE001 whatever is wrong with it, the old one stays
            self._refuse(bundle_id, error)
            return None
        self._refused_at.pop(bundle_id, None)
        self._problems.pop(bundle_id, None)
        return generation

    def _refuse(self, bundle_id: str, error: Exception, *, log: bool = True) -> None:
        self._refused_at[bundle_id] = time.monotonic()
        self._problems[bundle_id] = f"{type(error).__name__}: {error}"
        if log:
            _log.error("Bundle %s is refused: %s", bundle_id, error, exc_info=error)

    def _retire(self, service: Service, canary: CanaryGeneration) -> None:
        service.canary = None
        self._put_aside(service, canary.generation)

    def _put_aside(self, service: Service, generation: Generation) -> None:
        if generation not in service.generations:
            service.retired.append(generation)

    async def _prepare(self, bundle_id: str, beside: Sequence[str] = ()) -> Generation:
        """Open a Bundle here and in every stage, and prove it: itself, before any change."""
        base_id = split_id(bundle_id)[0]
        proven: Generation | None = None  # its Bundle stays open for the one with the changes
        if base_id != bundle_id and base_id not in self._proven:
            proven = await self._prepare(base_id, beside)
            proven.recommender.close()
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
        if bundle_id == base_id:
            self._proven.add(base_id)
        del proven
        return generation

    def _bring_back(self, service: Service, generation: Generation) -> None:
        if generation in service.retired:
            service.retired.remove(generation)
            self._idle_since.pop(generation.bundle_id, None)

    def _let_go(self, service: Service) -> None:
        now = time.monotonic()
        for generation in list(service.retired):
            idle_since = self._idle_since.setdefault(generation.bundle_id, now)
            if generation.num_in_flight or generation.bundle_id in self._in_hand:
                self._idle_since[generation.bundle_id] = now
            elif now - idle_since > _LINGER_S:
                service.retired.remove(generation)
                del self._idle_since[generation.bundle_id]
                generation.recommender.close()


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
