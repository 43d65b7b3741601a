"""One moment for all users, and every positive after it is foretold."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

from recsys.data.splits.base import TimeSplit


class GlobalTimeSplit(TimeSplit):
    """A global split in time, evaluated as rolling next item: every positive is a target, given all before it."""

    kind: Literal["global_time"] = "global_time"
    protocol: ClassVar[str] = "rolling_next_item"

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls()
