"""What the code imports is declared: by the package itself, or by the extra that brings the part or the kind."""

from __future__ import annotations

import ast
import functools
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from recsys.libraries import DISTRIBUTION, install

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PARTS = {
    "recsys": (),
    "recsys/testing": ("dev",),
    "jobs": ("ray",),
    "jobs/demo.py": ("demo",),
    "serve": ("serve",),
}
"""the extras with which all of a folder or file can be imported; the longest name counts"""
OTHER_NAMES = {
    "faiss": {"faiss-cpu", "faiss-gpu"},
    "mlflow": {"mlflow-skinny"},
    "sklearn": {"scikit-learn"},
    "yaml": {"pyyaml"},
}
BY_NAME = {"import_module", "library", "need", "installed", "find_spec"}
"""functions whose first argument names a module"""


class Found(NamedTuple):
    module: str
    line: int
    is_lazy: bool
    """imported when a function is called, or for type checkers alone"""
    extras: tuple[str, ...] = ()
    """those that the error names where it is missing"""


def imports(code: str) -> list[Found]:
    """The modules of others that ``code`` imports; of ``a.b`` it says ``a``."""

    def visit(node: ast.AST, is_lazy: bool) -> Iterator[Found]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Found(alias.name, child.lineno, is_lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                yield Found(child.module or "", child.lineno, is_lazy)
            elif isinstance(child, ast.Call) and (module := named_module(child)):
                words = [word.value for word in child.keywords if word.arg == "extra"]
                named = {str(each.value) for word in words for each in ast.walk(word) if isinstance(each, ast.Constant)}
                yield Found(module, child.lineno, is_lazy, tuple(sorted(named)))
            function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            yield from visit(child, is_lazy or function or types)

    own = {*sys.stdlib_module_names, "recsys", "jobs", "serve"}
    tops = [each._replace(module=each.module.partition(".")[0]) for each in visit(ast.parse(code), False)]
    return [each for each in tops if each.module not in own]


def named_module(call: ast.Call) -> str | None:
    """The module that a call of one of :data:`BY_NAME` names as it stands."""
    match call:
        case ast.Call(ast.Name(name) | ast.Attribute(attr=name), [ast.Constant(str(module)), *_]) if name in BY_NAME:
            return module
    return None


def test_every_form_of_import_is_seen() -> None:
    code = """
import numpy as np, os
from torch.nn import functional
if TYPE_CHECKING:
    import faiss
class A:
    import yaml
    def f(self):
        from ray import serve
        from recsys.errors import ConfigError
        importlib.import_module("sklearn.utils")
        library("redis.retry", "this", extra="gpu" if a == "gpu" else "cpu")
        library(name)
"""
    assert imports(code) == [
        ("numpy", 2, False, ()),
        ("torch", 3, False, ()),
        ("faiss", 5, True, ()),
        ("yaml", 7, False, ()),
        ("ray", 9, True, ()),
        ("sklearn", 11, True, ()),
        ("redis", 12, True, ("cpu", "gpu")),
    ]


@functools.cache
def declared(*extras: str) -> frozenset[str]:
    """The distributions that ``extras`` alone bring; no extra stands for what everybody gets."""
    found: set[str] = set()
    for text in [text for extra in extras for text in EXTRAS[extra]] or PROJECT["dependencies"]:
        requirement = Requirement(text)
        own = canonicalize_name(requirement.name) == DISTRIBUTION
        found |= declared(*sorted(requirement.extras)) if own else {canonicalize_name(requirement.name)}
    return frozenset(found)


def distributions(module: str) -> set[str]:
    """Those that bring ``module``: of its own name, but for the few that are called otherwise."""
    return OTHER_NAMES.get(module, {canonicalize_name(module)})


@functools.cache
def files() -> list[tuple[Path, list[Found]]]:
    paths = [path for folder in ("recsys", "jobs", "serve") for path in sorted((ROOT / folder).rglob("*.py"))]
    return [(path.relative_to(ROOT), imports(path.read_text())) for path in paths]


def test_what_is_imported_is_declared() -> None:
    optional = {extra for extra in EXTRAS if extra != "dev"}
    missing: list[str] = []
    for path, found in files():
        part = PARTS[max((name for name in PARTS if path.is_relative_to(name)), key=len)]
        always = declared() | (declared(*part) if part else frozenset())
        perhaps = always | declared(*sorted(optional))
        undeclared = [one for one in found if not distributions(one.module) & (perhaps if one.is_lazy else always)]
        missing += [f"{path}:{one.line}: {one.module}" for one in undeclared]
    assert missing == []


def test_errors_name_the_extra_that_brings_it() -> None:
    named = [(one, f"{path}:{one.line}") for path, found in files() for one in found if one.extras]
    assert len(named) > 10
    wrong = [(one, where) for one, where in named for extra in one.extras
             if not distributions(one.module) & declared(extra)]  # fmt: skip
    assert wrong == []


def test_what_everybody_gets_is_imported() -> None:
    modules = {one.module for _, found in files() for one in found}
    used = {name for module in modules for name in distributions(module)}
    assert declared() - used == set()


def test_the_library_is_light() -> None:
    assert declared() & {"ray", "faiss-cpu", "openvino", "nncf", "transformers", "fastapi"} == set()


def test_all_is_all_but_what_excludes_each_other() -> None:
    assert declared("all") == declared(*sorted(set(EXTRAS) - {"cpu", "gpu", "dev", "all"}))


@pytest.mark.parametrize("extra", EXTRAS)
def test_every_extra_is_pinned(extra: str) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(line.split("==")[0]) for line in lines if "==" in line}
    assert declared(extra) | declared() <= pinned


def test_one_name() -> None:
    assert PROJECT["name"] == DISTRIBUTION
    assert install("cpu") == "pip install 'recsys-ray[cpu]'"
