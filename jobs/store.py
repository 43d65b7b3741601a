"""Bundles: list those of a store, choose which one answers, and by which rules. Gateways follow within seconds."""

from __future__ import annotations

import getpass
import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from recsys.bundle.live import live_id
from recsys.bundle.pointer import Pointer
from recsys.bundle.rule_log import RuleChange
from recsys.bundle.store import BundleStore
from recsys.cli import group, readable_errors
from recsys.config import parse
from recsys.errors import BundleError, BundleNotFoundError, ConfigError
from recsys.pipeline.config import pipeline_config
from recsys.pipeline.rules import AnyRules
from recsys.pipeline.rules.changes import plain, rule_history, unknown_names

app = group(__doc__)
rules = group("By which rules the Bundles of a store answer, whichever is current.")
app.add_typer(rules, name="rules")
Store = Annotated[str, typer.Option("--store", help="folder or fsspec URI of the store, such as runs/NAME/bundles")]
Which = Annotated[str, typer.Argument(help="bundle_id, or as much of its beginning as tells it from the others")]
Reason = Annotated[str, typer.Option(help="why; kept in the store")]

Note = Annotated[str, typer.Option(help="why; kept with the change")]
After = Annotated[int | None, typer.Option(help="refuse where another version is the last one", min=0)]


@app.command("list")
def show(store: Store) -> None:
    """Every Bundle, newest first."""
    with readable_errors():
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
    Console(width=None if Console(markup=False).is_terminal else 200, markup=False).print(table, why)


@app.command()
def activate(which: Which, store: Store) -> None:
    """All users get this Bundle."""
    with readable_errors():
        held = BundleStore(store)
        pointer = held.current()
        _tell(held.activate(_bundle_id(held, which), None if pointer is None else pointer.bundle_id))


@app.command()
def rollback(store: Store) -> None:
    """Return to the Bundle that was current before; once more returns to the one before that."""
    with readable_errors():
        _tell(BundleStore(store).rollback())


@app.command()
def canary(
    which: Which,
    store: Store,
    share: Annotated[float, typer.Option(help="percent of the users who get it", min=0, max=100)] = 5,
    reason: Reason = "",
) -> None:
    """Some of the users get this Bundle; gateways take it back when it fails, degrades or is slow."""
    with readable_errors():
        held = BundleStore(store)
        _tell(held.start_canary(_bundle_id(held, which), share / 100, reason=reason or None))


@app.command()
def promote(store: Store, reason: Reason = "") -> None:
    """The canary becomes the current Bundle."""
    with readable_errors():
        _tell(BundleStore(store).promote(reason=reason or None))


@app.command()
def withdraw(store: Store, reason: Reason = "") -> None:
    """End the canary: all users get the current Bundle."""
    with readable_errors():
        _tell(BundleStore(store).withdraw(reason=reason or None))


@app.command()
def collect(store: Store, keep: Annotated[int, typer.Option(help="newest Bundles that stay", min=1)] = 3) -> None:
    """Remove old Bundles, but none that the pointer names."""
    with readable_errors():
        for bundle_id in BundleStore(store).collect(keep):
            typer.echo(f"removed {bundle_id}")


@rules.command("show")
def show_rules(
    store: Store, version: Annotated[int | None, typer.Option(help="of an earlier change", min=0)] = None
) -> None:
    """The rules, as `set` takes them, and who changed them when."""
    with readable_errors():
        held = BundleStore(store)
        found = rule_history(held.rules, pipeline_config(held.open()).rules, time.time_ns() // 1_000_000, version)
        if found is None:
            raise BundleError(f"{held}: no version {version} of the rules is kept")
    typer.echo(yaml.safe_dump([dict(rule) for rule in found.rules], sort_keys=False, allow_unicode=True), nl=False)
    states = ", ".join(f"{rule['kind']} {state}" for rule, state in zip(found.rules, found.states, strict=True))
    typer.echo(f"version {found.version}: {states or 'no rules'}", err=True)
    for change in found.changes:
        typer.echo(_told(change), err=True)


@rules.command("set")
def set_rules(
    file: Annotated[Path, typer.Argument(help="YAML list of rules", exists=True, dir_okay=False)],
    store: Store,
    note: Note = "",
    after: After = None,
) -> None:
    """Replace all rules by those of a file."""
    with readable_errors():
        held = BundleStore(store)
        try:
            tree = yaml.safe_load(file.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file}: not valid YAML: {error}", path=str(file)) from error
        if not isinstance(tree, list):
            raise ConfigError(f"{file}: must hold a list of rules, not {type(tree).__name__}", path=str(file))
        wanted = parse(AnyRules, tree, where=str(file))
        pointer = _pointer(held)
        catalogue = held.open_live(live_id(pointer.bundle_id, held.version().items)).catalogue()
        for what, names in zip(("items", "categories"), unknown_names(wanted, catalogue), strict=True):
            if names:
                typer.echo(f"{what} that the catalogue lacks, and that are ignored: {', '.join(names)}", err=True)
        _change_rules(held, plain(wanted), after, note)


@rules.command("reset")
def reset_rules(store: Store, note: Note = "", after: After = None) -> None:
    """Return to the Bundle's own rules."""
    with readable_errors():
        _change_rules(BundleStore(store), None, after, note)


def _pointer(store: BundleStore) -> Pointer:
    pointer = store.current()
    if pointer is None:
        raise BundleNotFoundError(f"{store}: no store of Bundles, or one without a current one", path=str(store))
    return pointer


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an account without a name, as containers have
        return f"uid {os.getuid()}"


def _change_rules(store: BundleStore, trees: list[dict[str, Any]] | None, after: int | None, note: str) -> None:
    _pointer(store)
    log = store.rules
    last = log.version() if after is None else after
    change = log.append(trees, after=last, by=f"command ({_user()})", note=note or None)
    typer.echo(_told(change))
    if last:
        typer.echo(f"after {_told(log.read(last))}")


def _told(change: RuleChange) -> str:
    what = "the Bundle's own rules" if change.rules is None else f"{len(change.rules)} rules"
    why = "" if change.note is None else f": {change.note}"
    return f"version {change.version}, {change.at.isoformat(' ', 'seconds')}, by {change.by}: {what}{why}"


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


if __name__ == "__main__":
    app()
