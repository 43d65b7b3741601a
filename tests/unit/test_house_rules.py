"""Rules of the house that no linter knows: see CONTRIBUTING.md."""

from __future__ import annotations

import ast
import importlib
import os
import pickle
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import recsys
from recsys.config import StrictConfig
from recsys.errors import RecsysError
from recsys.kinds import parts_of

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("recsys", "jobs", "serve")
MAX_LINES = 600
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def unsafe(code: str) -> Iterator[str]:
    """What in ``code`` reads or writes formats that run code when they are loaded."""
    for node in ast.walk(ast.parse(code)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (module for module in modules if module.split(".")[0] in UNSAFE_MODULES)
        yield from (module for module in modules if module in ("torch.load", "torch.save"))
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            safe = any(
                word.arg == "weights_only" and isinstance(word.value, ast.Constant) and word.value.value is True
                for word in node.keywords
            )
            if name == "torch.save" or (name == "torch.load" and not safe):
                yield name
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            yield "allow_pickle"


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import pickle", ["pickle"]),
        ("from joblib import dump", ["joblib", "joblib.dump"]),
        ("import torch\ntorch.load('x')", ["torch.load"]),
        ("import torch\ntorch.load('x', weights_only=False)", ["torch.load"]),
        ("import torch\ntorch.load('x', weights_only=True)", []),
        ("np.load('x', allow_pickle=True)", ["allow_pickle"]),
        ("import json", []),
    ],
)
def test_unsafe_formats_are_recognised(code: str, found: list[str]) -> None:
    assert list(unsafe(code)) == found


def test_nothing_saved_can_run_code() -> None:
    assert {str(path): found for path in sources(*ROOMS) if (found := list(unsafe(path.read_text())))} == {}


def test_no_text_is_taken_for_markup() -> None:
    """What is printed holds titles, paths and ``pip install 'name[extra]'``, whose brackets must stay."""
    calls = [
        ast.unparse(node)
        for path in sources(*ROOMS)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "Console"
    ]
    assert len(calls) > 5
    assert [call for call in calls if "markup=False" not in call] == []


def test_no_file_is_two_files() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources(*ROOMS, "tests")}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_every_folder_of_code_is_a_package() -> None:
    folders = {path.parent for path in sources(*ROOMS)}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in sources("tests") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


# --- the library's classes --------------------------------------------------------------------------------------------


def subclasses(base: type) -> list[type]:
    """All classes of the library below ``base``, whichever module they are in."""
    for module in pkgutil.walk_packages(recsys.__path__, "recsys."):
        if not module.name.startswith("recsys.testing"):
            importlib.import_module(module.name)
    found: list[type] = []
    todo = [base]
    while todo:
        for each in todo.pop().__subclasses__():
            if each not in found and each.__module__.split(".")[0] == "recsys":
                found.append(each)
                todo.append(each)
    return found


def test_every_error_crosses_a_process_border() -> None:
    classes = [RecsysError, *subclasses(RecsysError)]
    assert len(classes) > 10
    for cls in classes:
        error = cls("row 3 of items.csv: no title", row=3, file="items.csv")
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is cls
        assert (str(again), again.details) == (str(error), {"row": 3, "file": "items.csv"})


def test_errors_live_in_one_module() -> None:
    assert {cls.__module__ for cls in subclasses(RecsysError)} == {"recsys.errors"}


def settings_of(*roots: type[StrictConfig]) -> list[type[StrictConfig]]:
    """The configuration classes that a person writes: ``roots`` and all that their fields hold, every kind included."""
    found: list[type[StrictConfig]] = []
    todo: list[Any] = list(roots)
    while todo:
        each = todo.pop()
        if isinstance(each, type) and issubclass(each, StrictConfig):
            if each not in found:
                found.append(each)
                todo += each.model_fields.values()
        else:
            todo += parts_of(each)
    return found


def test_every_setting_is_described() -> None:
    from jobs.config import JobConfig
    from serve.config import ServeConfig

    classes = settings_of(JobConfig, ServeConfig)
    assert len(classes) > 15
    bare = [
        f"{cls.__module__}.{cls.__name__}.{name}"
        for cls in classes
        for name, field in cls.model_fields.items()
        if name != "kind" and not field.description
    ]
    assert bare == []


# --- the tree ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "constraints.txt"])
def test_a_reader_finds(name: str) -> None:
    assert len((ROOT / name).read_text()) > 200


def test_the_changelog_names_the_version() -> None:
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert f"[{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_no_file_names_the_machine_it_was_written_on() -> None:
    """Paths and package indexes of one machine mean nothing on the next."""
    words = re.compile("|".join(("/work" + "/", r"--(extra-)?index-url", r"/opt/(pypi|wheels)", "/root" + "/")))
    suffixes = {".py", ".md", ".toml", ".yaml", ".yml", ".txt", ".json", ""}
    found = []
    for path in tree():
        if path.suffix in suffixes and path != Path(__file__):
            text = path.read_text(errors="ignore")
            found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in words.finditer(text)]
    assert found == []


def tree() -> Iterator[Path]:
    """The files of the checkout, without environments, caches and results."""
    skipped = {"runs", "dist", "build", "__pycache__"}
    for folder, inner, files in os.walk(ROOT):
        inner[:] = [name for name in inner if name not in skipped and (name[0] != "." or name == ".ci")]
        yield from (Path(folder) / name for name in files)


def test_dependencies_are_pinned() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line)] == []
    pinned = {re.sub(r"[._-]+", "-", line.split("==")[0]).lower() for line in lines}
    text = (ROOT / "pyproject.toml").read_text()
    wanted = re.findall(r'^ {4}"([A-Za-z0-9._-]+)(?:\[.*?\])?[>=]=', text, re.MULTILINE)
    wanted += [
        name
        for line in re.findall(r"^(?:cpu|gpu|demo) = .*$", text, re.MULTILINE)
        for name in re.findall(r'"([\w-]+)[>=]=', line)
    ]
    assert len(wanted) > 25
    assert {re.sub(r"[._-]+", "-", name).lower() for name in wanted} - pinned == set()
