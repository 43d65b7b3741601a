"""API keys of the gateway: add, rotate, revoke and list them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from recsys.cli import group, readable_errors
from serve.access.keys import SCOPES, KeyFile, add_key, revoke_keys, rotate_keys

app = group("API keys of the gateway.")
File = Annotated[Path, typer.Option("--file", help="the file of hashes")]


@app.command()
def add(
    name: Annotated[str, typer.Argument(help="whose key it is")],
    file: File = Path("keys.json"),
    scope: Annotated[list[str], typer.Option(help=f"some of {', '.join(SCOPES)}; repeat the option")] = ["read"],  # noqa: B006 typer reads it once
    requests_per_s: Annotated[float, typer.Option(help="rate; 0 is unlimited", min=0)] = 0,
    burst: Annotated[int, typer.Option(help="requests that may come at once", min=1)] = 20,
    days: Annotated[float, typer.Option(help="days until it expires; 0 is never", min=0)] = 0,
) -> None:
    """Add a key and show it, this once."""
    expires_at = datetime.now(UTC) + timedelta(days=days) if days else None
    settings = {"requests_per_s": requests_per_s or None, "burst": burst, "expires_at": expires_at}
    _say(lambda: add_key(file, name, scope, **settings))  # pyright: ignore[reportArgumentType] validated by ApiKey


@app.command()
def rotate(
    name: Annotated[str, typer.Argument(help="whose key it is")],
    file: File = Path("keys.json"),
    grace_hours: Annotated[float, typer.Option(help="how long the former key still holds", min=0)] = 24,
) -> None:
    """Add a key like the one before and let that one expire."""
    _say(lambda: rotate_keys(file, name, timedelta(hours=grace_hours)))


@app.command()
def revoke(
    which: Annotated[str, typer.Argument(help="name or id")],
    file: File = Path("keys.json"),
) -> None:
    """Remove keys; gateways refuse them a second later."""
    _say(lambda: f"{revoke_keys(file, which)} removed")


@app.command(name="list")
def show(file: File = Path("keys.json")) -> None:
    """Show who has a key."""
    table = Table("id", "name", "scopes", "requests/s", "burst", "created", "expires", show_edge=False)

    def rows() -> Table:
        for key in KeyFile.read(file).keys:
            rate = "unlimited" if key.requests_per_s is None else f"{key.requests_per_s:g}"
            expires = "never" if key.expires_at is None else f"{key.expires_at:%Y-%m-%d %H:%M}"
            created = f"{key.created_at:%Y-%m-%d %H:%M}"
            table.add_row(key.key_id, key.name, " ".join(key.scopes), rate, str(key.burst), created, expires)
        return table

    _say(rows)


def _say(work: Any) -> None:
    with readable_errors():
        said = work()
    if isinstance(said, str):
        typer.echo(said)
    else:
        Console(markup=False).print(said)


if __name__ == "__main__":
    app()
