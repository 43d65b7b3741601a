"""The outcome of an evaluation: JSON for programs, Markdown and a terminal table for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from recsys.data.dataset import Dataset, Split
from recsys.errors import DataError
from recsys.evaluation.protocol import SEGMENTS, EvaluationConfig, Segment, SystemResult
from recsys.evaluation.significance import Difference, Interval, bootstrap, paired_difference
from recsys.files import atomic_path, write_json
from recsys.types import Float64Array

FORMAT = 1
"""Raised when the meaning of ``metrics.json`` changes."""


@dataclass(frozen=True)
class SegmentReport:
    """Metrics of one system on one segment of the queries."""

    num_queries: int
    num_users: int
    metrics: dict[str, Interval]
    """empty where the segment has no queries"""


@dataclass(frozen=True)
class ViewReport:
    """One system under one view."""

    view: str
    num_left_out: int
    """queries without a relevant item under this view"""
    segments: dict[str, SegmentReport]
    slates: dict[str, float | None]
    """metrics of the slates as a whole; None where undefined"""
    differences: dict[str, Difference]
    """against the best baseline of this view, per metric, over the same queries; empty for that baseline itself"""


@dataclass(frozen=True)
class SystemReport:
    """One system; the first view is the headline."""

    name: str
    is_baseline: bool
    views: list[ViewReport]


@dataclass(frozen=True)
class EvaluationReport:
    """Systems judged on the same queries."""

    format: int
    dataset: str
    dataset_fingerprint: str
    id_map_fingerprint: str
    protocol: str
    split: str
    num_items: int
    num_targets: int
    """queries of the split; fewer are judged where ``config.max_queries`` samples users"""
    config: dict[str, Any]
    best_baseline: dict[str, str]
    """per view, the baseline with the greatest ``config.main_metric``"""
    systems: list[SystemReport]

    def system(self, name: str) -> SystemReport:
        """The report of one system."""
        for system in self.systems:
            if system.name == name:
                return system
        raise DataError(f"no system {name!r} was evaluated, only {', '.join(s.name for s in self.systems)}", name=name)

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for :func:`json.dumps`."""
        return asdict(self)

    def save(self, folder: str | Path) -> None:
        """Write ``metrics.json`` and ``report.md``."""
        write_json(Path(folder) / "metrics.json", self.to_json())
        with atomic_path(Path(folder) / "report.md") as temporary:
            temporary.write_text(self.to_markdown())

    def print(self, console: Console | None = None) -> None:
        """Print the main figures, narrow enough for a terminal; ``report.md`` holds all of them."""
        console = console or Console(markup=False)
        for position, first in enumerate(self.systems[0].views):
            title, header, rows = self._summary_table(position)
            table = Table(title=title, show_edge=False)
            for column, name in enumerate(header):
                table.add_column(name, justify="left" if column == 0 else "right", overflow="fold")
            for row in rows:
                table.add_row(*row)
            console.print(table)
            conditions = self._conditions() if first is self.systems[0].views[-1] else ""
            console.print(conditions, style="dim", highlight=False)

    def _summary_table(self, position: int) -> tuple[str, list[str], list[list[str]]]:
        main = self.config["main_metric"]
        k = main.partition("@")[2]
        view = self.systems[0].views[position].view
        best = self.best_baseline.get(view)
        header = ["system", main, "interval", f"recall@{k}", *([f"minus {best}"] if best else [])]
        rows: list[list[str]] = []
        for system in self.systems:
            result = system.views[position]
            found = result.segments["all"].metrics
            interval = found[main]
            row = [_name(system), f"{interval.mean:.4f}", f"{interval.low:.4f} to {interval.high:.4f}"]
            row.append(f"{found[f'recall@{k}'].mean:.4f}")
            if best:
                difference = result.differences.get(main)
                row.append("" if difference is None else _interval(difference, "+"))
            rows.append(row)
        return f"{_label(view)}, {self.split}", header, rows

    def to_markdown(self) -> str:
        """The tables with the conditions they were made under."""
        lines = [f"# Evaluation of {self.dataset}", "", self._conditions(), ""]
        for title, header, rows in self._tables():
            lines += [f"## {title}", "", "| " + " | ".join(header) + " |"]
            lines.append("| :-- |" + " --: |" * (len(header) - 1))
            lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows] + [""]
        return "\n".join(lines)

    def _conditions(self) -> str:
        whole = self.systems[0].views[0]
        sample = "" if self.config["max_queries"] is None else f", a sample of users with seed {self.config['seed']},"
        left_out = "; ".join(
            f"{view.num_left_out} without a relevant item in view {view.view}" for view in self.systems[0].views
        )
        interval = f"{self.config['confidence']:.0%} bootstrap intervals over users"
        asked = whole.segments["all"].num_queries + whole.num_left_out
        return (
            f"Protocol {self.protocol}, split {self.split}, full ranking of {self.num_items} items; "
            f"{asked} of {self.num_targets} queries{sample} by {whole.segments['all'].num_users} users ({left_out}); "
            f"{interval} ({self.config['num_bootstrap']} resamples, seed {self.config['seed']}), "
            f"p values not adjusted for several comparisons; dataset {self.dataset_fingerprint[:16]}."
        )

    def _tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        tables: list[tuple[str, list[str], list[list[str]]]] = []
        for position, first in enumerate(self.systems[0].views):
            view = first.view
            label = _label(view)
            views = [(system, system.views[position]) for system in self.systems]
            tables.append((f"Accuracy, {label}", *self._accuracy_table(view, views)))
            tables.append((f"Warm and cold, {label}", *self._segment_table(views)))
            tables.append((f"Slates, {label}", *_slate_table(views)))
        return tables

    def _accuracy_table(
        self, view: str, views: list[tuple[SystemReport, ViewReport]]
    ) -> tuple[list[str], list[list[str]]]:
        main, best = self.config["main_metric"], self.best_baseline.get(view)
        header = ["system", *views[0][1].segments["all"].metrics, *([f"{main} minus {best}", "p"] if best else [])]
        rows: list[list[str]] = []
        for system, result in views:
            row = [_name(system)] + [_interval(i) for i in result.segments["all"].metrics.values()]
            if best:
                difference = result.differences.get(main)
                row += ["", ""] if difference is None else [_interval(difference, "+"), f"{difference.p_value:.3g}"]
            rows.append(row)
        return header, rows

    def _segment_table(self, views: list[tuple[SystemReport, ViewReport]]) -> tuple[list[str], list[list[str]]]:
        main = self.config["main_metric"]
        sizes = {name: views[0][1].segments[name].num_queries for name in SEGMENTS}
        header = ["system", *(f"{main}, {name.replace('_', ' ')} ({size})" for name, size in sizes.items())]
        rows: list[list[str]] = []
        for system, result in views:
            row = [_name(system)]
            for name in SEGMENTS:
                found = result.segments[name].metrics
                row.append(_interval(found[main]) if found else "no queries")
            rows.append(row)
        return header, rows


