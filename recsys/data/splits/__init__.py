"""How a log is cut into train, validation and test, one file per kind."""

from __future__ import annotations

from typing import Annotated

from recsys.data.splits.base import SplitPolicy, check_not_empty
from recsys.kinds import Kinds

KINDS: Kinds[SplitPolicy] = Kinds(
    "splits",
    {
        "global_time": "recsys.data.splits.global_time:GlobalTimeSplit",
        "leave_one_out": "recsys.data.splits.leave_one_out:LeaveOneOutSplit",
        "next_basket": "recsys.data.splits.next_basket:NextBasketSplit",
    },
)
AnySplit = Annotated[SplitPolicy, KINDS]

__all__ = ["KINDS", "AnySplit", "SplitPolicy", "check_not_empty"]
