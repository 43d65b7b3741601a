"""All families of models side by side, written to ``results/families.json``: ``make bench-families``.

Trains what the suites ``families_*`` list (or reuses it), copies their tables and plots to ``results/families/``, and
turns them into rows. The contract tests of every kind run first: what breaks the contract does not count as served.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import Annotated, Any

import numpy as np
import typer
from rows import RESULTS, write_row

from jobs import benchmark, benchmark_ratings
from jobs.benchmark import SUITES, BenchmarkConfig, Judged, hardware
from jobs.benchmark_ratings import RatingSuite
from jobs.cli import show_progress
from jobs.config import JobConfig
from jobs.steps import prepare
from recsys.config import load_config
from recsys.data.dataset import Dataset
from recsys.evaluation.page import latency_plot
from recsys.evaluation.significance import Interval
from recsys.evaluation.suite import ratio_interval
from recsys.files import atomic_path
from recsys.models import rankers, retrievers
from recsys.models.text.contrastive import PairData, finetune
from recsys.models.text.encoder import TextEncoderConfig, item_texts
from recsys.models.text.masked_lm import pretrain
from recsys.training.runtime import Runtime

COMMAND = "make bench-families"
FILE = "families"
NAMES = ("families_movielens", "families_online_retail")
GAINS = {NAMES[0]: "mind_recall_gain_movielens", NAMES[1]: "mind_recall_gain"}
RATINGS = "movielens_small"
PEERS = {
    "item_knn_plain": "rectools_item_knn",
    "als": "rectools_als",
    "ease": "rectools_ease",
    "sasrec": "rectools_sasrec",
    "bert4rec": "rectools_bert4rec",
}
CONTRACTS = ("tests/contract/test_retrievers.py", "tests/contract/test_rankers.py")


def served(configs: list[BenchmarkConfig], done: list[Judged]) -> None:
    """Kinds that stand in a table and whose contract tests all pass."""
    passed = subprocess.run([sys.executable, "-m", "pytest", "-q", *CONTRACTS], check=False).returncode == 0
    kinds: set[str] = set()
    for config, judged in zip(configs, done, strict=True):
        present = {run.system for run in judged.runs}
        for system in config.systems:
            if system.name in present and system.model is not None:
                kinds.add(system.model.kind)
                kinds |= {system.ranker.kind} if system.ranker is not None else set()
    registered = {*retrievers.KINDS.names, *rankers.KINDS.names}
    write_row(
        FILE,
        "families_served",
        len(kinds & registered) if passed else 0,
        unit="kinds",
        bar=">= 20",
        passes=passed and len(kinds & registered) >= 20,
        protocol="kinds of retriever and ranker in the tables of the suites families_*, if the contract tests pass",
        command=COMMAND,
        seeds=[0],
        details={"kinds": sorted(kinds & registered), "without a row": sorted(registered - kinds)},
    )


def _gain(config: BenchmarkConfig, judged: Judged, metric: str, ours: str, theirs: str) -> tuple[Interval, list[float]]:
    """The ratio of two systems under the headline view, and the mean of each; queries averaged over seeds."""
    view = next(iter(judged.report.views))
    runs = {name: [run for run in judged.runs if run.system == name] for name in (ours, theirs)}
    mine, others = (np.mean([run.views[view][metric] for run in own], axis=0) for own in runs.values())
    ratio = ratio_interval(mine, others, runs[ours][0].user_idx[view], config.evaluation)
    return ratio, [float(mine.mean()), float(others.mean())]


def interests(config: BenchmarkConfig, judged: Judged, row: str) -> None:
    """Recall of K vectors over that of one of as many multiplications per scored item, and of one of their size."""
    names = ("mind", "mind_one_wide", "mind_one")
    metric = "recall@20"
    ratio, (several, wide) = _gain(config, judged, metric, *names[:2])
    same_size, (_, one) = _gain(config, judged, metric, "mind", "mind_one")
    summaries = [judged.report.summary(name) for name in names]
    write_row(
        FILE,
        row,
        ratio.mean,
        unit="x",
        bar="> 1",
        passes=ratio.mean > 1,
        protocol=f"suite {config.name}: {metric} of K interests over that of one of K times the dimensions, the rest "
        "alike; equal multiplications per scored item, p50 beside",
        command=COMMAND,
        seeds=summaries[0].seeds,
        details={
            "interval": [ratio.low, ratio.high],
            "over one of the same size": [same_size.mean, same_size.low, same_size.high],
            metric: dict(zip(names, (several, wide, one), strict=True)),
            "p50_ms": {summary.name: summary.recommend_ms for summary in summaries},
        },
    )


def parity(config: BenchmarkConfig, judged: Judged) -> None:
    """The worst of ours over the same model of another library."""
    metric = config.evaluation.main_metric
    found: dict[str, Any] = {}
    for ours, theirs in PEERS.items():
        ratio, means = _gain(config, judged, metric, ours, theirs)
        found[ours] = {"ratio": [ratio.mean, ratio.low, ratio.high], metric: means, "peer": theirs}
    worst = min(pair["ratio"][0] for pair in found.values())
    write_row(
        FILE,
        "peer_parity_worst",
        worst,
        unit="x",
        bar=">= 0.97",
        passes=worst >= 0.97,
        protocol=f"suite {config.name}: NDCG@10 of ours over that of the peer with the same settings, the worst of "
        f"{', '.join(found)}; both trained in the same run, means over as many seeds of each",
        command=COMMAND,
        seeds=sorted({run.seed for run in judged.runs if run.system in PEERS}),
        details=found,
    )


EFFECTS = {
    "item text": ("esasrec_text", "esasrec"),
    "augmentation: a fifth of what is read blanked out": ("esasrec_masked_items", "esasrec"),
    "a second source, fused by rank": ("blend", "esasrec"),
    "a ranker of features and attention": ("attention", "esasrec_text"),
    "a ranker of words, its top two layers learned": ("cross_encoder", "esasrec_text"),
    "LoRA instead of the top two layers": ("cross_encoder_lora", "cross_encoder"),
    "squared error instead of cross-entropy": ("cross_encoder_mse", "cross_encoder"),
    "a small language model": ("causal_lm", "esasrec_text"),
}
"""what differs between the first and the second system of a pair"""
FEW_SHOT = ("0", "1", "2 to 4", "5 to 9")
"""lengths of histories, as the suite's slices name them"""


