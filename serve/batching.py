"""Batches that form by themselves: what arrives while one batch is computed makes up the next.

An idle replica starts at once and a busy one batches by its load; nothing waits for company. (``serve.batch`` waits
for it, and inspects the method's signature at each call, which costs more than a short stage computes.)
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

CallT = TypeVar("CallT")
ResultT = TypeVar("ResultT")


class Batcher(Generic[CallT, ResultT]):
    """One batch at a time, in order of arrival. For one event loop."""

    def __init__(self, compute: Callable[[list[CallT]], list[ResultT]], max_size: int, *, inline: bool) -> None:
        """``compute`` gives one result per call, in order; ``inline`` runs it in the event loop, else in a thread."""
        self._compute = compute
        self._max_size = max_size
        self._executor = None if inline else ThreadPoolExecutor(1, thread_name_prefix="batch")
        self._waiting: deque[tuple[CallT, asyncio.Future[ResultT]]] = deque()
        self._task: asyncio.Task[None] | None = None

    async def submit(self, call: CallT) -> ResultT:
        """The result for ``call``; what ``compute`` raises is raised to every call of its batch."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ResultT] = loop.create_future()
        self._waiting.append((call, future))
        if self._task is None:
            self._task = loop.create_task(self._drain())
        return await future

    async def _drain(self) -> None:
        try:
            while self._waiting:
                # A caller that has given up is not computed for.
                size = min(self._max_size, len(self._waiting))
                batch = [self._waiting.popleft() for _ in range(size)]
                batch = [(call, future) for call, future in batch if not future.done()]
                if batch:
                    await self._answer(batch)
        finally:
            self._task = None

    async def _answer(self, batch: list[tuple[CallT, asyncio.Future[ResultT]]]) -> None:
        calls = [call for call, _ in batch]
        try:
            if self._executor is None:
                results = self._compute(calls)
            else:
                results = await asyncio.get_running_loop().run_in_executor(self._executor, self._compute, calls)
        except Exception as error:  # noqa: BLE001 whatever it is, the waiting callers must hear of it
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), result in zip(batch, results, strict=True):
            if not future.done():
                future.set_result(result)
