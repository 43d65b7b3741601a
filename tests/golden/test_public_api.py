"""The public names of ``recsys``: listed in docs/api.md, documented, cheap to import, their signatures as they were.

``python tests/golden/test_public_api.py`` writes public_api.txt anew.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import pytest

import recsys
import recsys.errors

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("public_api.txt")
RENEW = "if this is meant, run: python tests/golden/test_public_api.py"


def listed(heading: str) -> list[str]:
    """The names in the table of docs/api.md below ``heading``."""
    text = (ROOT / "docs/api.md").read_text()
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    cells = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]


def public() -> list[Any]:
    return [getattr(recsys, name) for name in recsys.__all__]


# --- names ------------------------------------------------------------------------------------------------------------


def test_the_page_lists_the_public_names() -> None:
    assert sorted(listed("Stable") + listed("Provisional")) == sorted(recsys.__all__)


def test_each_name_is_what_an_editor_takes_it_for() -> None:
    tree = ast.parse(Path(recsys.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert sorted(seen) == sorted(recsys.__all__)
    for name, module in seen.items():
        assert getattr(recsys, name) is getattr(import_module(str(module)), name)
        assert getattr(recsys, name).__name__ == name


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="'recsys' has no attribute 'Recomender'"):
        _ = recsys.Recomender
    assert {"Recommender", "__version__"} <= set(dir(recsys))


def test_every_error_is_public() -> None:
    errors = {name for name, value in vars(recsys.errors).items() if name.endswith("Error") and isinstance(value, type)}
    assert errors - set(recsys.__all__) == set()


def test_what_kinds_derive_from_is_public() -> None:
    bases = re.findall(r"^\| [^|]+ \| `(\w+)` in `recsys/", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert len(bases) > 8
    assert set(bases) - set(recsys.__all__) == set()


def test_importing_the_package_loads_nothing_else() -> None:
    program = (
        "import json, sys; before = set(sys.modules); import recsys; recsys.RequestError; dir(recsys);"
        "print(json.dumps([name for name in sys.modules if name not in before]))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert loaded - sys.stdlib_module_names == {"recsys"}


# --- version ----------------------------------------------------------------------------------------------------------


def test_the_version_is_that_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"]
    installed = {name: "9.8.7"}

    def version(distribution: str) -> str:
        if distribution not in installed:
            raise metadata.PackageNotFoundError(distribution)
        return installed[distribution]

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.delitem(vars(recsys), "__version__", raising=False)
    assert recsys.__version__ == "9.8.7", f"_DISTRIBUTION in recsys/__init__.py must be {name!r}"
    installed.clear()
    monkeypatch.delitem(vars(recsys), "__version__")
    assert recsys.__version__ == "unknown"
    monkeypatch.delitem(vars(recsys), "__version__")


# --- docstrings -------------------------------------------------------------------------------------------------------

METHODS = (types.FunctionType, classmethod, staticmethod, property, functools.cached_property)


def undocumented(value: Any) -> Iterator[str]:
    """``value``, or what of a class has no docstring, neither its own nor of what it overrides.

    A dataclass without one has its signature in the place of it.
    """
    own = vars(value).get("__doc__") if isinstance(value, type) else value.__doc__
    if not own or own.startswith(f"{value.__name__}("):
        yield value.__name__
    for name, member in vars(value).items() if isinstance(value, type) else ():
        if not name.startswith("_") and isinstance(member, METHODS):
            overridden = [vars(base)[name] for base in value.__mro__ if name in vars(base)]
            if not any(each.__doc__ for each in overridden):
                yield f"{value.__name__}.{name}"


class Silent(list[int]):
    def said(self) -> None: ...
    @property
    def held(self) -> int: ...
    @classmethod
    def made(cls) -> None: ...
    def append(self, value: int) -> None: ...
    def _own(self) -> None: ...


def test_what_says_nothing_is_found() -> None:
    assert list(undocumented(Silent)) == ["Silent", "Silent.said", "Silent.held", "Silent.made"]


def test_all_that_is_public_says_what_it_is() -> None:
    assert [name for value in public() for name in undocumented(value)] == []


# --- signatures -------------------------------------------------------------------------------------------------------


def outline(value: Any) -> Iterator[str]:
    """A function's signature; of a class what it derives from, then its public fields, properties and methods."""
    (node,) = ast.parse(inspect.getsource(value)).body
    if not isinstance(node, ast.ClassDef):
        yield signature(node)
        return
    yield from (f"@{ast.unparse(decorator)}" for decorator in node.decorator_list)
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    yield f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    for part in node.body:
        match part:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) if name == "__init__" or name[0] != "_":
                yield from (f"    @{ast.unparse(decorator)}" for decorator in part.decorator_list)
                yield f"    {signature(part)}"
            case ast.AnnAssign(target=ast.Name(id=name)) | ast.Assign(targets=[ast.Name(id=name)]) if name[0] != "_":
                yield f"    {ast.unparse(undescribed(part))}"


def signature(node: Any) -> str:
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    start = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{start} {node.name}({ast.unparse(node.args)}){returns}"


def undescribed(field: ast.AnnAssign | ast.Assign) -> ast.AST:
    """A setting without its description, which is for people."""
    if isinstance(field.value, ast.Call):
        field.value.keywords = [each for each in field.value.keywords if each.arg != "description"]
    return field


def whole_outline() -> str:
    blocks = []
    for heading in ("Stable", "Provisional"):
        blocks.append(f"# {heading}")
        blocks += ["\n".join(outline(getattr(recsys, name))) for name in listed(heading)]
    return "\n\n".join(blocks) + "\n"


def test_signatures_are_as_they_were() -> None:
    assert whole_outline() == GOLDEN.read_text(), RENEW


def test_what_a_public_class_inherits_is_public() -> None:
    """Else its outline would lack a part."""
    classes = [value for value in public() if isinstance(value, type)]
    bases = {base for cls in classes for base in cls.__mro__ if base.__module__.partition(".")[0] == "recsys"}
    assert {base.__qualname__ for base in bases} - set(recsys.__all__) == set()


if __name__ == "__main__":
    GOLDEN.write_text(whole_outline())
