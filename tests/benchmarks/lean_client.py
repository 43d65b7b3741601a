"""An HTTP client that costs next to nothing: one keep-alive connection, one write and few reads per call.

httpx takes most of a millisecond per request on a small machine, which would be counted as the server's.
"""

from __future__ import annotations

import re
import socket
import time
from typing import Self
from urllib.parse import urlsplit

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class LeanClient:
    """For one caller at a time; the server must announce the length of its answers.

    Like any HTTP client it connects anew where the server has closed the kept connection, as a proxy does whose
    configuration has changed; such a call is not repeated more than once.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "", parts.port or 80)
        self._host = parts.netloc.encode()
        self._connect()

    def post(self, path: str, body: bytes) -> tuple[bytes, float]:
        """The body of the answer, which must be a 200, and the milliseconds that it took."""
        head = b"POST %s HTTP/1.1\r\nhost: %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        message = head % (path.encode(), self._host, len(body)) + body
        started = time.perf_counter()
        try:
            self._socket.sendall(message)
            received = self._receive()
        except ConnectionError:
            self._connect()
            self._socket.sendall(message)
            received = self._receive()
        while b"\r\n\r\n" not in received:
            received += self._receive()
        headers, _, answer = received.partition(b"\r\n\r\n")
        found = _LENGTH.search(headers)
        assert found is not None, headers
        while len(answer) < int(found[1]):
            answer += self._receive()
        elapsed_ms = (time.perf_counter() - started) * 1e3
        assert headers.startswith(b"HTTP/1.1 200 "), received[:500]
        return answer, elapsed_ms

    def _connect(self) -> None:
        self._socket = socket.create_connection(self._address, timeout=30)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _receive(self) -> bytes:
        received = self._socket.recv(1 << 16)
        if not received:
            raise ConnectionError("the server closed the connection")
        return received

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.close()
