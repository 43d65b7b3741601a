"""Train and judge what a suite lists, over several seeds.

A suite is a file of ``configs/benchmark``. Every system and seed is an artefact of its own: what is there is not
trained again, so a run that was stopped goes on, and trainings resume from their checkpoints. The report (JSON,
Markdown, one HTML page) is written anew after each of them, into ``WORKDIR/SUITE/report``.
"""

from __future__ import annotations

import functools
import logging
import os
import platform
import re
import resource
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import torch
import typer
from pydantic import Field, model_validator
from rich.console import Console
from rich.markdown import Markdown
from rich.text import Text
from safetensors.torch import load_file

from jobs import cli
from jobs._ray import ComputeConfig, PayloadT, TrainFunction, discard, fit_distributed, ray_session
from jobs.artifacts import Artifact, Embedded, Prepared
from jobs.config import JobConfig
from jobs.external import run_program
from jobs.steps import embed, prepare
from jobs.steps.base import Results
from jobs.steps.train_ranker import ranking_embeddings
from recsys.cli import command, readable_errors
from recsys.config import StrictConfig
from recsys.data.catalogue import Catalogue
from recsys.data.config import DataConfig
from recsys.data.dataset import Dataset, Split, Targets
from recsys.data.features import ItemFeatures
from recsys.data.splits.leave_one_out import LeaveOneOutSplit
from recsys.errors import ConfigError
from recsys.evaluation.page import check_plots, suite_page
from recsys.evaluation.protocol import EvaluationConfig, RankFn, retriever_ranker, sample_queries
from recsys.evaluation.suite import Anchor, Cost, Run, SuiteReport, build_suite_report, judge
from recsys.files import atomic_path, link_or_copy, read_json, write_json
from recsys.index.flat import FlatIndex
from recsys.models.base import FitData, Retriever, RetrieverConfig
from recsys.models.rankers import AnyRanker, load_ranker
from recsys.models.rankers.base import Ranker, RankerConfig
from recsys.models.rankers.examples import RankingExamples
from recsys.models.rankers.queries import RankingCatalogue, RankingItems, item_content
from recsys.models.retrievers import AnyRetriever, load_retriever
from recsys.models.retrievers.neighbours.item_knn import ItemKNN
from recsys.models.retrievers.popularity import Popularity
from recsys.models.text.encoder import TextEncoderConfig
from recsys.pipeline.build import Parts
from recsys.pipeline.config import PipelineConfig
from recsys.pipeline.offline import OfflinePipeline, retrieved_examples
from recsys.pipeline.stage import RANKING, RETRIEVAL
from recsys.training.runtime import Runtime
from recsys.types import FloatArray

ModelT = TypeVar("ModelT")
SUITES = Path("configs/benchmark")
_TABLE_WIDTH = 180
_CLEAR_PEAK, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_MAX_HISTORY, _MAX_RANKER_QUERIES, _HOLDOUT_SHARE = 500, 2000, 0.2
"""of systems with a ranker: interactions that it may read, queries of VALID it learns from, share of users held out"""
console = Console(stderr=True, markup=False)
logger = logging.getLogger(__name__)


class Range(StrictConfig):
    """A stretch of numbers to search."""

    low: float = Field(..., description="lower end")
    high: float = Field(..., description="upper end")
    log: bool = Field(default=False, description="draw the logarithm uniformly (both ends above 0)")

    @model_validator(mode="after")
    def _in_order(self) -> Range:
        if self.low >= self.high or (self.log and self.low <= 0):
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}, and above 0 with log")
        return self


