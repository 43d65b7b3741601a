"""What a new kind costs beside its one new file: a toy member of each room is added to a copy of the tree, and tested.

A toy is a kind named ``toy``, whose source stands in ``toys/``; the contract tests of its room are run for it alone
(``-k toy``).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
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


class Change(NamedTuple):
    """In ``file`` the text ``old``, which stands there once, becomes ``new``."""

    file: str
    old: str
    new: str


class Room(NamedTuple):
    """How a member is added to a room."""

    room: str
    file: str
    """where its one new file goes"""
    toy: str
    """the file of ``toys/`` that goes there"""
    changes: Sequence[Change]
    """all that must be said elsewhere"""
    tests: Sequence[str]
    """the room's contract tests, for pytest"""
    limit: int = 1
    """lines that may change beside the new file"""


class Added(NamedTuple):
    """What it took."""

    lines: int
    """lines that changed beside the new file"""
    passed: int
    """contract tests of the toy that passed"""
    skipped: int


def after(file: str, old: str, line: str) -> Change:
    """``line`` is put after ``old``, which ends a line."""
    return Change(file, f"{old}\n", f"{old}\n{line}\n")


INDEX, MODELS, RATINGS = "recsys/index/__init__.py", "recsys/models/__init__.py", "recsys/models/ratings/__init__.py"
EVENTS, SOURCES = "recsys/events/__init__.py", "recsys/data/sources/__init__.py"
INDEX_TESTS, SOURCE_TESTS = "tests/contract/test_index_contract.py", "tests/contract/test_source_contract.py"
RETRIEVER_TESTS, RANKER_TESTS = "tests/contract/test_retrievers.py", "tests/contract/test_rankers.py"
RATING_TESTS, EVENT_TESTS = "tests/contract/test_rating_models.py", "tests/contract/test_event_stores.py"
ROOMS = (
    Room(
        "index", "recsys/index/toy.py", "index.py.txt",
        [
            after(INDEX, "import IvfIndex", "from recsys.index.toy import Toy"),
            Change(INDEX, "IvfIndex, HnswIndex)", "IvfIndex, HnswIndex, Toy)"),
        ],
        [INDEX_TESTS],
    ),
    Room(
        "source", "recsys/data/sources/toy.py", "source.py.txt",
        [
            after(SOURCES, "import SyntheticSource", "from recsys.data.sources.toy import Toy"),
            after(SOURCES, "    CsvSource,\n    SyntheticSource,", "    Toy,"),
            after(SOURCE_TESTS, "    return {}\n", "\ndef toy(folder: Path) -> dict[str, object]:\n    return {}\n"),
            Change(SOURCE_TESTS, "csv, synthetic)", "csv, synthetic, toy)"),
        ],
        [SOURCE_TESTS],
    ),
    Room(
        "retriever", "recsys/models/toy.py", "retriever.py.txt",
        [
            after(MODELS, "import TfIdf", "from recsys.models.toy import Toy"),
            after(MODELS, "    Blend,", "    Toy,"),
            after(RETRIEVER_TESTS, "import TfIdf", "from recsys.models.toy import Toy"),
            after(
                RETRIEVER_TESTS,
                "    config = EASE(regularization=10.0)\n    min_ndcg = 0.35\n",
                "\nclass TestToy(RetrieverContract):\n    config = Toy()\n    min_ndcg = 0.35\n",
            ),
        ],
        [RETRIEVER_TESTS],
    ),
    Room(
        "ranker", "recsys/models/toy.py", "ranker.py.txt",
        [
            after(MODELS, "import TfIdf", "from recsys.models.toy import Toy"),
            Change(MODELS, "CrossEncoderConfig, CausalLMConfig)", "CrossEncoderConfig, CausalLMConfig, Toy)"),
            after(RANKER_TESTS, "import TextRanker, TextRankerConfig", "from recsys.models.toy import Toy"),
            after(
                RANKER_TESTS,
                "batch_queries=4, dropout=0.0\n    )\n",
                "\nclass TestToy(PlantedContract):\n    config = Toy(epochs=40, learning_rate=0.1)\n",
            ),
        ],
        [RANKER_TESTS],
    ),
    Room(
        "rating model", "recsys/models/ratings/toy.py", "rating_model.py.txt",
        [
            after(RATINGS, "import Neighbours", "from recsys.models.ratings.toy import Toy"),
            Change(RATINGS, "(Biases, Neighbours, Factors)", "(Biases, Neighbours, Factors, Toy)"),
            after(RATING_TESTS, "import Neighbours", "from recsys.models.ratings.toy import Toy"),
            Change(RATING_TESTS, "regularization=2)]", "regularization=2), Toy()]"),
        ],
        [RATING_TESTS],
    ),
    Room(
        "event store", "recsys/events/toy.py", "event_store.py.txt",
        [
            after(EVENTS, "import SqliteEventStoreConfig", "from recsys.events.toy import Toy"),
            Change(EVENTS, "KINDS = (SqliteEventStoreConfig,", "KINDS = (SqliteEventStoreConfig, Toy,"),
            after(EVENT_TESTS, "RedisEventStoreConfig, SqliteEventStoreConfig", "from recsys.events.toy import Toy"),
            after(
                EVENT_TESTS,
                'folder / "events.sqlite"))\n',
                "\nclass TestToy(EventStoreContract):\n    def config(self, folder: Path) -> Toy:\n"
                "        return Toy(folder=str(folder))\n",
            ),
        ],
        [EVENT_TESTS],
    ),
)  # fmt: skip


def add(room: Room) -> Added:
    """Add the room's toy to a copy of the tree as it stands, and run its contract tests there.

    A toy that cannot be added, or whose tests fail or are none, ends the measurement.
    """
    with tempfile.TemporaryDirectory(prefix="house-") as folder:
        tree = Path(folder) / "tree"
        copy_tree(tree)
        target = tree / room.file
        if target.exists():
            raise SystemExit(f"{room.room}: {room.file} is there already")
        target.write_text((TOYS / room.toy).read_text())
        for change in room.changes:
            text = (tree / change.file).read_text()
            if text.count(change.old) != 1:
                raise SystemExit(
                    f"{room.room}: {change.file} has {change.old!r} {text.count(change.old)} times, not once"
                )
            (tree / change.file).write_text(text.replace(change.old, change.new))
        lines = changed_lines(tree)
        passed, skipped = run_tests(room, tree)
    print(f"{room.room}: {lines} lines beside {room.file}; {passed} tests passed, {skipped} skipped", flush=True)
    return Added(lines, passed, skipped)


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
    command = [sys.executable, "-m", "pytest", "-q", "-k", KIND, f"--junit-xml={report}", *room.tests]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    suite = ET.parse(report).find("testsuite") if report.exists() else None
    counts = {} if suite is None else {name: int(suite.attrib[name]) for name in ("tests", "skipped")}
    passed = counts.get("tests", 0) - counts.get("skipped", 0)
    if done.returncode or passed < 1:
        raise SystemExit(f"{room.room}: the toy does not keep the contract\n{done.stdout}{done.stderr}")
    return passed, counts["skipped"]


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout
