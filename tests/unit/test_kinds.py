"""Rooms of kinds: who is found, what is imported for it, and what is said where nobody is."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from pydantic import Field, TypeAdapter

from recsys.config import StrictConfig
from recsys.errors import ConfigError
from recsys.index import KINDS as INDEXES
from recsys.index import AnyIndex, IndexConfig
from recsys.index.flat import FlatIndex
from recsys.index.ivf import IvfIndex
from recsys.kinds import Kind, Kinds, parts_of

ROOT = Path(__file__).resolve().parents[2]
BASES = {
    "recsys.data.sources": "Source",
    "recsys.data.splits": "SplitPolicy",
    "recsys.events": "EventStoreConfig",
    "recsys.index": "IndexConfig",
    "recsys.models.rankers": "RankerConfig",
    "recsys.models.ratings": "RatingConfig",
    "recsys.models.retrievers": "RetrieverConfig",
}
"""the rooms by their modules, each with the base class of its kinds"""


class Holder(StrictConfig):
    one: AnyIndex = Field(default=FlatIndex(), description="an index")
    several: tuple[AnyIndex, ...] = Field(default=(), description="indexes")
    perhaps: AnyIndex | None = Field(default=None, description="an index or none")


def python(code: str, **environment: str) -> str:
    """What ``code`` prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("room", BASES)
def test_every_line_of_a_table_names_its_kind(room: str) -> None:
    module = importlib.import_module(room)
    kinds: Kinds[Kind] = module.KINDS
    base = getattr(module, BASES[room])
    for name, kind in zip(kinds.names, kinds.classes, strict=True):
        assert issubclass(kind, base)
        assert issubclass(base, Kind)
        assert kind.model_fields["kind"].default == name
        assert kind.sample.__func__ is not Kind.sample.__func__, f"{name} has no sample"


def test_an_unknown_kind_is_told_the_nearest() -> None:
    with pytest.raises(ConfigError, match="index has no kind 'falt': did you mean 'flat'") as raised:
        INDEXES.get("falt")
    assert raised.value.details == {"room": "index", "kind": "falt"}
    with pytest.raises(ConfigError, match="has no kind 'annoy': kinds are flat, ivf, hnsw"):
        INDEXES.get("annoy")


def test_parse_takes_a_tree_or_a_configuration_and_says_where() -> None:
    assert INDEXES.parse({"kind": "ivf", "num_lists": 3}, where="here") == IvfIndex(num_lists=3)
    assert INDEXES.parse(IvfIndex(num_lists=3), where="here") == IvfIndex(num_lists=3)
    for tree in ({}, {"kind": 3}, None, "flat"):
        with pytest.raises(ConfigError, match=r"my\.yaml: name a kind; kinds of index are flat, ivf, hnsw"):
            INDEXES.parse(tree, where="my.yaml")
    with pytest.raises(ConfigError, match=r"my\.yaml: 1 problem(.|\n)*no_such_key"):
        INDEXES.parse({"kind": "flat", "no_such_key": 1}, where="my.yaml")


def test_a_field_takes_any_kind_and_survives_json_and_yaml() -> None:
    tree = {"one": {"kind": "ivf", "num_lists": 3}, "several": [{"kind": "hnsw"}], "perhaps": {"kind": "flat"}}
    holder = Holder.parse(tree, where="test")
    assert holder.one == IvfIndex(num_lists=3)
    assert Holder.model_validate_json(holder.model_dump_json()) == holder
    assert Holder.parse(yaml.safe_load(yaml.safe_dump(holder.model_dump(mode="json"))), where="test") == holder
    with pytest.raises(ConfigError, match="there is no kind 'annoy'; there are flat, ivf, hnsw"):
        Holder.parse({"one": {"kind": "annoy"}}, where="test")


def test_a_room_of_one_needs_no_tag_to_tell_it_by() -> None:
    room: Kinds[IndexConfig] = Kinds("room of one", {"flat": "recsys.index.flat:FlatIndex"})
    assert TypeAdapter(Annotated[IndexConfig, room]).validate_python({}) == FlatIndex()


def test_the_parts_of_a_field_are_the_kinds_of_its_room() -> None:
    fields = Holder.model_fields
    assert parts_of(fields["one"]) == INDEXES.classes
    inner, ellipsis = parts_of(fields["several"].annotation)
    assert (parts_of(inner), ellipsis) == (INDEXES.classes, Ellipsis)
    inner, none = parts_of(fields["perhaps"].annotation)
    assert (parts_of(inner), none) == (INDEXES.classes, type(None))
    assert parts_of(dict[str, int]) == (str, int)
    assert parts_of(int) == ()


