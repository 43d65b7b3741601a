"""An open-loop load generator in a process of its own: requests leave when they are due, whatever became of the others.

Latency counts from the moment a request was due, not from when it left, so a server that stalls cannot hide it (what
Gil Tene calls coordinated omission). Arrivals are a Poisson process.

    python tests/benchmarks/load.py --url http://127.0.0.1:8000/v1/recommend --rate 50 --bodies bodies.jsonl
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import numpy as np
import typer

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Connection(asyncio.Protocol):
    """One kept connection: a request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, found, body = self._received.partition(b"\r\n\r\n")
        if not found or self._answer is None:
            return
        if self._answer.done():
            return
        length = _LENGTH.search(head)
        if length is None:  # a refusal by a proxy, whose end is not told: the status is all that is wanted of it
            self._answer.set_result((int(head[9:12]), b""))
            self.close()
        elif len(body) >= int(length[1]):
            self._received = body[int(length[1]) :]
            self._answer.set_result((int(head[9:12]), body[: int(length[1])]))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("closed by the server"))

    @property
    def usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, message: bytes, timeout_s: float) -> tuple[int, bytes]:
        """Status and body."""
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(message)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._answer
        except TimeoutError:
            self.close()
            raise
        finally:
            self._answer = None

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class Load:
    """Sends ``bodies`` in turn to ``url``."""

    def __init__(self, url: str, bodies: list[bytes], headers: dict[str, str], timeout_s: float, every: int) -> None:
        """One answer in ``every`` is read for its timings and what was degraded."""
        parts = urlsplit(url)
        self._address = parts.hostname or "", parts.port or 80
        self._timeout_s = timeout_s
        self._every = every
        fields = {"host": parts.netloc, "content-type": "application/json", **headers}
        head = f"POST {parts.path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._messages = [head.encode() + b"content-length: %d\r\n\r\n" % len(body) + body for body in bodies]
        self._free: list[Connection] = []
        self.number: list[int] = []
        self.latency_ms: list[float] = []
        self.status: list[int] = []
        self.at: list[float] = []
        self.degraded: list[bool] = []
        self.read: list[bool] = []
        """whether the answer was looked at: only then is it known whether it is degraded"""
        self.timings: list[dict[str, float]] = []
        self.num_connections = 0
        self.why: list[str] = []
        """of each request without an answer, what went wrong, and of each that failed, its status"""

    async def send(self, number: int, due: float) -> None:
        """One request; 0 stands for the status of one that got no answer."""
        try:
            connection = await self._connection()
            status, body = await connection.ask(self._messages[number % len(self._messages)], self._timeout_s)
        except (OSError, TimeoutError) as error:
            status, body, connection = 0, b"", None
            self.why.append(f"{type(error).__name__}: {error}")
        else:
            if status not in (200, 503):
                self.why.append(str(status))
        self.number.append(number)
        self.latency_ms.append((time.perf_counter() - due) * 1e3)
        self.status.append(status)
        self.at.append(time.monotonic())
        self.degraded.append(False)
        self.read.append(status == 200 and number % self._every == 0)
        if connection is not None and connection.usable:
            self._free.append(connection)
        if self.read[-1]:
            answer = json.loads(body)
            self.degraded[-1] = bool(answer.get("degraded"))
            self.timings.append(answer.get("timings_ms", {}))

    async def _connection(self) -> Connection:
        while self._free:
            connection = self._free.pop()
            if connection.usable:
                return connection
        self.num_connections += 1
        _, connection = await asyncio.get_running_loop().create_connection(Connection, *self._address)
        return connection

    def close(self) -> None:
        for connection in self._free:
            connection.close()


async def open_loop(load: Load, rate: float, seconds: float, seed: int) -> None:
    """``rate`` requests per second on average for ``seconds``, and then until the last is answered."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, int(rate * seconds * 1.5) + 10)
    due = np.cumsum(gaps)
    due = due[due < seconds] + time.perf_counter() + 0.05
    running: set[asyncio.Task[None]] = set()
    for number, moment in enumerate(due.tolist()):
        wait_s = moment - time.perf_counter()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        task = asyncio.create_task(load.send(number, moment))
        running.add(task)
        task.add_done_callback(running.discard)
    if running:
        await asyncio.wait(running)


async def closed_loop(load: Load, callers: int, seconds: float) -> None:
    """``callers`` that each wait for an answer before they ask again: what a server can do at most."""
    end = time.perf_counter() + seconds

    async def caller(first: int) -> None:
        number = first
        while time.perf_counter() < end:
            await load.send(number, time.perf_counter())
            number += callers

    await asyncio.gather(*map(caller, range(callers)))


def main(
    url: Annotated[str, typer.Option(help="where requests are posted to")],
    bodies: Annotated[Path, typer.Option(help="JSON bodies, one per line, sent in turn")],
    rate: Annotated[float, typer.Option(help="requests per second; 0 with --callers")] = 0,
    callers: Annotated[int, typer.Option(help="closed loop of so many callers instead")] = 0,
    seconds: float = 10,
    key: Annotated[str, typer.Option(help="API key")] = "",
    timeout_s: float = 10,
    seed: int = 0,
    every: Annotated[int, typer.Option(help="one answer in so many is read")] = 10,
) -> None:
    """Print what was measured as JSON."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    load = Load(url, bodies.read_bytes().splitlines(), headers, timeout_s, every)
    started, cpu = time.perf_counter(), time.process_time()
    asyncio.run(open_loop(load, rate, seconds, seed) if rate else closed_loop(load, callers, seconds))
    took_s = time.perf_counter() - started
    names = {name for timing in load.timings for name in timing}  # an answer lacks those of stages that were skipped
    stages = {name: [timing[name] for timing in load.timings if name in timing] for name in sorted(names)}
    json.dump(
        {
            "rate": rate,
            "seconds": took_s,
            "cpu_s": time.process_time() - cpu,
            "num_connections": load.num_connections,
            "number": load.number,
            "latency_ms": load.latency_ms,
            "status": load.status,
            "degraded": load.degraded,
            "read": load.read,
            "why": load.why,
            "at": load.at,
            "timings_ms": {name: float(np.median(values)) for name, values in stages.items()},
        },
        sys.stdout,
    )


if __name__ == "__main__":
    typer.run(main)
