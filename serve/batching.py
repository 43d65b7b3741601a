"""Batches that form by themselves: what arrives while one batch is computed makes up the next.

An idle replica starts at once and a busy one batches by its load; nothing waits for company. ``serve.batch`` waits for
it, and inspects the method's signature at each call, which costs more than a short stage computes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

CallT = TypeVar("CallT")
ResultT = TypeVar("ResultT")


class Batcher(Generic[CallT, ResultT]):
    """Computes in the event loop, one batch after another, in order of arrival.

    Handing a batch to a thread takes a good part of a millisecond when the machine has to wake up for it, and a replica
    of one stage has nothing else to do meanwhile. Calls that arrive wait in their sockets. A stage that hangs stops the
    replica's health check, so that Serve replaces the replica; in a thread it would hang unseen.
    """

    def __init__(self, compute: Callable[[list[CallT]], list[ResultT]], max_size: int) -> None:
        """``compute`` gives one result per call, in order; it is given ``max_size`` calls at most."""
        self._compute = compute
        self._max_size = max_size
        self._waiting: deque[tuple[CallT, asyncio.Future[ResultT]]] = deque()

    async def submit(self, call: CallT) -> ResultT:
        """The result for ``call``; what ``compute`` raises is raised to every call of its batch."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ResultT] = loop.create_future()
        if not self._waiting:
            # Not now but in a moment: the others that have just been read from the sockets come along.
            loop.call_soon(self._take)
        self._waiting.append((call, future))
        return await future

    def _take(self) -> None:
        while self._waiting:
            first = [self._waiting.popleft() for _ in range(min(self._max_size, len(self._waiting)))]
            # A caller that has given up is not computed for.
            batch = [(call, future) for call, future in first if not future.done()]
            if batch:
                self._answer(batch)

    def _answer(self, batch: list[tuple[CallT, asyncio.Future[ResultT]]]) -> None:
        try:
            results = self._compute([call for call, _ in batch])
        except Exception as error:  # noqa: BLE001 whatever it is, the waiting callers must hear of it
            for _, future in batch:
                future.set_exception(error)
        else:
            for (_, future), result in zip(batch, results, strict=True):
                future.set_result(result)
