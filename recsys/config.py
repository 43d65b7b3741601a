"""Configuration: frozen pydantic models that refuse unknown keys, read from YAML, hashed by content."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from recsys.errors import ConfigError
from recsys.files import fingerprint


class StrictConfig(BaseModel):
    """Base of every configuration: frozen, typed, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def content_hash(self) -> str:
        """SHA-256 (hex) of the canonical JSON form: equal configurations have equal hashes in every process."""
        return fingerprint(self.model_dump(mode="json"))

    @classmethod
    def parse(cls, tree: Any, *, where: str) -> Self:
        """Validate ``tree``; a :class:`ConfigError` names each wrong key and ``where`` it was read."""
        return parse(cls, tree, where=where)


ConfigT = TypeVar("ConfigT")


def parse(config_type: type[ConfigT] | Any, tree: Any, *, where: str) -> Any:
    """Validate ``tree`` as ``config_type`` (a class or an annotated union), with errors that name key and file."""
    adapter: TypeAdapter[Any] = TypeAdapter(config_type)
    try:
        return adapter.validate_python(tree)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, each['loc'])) or '(top level)'}: {_message(each, adapter.core_schema)}"
            for each in error.errors()
        ]
        raise ConfigError(f"{where}: {len(lines)} problem(s)\n" + "\n".join(lines), where=where) from error


def _message(error: Any, schema: Any) -> str:
    """What is wrong, and where a name is unknown, which one was meant."""
    if error["type"] == "extra_forbidden":
        known = _keys_at(schema, error["loc"][:-1])
        return f"there is no such key; {nearest(str(error['loc'][-1]), known)}"
    if error["type"] == "union_tag_invalid":
        known = [name.strip("' ") for name in error["ctx"]["expected_tags"].split(",")]
        hint = nearest(error["ctx"]["tag"], known)
        kinds = "" if hint.startswith("there are") else f" There are {', '.join(known)}"
        return f"there is no kind {error['ctx']['tag']!r}; {hint}{kinds}"
    return error["msg"]


def nearest(name: str, known: Iterable[str]) -> str:
    """What to say of a name that is not among those that are known."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"


def _keys_at(schema: Any, location: Sequence[str | int]) -> list[str]:
    """The keys that a configuration has at ``location``, as pydantic's own schema of it says."""
    definitions: dict[str, Any] = {each["ref"]: each for each in schema.get("definitions", ())}
    left = list(location)
    while True:
        match schema["type"]:
            case "definition-ref":
                schema = definitions[schema["schema_ref"]]
            case "model-fields":
                if not left:
                    return list(schema["fields"])
                schema = schema["fields"][left.pop(0)]
            case "tagged-union":
                schema = schema["choices"][left.pop(0)]
            case "tuple" | "list" | "dict" if left:
                left.pop(0)
                schema = schema.get("values_schema") or schema["items_schema"]
                schema = schema[0] if isinstance(schema, list) else schema
            case _:
                if "schema" not in schema:
                    return []
                schema = schema["schema"]


def load_config(
    config_type: type[ConfigT], path: str | Path, *, overrides: Iterable[str] = (), section: str | None = None
) -> ConfigT:
    """Read a YAML file, apply ``key.sub=value`` overrides (values are YAML) and validate.

    An override whose first key is no top-level key of the file is looked up below ``section``, so that
    ``--set train.epochs=3`` of the job ``train_retriever`` means ``retriever.train.epochs``.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such configuration file", path=str(path)) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}", path=str(path)) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the file must hold a mapping of keys, not {type(tree).__name__}", path=str(path))
    known = set(getattr(config_type, "model_fields", tree))
    for override in overrides:
        apply_override(tree, override, known=known, section=section)
    return parse(config_type, tree, where=str(path))


def apply_override(
    tree: dict[str, Any], override: str, *, known: Collection[str] = (), section: str | None = None
) -> None:
    """Set ``key.sub`` of ``tree`` to the value that ``override`` (``key.sub=value``) gives, see :func:`load_config`."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override!r}: write it as key.sub=value", override=override)
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not valid YAML: {error}", override=override) from error
    parts = key.split(".")
    if section is not None and parts[0] not in known:
        parts = [section, *parts]
    node: Any = tree
    for part in parts[:-1]:
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override!r}: {part!r} holds a value, not a group of keys", override=override)
    node[parts[-1]] = value


def to_yaml(config: StrictConfig | Mapping[str, Any]) -> str:
    """The YAML form of a configuration, defaults included."""
    tree = config.model_dump(mode="json") if isinstance(config, StrictConfig) else dict(config)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def annotated_yaml(config: StrictConfig) -> str:
    """The YAML form of a configuration, defaults included, with what each key means behind it."""
    return "\n".join(_annotated(config, "")) + "\n"


def _annotated(config: StrictConfig, indent: str) -> list[str]:
    lines: list[str] = []
    fields = type(config).model_fields
    for name in sorted(fields, key=lambda each: each != "kind"):
        field, value = fields[name], getattr(config, name)
        comment = f"  # {' '.join(field.description.split())}" if field.description else ""
        if isinstance(value, StrictConfig) and type(value).model_fields:
            lines += [f"{indent}{name}:{comment}", *_annotated(value, indent + "  ")]
        else:
            tree = config.model_dump(mode="json", include={name})[name]
            # In a list, as a plain scalar would end with a line of its own.
            text = yaml.safe_dump([tree], sort_keys=False, allow_unicode=True, default_flow_style=True, width=1 << 20)
            lines.append(f"{indent}{name}: {text.strip()[1:-1]}{comment}")
    return lines
