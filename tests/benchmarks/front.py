"""What a newcomer meets first, written to ``results/front.json``: ``make bench-front``, or one figure by ``--only``."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rows import RESULTS, print_rows, write_row

ROOT = Path(__file__).resolve().parents[2]
FILE = "front"
COMMAND = "make bench-front"
HEAVY = ("torch", "transformers", "ray", "openvino")
NUM_RUNS = 11


def write_import_recommender_cpu_s() -> None:
    seconds, loaded = _cpu_s("from recsys import Recommender")
    write_row(
        FILE, "import_recommender_cpu_s", seconds, unit="s", bar=f"<= 0.4, none of {', '.join(HEAVY)} loaded",
        passes=seconds <= 0.4 and not loaded, command=COMMAND,
        protocol=f"CPU seconds of a fresh process that imports recsys.Recommender and ends, median of {NUM_RUNS}, "
        "files cached",
        details={"loaded": loaded},
    )  # fmt: skip


def write_cli_help_cpu_s() -> None:
    seconds, loaded = _cpu_s("import sys; sys.argv = ['recsys', '--help']; from recsys.cli import app; app()")
    write_row(
        FILE, "cli_help_cpu_s", seconds, unit="s", bar="<= 0.5", passes=seconds <= 0.5, command=COMMAND,
        protocol=f"CPU seconds of a fresh process that prints recsys --help, median of {NUM_RUNS}, files cached",
        details={"loaded": loaded},
    )  # fmt: skip


def write_cli_help_lines() -> None:
    command = [str(Path(sys.executable).with_name("recsys")), "run", "--help"]
    number = len(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())
    write_row(
        FILE, "cli_help_lines", number, unit="lines", bar="<= 60", passes=number <= 60, command=COMMAND,
        protocol="lines that recsys run --help prints",
    )  # fmt: skip


def write_demo_console_lines() -> None:
    runs = ROOT / "runs"
    kept = ROOT / "runs.kept"
    if runs.exists():
        runs.rename(kept)  # every step is to run
    try:
        command = ["make", "--no-print-directory", "demo", "ONCE=1"]
        done = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True
        )
    finally:
        if kept.exists():
            shutil.rmtree(runs, ignore_errors=True)
            kept.rename(runs)
    lines = done.stdout.splitlines()
    (RESULTS / "front").mkdir(exist_ok=True)
    (RESULTS / "front/demo.txt").write_text("\n".join(lines).replace(str(ROOT), ".") + "\n")
    write_row(
        FILE, "demo_console_lines", len(lines), unit="lines", bar="<= 120", passes=len(lines) <= 120, command=COMMAND,
        protocol="lines of make demo ONCE=1, standard output and error together, no terminal, no step reused; they are "
        "in results/front/demo.txt",
    )  # fmt: skip


FIGURES = {
    "import_recommender_cpu_s": write_import_recommender_cpu_s,
    "cli_help_cpu_s": write_cli_help_cpu_s,
    "cli_help_lines": write_cli_help_lines,
    "demo_console_lines": write_demo_console_lines,
}


def _cpu_s(code: str) -> tuple[float, list[str]]:
    """Median CPU seconds of a fresh process that runs ``code``, and which of the heavy libraries it loads."""
    report = f"import atexit, sys\natexit.register(lambda: print('loaded:', *({set(HEAVY)!r} & set(sys.modules))))\n"
    seconds: list[float] = []
    for _ in range(NUM_RUNS):
        before = os.times()
        done = subprocess.run([sys.executable, "-c", report + code], capture_output=True, text=True, check=True)
        after = os.times()
        spent = after.children_user - before.children_user + after.children_system - before.children_system
        seconds.append(spent)
    return statistics.median(seconds), sorted(done.stdout.rpartition("loaded:")[2].split())


def main(
    only: Annotated[list[str] | None, typer.Option(help=f"figures to measure: {', '.join(FIGURES)}")] = None,
) -> None:
    """Measure what a newcomer meets first and print all that is known."""
    for name in only or FIGURES:
        print(f"== {name}", flush=True)
        FIGURES[name]()
    print_rows(FILE)


if __name__ == "__main__":
    typer.run(main)
