"""The last positive of each user is foretold, whenever it was."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from recsys.data.dataset import Split
from recsys.data.splits.base import Borders, Labels, LogColumns, SplitPolicy
from recsys.errors import LeakageError
from recsys.types import BoolArray, Int32Array, Int64Array


class LeaveOneOutSplit(SplitPolicy):
    """The last positive of each user is test, the one before it validation.

    From a user's validation positive on an interaction is validation, from the test positive on it is test, so what
    is not a positive never goes back behind a target. Users with fewer positives than ``min_positives`` are train
    only. Needs order, not time.
    """

    kind: Literal["leave_one_out"] = "leave_one_out"
    protocol: ClassVar[str] = "leave_one_out"
    min_positives: int = Field(
        default=3, ge=3, description="Positives a user needs to be evaluated (3 or more: one stays for training)."
    )

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls()

    def assign(self, user_idx: Int32Array, timestamp_ms: Int64Array | None, positive: BoolArray) -> Labels:
        counts = np.bincount(user_idx[positive], minlength=int(user_idx.max(initial=-1)) + 1)
        done = np.cumsum(positive) - (np.cumsum(counts) - counts)[user_idx]
        """positives of the user up to and with each row"""
        left = counts[user_idx] - done
        split = (left <= 1).astype(np.int8) + (left <= 0)
        return Labels(np.where(counts[user_idx] >= self.min_positives, split, Split.TRAIN).astype(np.int8))

    def check_cut(self, log: LogColumns, borders_ms: Borders | None) -> None:
        num_users = int(log.user.max(initial=-1)) + 1
        by_split = [np.bincount(log.user[log.positive & (log.split == s)], minlength=num_users) for s in Split]
        train, valid, test = by_split
        evaluated = np.bincount(log.user[log.split != Split.TRAIN], minlength=num_users) > 0
        wrong = evaluated & ((valid != 1) | (test != 1) | (train < self.min_positives - 2))
        if wrong.any():
            user = int(np.flatnonzero(wrong)[0])
            raise LeakageError(
                f"leave-one-out: user_idx {user} has {train[user]} training, {valid[user]} validation and {test[user]} "
                f"test positives; it must be at least {self.min_positives - 2}, one and one",
                user_idx=user,
            )
