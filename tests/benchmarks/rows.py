"""Result files: a JSON list of rows, one per figure, each with what is needed to judge and repeat it."""

from __future__ import annotations

import datetime as dt
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from recsys.files import read_json, write_json

RESULTS = Path(__file__).parent / "results"


def write_row(
    file: str,
    name: str,
    value: float,
    *,
    unit: str,
    bar: str,
    passes: bool,
    protocol: str,
    command: str,
    seeds: list[int] | None = None,
    details: dict[str, Any] | None = None,
) -> None:
    """Add a row to ``results/<file>.json``, in place of an older one of the same name."""
    path = RESULTS / f"{file}.json"
    rows: list[dict[str, Any]] = read_json(path) if path.exists() else []
    row = {
        "name": name,
        "value": float(f"{value:.6g}"),
        "unit": unit,
        "bar": bar,
        "passes": bool(passes),
        "protocol": protocol,
        "seeds": seeds or [],
        "command": command,
        "commit": _commit(),
        "hardware": hardware(),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
    }
    if details:
        row["details"] = details
    known = [one["name"] for one in rows]
    if name in known:
        rows[known.index(name)] = row
    else:
        rows.append(row)
    write_json(path, rows)
    print(f"{name} = {row['value']} {unit} (bar {bar}): {'passes' if passes else 'MISSED'}", flush=True)


def print_rows(file: str) -> None:
    """All rows of ``results/<file>.json``, as a table."""
    table = Table("figure", "value", "bar", "outcome", show_edge=False)
    for row in read_json(RESULTS / f"{file}.json"):
        table.add_row(row["name"], f"{row['value']:g} {row['unit']}", row["bar"], "met" if row["passes"] else "MISSED")
    Console(markup=False).print(table)


def hardware() -> str:
    """Processor, its vector instructions, cores and memory."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    flags = next((line.split(":")[1].split() for line in info.splitlines() if line.startswith("flags")), [])
    best = next((flag for flag in ("amx_tile", "avx512_vnni", "avx512f", "avx2") if flag in flags), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model or platform.processor()} ({best}), {os.cpu_count()} cores, {memory:.0f} GiB, no GPU"


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()

    dirty = "+changes" if git("status", "--porcelain", "--untracked-files=no", ":!tests/benchmarks/results") else ""
    return git("rev-parse", "--short", "HEAD") + dirty
