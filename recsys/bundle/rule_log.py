"""By which reranking rules the Bundles of a store answer since somebody changed them: a log beside the Bundles.

::

    rules/00000001.json   one change: the whole list of rules, who made it, when and why

A version is the number of a file; the highest holds, for whatever Bundle is current. Writing the next number succeeds
for one writer only, and each says which one it follows, so that nobody overwrites what they have not seen. What the
rules mean is not known here: they are plain values.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AwareDatetime, Field

from recsys.bundle.location import Location
from recsys.config import StrictConfig
from recsys.errors import BundleCorruptError, BundleError, ChangeConflictError, ConfigError
from recsys.ids import Text

MAX_BYTES = 1 << 19
"""longest list of rules, as JSON (bytes)"""
KEPT_CHANGES = 500
"""so many changes can still be read; older ones are removed"""
Note = Annotated[Text, Field(max_length=1000)]
"""why somebody made a change"""
_NAME = re.compile(r"(\d{8})\.json")
_log = logging.getLogger(__name__)


class RuleChange(StrictConfig):
    """One change, kept as it is."""

    version: int = Field(ge=1)
    at: AwareDatetime
    by: Text
    """name of the API key, or what else made it"""
    rules: tuple[dict[str, Any], ...] | None
    """all rules from then on, in order; None for those of the Bundle"""
    note: Note | None = None
    token: str
    """unique to the change, so that a writer recognises its own"""


class RuleLog:
    """Changes of the rules of a store. Holds no state of its own: make as many as you like."""

    def __init__(self, root: Location) -> None:
        """``root`` is the folder of the log; it need not exist."""
        self._root = root

    def versions(self) -> list[int]:
        """Those that are kept, ascending."""
        return [int(match[1]) for name in self._root.names() if (match := _NAME.fullmatch(name))]

    def version(self) -> int:
        """The last version; 0 where nothing was ever changed."""
        return max(self.versions(), default=0)

    def read(self, version: int) -> RuleChange:
        """The change that made ``version``.

        :raises BundleCorruptError: when it is missing or cannot be read.
        """
        where = self._root / f"{version:08d}.json"
        try:
            change = RuleChange.parse(json.loads(where.read()), where=str(where))
        except (FileNotFoundError, ValueError, ConfigError) as error:
            raise BundleCorruptError(f"{where}: not a readable change of rules: {error}", path=str(where)) from error
        if change.version != version:
            raise BundleCorruptError(f"{where}: says it is version {change.version}", path=str(where))
        return change

    def append(
        self, rules: Sequence[Mapping[str, Any]] | None, *, after: int, by: str, note: str | None = None
    ) -> RuleChange:
        """Let ``rules`` (plain values; None: those of the Bundle) follow on version ``after``. Durable when it returns.

        :raises ChangeConflictError: when another version is the last one.
        :raises ConfigError: when they are too large, or ``note`` is too long or no text.
        :raises BundleError: when it cannot be written.
        """
        found = self.version()
        if found != after:
            raise _conflict(self._root, found, after)
        change = RuleChange.parse(
            {
                "version": after + 1,
                "at": datetime.now(UTC),
                "by": by,
                "rules": None if rules is None else [dict(rule) for rule in rules],
                "note": note,
                "token": uuid.uuid4().hex,
            },
            where="change of the rules",
        )
        content = (json.dumps(change.model_dump(mode="json"), indent=1) + "\n").encode()
        if len(content) > MAX_BYTES:
            raise ConfigError(f"the rules are {len(content)} bytes long as JSON, more than {MAX_BYTES}")
        where = self._root / f"{change.version:08d}.json"
        try:
            written = where.create(content)
        except OSError as error:
            raise BundleError(f"{where} cannot be written: {error}") from error
        if not written:
            raise _conflict(self._root, self.version(), after)
        self._forget(change.version - KEPT_CHANGES)
        return change

    def _forget(self, last: int) -> None:
        """Remove the versions up to ``last``. The change is durable by now, so nothing may fail because of them."""
        try:
            for old in self.versions():
                if old <= last:
                    with suppress(FileNotFoundError):  # another writer does the same
                        (self._root / f"{old:08d}.json").remove()
        except OSError as error:
            _log.warning("%s: old changes cannot be removed: %s", self._root, error)


def _conflict(root: Location, found: int, after: int) -> ChangeConflictError:
    return ChangeConflictError(
        f"{root}: the rules are at version {found}, not {after}: look at what was changed meanwhile and try again",
        found=found,
        expected=after,
    )
