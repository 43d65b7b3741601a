"""The code's own figures, written to ``results/house.json``: ``make bench-house``, or one of them with ``--only``.

Modules that import each other in circles, blocks that stand twice, lines of code, and what a new kind costs beside its
file. ``tests/unit/test_house.py`` holds the first two at zero.
"""

from __future__ import annotations

import ast
import io
import subprocess
import tokenize
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rows import print_rows, write_row

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("recsys", "jobs", "serve")
FILE = "house"
COMMAND = "make bench-house"
LEAST_LINES = 6
"""equal lines that make a block which stands twice"""


# --- circles ----------------------------------------------------------------------------------------------------------


class Import(NamedTuple):
    """``importer`` has an import of ``imported``; both are modules of ours, by their dotted names."""

    importer: str
    imported: str
    place: str
    """``file:line``"""


def imports(root: Path = ROOT) -> list[Import]:
    """Every import that a module of ``FOLDERS`` has of another: at top level, in functions and for the type checker.

    ``from a import b`` imports the module ``a.b`` where there is one, else ``a``; ``import_module("a.b")`` is an import
    like any other. Strings like ``"a.b:Name"`` are none: they look up by name, as entry points do.
    """
    files = {_module(path.relative_to(root)): path for path in sources(root)}
    found: list[Import] = []
    for importer, path in files.items():
        package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text())):
            for name in _imported(node, package):
                while name and name not in files:
                    name = name.rpartition(".")[0]
                if name and name != importer:
                    found.append(Import(importer, name, f"{path.relative_to(root)}:{node.lineno}"))
    return found


def sources(root: Path = ROOT) -> list[Path]:
    """The Python files of ``FOLDERS``."""
    return sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(node: ast.AST, package: str) -> Iterator[str]:
    """The dotted names that a statement imports, each with what it takes from a module."""
    match node:
        case ast.Import():
            yield from (alias.name for alias in node.names)
        case ast.ImportFrom():
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)
        case ast.Call(func=function, args=[ast.Constant(value=str(name)), *_]):
            if ast.unparse(function).rpartition(".")[2] in ("import_module", "__import__"):
                yield name


def room(module: str) -> str:
    """The child of ``recsys``, ``jobs`` or ``serve`` that ``module`` is or is in."""
    return ".".join(module.split(".")[:2])


def circles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The sets of two and more names that all reach each other along ``edges`` (strongly connected components)."""
    after: dict[str, set[str]] = defaultdict(set)
    for start, end in edges:
        after[start].add(end)
    reached: dict[str, set[str]] = {}
    for start in after:
        reached[start], todo = set(), [start]
        while todo:
            new = after.get(todo.pop(), set()) - reached[start]
            reached[start] |= new
            todo += new
    found = {frozenset(end for end in ends if start in reached.get(end, ())) for start, ends in reached.items()}
    return sorted(sorted(circle) for circle in found if len(circle) > 1)


def cycles(found: Iterable[Import], name: Callable[[str], str] = str) -> dict[tuple[str, ...], list[str]]:
    """The circles among modules, or among rooms where ``name`` is :func:`room`, each with the imports that make it."""
    named = [(name(one.importer), name(one.imported), one) for one in found]
    return {
        tuple(circle): [
            f"{one.place}: {one.importer} imports {one.imported}"
            for start, end, one in named
            if start != end and start in circle and end in circle
        ]
        for circle in circles((start, end) for start, end, _ in named)
    }


# --- blocks that stand twice ------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A line of code, its white space folded; ``number`` from 1."""

    number: int
    text: str


def lines_that_count(code: str) -> list[Line]:
    """The lines of ``code`` without blank ones, comments, docstrings, imports, signatures, decorators and punctuation.

    A signature reaches from the first decorator to the line before the body.
    """
    lines = code.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    passed: set[int] = set()
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant(value=str())):
                passed.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                passed.update(range(first, max(node.lineno + 1, node.body[0].lineno)))
    folded = ((number, " ".join(line.split())) for number, line in enumerate(lines, start=1) if number not in passed)
    return [Line(number, text) for number, text in folded if any(map(str.isalnum, text))]


