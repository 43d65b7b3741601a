"""No module imports in a circle and no block stands twice; ``make bench-house`` counts what these tests refuse."""

from __future__ import annotations

from pathlib import Path

import pytest
from house import circles, cycles, duplicate_blocks, duplicates, imports, lines_that_count, room


def test_no_import_goes_in_a_circle() -> None:
    found = imports()
    assert (cycles(found), cycles(found, room)) == ({}, {})


def test_no_block_stands_twice() -> None:
    assert duplicates() == []


# --- what is counted --------------------------------------------------------------------------------------------------


def tree(root: Path, **files: str) -> Path:
    """``root`` with modules of the package recsys, ``a__b`` for ``a/b.py``, and a package for each folder."""
    for name, code in files.items():
        path = root / "recsys" / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
        for folder in (root / "recsys", path.parent):
            (folder / "__init__.py").touch()
    return root


@pytest.mark.parametrize(
    ("code", "imported"),
    [
        ("from recsys.b import thing", ["recsys.b"]),
        ("from recsys import b", ["recsys.b"]),
        ("from recsys import VERSION", ["recsys"]),
        ("from recsys.c import d, thing", ["recsys.c.d", "recsys.c"]),
        ("from recsys.c import *", ["recsys.c"]),
        ("import recsys.c.d as d, numpy.random", ["recsys.c.d"]),
        ("from . import b", ["recsys.b"]),
        ("from .c.d import thing", ["recsys.c.d"]),
        ("def f():\n    from recsys.b import thing", ["recsys.b"]),
        ("if TYPE_CHECKING:\n    from recsys.b import thing", ["recsys.b"]),
        ("b = importlib.import_module('recsys.b')", ["recsys.b"]),
        ("KIND = 'recsys.b:Thing'", []),
        ("import recsys.a", []),
        ("import os, torch.nn", []),
    ],
)
def test_every_form_of_import_is_an_edge(tmp_path: Path, code: str, imported: list[str]) -> None:
    found = imports(tree(tmp_path, a=code, b="", c__d=""))
    assert [one.imported for one in found] == imported
    assert {(one.importer, one.place.split(":")[0]) for one in found} <= {("recsys.a", "recsys/a.py")}


def test_circles_are_the_sets_that_reach_each_other() -> None:
    assert circles([("a", "b"), ("b", "c"), ("a", "c"), ("c", "c")]) == []
    assert circles([("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("d", "e"), ("e", "d"), ("e", "f")]) == [
        ["a", "b", "c"],
        ["d", "e"],
    ]


def test_rooms_can_go_in_a_circle_where_no_module_does(tmp_path: Path) -> None:
    files = {"a__one": "import recsys.b.one", "b__one": "", "b__two": "\nimport recsys.a.two", "a__two": ""}
    found = imports(tree(tmp_path, **files))
    assert cycles(found) == {}
    assert cycles(found, room) == {
        ("recsys.a", "recsys.b"): [
            "recsys/a/one.py:1: recsys.a.one imports recsys.b.one",
            "recsys/b/two.py:2: recsys.b.two imports recsys.a.two",
        ]
    }
    assert [room(name) for name in ("jobs.a.b", "serve", "recsys.a", "recsys.a.b.c", "recsys")] == [
        "jobs.a",
        "serve",
        "recsys.a",
        "recsys.a",
        "recsys",
    ]


CODE = '''"""A module."""
import os
from x import (
    y,
)


@decorated(
    by="this",
)
def f(
    a: int,
) -> int:
    """Says
    something.
    """
    # a comment
    one = g(
        a  +  1,  # another
    )

    class Inner(Base):
        two = "# no comment"

    return one
'''


def test_lines_that_count() -> None:
    assert [(line.number, line.text) for line in lines_that_count(CODE)] == [
        (18, "one = g("),
        (19, "a + 1,"),
        (23, 'two = "# no comment"'),
        (25, "return one"),
    ]


def lines(*names: str) -> list[str]:
    return [f"{name} = 1" for name in names]


@pytest.mark.parametrize(
    ("first", "second", "pairs"),
    [
        ("xabcdefy", "zabcdefw", ["1:2-7 = 2:2-7 (6 lines)"]),
        ("abcdefgh", "abcdefgh", ["1:1-8 = 2:1-8 (8 lines)"]),
        ("abcde", "abcde", []),
        ("abcdexf", "abcdeyf", []),
        ("abcdefxabcdef", "", ["1:1-6 = 1:8-13 (6 lines)"]),
        ("aaaaaaaa", "", []),
        ("aaaaaaaaaaaa", "", ["1:1-6 = 1:7-12 (6 lines)"]),
        (
            "abcdefxabcdef",
            "zabcdef",
            ["1:1-6 = 1:8-13 (6 lines)", "1:1-6 = 2:2-7 (6 lines)", "1:8-13 = 2:2-7 (6 lines)"],
        ),
    ],
)
def test_pairs_of_blocks_are_as_long_as_they_go(first: str, second: str, pairs: list[str]) -> None:
    files = {name: lines_that_count("\n".join(lines(*text)) + "\n") for name, text in (("1", first), ("2", second))}
    assert duplicate_blocks(files) == pairs
