"""What command lines share: options, what they tell of their progress, and the help on a configuration."""

from __future__ import annotations

import logging
import os
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from jobs._ray import ComputeConfig
from jobs.config import JobConfig
from recsys.config import load_config
from recsys.kinds import parts_of

ConfigPath = Annotated[Path, typer.Option("--config", help="YAML configuration; see configs/ for complete ones")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="override one key, as key.sub=value; may be given several times", metavar="K=V"),
]

SuiteOverrides = Annotated[
    list[str] | None, typer.Option("--set", help="override one key of the suite's file", metavar="K=V")
]
ConfigT = TypeVar("ConfigT")


def application(name: str, summary: str, section: str | None, command: Callable[..., None]) -> typer.Typer:
    """``command`` as ``python -m jobs.NAME``; its help is the summary, and every key of ``section``, or of all."""
    command.__doc__ = f"{summary}\n\n{_keys_of(section)}"
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(name=f"jobs.{name}")(command)
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


def _keys_of(section: str | None) -> str:
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
