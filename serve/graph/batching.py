"""Batches that form by themselves: what arrives while one batch is computed makes up the next.

An idle replica starts at once and a busy one batches by its load; nothing waits for company. ``serve.batch`` waits for
it, and inspects the method's signature at each call, which costs more than a short stage computes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from recsys.errors import StageError

CallT = TypeVar("CallT")
ResultT = TypeVar("ResultT")


class Batcher(Generic[CallT, ResultT]):
    """Computes in the event loop, one batch after another, in order of arrival.

    Handing a batch to a thread takes a good part of a millisecond when the machine has to wake up for it, and a replica
    of one stage has nothing else to do meanwhile: calls that arrive wait in their sockets. Between two batches the loop
    has its turn, so that answers leave and callers that gave up are not computed for.
    """

    def __init__(self, compute: Callable[[list[CallT]], Sequence[ResultT | Exception]], max_size: int) -> None:
        """``compute`` gives one result per call, in order, or the exception to raise to that call alone; it is given
        ``max_size`` calls at most.
        """
        self._compute = compute
        self._max_size = max_size
        self._waiting: deque[tuple[CallT, asyncio.Future[ResultT]]] = deque()
        self._scheduled = False

    async def submit(self, call: CallT) -> ResultT:
        """The result for ``call``; what ``compute`` raises is raised to every call of its batch."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ResultT] = loop.create_future()
        self._waiting.append((call, future))
        if not self._scheduled:
            # Not now but in a moment: the others that have just been read from the sockets come along.
            self._scheduled = True
            loop.call_soon(self._take, loop)
        return await future

    @property
    def num_waiting(self) -> int:
        """Calls that wait for their batch."""
        return len(self._waiting)

    def _take(self, loop: asyncio.AbstractEventLoop) -> None:
        batch: list[tuple[CallT, asyncio.Future[ResultT]]] = []
        while self._waiting and len(batch) < self._max_size:
            call, future = self._waiting.popleft()
            if not future.done():
                batch.append((call, future))
        try:
            if batch:
                self._answer(batch)
        finally:  # whatever became of this batch, the next one is computed
            self._scheduled = bool(self._waiting)
            if self._scheduled:
                # In two steps, for in between the loop looks at its sockets and at its timers.
                loop.call_soon(loop.call_soon, self._take, loop)

    def _answer(self, batch: list[tuple[CallT, asyncio.Future[ResultT]]]) -> None:
        try:
            results = self._compute([call for call, _ in batch])
            _check(len(results), len(batch))
        except BaseException as error:
            for _, future in batch:
                future.set_exception(_raisable(error))
            if not isinstance(error, Exception):
                raise
            return
        for (_, future), result in zip(batch, results, strict=True):
            if isinstance(result, Exception):
                future.set_exception(_raisable(result))
            else:
                future.set_result(result)


def _check(num_results: int, num_calls: int) -> None:
    if num_results != num_calls:
        raise StageError(f"{num_results} results for {num_calls} calls")


def _raisable(error: BaseException) -> BaseException:
    """``error``, or what stands for it where a future does not take it."""
    return StageError(f"StopIteration: {error}") if isinstance(error, StopIteration) else error
