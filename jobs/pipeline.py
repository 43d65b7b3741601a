"""Run steps and what they read, as one job: ``python -m jobs.STEP --config FILE [--set key=value ...]``.

``python -m jobs.pipeline`` is all that a published Bundle needs. What is run by its name lies in a file of its own,
which holds nothing else: what Ray's workers are sent must not be of the module ``__main__``.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs import cli
from jobs._ray import ray_session
from jobs.config import JobConfig
from jobs.steps import publish
from jobs.steps.base import Results, Step, plan
from recsys.cli import readable_errors

console = Console(stderr=True, markup=False)


def run(config: JobConfig, until: Step[Any] = publish.STEP) -> Results:
    """Run a step and those that it needs; the ones that are complete are reused."""
    steps, done = plan(config, until), Results()
    if "working_dir_files" in (home := Path(config.workdir).absolute()).parts:
        advice = (
            "is inside Ray's copy of the submitted folder, which Ray deletes: give one that stays, --set workdir=FOLDER"
        )
        console.print(f"{home} {advice}", style="yellow", soft_wrap=True)
    started = time.perf_counter()
    with ray_session() if config.compute.num_workers else nullcontext():
        for step in steps:
            left = done.run(config, step)
            state = "reused" if left.reused else f"done in {left.seconds:.1f} s"
            told = Text.assemble((step.name, "bold"), f" {state}  ", (str(left.path), "dim"))
            console.print(told, soft_wrap=True)
    if (published := done.get(publish.STEP)) is not None:
        where = Path(published.store).absolute()
        console.print(f"Bundle {published.bundle_id} in {where}", highlight=False, soft_wrap=True)
    table = Table(title=f"{config.name}: {time.perf_counter() - started:.1f} s", show_edge=False)
    table.add_column("step")
    table.add_column("seconds", justify="right")
    table.add_column("artefact")
    for step, left in done:
        table.add_row(step.name, "reused" if left.reused else f"{left.seconds:.1f}", f"{left.step}/{left.key}")
    console.print(table)
    return done


def main(name: str, module: str) -> None:
    """The command line of the step ``name``, where ``module`` (``__name__``) is what Python was asked to run."""
    if module == "__main__":
        step: Step[Any] = import_module(f"jobs.steps.{name}").STEP
        application(name, step, step.section)()


def application(name: str, until: Step[Any], section: str | None) -> typer.Typer:
    """The command line that runs ``until``; overrides may leave out the name of ``section``."""

    def command(config: cli.ConfigPath, set_: cli.Overrides = None) -> None:
        with readable_errors():
            run(cli.read(config, set_, section), until)

    command.__doc__ = until.help
    return cli.application(command, lambda _: section, f"jobs.{name}")


if __name__ == "__main__":
    application("pipeline", publish.STEP, None)()
