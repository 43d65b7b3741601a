"""Train, publish and serve on real data, and ask for a recommendation. ``make demo`` runs it on MovieLens-small."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.cli import show_progress
from jobs.config import JobConfig
from jobs.pipeline import run
from jobs.steps import publish
from recsys.bundle.reader import Bundle
from recsys.cli import command, readable_errors
from recsys.config import load_config

console = Console(markup=False)
NUM_SHOWN = 10


def demo(
    config: Annotated[Path, typer.Option(help="YAML configuration of the pipeline")] = Path(
        "configs/movielens_small.yaml"
    ),
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="override one key of the configuration", metavar="K=V")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="exit after the first answer instead of staying up")] = False,
    topology: Annotated[str, typer.Option(help="graph (a deployment per stage) or fused (one replica)")] = "graph",
    port: Annotated[int, typer.Option(help="HTTP port on 127.0.0.1")] = 8000,
) -> None:
    """Run every step (finished ones are reused), serve the Bundle and show one recommendation."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    show_progress()
    started = time.perf_counter()
    with readable_errors():
        settings = load_config(JobConfig, config, overrides=set_ or ())
        published = run(settings)[publish.STEP]
    command = [sys.executable, "-m", "serve.run", "--bundle", published.store]
    command += ["--topology", topology, "--port", str(port), "--open"]
    command += ["--events", f"{settings.home}/events.sqlite"]
    log_path = Path(settings.home) / "serve.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("w") as log:
        # Its own process group: Ctrl-C reaches it through us, once, and it is stopped in any case.
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            url = f"http://127.0.0.1:{port}"
            with console.status(f"starting the graph at {url} (log: {log_path})"):
                wait_until_ready(server, url, log_path)
            show(url, typical_user(published.bundle()))
            console.print(f"first answer {time.perf_counter() - started:.1f} s after the start", highlight=False)
            if not once:
                console.print(
                    Text.assemble("\nThe graph stays up at ", (url, "bold"), f" (try {url}/docs). Ctrl-C ends it.")
                )
                server.wait()
        except KeyboardInterrupt:
            console.print("\nstopping")
        finally:
            stop(server)


def wait_until_ready(server: subprocess.Popen[bytes], url: str, log_path: Path, timeout_s: float = 180.0) -> None:
    """Return once ``/readyz`` answers 200; show the server's log where it ends before."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            if httpx.get(f"{url}/readyz", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.2)
            continue
        time.sleep(0.2)
    tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-30:])
    console.print(Text.assemble(("the graph did not become ready", "red"), f"; the end of {log_path}:\n{tail}"))
    raise typer.Exit(1)


def stop(server: subprocess.Popen[bytes], timeout_s: float = 60.0) -> None:
    """Ask the server to end; one that does not is ended with its whole process group."""
    if server.poll() is None:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def typical_user(bundle: Bundle) -> str:
    """The id of a user of middling activity."""
    histories = bundle.histories()
    order = sorted(range(len(histories)), key=lambda row: len(histories["item_ids"][row]))
    return histories["user_id"][order[len(order) // 2]].as_py()


def show(url: str, user_id: str) -> None:
    """Print what is known of a user and what is recommended."""
    with httpx.Client(base_url=url, timeout=30) as client:
        known = answer(client.get(f"/v1/users/{user_id}"))
        newest = known["history"][-NUM_SHOWN:][::-1]
        table = Table(title=f"user {user_id}: the newest of {len(known['history'])} events", show_edge=False)
        for column in ("event", "value", "title"):
            table.add_column(column)
        for entry in newest:
            value = "" if entry.get("value") is None else f"{entry['value']:g}"
            table.add_row(entry["event"], value, entry.get("title") or entry["item_id"])
        console.print(table)
        slate = answer(client.post("/v1/recommend", json={"user_id": user_id, "top_k": NUM_SHOWN}))
        table = Table(title=f"recommended over {url}/v1/recommend", show_edge=False)
        for column in ("rank", "title", "score", "sources", "scores by stage"):
            table.add_column(column)
        for item in slate["items"]:
            stages = "  ".join(f"{stage} {score:.3f}" for stage, score in item["stage_scores"].items())
            table.add_row(str(item["rank"]), item["title"], f"{item['score']:.3f}", ", ".join(item["sources"]), stages)
        console.print(table)
        timings = "  ".join(f"{stage} {value:.1f}" for stage, value in slate["timings_ms"].items())
        console.print(f"milliseconds: {timings}   bundle {slate['bundle_id'][:12]}   degraded: {slate['degraded']}")


def answer(response: httpx.Response) -> dict[str, Any]:
    """The JSON body of a successful response."""
    response.raise_for_status()
    return response.json()


app = command(demo)

if __name__ == "__main__":
    app()