class SystemConfig(StrictConfig):
    """One system of a suite."""

    name: str = Field(..., pattern=r"^[A-Za-z0-9_.-]+$", description="its name in tables: letters, digits, . _ -")
    model: AnyRetriever | None = Field(default=None, description="the model and its hyper-parameters")
    ranker: AnyRanker | None = Field(
        default=None, description="a ranker of the model's best candidates; it learns from what VALID holds"
    )
    num_candidates: int = Field(default=50, ge=2, description="candidates that the ranker is given")
    command: str | None = Field(
        default=None, description="instead of model, a program of another library (jobs/external.py says how it is run)"
    )
    text: bool = Field(default=False, description="give the model the vectors of the items' texts (needs encoder)")
    baseline: bool = Field(default=False, description="one of those that the others are held against")
    seeds: tuple[int, ...] | None = Field(default=None, description="seeds of this system; null for those of the suite")
    search: dict[str, tuple[Any, ...] | Range] = Field(
        default={},
        description="what jobs.tune tries: dotted keys of the model, each with a list of values or a range",
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> SystemConfig:
        if (self.model is None) == (self.command is None):
            raise ValueError(f"system {self.name} needs either a model or a command")
        if self.command is not None and (self.text or self.search or self.ranker):
            raise ValueError(f"system {self.name}: text, ranker and search are for models, not for commands")
        return self


class BenchmarkConfig(StrictConfig):
    """A suite: one dataset and protocol, several systems.

    ItemKNN and popularity are always among the baselines, popularity of a window where the split is one in time: a lead
    over weaker ones proves nothing (Dacrema et al., RecSys 2019).
    """

    name: str = Field(..., pattern=r"^[A-Za-z0-9_-]+$", description="name of the suite: letters, digits, - and _")
    workdir: str = Field(default="runs/benchmark", description="folder of all results")
    data: DataConfig = Field(..., description="source, positives, filters, split")
    encoder: TextEncoderConfig | None = Field(default=None, description="text encoder for systems with text")
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1, description="seeds of every system")
    systems: tuple[SystemConfig, ...] = Field(..., min_length=1, description="what is trained and judged")
    anchors: tuple[Anchor, ...] = Field(default=(), description="published figures of the same data and protocol")
    evaluation: EvaluationConfig = Field(default=EvaluationConfig(), description="metrics and intervals")
    compute: ComputeConfig = Field(default=ComputeConfig(), description="workers, devices, failures")

    @model_validator(mode="after")
    def _consistent(self) -> BenchmarkConfig:
        names = [system.name for system in self.systems]
        if len(set(names)) < len(names):
            raise ValueError(f"two systems have the same name: {', '.join(sorted(names))}")
        if self.encoder is None and (with_text := [system.name for system in self.systems if system.text]):
            raise ValueError(f"systems with text need an encoder: {', '.join(with_text)}")
        baselines = [system.model for system in self.systems if system.baseline and system.ranker is None]
        in_time = not isinstance(self.data.split, LeaveOneOutSplit)
        needed = {
            "{kind: popularity, window_days: ...}" if in_time else "{kind: popularity}": any(
                isinstance(model, Popularity) and (model.window_days is not None or not in_time) for model in baselines
            ),
            "{kind: item_knn}": any(isinstance(model, ItemKNN) for model in baselines),
        }
        if missing := [model for model, there in needed.items() if not there]:
            raise ValueError(f"a suite needs these models, too, each with baseline: true: {', '.join(missing)}")
        return self

    def system(self, name: str) -> SystemConfig:
        """One system by its name.

        :raises ConfigError: when there is none.
        """
        for one in self.systems:
            if one.name == name:
                return one
        raise ConfigError(
            f"the suite {self.name} has no system {name!r}, only {', '.join(s.name for s in self.systems)}"
        )

    def prepared(self, *, text: bool) -> tuple[Prepared, Embedded | None]:
        """The dataset, and with ``text`` the vectors of the items' texts."""
        job = JobConfig(name=self.name, workdir=self.workdir, data=self.data, encoder=self.encoder)
        done = Results.of(job, prepare.STEP, *([embed.STEP] if text else []))
        return done[prepare.STEP], done.get(embed.STEP)


@dataclass(frozen=True)
class Payload:
    """What a training is given."""

    config: RetrieverConfig
    data: FitData


