"""Several systems over several seeds on one benchmark: what each run leaves, and the report that joins them.

A run is judged like any system (:mod:`recsys.evaluation.protocol`) and keeps its metrics query by query, so that a
report can be made again without training: the mean over seeds per query is what intervals and comparisons are about,
clustered by user; the spread between seeds is reported beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from recsys.config import StrictConfig
from recsys.data.dataset import Dataset, Targets
from recsys.errors import DataError
from recsys.evaluation.protocol import EvaluationConfig, RankFn, evaluate_ranker
from recsys.evaluation.significance import Difference, Interval, bootstrap, paired_difference
from recsys.evaluation.slices import Slices, slices
from recsys.files import atomic_path, read_json, write_json, write_parquet
from recsys.types import Float64Array, Int32Array

FORMAT = 1
"""Raised when the meaning of ``suite.json`` changes."""


class Anchor(StrictConfig):
    """A published figure that ours stand beside. It must be of the same data and the same protocol."""

    name: str = Field(description="the model, as its source calls it")
    metrics: Mapping[str, float] = Field(description="published values by metric, such as ndcg@10")
    source: str = Field(description="where it was published")
    uses_time: bool = Field(default=False, description="whether the model reads timestamps")


@dataclass(frozen=True)
class Cost:
    """What a training took."""

    train_seconds: float
    """wall seconds of fitting, data preparation and validation included, start-up of workers excluded"""
    peak_memory_bytes: int
    """largest resident size of the process that trained (of the first worker where there are several)"""
    num_parameters: int
    num_workers: int
    cpu_seconds: float | None = None
    """processor seconds of fitting, over all workers; None where that was not measured, as of another program"""
    recommend_ms: float | None = None
    """median milliseconds of one recommendation by itself, history in and slate out, inside the process"""


@dataclass(frozen=True)
class Run:
    """One system with one seed, judged on TEST."""

    system: str
    seed: int
    is_baseline: bool
    views: Mapping[str, Mapping[str, Float64Array]]
    """per view and metric, float64 [Q]"""
    user_idx: Mapping[str, Int32Array]
    """per view, int32 [Q]"""
    slates: Mapping[str, Mapping[str, float]]
    slices: Sequence[Slices]
    """of the first view"""
    curve: Sequence[Mapping[str, float]]
    cost: Cost

    def save(self, folder: str | Path) -> None:
        """One Parquet file per view and ``run.json`` (last)."""
        folder = Path(folder)
        for view, values in self.views.items():
            columns = {"user_idx": self.user_idx[view], **values}
            write_parquet(folder / f"{view}.parquet", pa.table(columns))
        record = {
            "system": self.system,
            "seed": self.seed,
            "is_baseline": self.is_baseline,
            "views": list(self.views),
            "slates": self.slates,
            "slices": [asdict(one) for one in self.slices],
            "curve": list(self.curve),
            "cost": asdict(self.cost),
        }
        write_json(folder / "run.json", record)

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Read what :meth:`save` wrote."""
        folder = Path(folder)
        record = read_json(folder / "run.json")
        views: dict[str, dict[str, Float64Array]] = {}
        users: dict[str, Int32Array] = {}
        for view in record["views"]:
            table = pq.read_table(folder / f"{view}.parquet")
            columns = {name: table[name].to_numpy() for name in table.column_names}
            users[view] = columns.pop("user_idx")
            views[view] = columns
        return cls(
            record["system"],
            record["seed"],
            record["is_baseline"],
            views,
            users,
            record["slates"],
            [_slices(one) for one in record["slices"]],
            record["curve"],
            Cost(**record["cost"]),
        )


