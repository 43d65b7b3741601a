"""``python -m jobs.publish``: all steps, and which Bundle the store points to."""

from __future__ import annotations

from typing import Annotated

import typer

from jobs import cli, pipeline
from jobs.steps.publish import STEP, point_to
from recsys.bundle.store import BundleStore
from recsys.cli import readable_errors
from recsys.errors import ConfigError


def publish(
    config: cli.ConfigPath,
    set_: cli.Overrides = None,
    activate: Annotated[
        bool, typer.Option("--activate", help="point the store to the Bundle even if publish.activate is false")
    ] = False,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="make nothing: return to the Bundle that was current before")
    ] = False,
) -> None:
    """What the step does, and more of the pointer than it does."""
    with readable_errors():
        settings = cli.read(config, set_, STEP.section)
        if rollback:
            if activate:
                raise ConfigError("--activate and --rollback exclude each other")
            typer.echo(f"current is {BundleStore(settings.store).rollback().bundle_id}")
            return
        published = pipeline.run(settings, STEP)[STEP]
        if activate and not settings.publish.activate:  # else it was, and somebody may have moved it since
            point_to(settings, published.bundle_id)


app = cli.application(publish, lambda _: STEP.section, f"jobs.{STEP.name}")

if __name__ == "__main__":
    app()
