"""Run the steps from interactions to a published Bundle. Finished steps are reused."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Annotated, Any

import typer

from jobs import cli, pipeline, steps
from jobs.steps.base import Step
from recsys.cli import readable_errors
from recsys.config import nearest
from recsys.errors import ConfigError

LAST = "publish"


def names() -> list[str]:
    """The steps, as their files are named."""
    return sorted(module.name for module in iter_modules(steps.__path__) if module.name != "base")


def section_of(words: list[str]) -> str | None:
    """The section of the step that a command line names."""
    return next((_step(word).section for word in words if word in names()), None)


def run(
    config: Annotated[Path, typer.Argument(help="YAML configuration; see configs/ for complete ones")],
    step: Annotated[str, typer.Argument(help=f"the last step: {', '.join(names())}")] = LAST,
    set_: cli.Overrides = None,
) -> None:
    """Run the steps from interactions to a published Bundle. Finished steps are reused."""
    with readable_errors():
        if step not in names():
            raise ConfigError(f"there is no step {step!r}; {nearest(step, names())}", step=step)
        section = None if step == LAST else _step(step).section
        pipeline.run(cli.read(config, set_, section), _step(step))


def _step(name: str) -> Step[Any]:
    return import_module(f"jobs.steps.{name}").STEP


app = cli.application(run, section_of)

if __name__ == "__main__":
    app()