def judge(
    system: str,
    seed: int,
    rank_fn: RankFn,
    targets: Targets,
    dataset: Dataset,
    config: EvaluationConfig,
    *,
    cost: Cost,
    curve: Sequence[Mapping[str, float]] = (),
    is_baseline: bool = False,
) -> Run:
    """Judge one trained system; see :func:`recsys.evaluation.protocol.evaluate_ranker` for what it refuses."""
    ranked: list[Int32Array] = []

    def recorded(batch: Targets) -> Int32Array:
        found = rank_fn(batch)
        ranked.append(found[:, : config.depth])
        return found

    result = evaluate_ranker(system, recorded, targets, dataset, config)
    first = result.views[0].segments["all"]
    of_first = np.concatenate(ranked)[: len(first.rows)]  # views are ranked one after another
    asked = targets.select(first.rows)
    return Run(
        system,
        seed,
        is_baseline,
        {view.view: view.segments["all"].values for view in result.views},
        {view.view: view.segments["all"].user_idx for view in result.views},
        {view.view: dict(view.slates) for view in result.views},
        slices(of_first, asked, dataset),
        list(curve),
        cost,
    )


@dataclass(frozen=True)
class SystemSummary:
    """One system over its seeds, under one view."""

    name: str
    is_baseline: bool
    seeds: list[int]
    metrics: dict[str, Interval]
    """of the mean over seeds"""
    by_seed: dict[str, list[float]]
    """per metric, the mean over queries for each seed"""
    slates: dict[str, float]
    """means over seeds"""
    difference: Difference | None
    """main metric minus that of the best baseline; None for that baseline"""
    ratio: Interval | None
    """main metric over that of the best baseline; None for that baseline"""
    slices: list[Slices]
    """means over seeds; empty for views but the first"""
    curves: list[list[Mapping[str, float]]]
    """the learning curve of each seed"""
    train_seconds: float
    """mean over seeds"""
    peak_memory_bytes: int
    num_parameters: int
    num_workers: int
    cpu_seconds: float | None
    """mean over seeds"""
    recommend_ms: float | None
    """median over seeds"""