def fit(payload: Payload, runtime: Runtime) -> Callable[[Path], None]:
    """Train on TRAIN, choosing on VALID, and note what it took."""
    retriever, took = _measured(lambda: payload.config.fit(payload.data, runtime), runtime)

    def save(folder: Path) -> None:
        retriever.save(folder / "model")
        own = {
            "num_parameters": _num_parameters(retriever, folder / "model"),
            "num_workers": runtime.world_size,
            "curve": [dict(row) for row in retriever.history],
        }
        write_json(folder / "training.json", took | own)

    return save


def _measured(train: Callable[[], ModelT], runtime: Runtime) -> tuple[ModelT, dict[str, Any]]:
    """What ``train`` returns and what it took: time and memory of this worker, CPU time of all of them."""
    forget_peak_memory()
    started, cpu_started = time.perf_counter(), time.process_time()
    model = train()
    seconds = time.perf_counter() - started
    cpu = torch.tensor(time.process_time() - cpu_started, dtype=torch.float64, device=runtime.device)
    cpu_seconds = float(runtime.all_reduce_sum(cpu))
    return model, {"train_seconds": seconds, "cpu_seconds": cpu_seconds, "peak_memory_bytes": peak_memory_bytes()}


@dataclass(frozen=True)
class RankerPayload:
    """What the training of a ranker is given."""

    config: RankerConfig
    catalogue: RankingCatalogue
    train: RankingExamples
    holdout: RankingExamples
    seed: int


def fit_ranker(payload: RankerPayload, runtime: Runtime) -> Callable[[Path], None]:
    """Train, stopped by the users held out, and note what it took."""
    ranker, took = _measured(
        lambda: payload.config.fit(
            payload.train, payload.catalogue, runtime, holdout=payload.holdout, seed=payload.seed
        ),
        runtime,
    )

    def save(folder: Path) -> None:
        ranker.save(folder / "ranker")
        write_json(folder / "training.json", {**took, "num_parameters": _num_parameters(ranker, folder / "ranker")})

    return save


@dataclass(frozen=True)
class Judged:
    """A whole suite, trained and judged."""

    folder: Path
    """with ``suite.json``, ``suite.md`` and ``suite.html``"""
    report: SuiteReport
    runs: list[Run]


def run(config: BenchmarkConfig, command: str, only: tuple[str, ...] = ()) -> Judged:
    """Train and judge what is missing.

    :raises NotInstalledError: where the report could not be written in the end.
    """
    check_plots()
    with ray_session() if config.compute.num_workers else nullcontext():
        return _run(config, command, only)


def _run(config: BenchmarkConfig, command: str, only: tuple[str, ...]) -> Judged:
    systems = [system for system in config.systems if not only or system.name in only]
    prepared, embedded = config.prepared(text=any(system.text for system in systems))
    dataset = prepared.dataset()
    folder = Path(config.workdir) / config.name / "report"
    runs: list[Run] = []
    report: SuiteReport | None = None
    for seed_number in range(max(len(system.seeds or config.seeds) for system in systems)):
        # Seed by seed: after the first round every system stands in the table.
        for system in systems:
            seeds = system.seeds or config.seeds
            if seed_number < len(seeds):
                artifact = train_and_judge(config, system, seeds[seed_number], dataset, prepared, embedded)
                runs.append(Run.load(artifact.path / "run"))
                state = "reused" if artifact.reused else f"done in {artifact.seconds:.0f} s"
                console.print(Text.assemble((system.name, "bold"), f" seed {seeds[seed_number]} {state}"))
                report = write_report(config, runs, dataset, folder, command)
    assert report is not None, "a suite has a system and a seed"
    return Judged(folder, report, runs)


