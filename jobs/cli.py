"""What command lines share: options, what they tell of their progress, and the help on a configuration."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

from jobs.config import JobConfig
from recsys.cli import readable_errors
from recsys.config import annotated_yaml, load_config

ConfigPath = Annotated[Path, typer.Option("--config", help="YAML configuration; see configs/ for complete ones")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="override one key, as key.sub=value; may be given several times", metavar="K=V"),
]

SuiteOverrides = Annotated[
    list[str] | None, typer.Option("--set", help="override one key of the suite's file", metavar="K=V")
]
ConfigT = TypeVar("ConfigT")
_ARGUMENTS = "recsys.arguments"


def application(
    main: Callable[..., None], section_of: Callable[[list[str]], str | None], name: str | None = None
) -> typer.Typer:
    """``main``, which reads a configuration, as a command. Its help is its docstring and, where the command line has a
    configuration file, the keys of that file, for the kinds that it chooses.

    ``section_of`` says for a command line in which section they stand; None for all.
    """

    class Command(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            ctx.meta[_ARGUMENTS] = list(args)
            return super().parse_args(ctx, args)

        def format_epilog(self, ctx: Any, formatter: Any) -> None:
            words: list[str] = ctx.meta[_ARGUMENTS]
            section = section_of(words)
            below = f" {section}" if section else ""
            file = next((Path(word) for word in words if word.endswith((".yaml", ".yml"))), None)
            formatter.write_paragraph()
            if file is None or not file.exists():
                formatter.write_text(f"Keys for --set, with what they mean: recsys config show FILE{below}")
                return
            with readable_errors():
                config = load_config(JobConfig, file)
            keys = annotated_yaml(getattr(config, section) if section else config)
            formatter.write(f"Keys for --set, as {file} has them{below and ' below' + below}:\n\n{keys}")

    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command(name, cls=Command)(main)
    return app


def read(path: Path, overrides: list[str] | None, section: str | None) -> JobConfig:
    """The configuration of a command that begins."""
    show_progress()
    return load_config(JobConfig, path, overrides=overrides or (), section=section)


def read_suite(config_type: type[ConfigT], folder: Path, suite: str, overrides: list[str] | None) -> ConfigT:
    """``suite``, a file of ``folder`` without its ending or the path of one, for a command that begins."""
    show_progress()
    path = Path(suite) if Path(suite).suffix else folder / f"{suite}.yaml"
    return load_config(config_type, path, overrides=overrides or ())


def show_progress() -> None:
    """Print what steps and trainings tell of their progress, and of Ray only what needs attention."""
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for room in ("jobs", "recsys"):
        logging.getLogger(room).setLevel(logging.INFO)