@dataclass(frozen=True)
class SuiteReport:
    """A whole benchmark."""

    format: int
    suite: str
    dataset: str
    dataset_fingerprint: str
    """hash of the data and of how it was split"""
    protocol: str
    num_items: int
    num_queries: dict[str, int]
    main_metric: str
    confidence: float
    hardware: str
    command: str
    best_baseline: dict[str, str]
    views: dict[str, list[SystemSummary]]
    anchors: list[dict[str, Any]]

    def summary(self, system: str, view: str | None = None) -> SystemSummary:
        """One system under ``view`` (None for the first)."""
        view = view or next(iter(self.views))
        for one in self.views[view]:
            if one.name == system:
                return one
        raise DataError(f"no system {system!r} in the suite, only {', '.join(s.name for s in self.views[view])}")

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def to_markdown(self) -> str:
        """A table per view, the anchors below ours, and the conditions."""
        k = self.main_metric.partition("@")[2]
        shown = [self.main_metric, f"recall@{k}", f"hr@{k}"]
        lines = [f"# Benchmark {self.suite}", "", self.conditions(), ""]
        for view, systems in self.views.items():
            best = self.best_baseline.get(view)
            header = ["system", *shown, "interval", "seeds", *([f"minus {best}", "p"] if best else []), "coverage"]
            header += ["training s", "CPU s", "memory MB", "parameters", "p50 ms"]
            label = "items new to the user" if view == "new" else "repeats included"
            lines += [f"## {label}", "", _row(header), "| :-- |" + " --: |" * (len(header) - 1)]
            for one in systems:
                interval = one.metrics[self.main_metric]
                name = f"{one.name} (baseline)" if one.is_baseline else one.name
                cells = [name, *(f"{one.metrics[metric].mean:.4f}" for metric in shown)]
                cells += [f"{interval.low:.4f} to {interval.high:.4f}", _spread(one.by_seed[self.main_metric])]
                if best:
                    d = one.difference
                    cells += (
                        ["", ""] if d is None else [f"{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}]", f"{d.p_value:.3g}"]
                    )
                cells += [f"{one.slates[f'coverage@{k}']:.3f}", f"{one.train_seconds:.0f}"]
                cells += ["" if one.cpu_seconds is None else f"{one.cpu_seconds:.0f}"]
                cells += [f"{one.peak_memory_bytes / 1e6:.0f}", f"{one.num_parameters:,}"]
                cells += ["" if one.recommend_ms is None else f"{one.recommend_ms:.2f}"]
                lines.append(_row(cells))
            lines.append("")
        for position, one in enumerate(next(iter(self.views.values()))[0].slices):
            lines += [f"## Mean gain@10 by {one.quantity}", ""]
            lines.append(
                _row(["system", *(f"{label} ({num})" for label, num in zip(one.labels, one.num_pairs, strict=True))])
            )
            lines.append("| :-- |" + " --: |" * len(one.labels))
            for system in next(iter(self.views.values())):
                gains = system.slices[position].gain
                lines.append(_row([system.name, *("" if gain is None else f"{gain:.4f}" for gain in gains)]))
            lines.append("")
        if self.anchors:
            lines += ["## Published on the same data and protocol", "", _row(["model", *shown, "time", "from"])]
            lines.append("| :-- |" + " --: |" * len(shown) + " :-- | :-- |")
            for anchor in self.anchors:
                values = [f"{anchor['metrics'][m]:.4f}" if m in anchor["metrics"] else "" for m in shown]
                used = "used" if anchor["uses_time"] else "not used"
                lines.append(_row([anchor["name"], *values, used, anchor["source"]]))
            lines.append("")
        return "\n".join(lines)

    def conditions(self) -> str:
        """What the figures were made under, in a sentence."""
        queries = ", ".join(f"{number} ({view})" for view, number in self.num_queries.items())
        return (
            f"{self.dataset}, protocol {self.protocol}, full ranking of {self.num_items} items, queries: {queries}; "
            f"means over the seeds shown; {self.confidence:.0%} bootstrap intervals clustered by user, p values from a "
            f"paired randomisation by user, not adjusted for several comparisons; {self.hardware}; split "
            f"{self.dataset_fingerprint[:16]}; `{self.command}`."
        )

    def save(self, folder: str | Path) -> None:
        """Write ``suite.json`` and ``suite.md``."""
        write_json(Path(folder) / "suite.json", self.to_json())
        with atomic_path(Path(folder) / "suite.md") as temporary:
            temporary.write_text(self.to_markdown())


def build_suite_report(
    suite: str,
    runs: Sequence[Run],
    dataset: Dataset,
    config: EvaluationConfig,
    *,
    anchors: Sequence[Anchor] = (),
    hardware: str,
    command: str,
) -> SuiteReport:
    """Join ``runs``: one :class:`SystemSummary` per system and view.

    :raises DataError: when there is no run, or runs were judged on different queries.
    """
    if not runs:
        raise DataError("there are no runs to report on")
    by_system: dict[str, list[Run]] = {}
    for run in runs:
        by_system.setdefault(run.system, []).append(run)
    views: dict[str, list[SystemSummary]] = {}
    best_baseline: dict[str, str] = {}
    for view in runs[0].views:
        means = {name: _mean_over_seeds(group, view, runs[0]) for name, group in by_system.items()}
        baselines = [name for name, group in by_system.items() if group[0].is_baseline]
        if baselines:
            best_baseline[view] = max(baselines, key=lambda name: float(means[name][config.main_metric].mean()))
        users = runs[0].user_idx[view]
        views[view] = [
            _summary(group, view, means[name], means.get(best_baseline.get(view, "")), users, config)
            for name, group in by_system.items()
        ]
    return SuiteReport(
        format=FORMAT,
        suite=suite,
        dataset=dataset.info.name,
        dataset_fingerprint=dataset.info.fingerprint,
        protocol=dataset.info.protocol,
        num_items=dataset.num_items,
        num_queries={view: len(users) for view, users in runs[0].user_idx.items()},
        main_metric=config.main_metric,
        confidence=config.confidence,
        hardware=hardware,
        command=command,
        best_baseline=best_baseline,
        views=views,
        anchors=[anchor.model_dump(mode="json") for anchor in anchors],
    )


