"""Callers that wait for slow work: so many at a time, and whoever comes then is told to come again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar

from recsys.errors import StageOverloadedError

ResultT = TypeVar("ResultT")


class Turns:
    """Runs work in threads. For one event loop."""

    def __init__(self, what: str, stage: str, executor: Executor | None = None, *, max_waiting: int = 32) -> None:
        """``what`` errors say of the callers ("searches wait"), and ``stage`` as they name it; ``executor`` None is
        that of the loop.
        """
        self._what = what
        self._stage = stage
        self._executor = executor
        self._max_waiting = max_waiting
        self._num_waiting = 0

    async def run(self, work: Callable[[], ResultT]) -> ResultT:
        """What ``work`` returns, once it has had its turn.

        :raises StageOverloadedError: when too many wait already.
        """
        if self._num_waiting >= self._max_waiting:
            raise StageOverloadedError(f"{self._num_waiting} {self._what} already", stage=self._stage)
        self._num_waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, work)
        finally:
            self._num_waiting -= 1