def effects(config: BenchmarkConfig, judged: Judged) -> None:
    """What one change does, query by query, and how systems serve users of few interactions."""
    metric = config.evaluation.main_metric
    conditions = f"Suite {config.name}, seed 0; {hardware()}; `{COMMAND}`."
    lines = ["# Effects", "", f"{conditions} Ratios of {metric}, paired, with 95% intervals clustered by user."]
    lines += ["", f"| change | {metric} with | without | ratio | training s with | without |"]
    lines.append("| :-- | --: | --: | --: | --: | --: |")
    for change, (ours, theirs) in EFFECTS.items():
        ratio, (mine, others) = _gain(config, judged, metric, ours, theirs)
        seconds = [judged.report.summary(name).train_seconds for name in (ours, theirs)]
        cells = [f"{mine:.4f}", f"{others:.4f}", f"{ratio.mean:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"]
        lines.append("| " + " | ".join([change, *cells, *(f"{value:.0f}" for value in seconds)]) + " |")
    lines += ["", "## Few-shot users", "", "Mean gain@10 by the number of interactions the user has had (queries).", ""]
    slices = {run.system: next(part for part in run.slices if "history" in part.quantity) for run in judged.runs}
    shown = next(iter(slices.values()))
    places = [shown.labels.index(label) for label in FEW_SHOT if label in shown.labels]
    lines.append("| system | " + " | ".join(f"{shown.labels[at]} ({shown.num_pairs[at]})" for at in places) + " |")
    lines.append("| :-- |" + " --: |" * len(places))
    for system, part in slices.items():
        gains = (part.gain[at] for at in places)
        lines.append(f"| {system} | " + " | ".join("" if gain is None else f"{gain:.4f}" for gain in gains) + " |")
    with atomic_path(RESULTS / FILE / "effects.md") as temporary:
        temporary.write_text("\n".join([*lines, ""]))


ADAPTATIONS: dict[str, dict[str, Any]] = {
    "as it is": {"train": {"epochs": 0}},
    "pretraining": {"pretrain": {"epochs": 1}, "train": {"epochs": 0}},
    "fine-tuning, whole": {"train": {"trainable_layers": 0}},
    "fine-tuning, two layers": {"train": {"trainable_layers": 2}},
    "fine-tuning, LoRA": {"train": {"adapter": {"kind": "lora"}, "learning_rate": 5e-4}},
    "fine-tuning, prefix": {"train": {"adapter": {"kind": "prefix"}, "learning_rate": 5e-3}},
    "pretraining, then fine-tuning, whole": {"pretrain": {"epochs": 1}, "train": {"trainable_layers": 0}},
}
"""ways to adapt the text encoder to a catalogue; fine-tuning is one epoch of 2,048 pairs"""


