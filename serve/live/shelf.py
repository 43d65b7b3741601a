"""The Bundles that a replica of a stage has open: the one that answers, and for a while its neighbours.

Gateways say which Bundles they answer from or want to; nobody asked for another for :data:`FORGET_S` seconds, it goes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal
from weakref import WeakValueDictionary

from recsys.bundle import Bundle
from recsys.bundle.live import beneath, live_id, split_id
from recsys.bundle.location import Location
from recsys.bundle.manifest import MANIFEST
from recsys.bundle.pointer import locate
from recsys.bundle.store import BundleStore
from recsys.errors import BundleError, RecsysError
from recsys.pipeline.stage import Stage

FORGET_S = 60.0
FORGET_VERSION_S = 45.0
"""the same for a version of catalogue and rules: there may be a new one every few seconds"""
RETRY_S = 30.0
"""how long after a failure a Bundle that is still asked for is loaded once more"""
_log = logging.getLogger(__name__)


def _forget_s(bundle_id: str) -> float:
    return FORGET_S if beneath(bundle_id) is None else FORGET_VERSION_S


@dataclass(frozen=True, slots=True)
class StageInfo:
    """What a replica says of its stage and one Bundle."""

    name: str
    bundle_id: str
    state: Literal["loading", "ready", "failed"]
    present: bool = True
    """False where the Bundle has no such stage: a Bundle without a ranker is served without ranking"""
    problem: str = ""


class Shelf:
    """Stages by ``bundle_id``. :meth:`hold` is quick: loading happens in a thread."""

    def __init__(self, name: str, uri: str, build: Callable[[Bundle], Stage | None]) -> None:
        """Loads what ``uri`` (a Bundle, or a store of them) has for those who come first.

        :raises BundleError: when none of it can be loaded.
        """
        self._name = name
        self._uri = uri
        self._build = build
        self._stages: dict[str, Stage | None] = {}
        self._bundles: dict[str, Bundle] = {}  # open as long as their stages are: versions share the parts of one
        self._info: dict[str, StageInfo] = {}
        self._held: dict[str, float] = {}
        self._failed_at: dict[str, float] = {}
        self._loading = threading.Lock()
        # Loading takes a while, and the pointer may move meanwhile.
        loaded: set[str] = set()
        while missing := [each for each in wanted(uri) if split_id(each)[0] not in loaded]:
            for bundle_id in missing:
                loaded.add(split_id(bundle_id)[0])
                self._first(bundle_id)
        # Where the newest are no good, gateways answer from one before.
        for bundle_id in fallbacks(uri):
            if self._stages:
                break
            self._first(bundle_id)
        if not self._stages:
            problems = "; ".join(info.problem for info in self._info.values())
            raise BundleError(f"{name}: {uri} has no Bundle that can be loaded: {problems}")

    def _first(self, bundle_id: str) -> None:
        if bundle_id not in self._info:
            self._held[bundle_id] = time.monotonic()
            self._load(bundle_id)

    def get(self, bundle_id: str) -> Stage | None:
        """The stage of this Bundle; None where it has none or is not loaded, and then it will be soon."""
        stage = self._stages.get(bundle_id)
        if stage is None:
            self.hold([bundle_id])
        else:
            self._held[bundle_id] = time.monotonic()
        return stage

    @property
    def stages(self) -> list[Stage]:
        """All that are loaded."""
        return [stage for stage in list(self._stages.values()) if stage is not None]

    def hold(self, bundle_ids: Sequence[str]) -> dict[str, StageInfo]:
        """Have these Bundles loaded, now or soon, and forget what nobody has asked for lately. The state of each.

        One that failed is loaded once more when it is asked for after ``RETRY_S`` seconds.
        """
        now = time.monotonic()
        for bundle_id in bundle_ids:
            self._held[bundle_id] = now
            if bundle_id not in self._info or now - self._failed_at.get(bundle_id, now) > RETRY_S:
                self._failed_at.pop(bundle_id, None)
                self._info[bundle_id] = StageInfo(self._name, bundle_id, "loading")
                threading.Thread(target=self._load, args=(bundle_id,), name=f"load-{bundle_id}", daemon=True).start()
        for bundle_id in [each for each, held in self._held.items() if now - held > _forget_s(each)]:
            if self._info[bundle_id].state != "loading":
                self._stages.pop(bundle_id, None)
                self._bundles.pop(bundle_id, None)
                self._failed_at.pop(bundle_id, None)
                del self._held[bundle_id], self._info[bundle_id]
        return {bundle_id: self._info[bundle_id] for bundle_id in bundle_ids}

    def _load(self, bundle_id: str) -> None:
        with self._loading:  # one at a time: two would need the memory of both
            try:
                bundle = open_bundle(self._uri, bundle_id)
                stage = self._build(bundle)
            except Exception as error:  # noqa: BLE001 a Bundle that cannot be loaded takes no replica down
                problem = f"{type(error).__name__}: {error}"
                unexpected = None if isinstance(error, RecsysError) else error
                _log.error("%s: Bundle %s cannot be loaded: %s", self._name, bundle_id, problem, exc_info=unexpected)
                self._failed_at[bundle_id] = time.monotonic()
                self._info[bundle_id] = StageInfo(self._name, bundle_id, "failed", problem=problem)
            else:
                self._bundles[bundle_id] = bundle
                self._stages[bundle_id] = stage
                self._info[bundle_id] = StageInfo(self._name, bundle_id, "ready", present=stage is not None)


_open: WeakValueDictionary[tuple[str, str], Bundle] = WeakValueDictionary()
"""Bundles of this process that somebody has open: every version of catalogue and rules shares the parts of one"""
_opening = threading.RLock()


def is_store(uri: str) -> bool:
    """Whether ``uri`` is a store of Bundles, and not one Bundle."""
    return not (Location.of(uri) / MANIFEST).exists()


def wanted(uri: str) -> tuple[str, ...]:
    """Bundles of ``uri`` that may be asked for, the current one first.

    :raises BundleNotFoundError: when there is none.
    """
    if not is_store(uri):
        return (Bundle.open(uri).bundle_id,)
    store = BundleStore(uri)
    pointer = store.current()
    locate(uri)  # raises where the pointer was never set
    assert pointer is not None
    version = store.version()
    return tuple(live_id(bundle_id, *version) for bundle_id in pointer.wanted)


def fallbacks(uri: str) -> list[str]:
    """Bundles of ``uri`` that were current once and that it still holds, the latest first."""
    if not is_store(uri):
        return []
    store = BundleStore(uri)
    held = {manifest.bundle_id for manifest in store.list()}
    return [bundle_id for bundle_id in store.past() if bundle_id in held]


def open_bundle(uri: str, bundle_id: str) -> Bundle:
    """This Bundle of ``uri``, with the changes that the id names.

    :raises BundleError: when it cannot be opened, or ``uri`` is another Bundle.
    """
    if is_store(uri):
        with _opening:
            # The Bundle itself is checked whenever it is opened; what lies on it is not.
            under = beneath(bundle_id)
            base = None if under is None else _open.get((uri, under)) or open_bundle(uri, under)
            bundle = _open[uri, bundle_id] = BundleStore(uri).open_live(bundle_id, base)
            return bundle
    bundle = Bundle.open(uri)
    if bundle.bundle_id != bundle_id:
        raise BundleError(f"{uri} is Bundle {bundle.bundle_id}, not {bundle_id}")
    return bundle
