"""What a contributor is handed: hooks that run what `make lint` runs, and forms that a site can show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FORMS = sorted(path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")


def test_hooks_run_what_make_lint_runs() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"  # anything else is fetched
    recipes = re.findall(r"^(?:lint|audit):.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(recipes) == 2
    lint = re.sub(r" \.$", "", "".join(recipes).replace("$$", "$"), flags=re.MULTILINE)
    for hook in repository["hooks"]:
        program, _, arguments = hook["entry"].partition(" ")
        assert (program.rpartition("/")[0], hook["language"]) == (".venv/bin", "system")
        command = f"{Path(program).name} {arguments.replace('--force-exclude', '')}".strip()
        assert re.search(rf"(\t|\| xargs -0 ){re.escape(command)}\n", lint), f"make lint does not run {command}"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_asks_for_something(path: Path) -> None:
    """As GitHub's schema of issue forms has it: one that breaks it is not shown."""
    form = yaml.safe_load(path.read_text())
    assert form["name"]
    assert form["description"]
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert {part["type"] for part in asked} <= {"textarea", "input", "dropdown", "checkboxes"}
    names = [part["id"] for part in asked]
    assert len(names) == len(set(names))
    assert all(part["attributes"]["label"] for part in asked)
    assert any(part.get("validations", {}).get("required") for part in asked)


def test_there_is_a_form_for_each_need() -> None:
    assert [path.stem for path in FORMS] == ["bug", "feature"]


@pytest.mark.parametrize("name", [".github/PULL_REQUEST_TEMPLATE.md", "CODE_OF_CONDUCT.md", "SECURITY.md"])
def test_its_links_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\((?!http)(.+?)\)", text):
        path, _, heading = target.removeprefix("../blob/HEAD/").partition("#")
        found = (ROOT / path).read_text()
        assert not heading or re.search(rf"^#+ {heading}$", found, re.MULTILINE | re.IGNORECASE), target
