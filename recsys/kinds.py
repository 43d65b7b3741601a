"""Kinds: the members of a room, which a configuration names by ``kind``.

A room (retrievers, sources, index kinds, reranking rules ...) lists its members in one table, a line each::

    KINDS: Kinds[IndexConfig] = Kinds("index", {"flat": "recsys.index.flat:FlatIndex"})
    AnyIndex = Annotated[IndexConfig, KINDS]      # the type of a field that takes any of them

A member is imported when it is asked for, so a room costs what is used of it and its members do not import each other.
An installed package adds a member with an entry point ``<room>.<kind>`` in the group ``recsys.kinds`` that names the
class. Each member is a :class:`Kind`: it brings a small sample of itself for the contract tests of its room.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import operator
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Annotated, Any, Generic, Self, TypeVar, get_args

from pydantic import Field, GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema

from recsys.config import StrictConfig, parse
from recsys.errors import ConfigError

GROUP = "recsys.kinds"
"""entry-point group of third-party kinds"""


class Kind(StrictConfig):
    """A member of a room. Subclasses have a field ``kind: Literal["name"] = "name"``."""

    @classmethod
    def sample(cls, folder: Path) -> Self:
        """A small one, for the contract tests of its room: what it reads it writes into ``folder``, which exists.

        A server it needs is named by an environment variable.

        :raises NotInstalledError: where this machine lacks a package or a server; the tests are then skipped.
        """
        raise ConfigError(
            f"{cls.__module__}.{cls.__qualname__} has no sample: give it a classmethod sample(cls, folder) that makes "
            "a small one for the contract tests"
        )


MemberT = TypeVar("MemberT", bound=Kind)


class Kinds(Generic[MemberT]):
    """The members of one room. As an annotation (``Annotated[Base, KINDS]``) it makes a field take any of them."""

    def __init__(self, room: str, members: Mapping[str, str], *, beside: Kinds[Any] | None = None) -> None:
        """``members``: per kind ``"module:Class"``, the class's field ``kind`` being ``Literal[kind]``. Those of the
        room ``beside`` are members, too.
        """
        self.room = room
        self._places = dict(members)
        self._beside = beside
        self._classes: dict[str, type[MemberT]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The kinds, in the order of the table, those of installed packages last."""
        return (*(() if self._beside is None else self._beside.names), *self._places, *self._added)

    def get(self, kind: str) -> type[MemberT]:
        """The class of ``kind``.

        :raises ConfigError: when the room has no such kind; it names the nearest one.
        """
        if kind not in self._classes:
            if kind in self._places:
                module, _, name = self._places[kind].partition(":")
                self._classes[kind] = getattr(importlib.import_module(module), name)
            elif kind in self._added:
                self._classes[kind] = _load(self._added[kind], kind)
            elif self._beside is not None and kind in self._beside.names:
                self._classes[kind] = self._beside.get(kind)
            else:
                near = difflib.get_close_matches(kind, self.names, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ConfigError(
                    f"{self.room} has no kind {kind!r}: {hint}kinds are {', '.join(self.names)}",
                    room=self.room,
                    kind=kind,
                )
        return self._classes[kind]

    @property
    def classes(self) -> tuple[type[MemberT], ...]:
        """All classes; imports every member."""
        return tuple(self.get(kind) for kind in self.names)

    def parse(self, tree: Any, *, where: str) -> MemberT:
        """The configuration in ``tree`` (a mapping with ``kind``, or a configuration already); imports that kind alone.

        :raises ConfigError: when the kind is missing or unknown, or a key is wrong; it says ``where``.
        """
        if isinstance(tree, StrictConfig):
            tree = tree.model_dump()
        kind = tree.get("kind") if isinstance(tree, Mapping) else None
        if not isinstance(kind, str):
            raise ConfigError(f"{where}: name a kind; kinds of {self.room} are {', '.join(self.names)}", where=where)
        return parse(self.get(kind), tree, where=where)

    def union(self) -> Any:
        """The discriminated union of all members; imports every one."""
        members = self.classes
        if len(members) == 1:
            return members[0]
        return Annotated[functools.reduce(operator.or_, members), Field(discriminator="kind")]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler.generate_schema(self.union())

    @functools.cached_property
    def _added(self) -> dict[str, EntryPoint]:
        found: dict[str, EntryPoint] = {}
        for entry in entry_points(group=GROUP):
            room, _, kind = entry.name.partition(".")
            if room != self.room:
                continue
            if not kind or kind in self._places or kind in found:
                taken = f"{self.room} has a kind {kind!r} already" if kind else "it names no kind"
                raise ConfigError(f"{_described(entry)}: {taken}; the name must be {self.room}.KIND", room=self.room)
            found[kind] = entry
        return found


def _load(entry: EntryPoint, kind: str) -> Any:
    """The class that an installed package adds.

    :raises ConfigError: when it cannot be imported, or is no :class:`Kind` of this name.
    """
    try:
        found = entry.load()
    except Exception as error:
        raise ConfigError(f"{_described(entry)} cannot be loaded: {type(error).__name__}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Kind)):
        raise ConfigError(f"{_described(entry)}: {found!r} is no subclass of recsys.kinds.Kind")
    field = found.model_fields.get("kind")
    if field is None or field.default != kind:
        raise ConfigError(f'{_described(entry)}: the class needs a field kind: Literal["{kind}"] = "{kind}"')
    return found


def _described(entry: EntryPoint) -> str:
    package = "" if entry.dist is None else f" of the package {entry.dist.name}"
    return f"entry point {entry.name} = {entry.value}{package}"


def parts_of(annotation: Any) -> tuple[Any, ...]:
    """What an annotation or a field of a configuration is made of, as :func:`typing.get_args` says.

    In the place of a room's base class stand the classes of its kinds.
    """
    if isinstance(annotation, FieldInfo):
        parts = (annotation.annotation, *annotation.metadata)
    else:
        parts = get_args(annotation)
    rooms = [part for part in parts if isinstance(part, Kinds)]
    return rooms[0].classes if rooms else parts
