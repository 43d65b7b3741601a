"""What becomes of HAProxy's configuration: a real HAProxy, in front of a server that takes its time."""

from __future__ import annotations

import socketserver
import subprocess
import threading
import time
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx

from serve.fastpath import QUEUE_MS, fast_path, free_ports
from serve.http.wire import Problem

CONFIG = """global
    maxconn 4096
defaults
    mode http
    timeout connect 5s
    timeout client 5s
    timeout server 5s
    errorfile 503 {folder}/500.http
frontend prometheus
    bind :{metrics}
    http-request use-service prometheus-exporter
frontend http_frontend
    bind 127.0.0.1:{port}
    default_backend http-app
backend http-app
    server SERVE_REPLICA_gateway 127.0.0.1:{server} check inter 50ms
"""
"""the lines of Ray's that matter"""


class Slow(socketserver.StreamRequestHandler):
    """Answers when the test says so, with the header lines it was sent."""

    go = threading.Event()

    def handle(self) -> None:
        lines: list[bytes] = []
        while (line := self.rfile.readline()) not in (b"", b"\r\n"):
            lines.append(line)
        if lines and self.go.wait(30):
            body = b"".join(lines)
            self.wfile.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body)


@contextmanager
def haproxy(folder: Path, max_requests: int) -> Generator[tuple[str, socketserver.ThreadingTCPServer]]:
    """The URL of one that runs as Ray would start it, twice on the same file, and the server behind it."""
    port, metrics = free_ports(2)
    (folder / "500.http").write_bytes(b"HTTP/1.0 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n")
    wrapper = fast_path(folder, max_requests)["RAY_SERVE_HAPROXY_BINARY_PATH"]
    file = folder / "test.cfg"
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Slow) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        file.write_text(CONFIG.format(folder=folder, port=port, metrics=metrics, server=server.server_address[1]))
        subprocess.run([wrapper, "-c", "-f", str(file)], check=True)
        process = subprocess.Popen([wrapper, "-db", "-f", str(file)])
        try:
            url = f"http://127.0.0.1:{port}"
            Slow.go.set()
            deadline = time.monotonic() + 20
            while True:
                try:
                    httpx.get(url)
                    break
                except httpx.TransportError:
                    assert process.poll() is None and time.monotonic() < deadline
                    time.sleep(0.05)
            yield url, server
        finally:
            process.terminate()
            process.wait(20)
            server.shutdown()


def test_what_is_too_much_is_refused_early(tmp_path):
    refused: list[tuple[httpx.Response, float]] = []
    with haproxy(tmp_path, max_requests=2) as (url, server), httpx.Client() as client, ThreadPoolExecutor(5) as pool:
        Slow.go.clear()

        def ask(_: int) -> httpx.Response:
            started = time.perf_counter()
            response = client.get(url, timeout=30)
            if response.status_code == 503:
                refused.append((response, time.perf_counter() - started))
            return response

        asked = [pool.submit(ask, number) for number in range(4)]
        deadline = time.monotonic() + 20
        while len(refused) < 2:  # while nobody has been answered
            assert time.monotonic() < deadline
            time.sleep(0.01)
        Slow.go.set()
        answered = [each.result() for each in asked if each.result().status_code == 200]
        assert (len(answered), len(refused)) == (2, 2)
        for response, took_s in refused:
            assert took_s > QUEUE_MS / 1e3 * 0.9
            assert response.headers["retry-after"] == "1"
            assert response.headers["content-type"] == "application/problem+json"
            assert Problem.model_validate(response.json()).status == 503
        assert len({response.json()["request_id"] for response, _ in refused}) == 2
        assert b"x-request-disconnect-disabled: ?1" in answered[0].content

        server.shutdown()
        server.server_close()
        deadline = time.monotonic() + 20
        while (gone := client.get(url)).status_code != 503:  # until a health check has told that nobody is there
            assert time.monotonic() < deadline
        assert Problem.model_validate(gone.json()).status == 503


def test_what_was_open_to_every_interface_is_bound_to_loopback(tmp_path):
    with haproxy(tmp_path, max_requests=7):
        config = (tmp_path / "test.cfg").read_text()
    binds = [line.split()[1] for line in config.splitlines() if line.strip().startswith("bind")]
    assert len(binds) == 2 and all(bind.startswith("127.0.0.1:") for bind in binds)
    assert config.count("maxconn 7") == 1
    assert "http-request set-priority-class int(-100) if { path /healthz /readyz }" in config