def duplicate_blocks(files: Mapping[str, list[Line]]) -> list[str]:
    """Every pair of places where ``LEAST_LINES`` or more lines in a row are the same, as long as it goes."""
    starts: dict[tuple[str, ...], list[tuple[str, int]]] = defaultdict(list)
    for file, lines in files.items():
        for at in range(len(lines) - LEAST_LINES + 1):
            starts[tuple(line.text for line in lines[at : at + LEAST_LINES])].append((file, at))
    pairs: list[str] = []
    for same in starts.values():
        for (first, i), (second, j) in combinations(same, 2):
            a, b = files[first], files[second]
            if i and a[i - 1].text == b[j - 1].text:
                continue  # a part of the pair that begins before
            size = LEAST_LINES
            while i + size < len(a) and j + size < len(b) and a[i + size].text == b[j + size].text:
                size += 1
            if first == second:
                size = min(size, j - i)  # a block does not overlap itself
            if size >= LEAST_LINES:
                ends = a[i + size - 1].number, b[j + size - 1].number
                pairs.append(f"{first}:{a[i].number}-{ends[0]} = {second}:{b[j].number}-{ends[1]} ({size} lines)")
    return sorted(pairs)


def duplicates(root: Path = ROOT) -> list[str]:
    """The pairs of the tree."""
    return duplicate_blocks({str(path.relative_to(root)): lines_that_count(path.read_text()) for path in sources(root)})


# --- lines ------------------------------------------------------------------------------------------------------------


def lines_of_code(revision: str | None = None) -> int:
    """All lines of the Python files of ``FOLDERS`` that git knows; as they stand where no ``revision`` is given."""
    command = ["git", "grep", "--no-color", "--count", "", *([revision] if revision else []), "--"]
    files = [f"{folder}/*.py" for folder in FOLDERS]
    counted = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sum(int(line.rpartition(":")[2]) for line in counted.splitlines())


# --- rows -------------------------------------------------------------------------------------------------------------


def write_import_cycles(before: str) -> None:
    found = imports()
    modules, rooms = cycles(found), cycles(found, room)
    for circle, makers in [*modules.items(), *rooms.items()]:
        print(f"circle of {len(circle)}: {', '.join(circle)}", *makers, sep="\n  ")
    number = len(modules) + len(rooms)
    write_row(
        FILE, "import_cycles", number, unit="circles", bar="0", passes=not number, command=COMMAND,
        protocol="strongly connected components of more than one module of recsys, jobs and serve, and of more than "
        "one room (jobs, serve, each child of recsys); imports in functions and under TYPE_CHECKING count, names that "
        "are looked up ('a.b:Name') do not",
        details={"modules": [*modules], "rooms": [*rooms]},
    )  # fmt: skip


def write_duplicate_blocks(before: str) -> None:
    pairs = duplicates()
    for pair in pairs:
        print(pair)
    write_row(
        FILE, "duplicate_blocks", len(pairs), unit="pairs", bar="0", passes=not pairs, command=COMMAND,
        protocol=f"pairs of places in recsys, jobs and serve with {LEAST_LINES} or more lines in a row that are equal "
        "to the letter, white space folded; imports, signatures, decorators, docstrings, comments, blank lines and "
        "lone punctuation passed over",
        details={"pairs": pairs},
    )  # fmt: skip


def write_lines_of_code(before: str) -> None:
    now, then = lines_of_code(), lines_of_code(before)
    write_row(
        FILE, "lines_of_code", now, unit="lines", bar=f"< {then}", passes=now < then, command=COMMAND,
        protocol=f"all lines of the .py files of recsys, jobs and serve that git tracks; {then} at {before}",
        details={"before": then, "before_commit": before},
    )  # fmt: skip


def write_lines_to_add_a_kind(before: str) -> None:
    from adding import MEASURED, ROOMS, add

    added = {one.room: add(one) for one in ROOMS}
    missing = sorted(set(MEASURED) - set(added))
    worst = max(added[one.room].lines for one in ROOMS if one.limit == 1)
    write_row(
        FILE, "lines_to_add_a_kind", worst, unit="lines", bar="<= 1, a job step <= 2", command=COMMAND,
        passes=not missing and all(added[one.room].lines <= one.limit for one in ROOMS),
        protocol="lines of git diff --numstat beside the one new file, in the worst room of "
        f"{', '.join(added)}; a toy member of each was added to a copy of the tree, where its contract tests pass",
        details={"missing": missing, **{name: one._asdict() for name, one in added.items()}},
    )  # fmt: skip


FIGURES = {
    "import_cycles": write_import_cycles,
    "duplicate_blocks": write_duplicate_blocks,
    "lines_of_code": write_lines_of_code,
    "lines_to_add_a_kind": write_lines_to_add_a_kind,
}


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"figures to measure: {', '.join(FIGURES)}")] = None,
    before: Annotated[str, typer.Option(help="revision whose lines of code are compared with", metavar="REV")] = (
        "55a37df"
    ),
) -> None:
    """Measure the code's own figures and print all that are known."""
    for name in only or FIGURES:
        print(f"== {name}", flush=True)
        FIGURES[name](before)
    print_rows(FILE)


if __name__ == "__main__":
    typer.run(main)
