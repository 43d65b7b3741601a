"""What happens to every HTTP request before and after its route: an id, limits, and errors as RFC 9457 problems."""

from __future__ import annotations

import asyncio
import logging
import uuid

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.config import GatewayConfig
from serve.observe.observer import Observer
from serve.problems import PROBES, problem

_GONE = 499
"""status, in metrics, of a request whose caller did not wait for the answer, where the server watches for that"""
_WATCH_S = 0.02
_log = logging.getLogger(__name__)


class Limits:
    """Pure ASGI: numbers requests, refuses what is too much or too large, and answers 500 for what nobody expected."""

    def __init__(self, app: ASGIApp, config: GatewayConfig, observer: Observer) -> None:
        self._app = app
        self._observer = observer
        self._max_body_bytes = config.max_body_bytes
        self._max_in_flight = config.max_ongoing_requests
        self._retry_after = {"retry-after": str(config.retry_after_s)}
        self._in_flight = 0
        self._max_lag_s = config.max_lag_ms / 1e3
        self._lag_s = self._late_s = 0.0
        self._watching = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if not self._watching:
            self._watching = True
            self._watch()
        scope["request_id"] = uuid.uuid4().hex
        arrived, status = self._observer.arrived(), _GONE

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._answer(scope, receive, watched_send)
        finally:
            self._observer.left(scope, status, arrived)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = scope["request_id"]
        full, behind = self._in_flight >= self._max_in_flight, self._lag_s > self._max_lag_s
        if (full or behind) and scope["path"] not in PROBES:
            detail = (
                f"{self._in_flight} requests are being answered already" if full else "there is more to do than time"
            )
            detail += "; try again soon"
            await problem(503, detail, request_id, headers=self._retry_after)(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        self._in_flight += 1
        try:
            await self._app(scope, self._bounded(scope, receive), watched_send)
        except Exception:
            _log.exception("request %s: unexpected error", request_id, extra={"request_id": request_id})
            if started:
                raise
            detail = "an unexpected error; the log has it under this request_id"
            await problem(500, detail, request_id)(scope, receive, send)
        finally:
            self._in_flight -= 1

    def _watch(self, due: float | None = None) -> None:
        """How late this loop comes to what is due: those who have just arrived have waited as long, unseen.

        It has to be late twice in a row. Once may be a pause, after which there is time for all who waited.
        """
        loop = asyncio.get_running_loop()
        now = loop.time()
        late_s = 0.0 if due is None else now - due
        self._lag_s, self._late_s = min(late_s, self._late_s), late_s
        loop.call_at(now + _WATCH_S, self._watch, now + _WATCH_S)

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """``receive`` that refuses a body as soon as it is known to be too large, announced or not."""
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        received = 0

        async def bounded() -> Message:
            nonlocal received
            self._refuse_large(int(announced) if announced.isdigit() else 0)
            message = await receive()
            received += len(message.get("body", b""))
            self._refuse_large(received)
            return message

        return bounded

    def _refuse_large(self, num_bytes: int) -> None:
        if num_bytes > self._max_body_bytes:
            raise HTTPException(413, f"the body is larger than {self._max_body_bytes} bytes")
