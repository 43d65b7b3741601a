"""Serve a Bundle, or a store of Bundles, on this machine until Ctrl-C.

Sets the fast path's environment before Ray is imported, starts a Ray of its own (or joins the one at ``--address``),
deploys, waits until a recommendation can be asked for, and on the way out ends every process it started.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from recsys.bundle.manifest import MANIFEST
from recsys.cli import command, readable_errors
from recsys.errors import ConfigError
from recsys.libraries import need
from serve import fastpath
from serve.access.keys import SCOPES, KeyFile, add_key
from serve.config import ServeConfig

_SESSION = "RECSYS_SERVE_SESSION"
_UNAUTHORIZED = 401
_END_S = 10.0
"""how long processes may take to end by themselves"""


@contextmanager
def serving(
    config: ServeConfig,
    *,
    port: int = 8000,
    num_cpus: int | None = None,
    address: str | None = None,
    proxy_location: Literal["EveryNode", "HeadOnly"] = "EveryNode",
) -> Generator[str, None, None]:
    """Inside, ``config`` is served at the URL that is yielded, on the loopback interface.

    A Ray is started with ``num_cpus`` (None: those of the machine) and ended with everything it started; with
    ``address`` a running one is joined, which must have been started with the variables of
    :func:`serve.fastpath.fast_path` (a gateway gets as many requests as these say), and only the application is taken
    down. Otherwise Ray must not have been imported before. ``proxy_location`` HeadOnly is for nodes that share an IP
    address, and with it the port.
    """
    need("ray", "serving", extra="serve")
    need("fastapi", "serving over HTTP", extra="serve")
    _refuse_taken(port)
    folder = Path(tempfile.mkdtemp(prefix="recsys-", dir="/tmp" if Path("/tmp").is_dir() else None))  # noqa: S108 a socket's path is short
    session = uuid.uuid4().hex
    os.environ[_SESSION] = session
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    environment = fastpath.fast_path(folder, config.gateway.max_ongoing_requests)
    if address is None:
        # The whole Ray ends with this process, so nobody else's balancer needs time to notice.
        environment["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "1"
    fastpath.apply(environment)
    import ray
    from ray import serve

    from serve.app import APP_NAME, build

    http_options = {"host": fastpath.LOOPBACK, "port": port}
    try:
        if address is None:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                include_dashboard=False,
                log_to_driver=False,
            )
        else:
            ray.init(address=address, log_to_driver=False)
        serve.start(proxy_location=proxy_location, http_options=http_options)
        try:
            serve.run(build(config.model_dump(mode="json")), name=APP_NAME, route_prefix="/")
            url = f"http://{fastpath.LOOPBACK}:{port}"
            _wait_until_ready(url, config.gateway.ready_timeout_s)
            yield url
        finally:
            serve.delete(APP_NAME) if address is not None else serve.shutdown()
    finally:
        ray.shutdown()
        if address is None:
            _end_processes(session)
        shutil.rmtree(folder, ignore_errors=True)


def main(
    bundle: Annotated[str, typer.Option(help="Bundle to serve: folder, store or fsspec URI")],
    topology: Annotated[str, typer.Option(help="graph: stages scale apart; fused: all in each replica")] = "graph",
    port: Annotated[int, typer.Option(help="HTTP port on the loopback interface", min=1, max=65535)] = 8000,
    events: Annotated[
        str, typer.Option(help="file of the embedded event store; left out: events.sqlite beside the store of Bundles")
    ] = "",
    keys: Annotated[
        str, typer.Option(help="file of API keys, see recsys keys; left out: keys.json beside the events")
    ] = "",
    open_: Annotated[bool, typer.Option("--open", help="ask nobody on this machine for an API key")] = False,
    num_cpus: Annotated[int, typer.Option(help="CPUs of a Ray started here; 0 for all of this machine", min=0)] = 0,
    address: Annotated[str, typer.Option(help="join the Ray at this address instead of starting one")] = "",
) -> None:
    """Serve recommendations until Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with readable_errors():
        try:
            events_path = Path(events).absolute() if events else _beside(bundle)
            keys_path = Path(keys).absolute() if keys else events_path.with_name("keys.json")
            tree = {
                "bundle_uri": bundle if "://" in bundle else str(Path(bundle).absolute()),
                "topology": topology,
                "event_store": {"kind": "sqlite", "path": str(events_path)},
                "access": {"kind": "open"} if open_ else {"kind": "keys", "file": str(keys_path)},
            }
            if not open_ and keys_path.exists():
                KeyFile.read(keys_path)  # refused now, and not by a gateway in a minute
            elif not open_:
                key = add_key(keys_path, "first", SCOPES)
                sys.stdout.write(f"{keys_path} has its first API key; it may do everything and is shown once:\n{key}\n")
            config = ServeConfig.parse(tree, where="command line")
            with serving(config, port=port, num_cpus=num_cpus or None, address=address or None) as url:
                sys.stdout.write("".join(f"metrics: {each}\n" for each in metrics_urls()) + f"ready: {url}/docs\n")
                sys.stdout.flush()
                signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has put its own in between
                while True:
                    time.sleep(3600)
        except KeyboardInterrupt:
            sys.stdout.write("stopped\n")


def metrics_urls() -> list[str]:
    """Where Prometheus finds the metrics of each node; inside :func:`serving`."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    return [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in alive]


def _beside(bundle: str) -> Path:
    """Events belong to a run: each store of Bundles has its own, beside it.

    :raises ConfigError: for a store that is no folder of this machine.
    """
    if "://" in bundle:
        raise ConfigError("say with --events where events are kept: the Bundle is not in a folder of this machine")
    path = Path(bundle).absolute()
    store = path.parent if (path / MANIFEST).exists() else path
    return store.parent / "events.sqlite"


def _refuse_taken(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((fastpath.LOOPBACK, port))
        except OSError as error:
            raise ConfigError(
                f"port {port} is taken: {error.strerror}; choose another with --port", port=port
            ) from error


def _wait_until_ready(url: str, timeout_s: float) -> None:
    import httpx

    deadline = time.monotonic() + timeout_s
    while True:
        try:
            answer = httpx.get(f"{url}/readyz", timeout=5.0)
            if answer.is_success or answer.status_code == _UNAUTHORIZED:
                return  # a gateway that asks for a key is up, and it is up once it is proven
            seen = f"{answer.status_code}: {answer.text[:200]}"
        except httpx.TransportError as error:
            seen = str(error)
        if time.monotonic() > deadline:
            raise ConfigError(f"{url} did not become ready within {timeout_s:.0f} s; last seen: {seen}")
        time.sleep(0.2)


def _end_processes(session: str) -> None:
    """End what still lives of this session: an HAProxy outlives the actor that started it when that is killed."""
    deadline = time.monotonic() + _END_S
    while left := processes_marked(_SESSION, session):
        number = signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL
        for pid in left:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue
        time.sleep(0.2)


def processes_of_session() -> list[int]:
    """Every process that works for what is served, but this one; inside :func:`serving`."""
    return processes_marked(_SESSION, os.environ[_SESSION])


def processes_marked(variable: str, value: str) -> list[int]:
    """Every process but this one that was started with this in its environment."""
    mark = f"{variable}={value}".encode()
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.name) != os.getpid() and mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # it ended meanwhile, or is somebody else's
            continue
    return found


app = command(main)

if __name__ == "__main__":
    app()
