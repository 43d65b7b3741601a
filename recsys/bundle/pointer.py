"""Where a store of Bundles points: the current Bundle, and the canary that some of the users get instead.

::

    current/00000001.json      one move of the pointer; the entry with the highest number holds
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from pydantic import Field

from recsys.bundle.location import Location
from recsys.bundle.manifest import MANIFEST
from recsys.config import StrictConfig
from recsys.errors import BundleCorruptError, BundleNotFoundError, ConfigError

_ENTRY = re.compile(r"\d{8}\.json")


class Canary(StrictConfig):
    """A Bundle that some of the users get before all do."""

    bundle_id: str
    share: float = Field(gt=0, le=1, description="of the users who get it")
    token: str
    """unique to this start of it"""


class Pointer(StrictConfig):
    """One entry of the pointer log."""

    number: int
    bundle_id: str
    previous: str | None
    """what a rollback returns to"""
    moved_at: datetime
    token: str
    """unique to the move, so that a writer recognises its own entry"""
    canary: Canary | None = None
    """what some of the users get instead of ``bundle_id``"""
    reason: str | None = None
    """why it was moved, where somebody said so"""

    @property
    def wanted(self) -> tuple[str, ...]:
        """Bundles that may be asked for: the current one, the canary, and the one before."""
        canary = None if self.canary is None else self.canary.bundle_id
        return tuple(each for each in (self.bundle_id, canary, self.previous) if each is not None)


def read_pointers(store: Location) -> Iterator[Pointer]:
    """All moves of the pointer of ``store``, newest first; none where it was never set.

    :raises BundleCorruptError: when an entry cannot be read.
    """
    folder = store / "current"
    for name in reversed([name for name in folder.names() if _ENTRY.fullmatch(name)]):
        where = str(folder / name)
        try:
            pointer = Pointer.parse(json.loads((folder / name).read()), where=where)
        except (ValueError, ConfigError) as error:
            raise BundleCorruptError(f"{where}: not a readable pointer: {error}", path=where) from error
        if str(entry(store, pointer.number)) != where:
            raise BundleCorruptError(f"{where}: says it is number {pointer.number}", path=where)
        yield pointer


def entry(store: Location, number: int) -> Location:
    """The file of one move."""
    return store / "current" / f"{number:08d}.json"


def folder_of(store: Location, bundle_id: str) -> Location:
    """Where ``store`` holds a Bundle, or would."""
    return store / "bundles" / bundle_id


def locate(uri: str | Path) -> Location:
    """The folder of one Bundle: ``uri`` itself, or the current Bundle of the store at ``uri``.

    :raises BundleNotFoundError: when there is neither.
    """
    location = Location.of(uri)
    if (location / MANIFEST).exists():
        return location
    pointer = next(read_pointers(location), None)
    if pointer is None:
        raise BundleNotFoundError(f"{location}: neither a Bundle nor a store with a current one", path=str(location))
    return folder_of(location, pointer.bundle_id)
