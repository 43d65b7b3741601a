"""Several systems and seeds in one report: what it averages, what it compares, what it refuses, what a person sees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from recsys.data.dataset import Dataset, Split, Targets
from recsys.errors import DataError
from recsys.evaluation.page import suite_page
from recsys.evaluation.protocol import EvaluationConfig
from recsys.evaluation.slices import slices
from recsys.evaluation.suite import Anchor, Cost, Run, SuiteReport, build_suite_report, judge, ratio_interval
from recsys.testing.planted import planted_clusters

CONFIG = EvaluationConfig(ks=(5, 10), num_bootstrap=200)
COST = Cost(train_seconds=12.0, peak_memory_bytes=5_000_000, num_parameters=1234, num_workers=1)
CURVE = [{"epoch": 1, "loss": 2.0, "ndcg@10": 0.1}, {"epoch": 2, "loss": 1.0, "ndcg@10": 0.2}]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return planted_clusters(num_users=40)


def run(dataset: Dataset, name: str, skill: float, seed: int = 0, *, is_baseline: bool = False) -> Run:
    """A system that puts the relevant item first for a share ``skill`` of queries, among random unseen items."""

    def rank(targets: Targets) -> np.ndarray:
        rng = np.random.default_rng([seed, len(targets)])
        ranked = np.empty((len(targets), CONFIG.depth), np.int32)
        for row in range(len(targets)):
            free = np.setdiff1d(np.arange(dataset.num_items), targets.seen.items(row))
            order = rng.permutation(free)
            if rng.random() < skill:
                best = targets.relevant(row)[0]
                order = np.concatenate([[best], order[order != best]])
            ranked[row] = order[: CONFIG.depth]
        return ranked

    targets = dataset.targets(Split.VALID)
    return judge(name, seed, rank, targets, dataset, CONFIG, cost=COST, curve=CURVE, is_baseline=is_baseline)


@pytest.fixture(scope="module")
def runs(dataset: Dataset) -> list[Run]:
    ours = [run(dataset, "ours", 0.8, seed) for seed in (0, 1)]
    return [*ours, run(dataset, "weak", 0.1, is_baseline=True), run(dataset, "strong", 0.4, is_baseline=True)]


@pytest.fixture(scope="module")
def report(dataset: Dataset, runs: list[Run]) -> SuiteReport:
    anchors = [Anchor(name="Published <1>", metrics={"ndcg@10": 0.5}, source="a paper", uses_time=True)]
    return build_suite_report("tiny", runs, dataset, CONFIG, anchors=anchors, hardware="a machine", command="a command")


def test_slices_are_mean_gains_of_their_pairs(dataset: Dataset) -> None:
    targets = dataset.targets(Split.VALID)[:3]
    ranked = np.full((3, 10), -1, np.int32)
    first, second = targets.relevant(0)[0], targets.relevant(1)[0]
    ranked[0, 0] = first
    ranked[1, :2] = [first if first != second else first + 1, second]
    counts = dataset.train_counts(Split.TRAIN)
    by_count, by_length, *_ = slices(ranked, targets, dataset)
    gain = np.array([1.0, 1 / np.log2(3), 0.0])
    relevant = targets.relevant_item_idx
    for found, value in ((by_count, counts[relevant]), (by_length, targets.histories.lengths)):
        assert sum(found.num_pairs) == 3
        total = sum(g * n for g, n in zip(found.gain, found.num_pairs, strict=True) if g is not None)
        assert total == pytest.approx(gain.sum())
        assert [g is None for g in found.gain] == [n == 0 for n in found.num_pairs]
        low = [int(label.split(" ")[0]) for label in found.labels]
        for row in range(3):
            bucket = np.searchsorted(low, value[row], side="right") - 1
            assert found.num_pairs[bucket] >= 1


def test_a_run_survives_saving(dataset: Dataset, runs: list[Run], tmp_path: Path) -> None:
    runs[0].save(tmp_path)
    again = Run.load(tmp_path)
    assert (again.system, again.seed, again.is_baseline, again.cost) == ("ours", 0, False, COST)
    assert list(again.slices) == list(runs[0].slices)
    assert again.curve == CURVE
    for view, values in runs[0].views.items():
        assert np.array_equal(again.user_idx[view], runs[0].user_idx[view])
        assert {m: v.tolist() for m, v in values.items()} == {m: v.tolist() for m, v in again.views[view].items()}


def test_seeds_are_averaged_and_compared_with_the_best_baseline(runs: list[Run], report: SuiteReport) -> None:
    view = next(iter(report.views))
    assert report.best_baseline == {view: "strong"}
    ours, strong = report.summary("ours"), report.summary("strong")
    by_seed = [run.views[view]["ndcg@10"].mean() for run in runs[:2]]
    assert ours.by_seed["ndcg@10"] == pytest.approx(by_seed)
    assert ours.metrics["ndcg@10"].mean == pytest.approx(np.mean(by_seed))
    assert ours.difference is not None and ours.difference.low > 0 and ours.difference.p_value < 0.05
    assert ours.difference.mean == pytest.approx(np.mean(by_seed) - strong.metrics["ndcg@10"].mean)
    assert strong.difference is None and strong.ratio is None
    assert ours.ratio is not None and 1 < ours.ratio.low < ours.ratio.mean < ours.ratio.high


def test_the_interval_of_a_ratio_covers_it(dataset: Dataset) -> None:
    """Of 200 samples with a true ratio of 1.5 about 95 % of the intervals hold it."""
    rng, users, inside = np.random.default_rng(0), np.arange(80, dtype=np.int32), 0
    for _ in range(200):
        b = rng.exponential(1.0, 80)
        a = 1.5 * b + rng.normal(0, 1.0, 80)
        interval = ratio_interval(a, b, users, CONFIG)
        inside += interval.low <= 1.5 <= interval.high
    assert 178 <= inside <= 199


def test_runs_on_other_queries_are_refused(dataset: Dataset, runs: list[Run]) -> None:
    view = next(iter(runs[0].views))
    users = {view: runs[0].user_idx[view][:-1]}
    other = replace(runs[1], user_idx=users)
    with pytest.raises(DataError, match=r"ours \(seed 1\).*different queries"):
        build_suite_report("tiny", [runs[0], other], dataset, CONFIG, hardware="", command="")
    with pytest.raises(DataError, match="no runs"):
        build_suite_report("tiny", [], dataset, CONFIG, hardware="", command="")
    with pytest.raises(DataError, match="no system 'x'"):
        build_suite_report("tiny", runs, dataset, CONFIG, hardware="", command="").summary("x")


def test_what_a_person_reads(report: SuiteReport, tmp_path: Path) -> None:
    report.save(tmp_path)
    text = (tmp_path / "suite.md").read_text()
    ours = report.summary("ours")
    assert f"| ours | {ours.metrics['ndcg@10'].mean:.4f} |" in text
    assert "2 (sd " in text and "strong (baseline)" in text
    assert "| Published <1> | 0.5000 |" in text and "| used | a paper |" in text
    for words in ("leave_one_out", report.dataset_fingerprint[:16], "a machine", "`a command`", "clustered by user"):
        assert words in text
    assert text.count("## Mean gain@10 by ") == len(ours.slices)
    page = suite_page(report)
    assert page == suite_page(report), "the same report gives the same page"
    assert page.count("<svg") == 2 + len(ours.slices)
    assert "Published &lt;1&gt;" in page and "<1>" not in page
