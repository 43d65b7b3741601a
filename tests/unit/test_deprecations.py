"""What is deprecated says what to use instead and when it goes, and is gone by then: see CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORM = re.compile(r"\S.* is deprecated: use \S.*; it goes in (\d+)\.(\d+)\.0")


def messages(code: str) -> Iterator[str]:
    """What ``code`` says of each thing that it deprecates, by a decorator, a warning or the field of a setting."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            values = [*node.args, *(word.value for word in node.keywords)]
            warns = name == "warn" and any(ast.unparse(value).endswith("DeprecationWarning") for value in values)
            found = values[:1] if warns or name == "deprecated" else []
            found += [word.value for word in node.keywords if word.arg == "deprecated"]
            for value in found:
                yield str(value.value) if isinstance(value, ast.Constant) else ast.unparse(value)


def faults(code: str, version: str) -> list[str]:
    """What is wrong with the deprecations in ``code``, in a tree of this ``version``."""
    major, minor = map(int, version.split(".")[:2])
    found: list[str] = []
    for message in messages(code):
        match = FORM.fullmatch(message)
        if match is None:
            found.append(f"{message!r} must be 'OLD is deprecated: use NEW; it goes in X.Y.0'")
        elif (major, minor) >= (int(match[1]), int(match[2])):
            found.append(f"{message!r}, and this is {version}: remove it")
    return found


OLD = "old() is deprecated: use new(); it goes in 0.4.0"
FORMS = {
    "decorator": f"@deprecated({OLD!r})\ndef old(): ...",
    "of a module": f"@typing_extensions.deprecated({OLD!r})\nclass Old: ...",
    "warning": f"warnings.warn({OLD!r}, DeprecationWarning, stacklevel=2)",
    "warning by name": f"warn(message={OLD!r}, category=DeprecationWarning)",
    "setting": f"old: int = Field(default=1, deprecated={OLD!r})",
}


@pytest.mark.parametrize("code", FORMS.values(), ids=FORMS)
def test_what_is_deprecated_goes_in_the_version_that_it_names(code: str) -> None:
    assert [faults(code, version) for version in ("0.2.0", "0.3.7")] == [[], []]
    for version in ("0.4.0", "0.4.1", "0.10.0", "1.0.0"):
        assert faults(code, version) == [f"{OLD!r}, and this is {version}: remove it"]


@pytest.mark.parametrize(
    "message",
    [
        "'old() is deprecated'",
        "'old() is deprecated: it goes in 0.4.0'",
        "'old() is deprecated: use new()'",
        "'old() is deprecated: use new(); it goes in 0.4.1'",
        "f'{name} is deprecated: use new(); it goes in 0.4.0'",
        "MESSAGE",
        "True",
    ],
)
def test_a_message_that_says_less_is_refused(message: str) -> None:
    (fault,) = faults(f"@deprecated({message})\ndef old(): ...", "0.2.0")
    assert fault.endswith("must be 'OLD is deprecated: use NEW; it goes in X.Y.0'")


def test_other_warnings_are_none() -> None:
    code = "warnings.warn('slow')\nlog.warn('slow')\nwarnings.simplefilter('ignore', DeprecationWarning)"
    assert list(messages(code)) == []


def test_nothing_is_kept_beyond_its_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    files = [path for room in ("recsys", "jobs", "serve") for path in sorted((ROOT / room).rglob("*.py"))]
    assert len(files) > 150
    assert {str(path.relative_to(ROOT)): found for path in files if (found := faults(path.read_text(), version))} == {}