def adaptation(config: BenchmarkConfig) -> None:
    """What each way of adapting the encoder costs, and how well it then finds items consumed together."""
    assert config.encoder is not None
    dataset = Dataset.load(prepare.run(JobConfig(name=config.name, workdir=config.workdir, data=config.data)).path)
    texts = item_texts(dataset.items, config.encoder)
    lines = [
        "# Adapting the text encoder",
        "",
        (
            f"{config.encoder.model} on {dataset.info.name}: mean reciprocal rank of an item's partner among the items "
            f"of 256 validation pairs, learned from train; one process, seed 0; {hardware()}; `{COMMAND}`."
        ),
        "",
        "| adaptation | weights that learn | seconds | MRR | over as it is |",
        "| :-- | --: | --: | --: | --: |",
    ]
    for name, change in ADAPTATIONS.items():
        tree = config.encoder.model_dump(mode="json")
        change = {"train": {"epochs": 1, **change["train"]}, "pretrain": change.get("pretrain", {})}
        encoder = TextEncoderConfig.parse(tree | {key: tree[key] | value for key, value in change.items()}, where=name)
        data = PairData.of(dataset, texts, encoder.train.window, seed=0)
        started, weights, share = time.perf_counter(), None, 0.0
        if encoder.pretrain.epochs:
            adapted, _ = pretrain(encoder, texts, Runtime("cpu"), seed=0)
            weights = {key: value.numpy() for key, value in adapted.module.transformer.state_dict().items()}
            share = 1.0
        learned = time.perf_counter() - started
        metrics = finetune(encoder, data, Runtime("cpu"), weights).metrics
        share, learned = max(share, metrics["trained_share"]), learned + metrics["train_seconds"]
        before, after = metrics["held_out_mrr_before"], metrics["held_out_mrr_after"]
        lines.append(f"| {name} | {share:.2%} | {learned:.0f} | {after:.4f} | {after / before:.3f} |")
        print(lines[-1], flush=True)
    with atomic_path(RESULTS / FILE / "text_adaptation.md") as temporary:
        temporary.write_text("\n".join([*lines, ""]))


def ratings() -> None:
    """The table of the models that foretell ratings."""
    config = load_config(RatingSuite, benchmark_ratings.SUITES / f"{RATINGS}.yaml")
    folder, _ = benchmark_ratings.run(config, f"python -m jobs.benchmark_ratings --suite {RATINGS}")
    with atomic_path(RESULTS / FILE / "ratings.md") as temporary:
        temporary.write_text((folder / "ratings.md").read_text())


def keep(judged: Judged, name: str) -> None:
    """The table and the plot of a suite, for the repository."""
    folder = RESULTS / FILE
    for file, text in (
        (f"{name}.md", (judged.folder / "suite.md").read_text()),
        (f"{name}.svg", latency_plot(judged.report)),
    ):
        with atomic_path(folder / file) as temporary:
            temporary.write_text(text)


def main(
    suite: Annotated[list[str] | None, typer.Option(help=f"some of {', '.join(NAMES)}")] = None,
    text: Annotated[bool, typer.Option(help="measure how the text encoder adapts, too")] = True,
) -> None:
    """Train, judge and write the rows."""
    show_progress()
    ratings()
    if text:
        adaptation(load_config(BenchmarkConfig, SUITES / f"{NAMES[0]}.yaml"))
    configs: list[BenchmarkConfig] = []
    done: list[Judged] = []
    for name in suite or NAMES:
        if name not in NAMES:
            raise typer.BadParameter(f"no suite {name!r}, only {', '.join(NAMES)}")
        config = load_config(BenchmarkConfig, SUITES / f"{name}.yaml")
        judged = benchmark.run(config, f"python -m jobs.benchmark --suite {name}")
        keep(judged, name)
        interests(config, judged, GAINS[name])
        if name == NAMES[0]:
            parity(config, judged)
            effects(config, judged)
        configs.append(config)
        done.append(judged)
    if len(done) == len(NAMES):
        served(configs, done)


if __name__ == "__main__":
    typer.run(main)