def ratio_interval(a: Float64Array, b: Float64Array, user_idx: Int32Array, config: EvaluationConfig) -> Interval:
    """Mean of ``a`` over mean of ``b``, both float64 [Q] on the same queries, with its interval clustered by user.

    By the linearisation of a ratio: ``a - r b`` has mean zero at the ratio ``r``, and its interval over the mean of
    ``b`` is that of the ratio (Taylor series method; Cochran, Sampling Techniques, 1977, chapter 6).
    """
    ratio = float(a.mean() / b.mean())
    (around,) = bootstrap((a - ratio * b)[:, None], user_idx, **config.resampling)
    scale = float(b.mean())
    return Interval(ratio, ratio + around.low / scale, ratio + around.high / scale)


def _slices(record: Mapping[str, Any]) -> Slices:
    return Slices(record["quantity"], tuple(record["labels"]), tuple(record["num_pairs"]), tuple(record["gain"]))


def _mean_over_seeds(group: Sequence[Run], view: str, first: Run) -> dict[str, Float64Array]:
    for run in group:
        if view not in run.views or not np.array_equal(run.user_idx[view], first.user_idx[view]):
            raise DataError(f"{run.system} (seed {run.seed}) and {first.system} were judged on different queries")
    return {metric: np.mean([run.views[view][metric] for run in group], axis=0) for metric in group[0].views[view]}


def _summary(
    group: Sequence[Run],
    view: str,
    mean: Mapping[str, Float64Array],
    best: Mapping[str, Float64Array] | None,
    users: Int32Array,
    config: EvaluationConfig,
) -> SystemSummary:
    intervals = bootstrap(np.stack(list(mean.values()), axis=1), users, **config.resampling)
    difference: Difference | None = None
    ratio: Interval | None = None
    if best is not None and best is not mean:
        ours, theirs = mean[config.main_metric], best[config.main_metric]
        (difference,) = paired_difference(ours[:, None], theirs[:, None], users, **config.resampling)
        ratio = ratio_interval(ours, theirs, users, config) if theirs.any() else None
    first = group[0]
    return SystemSummary(
        name=first.system,
        is_baseline=first.is_baseline,
        seeds=[run.seed for run in group],
        metrics=dict(zip(mean, intervals, strict=True)),
        by_seed={metric: [float(run.views[view][metric].mean()) for run in group] for metric in mean},
        slates={name: float(np.mean([run.slates[view][name] for run in group])) for name in first.slates[view]},
        difference=difference,
        ratio=ratio,
        slices=_mean_slices(group) if view == next(iter(first.views)) else [],
        curves=[list(run.curve) for run in group],
        train_seconds=float(np.mean([run.cost.train_seconds for run in group])),
        peak_memory_bytes=max(run.cost.peak_memory_bytes for run in group),
        num_parameters=first.cost.num_parameters,
        num_workers=first.cost.num_workers,
        cpu_seconds=_known(np.mean, [run.cost.cpu_seconds for run in group]),
        recommend_ms=_known(np.median, [run.cost.recommend_ms for run in group]),
    )


def _known(joined: Callable[[list[float]], Any], values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(joined(known)) if known else None


def _mean_slices(group: Sequence[Run]) -> list[Slices]:
    joined: list[Slices] = []
    for position, one in enumerate(group[0].slices):
        gains = [run.slices[position].gain for run in group]
        means = tuple(
            None if values[0] is None else float(np.mean([v for v in values if v is not None]))
            for values in zip(*gains, strict=True)
        )
        joined.append(Slices(one.quantity, one.labels, one.num_pairs, means))
    return joined


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return "1"
    return f"{len(values)} (sd {np.std(values, ddof=1):.4f})"
