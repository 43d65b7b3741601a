"""``python -m jobs.store``: what a store of Bundles holds, and which one answers. Gateways follow within seconds."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from recsys.bundle.pointer import Pointer
from recsys.bundle.store import BundleStore
from recsys.errors import BundleError, RecsysError

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
Store = Annotated[str, typer.Option("--store", help="folder or fsspec URI of the store, such as runs/NAME/bundles")]
Which = Annotated[str, typer.Argument(help="bundle_id, or as much of its beginning as tells it from the others")]
Reason = Annotated[str, typer.Option(help="why; kept in the store")]


@app.command("list")
def show(store: Store) -> None:
    """Every Bundle, newest first."""
    with _errors():
        held = BundleStore(store)
        pointer = held.current()
        table = Table("bundle_id", "made at", "items", "bytes", "", box=None)
        for manifest in held.list():
            size = f"{manifest.num_bytes:,}"
            made_at = manifest.created_at.isoformat(" ", "seconds")
            table.add_row(
                manifest.bundle_id, made_at, f"{manifest.num_items:,}", size, _role(manifest.bundle_id, pointer)
            )
        why = "" if pointer is None or pointer.reason is None else f"\nlast move: {pointer.reason}"
    # Ids must stay whole where the output is no terminal: they are copied from here.
    Console(width=None if Console().is_terminal else 200).print(table, why)


@app.command()
def activate(which: Which, store: Store) -> None:
    """All users get this Bundle."""
    with _errors():
        held = BundleStore(store)
        pointer = held.current()
        _tell(held.activate(_bundle_id(held, which), None if pointer is None else pointer.bundle_id))


@app.command()
def rollback(store: Store) -> None:
    """Return to the Bundle that was current before; once more returns to the one before that."""
    with _errors():
        _tell(BundleStore(store).rollback())


@app.command()
def canary(
    which: Which,
    store: Store,
    share: Annotated[float, typer.Option(help="percent of the users who get it", min=0, max=100)] = 5,
    reason: Reason = "",
) -> None:
    """Some of the users get this Bundle; gateways take it back when it fails, degrades or is slow."""
    with _errors():
        held = BundleStore(store)
        _tell(held.start_canary(_bundle_id(held, which), share / 100, reason=reason or None))


@app.command()
def promote(store: Store, reason: Reason = "") -> None:
    """The canary becomes the current Bundle."""
    with _errors():
        _tell(BundleStore(store).promote(reason=reason or None))


@app.command()
def withdraw(store: Store, reason: Reason = "") -> None:
    """End the canary: all users get the current Bundle."""
    with _errors():
        _tell(BundleStore(store).withdraw(reason=reason or None))


@app.command()
def collect(store: Store, keep: Annotated[int, typer.Option(help="newest Bundles that stay", min=1)] = 3) -> None:
    """Remove old Bundles, but none that the pointer names."""
    with _errors():
        for bundle_id in BundleStore(store).collect(keep):
            typer.echo(f"removed {bundle_id}")


def _bundle_id(store: BundleStore, which: str) -> str:
    """The one Bundle whose id begins with ``which``."""
    found = [manifest.bundle_id for manifest in store.list() if manifest.bundle_id.startswith(which)]
    if len(found) != 1:
        raise BundleError(f"{store}: {len(found)} Bundles have an id that begins with {which!r}")
    return found[0]


def _role(bundle_id: str, pointer: Pointer | None) -> str:
    if pointer is None:
        return ""
    if bundle_id == pointer.bundle_id:
        return "current"
    if pointer.canary is not None and bundle_id == pointer.canary.bundle_id:
        return f"canary, {pointer.canary.share:.1%}"
    return "previous" if bundle_id == pointer.previous else ""


def _tell(pointer: Pointer) -> None:
    chosen = pointer.canary
    more = "" if chosen is None else f", {chosen.share:.1%} of the users get the canary {chosen.bundle_id}"
    typer.echo(f"current is {pointer.bundle_id}{more}")


@contextmanager
def _errors() -> Generator[None]:
    try:
        yield
    except RecsysError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    app()
