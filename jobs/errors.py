"""Errors as a person at a command line wants to read them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import typer

from recsys.errors import RecsysError


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
