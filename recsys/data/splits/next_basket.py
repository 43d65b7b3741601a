"""One moment for all users, and whole baskets after it are foretold."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np

from recsys.data.splits.base import Borders, LogColumns, TimeSplit, refuse


class NextBasketSplit(TimeSplit):
    """A global split in time, evaluated as next basket: what a user took at one time is one target."""

    kind: Literal["next_basket"] = "next_basket"
    protocol: ClassVar[str] = "next_basket"

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls()

    def check_cut(self, log: LogColumns, borders_ms: Borders | None) -> None:
        super().check_cut(log, borders_ms)
        assert log.time is not None
        torn = np.zeros(len(log.user), bool)
        torn[1:] = (log.user[1:] == log.user[:-1]) & (log.time[1:] == log.time[:-1]) & (log.split[1:] != log.split[:-1])
        refuse(torn, log, "is in another part than the rest of its basket")