def train_and_judge(
    config: BenchmarkConfig,
    system: SystemConfig,
    seed: int,
    dataset: Dataset,
    prepared: Prepared,
    embedded: Embedded | None,
) -> Artifact:
    """The artefact of one system and seed: ``model``, ``training.json`` and ``run``."""
    parents = [prepared, embedded] if system.text and embedded is not None else [prepared]
    tree = {
        "model": None if system.model is None else system.model.model_dump(mode="json"),
        "command": system.command,
        "name": system.name,
        "baseline": system.baseline,
        "evaluation": config.evaluation.model_dump(mode="json"),
        "seed": seed,
        "num_workers": max(1, config.compute.num_workers),
    }
    if system.ranker is not None:
        tree |= {"ranker": system.ranker.model_dump(mode="json"), "num_candidates": system.num_candidates}

    def make(folder: Path) -> dict[str, Any]:
        if system.command is not None:
            exchange = folder / "exchange"
            rank_fn, training = run_program(system.command, dataset, config.evaluation, seed, exchange)
            shutil.rmtree(exchange)
        else:
            assert system.model is not None
            text = embedded.vectors() if system.text and embedded is not None else None
            rank_fn, training = _Training(config, system, seed, dataset, text, folder).run(system.model)
            training["recommend_ms"] = recommend_ms(rank_fn, dataset.targets(Split.TEST))
        curve = training.pop("curve")
        judged = judge(
            system.name,
            seed,
            rank_fn,
            dataset.targets(Split.TEST),
            dataset,
            config.evaluation,
            cost=Cost(**training),
            curve=curve,
            is_baseline=system.baseline,
        )
        judged.save(folder / "run")
        view = next(iter(judged.views))
        main = config.evaluation.main_metric
        return {main: float(judged.views[view][main].mean()), **training}

    return Artifact.build(config.workdir, "benchmark", tree, parents, make)


@dataclass(frozen=True)
class _Training:
    """Of one system and seed."""

    config: BenchmarkConfig
    system: SystemConfig
    seed: int
    dataset: Dataset
    text: FloatArray | None
    folder: Path
    """of the artefact"""

    def run(self, model: RetrieverConfig) -> tuple[RankFn, dict[str, Any]]:
        """Fit on TRAIN into ``folder / "model"``; the system, and what it took."""
        valid = self.dataset.targets(Split.VALID)
        data = FitData.of(self.dataset, Split.TRAIN, text_vectors=self.text, valid=valid, seed=self.seed)
        # A model without epochs has nothing to spread over workers.
        compute = self.config.compute if model.learns_in_epochs else ComputeConfig(num_workers=0)
        training = self._fit(fit, Payload(model, data), compute, "model")
        retriever = load_retriever(self.folder / "model")
        if self.system.ranker is None:
            return retriever_ranker(retriever, self.dataset, self.config.evaluation), training
        return self._run_ranker(self.system.ranker, retriever, training)

    def _run_ranker(
        self, model: RankerConfig, retriever: Retriever, training: dict[str, Any]
    ) -> tuple[RankFn, dict[str, Any]]:
        """Fit on the retriever's candidates for VALID into ``folder / "ranker"``; what both trainings took, in one."""
        dataset, evaluation = self.dataset, self.config.evaluation
        features = ItemFeatures.of(dataset, Split.TRAIN)
        content = item_content(self.text, features)
        items = RankingItems.of(features, ranking_embeddings(retriever, content))
        catalogue = Catalogue.build(dataset.items)
        repeats = dataset.info.protocol == "next_basket"  # its first view has them
        pipeline = PipelineConfig(
            num_candidates=self.system.num_candidates,
            max_history=_MAX_HISTORY,
            repeat_after_days=0 if repeats else None,
        )
        valid = replace(dataset.targets(Split.VALID), repeats=repeats)
        sampling = evaluation.model_copy(update={"max_queries": _MAX_RANKER_QUERIES, "seed": self.seed})
        asked = valid.select(sample_queries(valid, sampling))
        parts = Parts.of_models(catalogue, retriever, FlatIndex())
        examples = retrieved_examples(parts, pipeline, asked, items, model.max_history)
        train, holdout = examples.split_by_user(_HOLDOUT_SHARE, self.seed)
        payload = RankerPayload(model, RankingCatalogue(items, content, dataset.items), train, holdout, self.seed)
        own = self._fit(fit_ranker, payload, self.config.compute, "ranker")
        summed = {name: training[name] + own[name] for name in ("train_seconds", "cpu_seconds", "num_parameters")}
        peak = max(training["peak_memory_bytes"], own["peak_memory_bytes"])
        parts = Parts.of_models(catalogue, retriever, FlatIndex(), load_ranker(self.folder / "ranker"))
        ranked = OfflinePipeline(parts, pipeline, stages=(RETRIEVAL, RANKING))
        return functools.partial(ranked.rank, depth=evaluation.depth), {**training, **summed, "peak_memory_bytes": peak}

    def _fit(self, fn: TrainFunction[PayloadT], payload: PayloadT, compute: ComputeConfig, part: str) -> dict[str, Any]:
        """Train ``folder / part``; what it took."""
        name, storage = f"{self.system.name}-{self.folder.name}", self.folder / f"fit_{part}"
        fitted = fit_distributed(fn, payload, compute=compute, name=name, storage=storage)
        link_or_copy(fitted.path / part, self.folder / part)
        training = read_json(fitted.path / "training.json")
        discard(fitted)
        return training