def build_report(
    results: Sequence[SystemResult],
    dataset: Dataset,
    split: Split,
    config: EvaluationConfig,
    *,
    baselines: Sequence[str] = (),
) -> EvaluationReport:
    """Compare ``results`` of one split; ``baselines`` names those that the others are held against.

    Raises :class:`DataError` where systems were judged on different queries or a baseline was not judged.
    """
    if not results:
        raise DataError("there are no evaluated systems to report on")
    names = [result.name for result in results]
    if len(set(names)) < len(names):
        raise DataError(f"two systems have the same name: {', '.join(sorted(names))}")
    if missing := sorted(set(baselines) - set(names)):
        raise DataError(f"baselines that were not evaluated: {', '.join(missing)}")
    for result in results[1:]:
        _check_same_queries(results[0], result)
    best: dict[str, SystemResult] = {}
    for position, first in enumerate(results[0].views):
        candidates = [result for result in results if result.name in baselines]
        if candidates:
            best[first.view] = max(
                candidates, key=lambda r: r.views[position].segments["all"].values[config.main_metric].mean()
            )
    systems = [
        SystemReport(
            result.name,
            result.name in baselines,
            [_view_report(result, position, best.get(view.view), config) for position, view in enumerate(result.views)],
        )
        for result in results
    ]
    return EvaluationReport(
        format=FORMAT,
        dataset=dataset.info.name,
        dataset_fingerprint=dataset.info.fingerprint,
        id_map_fingerprint=dataset.info.id_map_fingerprint,
        protocol=dataset.info.protocol,
        split=split.name.lower(),
        num_items=dataset.num_items,
        num_targets=results[0].num_targets,
        config=config.model_dump(mode="json"),
        best_baseline={view: result.name for view, result in best.items()},
        systems=systems,
    )


def _check_same_queries(a: SystemResult, b: SystemResult) -> None:
    same = len(a.views) == len(b.views) and all(
        x.view == y.view and np.array_equal(x.segments["all"].rows, y.segments["all"].rows)
        for x, y in zip(a.views, b.views, strict=True)
    )
    if not same:
        raise DataError(f"{a.name} and {b.name} were judged on different queries: evaluate both with one configuration")


def _view_report(
    result: SystemResult, position: int, best: SystemResult | None, config: EvaluationConfig
) -> ViewReport:
    view = result.views[position]
    differences: dict[str, Difference] = {}
    if best is not None and best is not result:
        ours, theirs = view.segments["all"], best.views[position].segments["all"]
        found = paired_difference(_matrix(ours), _matrix(theirs), ours.user_idx, **config.resampling)
        differences = dict(zip(ours.values, found, strict=True))
    return ViewReport(
        view=view.view,
        num_left_out=view.num_left_out,
        segments={name: _segment_report(segment, config) for name, segment in view.segments.items()},
        slates={name: value if math.isfinite(value) else None for name, value in view.slates.items()},
        differences=differences,
    )


def _segment_report(segment: Segment, config: EvaluationConfig) -> SegmentReport:
    if not len(segment.rows):
        return SegmentReport(0, 0, {})
    intervals = bootstrap(_matrix(segment), segment.user_idx, **config.resampling)
    found = dict(zip(segment.values, intervals, strict=True))
    return SegmentReport(len(segment.rows), len(np.unique(segment.user_idx)), found)


def _matrix(segment: Segment) -> Float64Array:
    return np.stack(list(segment.values.values()), axis=1)


def _slate_table(views: list[tuple[SystemReport, ViewReport]]) -> tuple[list[str], list[list[str]]]:
    header = ["system", *views[0][1].slates]
    cells = [[_name(s), *("" if x is None else f"{x:.4f}" for x in v.slates.values())] for s, v in views]
    return header, cells


def _label(view: str) -> str:
    return "items new to the user" if view == "new" else "repeats included"


def _name(system: SystemReport) -> str:
    return f"{system.name} (baseline)" if system.is_baseline else system.name


def _interval(value: Interval | Difference, sign: str = "") -> str:
    return f"{value.mean:{sign}.4f} [{value.low:{sign}.4f}, {value.high:{sign}.4f}]"
