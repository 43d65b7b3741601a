"""Throughput against latency of both topologies beside plain FastAPI: rows, a table and a plot."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rows import RESULTS, write_row
from served import (
    CALLERS,
    FRACTIONS,
    THREADS,
    WINDOW_S,
    bodies_of,
    graph_and_fused,
    load,
    million,
    plain,
    some_users,
    stages_cpu_ms,
    trained,
)

from recsys.bundle import Bundle
from recsys.files import write_json

COMMAND = "make bench-serve"
IN_TIME_MS = 520.0
"""the deadline of a request and 20 ms"""


def traffic(workdir: Path) -> None:
    """Throughput against latency, processor time per request, and what happens past saturation."""
    _traffic(trained(workdir), workdir, "", "Bundle trained on MovieLens-1M", rounds=2)


def traffic_1m(workdir: Path) -> None:
    """The same among a million items."""
    about = "Bundle of 1,000,000 random items, inverted lists"
    _traffic(million(workdir), workdir, "_1m", about, rounds=1)


def _traffic(bundle: Bundle, workdir: Path, suffix: str, about: str, rounds: int) -> None:
    users = some_users(bundle)
    bodies = bodies_of(bundle, workdir)
    windows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name:
        folder = Path(name)
        with plain(bundle, folder, 8021) as reference, graph_and_fused(bundle, folder, 8022) as ours:
            systems = [reference, *ours]
            for system in systems:
                load(system, bodies, callers=CALLERS, seconds=WINDOW_S)  # warms up
            top = {system.name: [] for system in systems}
            stages: list[float] = []
            for _ in range(rounds):
                for system in systems:
                    found = load(system, bodies, callers=CALLERS, seconds=WINDOW_S)
                    top[system.name].append(full_answers(found) / found["seconds"])
                stages.append(stages_cpu_ms(bundle, users))
            saturation = {name: float(np.median(rates)) for name, rates in top.items()}
            print("saturation, requests/s:", {name: round(rate, 1) for name, rate in saturation.items()}, flush=True)
            for turn in range(rounds):
                for fraction in FRACTIONS:
                    for system in systems:
                        rate = fraction * saturation["plain"]
                        found = load(system, bodies, rate=rate, seconds=WINDOW_S, seed=turn)
                        windows.append(found | {"system": system.name, "fraction": fraction})
            for system in systems:  # the goodput of each at twice its own
                found = load(system, bodies, rate=2 * saturation[system.name], seconds=WINDOW_S)
                windows.append(found | {"system": system.name, "fraction": 0.0})
    report(windows, saturation, float(np.median(stages)), suffix, about, rounds)


def full_answers(found: dict[str, Any]) -> float:
    """How many answers were whole: those from which a stage is missing are cheap, and say little of what it can do."""
    degraded = np.array(found["degraded"])[np.array(found["read"], bool)]
    return sum(status == 200 for status in found["status"]) * (1.0 - float(np.mean(degraded)))


def summary(windows: list[dict[str, Any]]) -> dict[str, float]:
    """Of several windows of one system at one rate, medians."""
    rows: list[dict[str, float]] = []
    for each in windows:
        latency, status = np.array(each["latency_ms"]), np.array(each["status"])
        answered = latency[status == 200]
        in_time = int(np.sum(answered <= IN_TIME_MS))
        read = np.array(each["read"], bool)
        degraded = float(np.mean(np.array(each["degraded"])[read])) if read.any() else 0.0
        percentiles = np.percentile(answered, [50, 95, 99, 99.9]) if len(answered) else np.full(4, np.nan)
        rows.append(
            {
                **dict(zip(("p50", "p95", "p99", "p99.9"), percentiles.tolist(), strict=True)),
                "rate": each["rate"],
                "answers": len(answered) / each["seconds"],
                "goodput": in_time / each["seconds"],
                "degraded": degraded,
                "refused": float(np.mean(status == 503)),
                "failed": float(np.mean((status != 200) & (status != 503))),
                "cpu_ms": 1e3 * each["server_cpu_s"] / max(1, len(answered)),
                "client_cpu_ms": 1e3 * each["cpu_s"] / max(1, len(status)),
                **{f"{name}_ms": value for name, value in each["timings_ms"].items()},
            }
        )
    return {name: float(np.median([row.get(name, np.nan) for row in rows])) for name in rows[0]}


def report(
    windows: list[dict[str, Any]], saturation: dict[str, float], stages_ms: float, suffix: str, about: str, rounds: int
) -> None:
    """Rows, a table and a plot."""
    names = list(saturation)
    by = {
        (name, fraction): summary([w for w in windows if (w["system"], w["fraction"]) == (name, fraction)])
        for name in names
        for fraction in (*FRACTIONS, 0.0)
    }
    folder = RESULTS / "serving"
    folder.mkdir(parents=True, exist_ok=True)
    table = table_of(by)
    print(table)
    (folder / f"traffic{suffix}.md").write_text(table)
    write_json(
        folder / f"traffic{suffix}.json",
        {
            "saturation": saturation,
            "stages_cpu_ms": stages_ms,
            "windows": [{"system": name, "fraction": fraction, **row} for (name, fraction), row in by.items()],
        },
    )
    plot(by, folder / f"traffic{suffix}.svg")
    protocol = (
        f"{about}, 200 candidates ranked, {THREADS} thread, one replica each; open loop, Poisson arrivals, latency "
        f"from the moment a request was due, medians of {rounds} windows of {WINDOW_S:g} s, in turns with the same "
        "stages behind plain FastAPI and uvicorn; "
        "generator in a process of its own on the same cores"
    )
    details = {"saturation_per_s": saturation, "stages_cpu_ms": stages_ms}
    for name, limit in (("graph", 5.0), ("fused", 0.8)):
        # The slope over rates: what Ray's processes do when nobody asks is no part of a request.
        # Nor are answers from which stages are missing: only rates that the system copes with count.
        rows = [by[name, f] for f in FRACTIONS if f * saturation["plain"] <= 0.75 * saturation[name]]
        per_s = [row["cpu_ms"] * row["answers"] for row in rows]
        slope_ms = float(np.polyfit([row["answers"] for row in rows], per_s, 1)[0])
        overhead = slope_ms - stages_ms
        write_row(
            "serving", f"{name}_cpu_overhead_ms{suffix}", overhead, unit="ms", bar=f"<= {limit:g}",
            passes=overhead <= limit,
            protocol=protocol + "; slope of processor time over rates up to 0.75 of the own "
            "saturation, less that of the stages in process",
            command=COMMAND, seeds=[0],
            details=details | {f"cpu_ms_at_{f:g}": by[name, f]["cpu_ms"] for f in FRACTIONS},
        )  # fmt: skip
    for name, limit in (("graph", 2.5), ("fused", 1.3)):
        ratio = by[name, 0.4]["p99"] / by["plain", 0.4]["p99"]
        write_row(
            "serving", f"{name}_p99_ratio{suffix}", ratio, unit="x", bar=f"<= {limit:g}", passes=ratio <= limit,
            protocol=protocol + "; at 0.4 of the reference's saturation", command=COMMAND, seeds=[0],
            details={each: by[each, 0.4]["p99"] for each in names},
        )  # fmt: skip
    ratio = saturation["fused"] / saturation["plain"]
    write_row(
        "serving", f"fused_saturation_ratio{suffix}", ratio, unit="x", bar=">= 0.9", passes=ratio >= 0.9,
        protocol=protocol + f"; whole answers in a closed loop of {CALLERS} callers", command=COMMAND, seeds=[0],
        details=saturation,
    )  # fmt: skip
    most = {name: max(by[name, fraction]["goodput"] for fraction in (*FRACTIONS, 0.0)) for name in names}
    goodput = {name: by[name, 0.0]["goodput"] / most[name] for name in ("graph", "fused")}
    worst = min(goodput.values())
    write_row(
        "serving", f"goodput_past_saturation{suffix}", worst, unit="x", bar=">= 0.8", passes=worst >= 0.8,
        protocol=protocol + "; answers within the deadline of 500 ms and 20 more, since they were due: the worse "
        "topology at twice its own saturation, over the most at any rate",
        command=COMMAND, seeds=[0], details=goodput,
    )  # fmt: skip


def table_of(by: dict[tuple[str, float], dict[str, float]]) -> str:
    """Markdown."""
    columns = [
        "p50",
        "p95",
        "p99",
        "p99.9",
        "answers",
        "goodput",
        "degraded",
        "refused",
        "failed",
        "cpu_ms",
        "client_cpu_ms",
    ]
    columns += ["state_ms", "retrieval_ms", "ranking_ms", "reranking_ms", "total_ms"]
    lines = [f"| system | rate | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for (name, fraction), row in by.items():
        label = f"{row['rate']:.0f}" + ("" if fraction else " (twice its own)")
        lines.append(f"| {name} | {label} | {' | '.join(f'{row.get(c, np.nan):.3g}' for c in columns)} |")
    return "\n".join(lines) + "\n"


def plot(by: dict[tuple[str, float], dict[str, float]], path: Path) -> None:
    """Latency over throughput."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(16, 4), sharey=True)
    for axis, percentile in zip(axes, ("p50", "p95", "p99", "p99.9"), strict=True):
        for name in dict.fromkeys(name for name, _ in by):
            rows = [by[name, fraction] for fraction in FRACTIONS]
            axis.plot([row["answers"] for row in rows], [row[percentile] for row in rows], "o-", label=name)
        axis.set(title=percentile, xlabel="answers per second", yscale="log")
    axes[0].set_ylabel("ms")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path)