def recommend_ms(rank_fn: RankFn, targets: Targets, num_queries: int = 50) -> float:
    """Median milliseconds of ``rank_fn`` over single queries, spread evenly over ``targets``."""
    rows = np.linspace(0, len(targets) - 1, num_queries).astype(int)
    taken: list[float] = []
    for number, row in enumerate([*rows[:5], *rows]):
        one = targets[row : row + 1]
        started = time.perf_counter()
        rank_fn(one)
        if number >= 5:  # the first ones warm up
            taken.append(1000 * (time.perf_counter() - started))
    return float(np.median(taken))


def write_report(config: BenchmarkConfig, runs: list[Run], dataset: Dataset, folder: Path, command: str) -> SuiteReport:
    """``suite.json``, ``suite.md`` and ``suite.html`` of the runs so far."""
    report = build_suite_report(
        config.name,
        runs,
        dataset,
        config.evaluation,
        anchors=config.anchors,
        hardware=hardware(),
        command=command,
    )
    report.save(folder)
    with atomic_path(folder / "suite.html") as temporary:
        temporary.write_text(suite_page(report))
    return report


def forget_peak_memory() -> None:
    """Begin the peak of this process anew, where the system (Linux) can do that."""
    if _CLEAR_PEAK.exists():
        _CLEAR_PEAK.write_text("5")


def peak_memory_bytes() -> int:
    """The largest resident size of this process, since it was last forgotten where that can be done."""
    status = _STATUS.read_text() if _STATUS.exists() else ""
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return 1024 * (int(found[1]) if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def hardware() -> str:
    """Processor, cores and memory of this machine."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model or platform.processor()}, {os.cpu_count()} cores, {memory:.0f} GiB"


def _num_parameters(model: Retriever | Ranker, folder: Path) -> int:
    """Weights of the network, or the numbers saved in ``folder`` by a model that has none."""
    network = getattr(model, "network", getattr(model, "_network", None))
    if network is not None:
        return sum(parameter.numel() for parameter in network.parameters())
    return sum(tensor.numel() for path in folder.rglob("*.safetensors") for tensor in load_file(path).values())


def main(
    suite: Annotated[str, typer.Option(help="a file of configs/benchmark without its ending, or the path of one")],
    set_: cli.SuiteOverrides = None,
    only: Annotated[list[str] | None, typer.Option(help="train and judge these systems only")] = None,
) -> None:
    """Train, judge and compare everything that a suite lists; what is done already is reused."""
    with readable_errors():
        config = cli.read_suite(BenchmarkConfig, SUITES, suite, set_)
        for name in only or ():
            config.system(name)
        changed = "".join(f" --set {override}" for override in set_ or ())
        changed += "".join(f" --only {name}" for name in only or ())
        folder = run(config, f"recsys benchmark --suite {suite}{changed}", tuple(only or ())).folder
    text, output = (folder / "suite.md").read_text(), Console(markup=False)
    # The tables are wide: where they do not fit, their source is easier to read than what would be left of them.
    output.print(Markdown(text)) if output.width >= _TABLE_WIDTH else output.print(text, soft_wrap=True)
    console.print(f"report: {folder}/suite.html", highlight=False)


app = command(main)

if __name__ == "__main__":
    app()
