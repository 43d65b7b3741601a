"""``recsys``: one command. Its subcommands come from packages, by entry points of the group ``recsys.commands``::

    [project.entry-points."recsys.commands"]
    run = "jobs.pipeline:app"     # a typer.Typer

A module is imported when its command is called. Help shows the first sentence of its docstring, below the first
sentence of its package's, and reads both from the source: a list of commands must not load torch and Ray.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from recsys.errors import RecsysError

GROUP = "recsys.commands"


class _Commands(TyperGroup):
    """Loads a command when it is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(_installed())

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        entry = _installed().get(cmd_name)
        return None if entry is None else typer.main.get_command(entry.load())

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        found = _installed()
        if args and not args[0].startswith("-") and args[0] not in found:
            near = difflib.get_close_matches(args[0], found, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(found))}"
            ctx.fail(f"there is no command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        packages: dict[str, list[tuple[str, str]]] = {}
        for name, entry in sorted(_installed().items()):
            package = entry.module.partition(".")[0]
            title = "Configuration" if package == "recsys" else _first_sentence(package)
            packages.setdefault(title, []).append((name, _first_sentence(entry.module)))
        for title, rows in sorted(packages.items()):
            with formatter.section(title):
                formatter.write_dl(rows)


def _installed() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _first_sentence(module: str) -> str:
    """Of a module's docstring; the module's name where there is none."""
    spec = importlib.util.find_spec(module)
    source = "" if spec is None or spec.origin is None else Path(spec.origin).read_text()
    text = (ast.get_docstring(ast.parse(source)) or module).partition("\n\n")[0]
    return " ".join(text.split()).partition(". ")[0].rstrip(".:")


@contextmanager
def readable_errors() -> Generator[None]:
    """One of ours ends the command: it is shown, and the exit status is 2."""
    try:
        yield
    except RecsysError as error:
        show_error(error)
        raise typer.Exit(2) from error


def show_error(error: Exception) -> None:
    """Its kind and what it says, on stderr."""
    typer.secho(f"{type(error).__name__}:", fg="red", err=True, nl=False)
    typer.echo(f" {error}", err=True)


def command(main: Callable[..., None]) -> typer.Typer:
    """``main`` as a command of its own; its help is its docstring."""
    found = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    found.command()(main)
    return found


def group(about: str | None) -> typer.Typer:
    """A command with subcommands."""
    return typer.Typer(
        help=about, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
    )


app = typer.Typer(
    cls=_Commands,
    help="Recommendations in real time from large models: train, publish and serve them.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def _main() -> None:
    # Makes a group of it, whatever is installed.
    return