def test_a_kind_without_a_sample_says_so() -> None:
    class Bare(Kind):
        kind: Literal["bare"] = "bare"

    with pytest.raises(ConfigError, match=r"Bare has no sample: give it a classmethod sample\(cls, folder\)"):
        Bare.sample(Path())


def test_a_kind_is_imported_when_it_is_asked_for() -> None:
    """A room imports none of its members, and reading one of them imports that one."""
    code = f"""
        import importlib, sys
        tables = {{room: importlib.import_module(room).KINDS for room in {list(BASES)}}}

        def loaded(kinds):
            return [name for name, place in kinds._places.items() if place.partition(":")[0] in sys.modules]

        for room, kinds in tables.items():
            assert loaded(kinds) == [], (room, loaded(kinds))
        for room, kinds in tables.items():
            kinds.get(kinds.names[0])
            assert kinds.names[0] in loaded(kinds), room
            assert len(loaded(kinds)) < len(kinds.names), (room, loaded(kinds))
    """
    python(code)


PACKAGE = """
from pathlib import Path
from typing import Any, Literal, Self

from {module} import {base}


class {base}OfOurs({base}):
    kind: Literal["ours"] = "ours"
    size: int = 1

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls(size=2)


{base}OfOurs.__abstractmethods__ = frozenset()
"""


def test_an_installed_package_adds_a_kind_to_every_room(tmp_path: Path) -> None:
    """As ``pip install`` leaves one: a field takes it, and it survives JSON and YAML."""
    about = tmp_path / "ours-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: ours\nVersion: 1.0\n")
    points = ["[recsys.kinds]"]
    for module, base in BASES.items():
        (tmp_path / f"ours_{base.lower()}.py").write_text(PACKAGE.format(module=module, base=base))
        points.append(f"{importlib.import_module(module).KINDS.room}.ours = ours_{base.lower()}:{base}OfOurs")
    (about / "entry_points.txt").write_text("\n".join(points) + "\n")
    code = f"""
        import importlib, yaml
        from typing import Annotated
        from pathlib import Path
        from pydantic import Field
        from recsys.config import StrictConfig
        from recsys.kinds import parts_of

        for module, base in {BASES}.items():
            room = importlib.import_module(module)
            assert room.KINDS.names[-1] == "ours" and len(room.KINDS.names) > 1, module
            sample = room.KINDS.get("ours").sample(Path())
            assert room.KINDS.parse({{"kind": "ours", "size": 2}}, where="test") == sample

            class Holder(StrictConfig):
                field: Annotated[getattr(room, base), room.KINDS] = Field(description="any kind")

            assert type(sample) in parts_of(Holder.model_fields["field"])
            holder = Holder(field=sample)
            assert Holder.model_validate_json(holder.model_dump_json()) == holder
            assert Holder.parse(yaml.safe_load(yaml.safe_dump(holder.model_dump(mode="json"))), where="test") == holder
            print(module)
    """
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    assert python(code, PYTHONPATH=path).split() == list(BASES)


@pytest.mark.parametrize(
    ("points", "problem"),
    [
        ({"index": "os:path"}, "it names no kind"),
        ({"index.flat": "os:path"}, "has a kind 'flat' already"),
        ({"index.ours": "no_such_module:Index"}, "cannot be loaded: ModuleNotFoundError"),
        ({"index.ours": "os:path"}, "is no subclass of recsys.kinds.Kind"),
        ({"index.ours": "recsys.index.flat:FlatIndex"}, 'needs a field kind: Literal["ours"]'),
    ],
)
def test_an_entry_point_that_adds_no_kind_is_named(tmp_path: Path, points: dict[str, str], problem: str) -> None:
    about = tmp_path / "ours-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: ours\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (about / "entry_points.txt").write_text("\n".join(["[recsys.kinds]", *lines]) + "\n")
    (name,) = points
    code = """
        from recsys.errors import ConfigError
        from recsys.index import KINDS
        try:
            KINDS.classes
        except ConfigError as error:
            print(error)
    """
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    told = python(code, PYTHONPATH=path)
    assert f"entry point {name} = {points[name]} of the package ours" in told
    assert problem in told


def test_a_store_is_a_log_too() -> None:
    from recsys.events import KINDS, LOG_KINDS

    assert set(KINDS.names) < set(LOG_KINDS.names)
    assert LOG_KINDS.get("sqlite") is KINDS.get("sqlite")
