"""Configuration files: show every key, check them, and give an editor their JSON schema.

What a file holds is said on its first line, as editors read it (``# yaml-language-server: $schema=schema/NAME.json``);
without one it is a run. Packages bring the types by entry points of the group ``recsys.configs``
(``run = "jobs.config:JobConfig"``).
"""

from __future__ import annotations

import json
import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import typer

from recsys.cli import group, readable_errors
from recsys.config import StrictConfig, annotated_yaml, load_config, nearest
from recsys.errors import ConfigError

GROUP = "recsys.configs"
RUN = "run"
_FIRST_LINE = re.compile(r"# yaml-language-server: \$schema=\S*?([\w-]+)\.json\s*$")

app = group(__doc__)
File = Annotated[Path, typer.Argument(help="YAML file", exists=True, dir_okay=False)]
Overrides = Annotated[list[str] | None, typer.Option("--set", help="override one key, as key.sub=value", metavar="K=V")]


@app.command()
def show(
    file: File,
    key: Annotated[str, typer.Argument(help="only what is below this key, such as retriever.train")] = "",
    set_: Overrides = None,
) -> None:
    """Every key with its value, defaults too, and what it means: of the kinds that the file chooses."""
    with readable_errors():
        typer.echo(annotated_yaml(_at(load_config(type_of(file), file, overrides=set_ or ()), key)), nl=False)


@app.command()
def check(file: File, set_: Overrides = None) -> None:
    """Say what is wrong with a file; exit status 0 where nothing is."""
    with readable_errors():
        config = load_config(type_of(file), file, overrides=set_ or ())
        typer.echo(f"{file}: a good {name_of(file)} configuration, {config.content_hash()[:12]}")


@app.command()
def schema(file: File) -> None:
    """The JSON schema of the file's type."""
    with readable_errors():
        typer.echo(schema_text(type_of(file)), nl=False)


def name_of(file: Path) -> str:
    """Under which name of the group its type is installed."""
    with file.open() as lines:
        match = _FIRST_LINE.match(lines.readline())
    return RUN if match is None else match[1]


def type_of(file: Path) -> type[StrictConfig]:
    """What the file holds.

    :raises ConfigError: when no installed package knows it.
    """
    name, types = name_of(file), installed()
    if name not in types:
        known = ", ".join(sorted(types)) or "none: the jobs are not installed"
        raise ConfigError(f"{file}: no configuration is named {name!r}; those are {known}", path=str(file))
    return types[name].load()


def installed() -> dict[str, Any]:
    """The entry points of the types, by name."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def schema_text(config_type: type[StrictConfig]) -> str:
    """The JSON schema of a type, as its file holds it."""
    return json.dumps(config_type.model_json_schema(), indent=1) + "\n"


def _at(config: StrictConfig, key: str) -> StrictConfig:
    found: Any = config
    for part in filter(None, key.split(".")):
        if not isinstance(found, StrictConfig) or part not in type(found).model_fields:
            known = type(found).model_fields if isinstance(found, StrictConfig) else ()
            raise ConfigError(f"{key}: there is no key {part!r}; {nearest(part, known)}", key=key)
        found = getattr(found, part)
    if not isinstance(found, StrictConfig):
        raise ConfigError(f"{key}: holds {found!r} and no keys", key=key)
    return found
