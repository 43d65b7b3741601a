"""The command line of every job: ``python -m jobs.STEP --config FILE [--set key=value ...]``."""

from __future__ import annotations

import logging
import os
import types
import typing
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Console

from jobs._ray import ComputeConfig
from jobs.config import JobConfig
from recsys.config import load_config
from recsys.errors import ConfigError, RecsysError
from recsys.kinds import parts_of

SECTIONS = {
    "prepare": "data",
    "train_encoder": "encoder",
    "embed": "encoder",
    "train_retriever": "retriever",
    "train_ranker": "ranking",
    "evaluate": "evaluation",
    "recommend": "slates",
    "publish": "publish",
    "pipeline": None,
}
"""Steps in order, each with the section of the configuration that is its own."""


ConfigPath = Annotated[Path, typer.Option("--config", help="YAML configuration; see configs/ for complete ones")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="override one key, as key.sub=value; may be given several times", metavar="K=V"),
]


def main(step: str) -> None:
    """Run the command line of ``step``."""
    application(step)()


def application(step: str) -> typer.Typer:
    """The command line of ``step``."""

    def command(config: ConfigPath, set_: Overrides = None) -> None:
        from jobs.pipeline import run

        with _errors():
            run(_read(step, config, set_), until=step)

    def publish(
        config: ConfigPath,
        set_: Overrides = None,
        activate: Annotated[
            bool, typer.Option("--activate", help="point the store to the Bundle even if publish.activate is false")
        ] = False,
        rollback: Annotated[
            bool, typer.Option("--rollback", help="make nothing: return to the Bundle that was current before")
        ] = False,
    ) -> None:
        from jobs.pipeline import run
        from jobs.steps.publish import point_to
        from recsys.bundle.store import BundleStore

        with _errors():
            read = _read(step, config, set_)
            if rollback:
                if activate:
                    raise ConfigError("--activate and --rollback exclude each other")
                typer.echo(f"current is {BundleStore(read.store).rollback().bundle_id}")
                return
            published = run(read, until=step)[step]
            if activate and not read.publish.activate:  # else it was, and somebody may have moved it since
                point_to(read, published.metrics["bundle_id"])

    chosen = publish if step == "publish" else command
    chosen.__doc__ = f"{_DOCS[step]}\n\n{_help(SECTIONS[step])}"
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(name=f"jobs.{step}")(chosen)
    return app


def _read(step: str, path: Path, overrides: list[str] | None) -> JobConfig:
    show_progress()
    return load_config(JobConfig, path, overrides=overrides or (), section=SECTIONS[step])


@contextmanager
def _errors() -> Generator[None]:
    try:
        yield
    except RecsysError as error:
        Console(stderr=True).print(f"[red]{type(error).__name__}:[/red] {error}", highlight=False)
        raise typer.Exit(2) from error


def show_progress() -> None:
    """Print what steps and trainings tell of their progress, and of Ray only what needs attention."""
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for room in ("jobs", "recsys"):
        logging.getLogger(room).setLevel(logging.INFO)


_DOCS = {
    "prepare": "Validate, quarantine, index, order and split the interactions.",
    "train_encoder": "Fine-tune the text encoder on items consumed together.",
    "embed": "Turn every item's text into a vector.",
    "train_retriever": "Train the retriever; refit it on all data.",
    "train_ranker": "Train the ranker on the retriever's candidates and compress it.",
    "evaluate": "Judge the served pipeline and the baselines on the test split.",
    "recommend": "Make the best items of every user, offline.",
    "publish": "Write a Bundle and point the store to it.",
    "pipeline": "Run every step, from interactions to a published Bundle; finished steps are reused.",
}


def _help(section: str | None) -> str:
    if section is None:
        return "\b\nKeys of the configuration (--set KEY=VALUE):\n" + "\n".join(_keys(JobConfig, "", depth=4))
    lines = [
        line for model in _models(JobConfig.model_fields[section]) for line in _keys(model, f"{section}.", depth=3)
    ]
    lines += _keys(ComputeConfig, "compute.", depth=1)
    return "\b\nKeys of this step (--set KEY=VALUE):\n" + "\n".join(lines)


def _keys(model: type[BaseModel], prefix: str, *, depth: int) -> list[str]:
    lines: list[str] = []
    for name, field in model.model_fields.items():
        nested = _models(field)
        if nested and depth > 1 and name != "kind":
            for one in nested:
                kind = one.model_fields.get("kind")
                label = f" (kind {kind.default})" if kind is not None else ""
                lines.append(f"  {prefix}{name}{label}: {field.description or one.__doc__}")
                lines.extend(_keys(one, f"{prefix}{name}.", depth=depth - 1))
            continue
        default = "required" if field.is_required() else f"default {_show(field.default)}"
        lines.append(f"  {prefix}{name}: {field.description or ''} [{default}]")
    return lines


def _show(value: Any) -> str:
    if isinstance(value, BaseModel):
        kind = value.model_dump().get("kind")
        return "see its keys" if kind is None else f"kind {kind}"
    return repr(value)


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The configuration classes inside a field or an annotation: itself, the members of a union or of a room."""
    if isinstance(annotation, FieldInfo) or typing.get_origin(annotation) in (typing.Union, types.UnionType, Annotated):
        return [model for part in parts_of(annotation) for model in _models(part)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
