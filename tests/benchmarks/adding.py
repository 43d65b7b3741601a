"""What a new kind costs beside its one new file: a toy member of each room is added to a copy of the tree, and tested.

A toy is a kind named ``toy``, whose source stands in ``toys/``; the contract tests of its room are run for it alone
(``-k toy``).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as ET

ROOT = Path(__file__).resolve().parents[2]
TOYS = Path(__file__).parent / "toys"
KIND = "toy"
MEASURED = (
    "source",
    "retriever",
    "ranker",
    "rating model",
    "index",
    "reranking rule",
    "event store",
    "job step",
)
"""the rooms that the figure is about: one that ``ROOMS`` lacks keeps it from passing"""


class Room(NamedTuple):
    """How a member is added to a room: ``toy.py`` in its folder, and a line in the table of its ``__init__.py``."""

    room: str
    folder: str
    toy: str
    """the file of ``toys/`` that becomes ``toy.py``"""
    tests: str
    """the room's contract tests"""
    limit: int = 1
    """lines that may change beside the new file"""


class Added(NamedTuple):
    """What it took."""

    lines: int
    """lines that changed beside the new file"""
    passed: int
    """contract tests of the toy that passed"""
    skipped: int


CONTRACT = "tests/contract"
STEP = Room("job step", "jobs/steps", "step", "", limit=2)
"""Nothing lists the steps, and to run it is the test; what it needs beside its file is an entry, ``jobs/toy.py``."""
ROOMS = (
    Room("index", "recsys/index", "index", "test_index_contract.py"),
    Room("source", "recsys/data/sources", "source", "test_source_contract.py"),
    Room("retriever", "recsys/models/retrievers", "retriever", "test_retrievers.py"),
    Room("ranker", "recsys/models/rankers", "ranker", "test_rankers.py"),
    Room("rating model", "recsys/models/ratings", "rating_model", "test_rating_models.py"),
    Room("reranking rule", "recsys/pipeline/rules", "rule", "test_rules.py"),
    Room("event store", "recsys/events", "event_store", "test_event_stores.py"),
    STEP,
)
ENTRY = 'from jobs.pipeline import main\n\nmain("toy", __name__)\n'
STEP_SETTINGS = ("data.source.num_users=40", "data.source.num_items=60", "compute.num_workers=0")


def add(room: Room) -> Added:
    """Add the room's toy to a copy of the tree as it stands, and run its contract tests there.

    A toy that cannot be added, or whose tests fail or are none, ends the measurement.
    """
    with tempfile.TemporaryDirectory(prefix="house-") as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        target = tree / room.folder / f"{KIND}.py"
        if target.exists():
            raise SystemExit(f"{room.room}: {target} is there already")
        target.write_text((TOYS / f"{room.toy}.py.txt").read_text())
        if room is STEP:
            (tree / "jobs" / target.name).write_text(ENTRY)
            lines = sum(1 for line in ENTRY.splitlines() if line)
            passed, skipped = run_step(tree)
        else:
            list_toy(tree / room.folder / "__init__.py", f"{room.folder}/{KIND}".replace("/", "."))
            lines = changed_lines(tree)
            passed, skipped = run_tests(room, tree)
    print(
        f"{room.room}: {lines} lines beside {room.folder}/{KIND}.py; {passed} tests passed, {skipped} skipped",
        flush=True,
    )
    return Added(lines, passed, skipped)


def list_toy(table: Path, module: str) -> None:
    """One line more, after the last one that names a member (``"kind": "module:Class",``)."""
    lines = table.read_text().splitlines(keepends=True)
    last = max(number for number, line in enumerate(lines) if re.match(r' +"\w+": "[\w.]+:\w+",$', line))
    indent = " " * (len(lines[last]) - len(lines[last].lstrip()))
    table.write_text("".join([*lines[: last + 1], f'{indent}"{KIND}": "{module}:Toy",\n', *lines[last + 1 :]]))


def copy_tree(tree: Path) -> None:
    """The files of the checkout that git knows or does not ignore, as they stand, all of them in git's index there."""
    named = git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, named):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    git(tree, "init", "--quiet")
    git(tree, "add", "--all")


def changed_lines(tree: Path) -> int:
    """Of the files that were there before: a line that was changed counts once, as one that was added does."""
    rows = [line.split("\t") for line in git(tree, "diff", "--numstat").splitlines()]
    return sum(max(int(added), int(deleted)) for added, deleted, _ in rows)


def run_tests(room: Room, tree: Path) -> tuple[int, int]:
    """Contract tests of the toy that passed and were skipped; SystemExit unless some passed and none failed."""
    report = tree.parent / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-k", KIND, f"--junit-xml={report}", f"{CONTRACT}/{room.tests}"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    suite = ET.parse(report).find("testsuite") if report.exists() else None
    counts = {} if suite is None else {name: int(suite.attrib[name]) for name in ("tests", "skipped")}
    passed = counts.get("tests", 0) - counts.get("skipped", 0)
    if done.returncode or passed < 1:
        raise SystemExit(f"{room.room}: the toy does not keep the contract\n{done.stdout}{done.stderr}")
    return passed, counts["skipped"]


def run_step(tree: Path) -> tuple[int, int]:
    """The step by its own name, with what it reads; SystemExit unless it ends well and leaves its figures."""
    command = [sys.executable, "-m", "jobs.toy", "--config", "configs/synthetic.yaml", "--set", "workdir=toy-runs"]
    for setting in STEP_SETTINGS:
        command += ["--set", setting]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    if done.returncode or len(list(tree.glob("toy-runs/toy/*/artifact.json"))) != 1:
        raise SystemExit(f"job step: the toy does not run\n{done.stdout}{done.stderr}")
    return 1, 0


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout
