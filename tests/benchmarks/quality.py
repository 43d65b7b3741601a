"""Retrieval quality, written to ``results/quality.json``: ``make bench-quality``, or one suite with ``--suite``.

Trains what the suites of ``configs/benchmark`` list (or reuses it) and turns their reports into rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import typer
from rows import write_row

from jobs import benchmark
from jobs.benchmark import SUITES, BenchmarkConfig
from jobs.cli import show_progress
from recsys.config import load_config
from recsys.evaluation.suite import Run, SuiteReport, ratio_interval

COMMAND = "make bench-quality"
FILE = "quality"
SHOWN = ("mean", "low", "high")


def level(report: SuiteReport, name: str, system: str, metric: str, bar: float) -> None:
    """A row for the mean over seeds of one metric."""
    found = report.summary(system)
    value = found.metrics[metric]
    write_row(
        FILE,
        name,
        value.mean,
        unit=metric,
        bar=f">= {bar:g}",
        passes=value.mean >= bar,
        protocol=f"{conditions(report)}; system {system}, mean over its seeds",
        command=COMMAND,
        seeds=found.seeds,
        details={
            "interval": [value.low, value.high],
            "by_seed": found.by_seed[metric],
            "train_seconds": found.train_seconds,
            "systems": {
                one.name: {shown: one.metrics[shown].mean for shown in (metric, "ndcg@10", "recall@10")}
                for one in report.views[next(iter(report.views))]
            },
        },
    )


def conditions(report: SuiteReport) -> str:
    """Protocol and split of a suite."""
    return (
        f"suite {report.suite}: {report.protocol}, full ranking of {report.num_items} items, "
        f"queries {report.num_queries}, fitted on train alone, intervals clustered by user, "
        f"split {report.dataset_fingerprint[:16]}"
    )


def mean_runs(runs: list[Run], system: str, view: str, metric: str) -> np.ndarray:
    """float64 [Q]: the metric of each query, mean over seeds."""
    return np.mean([run.views[view][metric] for run in runs if run.system == system], axis=0)


def beauty(config: BenchmarkConfig, report: SuiteReport, runs: list[Run]) -> None:
    """Ids alone, ids and text, and the one over the other."""
    present = {run.system for run in runs}
    if "esasrec" in present:
        level(report, "beauty_id_ndcg10", "esasrec", "ndcg@10", 0.0540)
    if "esasrec_text" not in present:
        return
    level(report, "beauty_ndcg10", "esasrec_text", "ndcg@10", 0.0570)
    level(report, "beauty_recall10", "esasrec_text", "recall@10", 0.0980)
    if "esasrec" not in present:
        return
    users = runs[0].user_idx["new"]
    text, ids = (mean_runs(runs, system, "new", "ndcg@10") for system in ("esasrec_text", "esasrec"))
    ratio = ratio_interval(text, ids, users, config.evaluation)
    write_row(
        FILE,
        "beauty_text_gain",
        ratio.mean,
        unit="x",
        bar="> 1, interval excludes it",
        passes=ratio.low > 1,
        protocol=f"{conditions(report)}; NDCG@10 of esasrec_text over that of esasrec, means over seeds",
        command=COMMAND,
        seeds=report.summary("esasrec").seeds,
        details={"interval": [ratio.low, ratio.high]},
    )


def ml1m(config: BenchmarkConfig, report: SuiteReport, runs: list[Run]) -> None:
    """Order alone."""
    level(report, "ml1m_ndcg10", "esasrec", "ndcg@10", 0.186)


def online_retail(config: BenchmarkConfig, report: SuiteReport, runs: list[Run]) -> None:
    """Over the best of the baselines, repeats both ways; the row is the harder of the two."""
    if missing := {system.name for system in config.systems if system.baseline} - {run.system for run in runs}:
        print(f"no row: without {', '.join(sorted(missing))} nothing is beaten", flush=True)
        return
    views: dict[str, Any] = {}
    for view, systems in report.views.items():
        best = report.best_baseline[view]
        ours = next(one for one in systems if one.name == "esasrec_text")
        assert ours.ratio is not None and ours.difference is not None
        views[view] = {
            "best_baseline": best,
            "ratio": [getattr(ours.ratio, shown) for shown in SHOWN],
            "p": ours.difference.p_value,
            "ndcg@10": {one.name: one.metrics["ndcg@10"].mean for one in systems},
        }
    hardest = min(views.values(), key=lambda view: view["ratio"][0])
    write_row(
        FILE,
        "online_retail_margin",
        hardest["ratio"][0],
        unit="x",
        bar=">= 1.05, paired p < .05",
        passes=hardest["ratio"][0] >= 1.05 and hardest["p"] < 0.05,
        protocol=f"{conditions(report)}; NDCG@10 of esasrec_text over the best of RecTools SASRec, RecTools EASE, "
        "item_knn and popularity (windowed too), all of the same run, with repeats and for new items; the "
        "smaller ratio of the two",
        command=COMMAND,
        seeds=report.summary("esasrec_text").seeds,
        details=views,
    )


ROWS: dict[str, Callable[[BenchmarkConfig, SuiteReport, list[Run]], None]] = {
    "beauty": beauty,
    "ml1m": ml1m,
    "online_retail": online_retail,
}


def main(
    suite: Annotated[list[str] | None, typer.Option(help=f"some of {', '.join(ROWS)}")] = None,
    only: Annotated[list[str] | None, typer.Option(help="these systems only, and the rows that need no other")] = None,
) -> None:
    """Train, judge and write the rows."""
    show_progress()
    for name in suite or list(ROWS):
        if name not in ROWS:
            raise typer.BadParameter(f"no suite {name!r}, only {', '.join(ROWS)}")
        config = load_config(BenchmarkConfig, SUITES / f"{name}.yaml")
        done = benchmark.run(config, f"python -m jobs.benchmark --suite {name}", tuple(only or ()))
        ROWS[name](config, done.report, done.runs)


if __name__ == "__main__":
    typer.run(main)
