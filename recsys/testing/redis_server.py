"""A real Redis for tests: the machine's ``redis-server``, on a port of its own, ended with the test."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from recsys.events.redis import SAMPLE_URL

_START_S = 20.0


@dataclass
class RedisServer:
    """One server, which a test may kill and start again on the same files."""

    folder: Path
    settings: dict[str, str] = field(default_factory=dict)
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def manifest(self) -> Path:
        """Lists the files that the append-only file consists of (Redis 7)."""
        return self.folder / "appendonlydir" / "appendonly.aof.manifest"

    def start(self) -> None:
        """Until it answers."""
        import redis

        if not self.port:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.port = probe.getsockname()[1]
        settings = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "dir": str(self.folder),
            "appendonly": "yes",
            "appendfsync": "always",
            "aof-load-truncated": "no",
            "save": "",
            **self.settings,
        }
        words = [word for name, value in settings.items() for word in (f"--{name}", value)]
        with (self.folder / "redis.log").open("ab") as log:
            if self.manifest.exists():  # a crash may have cut the last transaction
                fix = ["redis-check-aof", "--fix", str(self.manifest)]
                subprocess.run(fix, input=b"y\n" * 9, stdout=log, stderr=log, check=True)
            self.process = subprocess.Popen(["redis-server", *words], stdout=log, stderr=log)
        deadline = time.monotonic() + _START_S
        while True:
            try:
                with redis.Redis(port=self.port) as client:
                    client.ping()
            except (redis.ConnectionError, redis.BusyLoadingError):
                assert self.process.poll() is None, (self.folder / "redis.log").read_text()
                assert time.monotonic() < deadline, "redis-server does not answer"
                time.sleep(0.02)
            else:
                return

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@contextmanager
def redis_server(folder: Path, **settings: str) -> Generator[RedisServer, None, None]:
    """A server with its files in ``folder``; the test fails where the machine has none."""
    if shutil.which("redis-server") is None:
        pytest.fail("redis-server is not on PATH: `make .venv/bin/redis-server` puts one into .venv/bin", pytrace=False)
    folder.mkdir(parents=True, exist_ok=True)
    server = RedisServer(folder, settings)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def sample_server(folder: Path) -> Generator[None, None, None]:
    """A server for samples of kinds, unless the environment names one; none where the machine has none."""
    if SAMPLE_URL in os.environ or shutil.which("redis-server") is None:
        yield
        return
    with redis_server(folder) as server:
        os.environ[SAMPLE_URL] = server.url
        try:
            yield
        finally:
            del os.environ[SAMPLE_URL]
