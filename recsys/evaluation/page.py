"""A suite's report as one HTML page that needs nothing beside it: tables and plots (SVG)."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from recsys.evaluation.suite import SuiteReport, SystemSummary
from recsys.libraries import library

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em; color: #1a1a1a; }
table { border-collapse: collapse; margin: 1em 0; } th, td { padding: .3em .7em; border-bottom: 1px solid #ddd; }
th { text-align: left; font-weight: 600; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); gap: 1em; }
svg { width: 100%; height: auto; } .conditions { color: #555; font-size: 13px; }
"""


def check_plots() -> None:
    """Ask this before hours of work whose end is a page.

    :raises NotInstalledError: where matplotlib, which draws the plots, is not installed.
    """
    library("matplotlib", "a report with plots", extra="report")


def suite_page(report: SuiteReport) -> str:
    """The page.

    :raises NotInstalledError: see :func:`check_plots`.
    """
    check_plots()
    parts = [f"<h1>Benchmark {html.escape(report.suite)}</h1>"]
    parts.append(f"<p class=conditions>{_code(report.conditions())}</p>")
    for view in report.views:
        parts += [f"<h2>{'Items new to the user' if view == 'new' else 'Repeats included'}</h2>", _table(report, view)]
    if report.anchors:
        parts += ["<h2>Published on the same data and protocol</h2>", _anchors(report)]
    first = next(iter(report.views.values()))
    plots = [
        _plot("learning curves (validation)", "epoch", report.main_metric, lambda axes: _curves(axes, report, first))
    ]
    for position, one in enumerate(first[0].slices):
        plots.append(_plot(f"by {one.quantity}", one.quantity, "gain@10", _slices(first, position)))
    plots.append(_plot("accuracy against coverage", "coverage of the catalogue", report.main_metric, _coverage(report)))
    if any(one.recommend_ms is not None for one in first):
        plots.append(latency_plot(report))
    parts += ["<h2>Plots</h2>", "<div class=plots>", *plots, "</div>"]
    title = html.escape(report.suite)
    return f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>" + "\n".join(parts)


def latency_plot(report: SuiteReport) -> str:
    """SVG: accuracy against the time of one recommendation, of the systems whose time is known.

    :raises NotInstalledError: see :func:`check_plots`.
    """
    check_plots()
    systems = [one for one in next(iter(report.views.values())) if one.recommend_ms is not None]

    def draw(axes: Any) -> None:
        axes.set_xscale("log")
        for number, one in enumerate(systems):
            point = one.recommend_ms, one.metrics[report.main_metric].mean
            axes.scatter(*([value] for value in point), color=f"C{number}")
            axes.annotate(one.name, point, textcoords="offset points", xytext=(5, 4), fontsize=8)
        axes.margins(x=0.2)  # room for the names

    return _plot("accuracy against latency", "p50 of one recommendation, ms", report.main_metric, draw)


def _table(report: SuiteReport, view: str) -> str:
    main, best = report.main_metric, report.best_baseline.get(view)
    k = main.partition("@")[2]
    header = [
        "system",
        main,
        "interval",
        f"recall@{k}",
        "seeds",
        "minus best baseline",
        "p",
        "training",
        "memory",
        "p50",
    ]
    systems = sorted(report.views[view], key=lambda one: -one.metrics[main].mean)
    rows: list[list[str]] = []
    for one in systems:
        interval, d = one.metrics[main], one.difference
        rows.append(
            [
                one.name + (" (baseline)" if one.is_baseline else ""),
                f"{interval.mean:.4f}",
                f"{interval.low:.4f} to {interval.high:.4f}",
                f"{one.metrics[f'recall@{k}'].mean:.4f}",
                str(len(one.seeds)),
                ("the best" if one.name == best else "")
                if d is None
                else f"{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}]",
                "" if d is None else f"{d.p_value:.3g}",
                f"{one.train_seconds:.0f} s",
                f"{one.peak_memory_bytes / 1e6:.0f} MB",
                "" if one.recommend_ms is None else f"{one.recommend_ms:.2f} ms",
            ]
        )
    return _html_table(header, rows)


def _anchors(report: SuiteReport) -> str:
    metrics = list(dict.fromkeys(metric for anchor in report.anchors for metric in anchor["metrics"]))
    rows = [
        [
            anchor["name"],
            *(f"{anchor['metrics'][m]:.4f}" if m in anchor["metrics"] else "" for m in metrics),
            "yes" if anchor["uses_time"] else "no",
            anchor["source"],
        ]
        for anchor in sorted(report.anchors, key=lambda a: -a["metrics"].get(report.main_metric, 0.0))
    ]
    return _html_table(["model", *metrics, "uses time", "from"], rows)


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cell(text: str, tag: str = "td") -> str:
        number = tag == "td" and text[:1] in "+-.0123456789"
        return f"<{tag}{' class=number' if number and text else ''}>{html.escape(text)}</{tag}>"

    lines = ["<table>", "<tr>" + "".join(cell(name, "th") for name in header) + "</tr>"]
    lines += ["<tr>" + "".join(cell(text) for text in row) + "</tr>" for row in rows]
    return "\n".join([*lines, "</table>"])


_LEGEND_ROWS = 20


def _plot(title: str, x_label: str, y_label: str, draw: Callable[[Any], None]) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes: Any = figure.subplots()
    draw(axes)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(visible=True, alpha=0.3)
    num_labels = len(axes.get_legend_handles_labels()[0])
    if num_labels > _LEGEND_ROWS:  # beside the plot, which keeps its size
        columns = math.ceil(num_labels / _LEGEND_ROWS)
        figure.set_size_inches(7 + 1.7 * columns, 4.2)
        axes.legend(fontsize=7, ncols=columns, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    elif num_labels:
        axes.legend(fontsize=8)
    out = io.StringIO()
    # No date and a fixed salt: the same report gives the same page. Ids are the page's, so each plot has its own salt.
    with rc_context({"svg.hashsalt": title}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _style(number: int) -> dict[str, str]:
    """What tells a line from the others."""
    return {"color": f"C{number % 10}", "linestyle": ("-", "--", ":", "-.")[number // 10 % 4]}


def _curves(axes: Any, report: SuiteReport, systems: Sequence[SystemSummary]) -> None:
    for number, one in enumerate(systems):
        for position, curve in enumerate(one.curves):
            points = [(row["epoch"], row[report.main_metric]) for row in curve if report.main_metric in row]
            if points:
                label = one.name if position == 0 else None
                axes.plot(*zip(*points, strict=True), label=label, alpha=0.8, linewidth=1.2, **_style(number))


def _slices(systems: Sequence[SystemSummary], position: int) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for number, one in enumerate(systems):
            found = one.slices[position]
            points = [(place, gain) for place, gain in enumerate(found.gain) if gain is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=one.name, linewidth=1.2, **_style(number))
        found = systems[0].slices[position]
        names = [f"{label}\n({num})" for label, num in zip(found.labels, found.num_pairs, strict=True)]
        axes.set_xticks(range(len(names)), names, fontsize=7)

    return draw


def _code(text: str) -> str:
    """Escaped, with what stands between backticks as code."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts))


def _coverage(report: SuiteReport) -> Callable[[Any], None]:
    systems = next(iter(report.views.values()))
    k = report.main_metric.partition("@")[2]

    def draw(axes: Any) -> None:
        for number, one in enumerate(systems):
            x, y = one.slates[f"coverage@{k}"], one.metrics[report.main_metric].mean
            axes.scatter([x], [y], color=f"C{number}")
            axes.margins(x=0.2)  # room for the names
            axes.annotate(one.name, (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)

    return draw
