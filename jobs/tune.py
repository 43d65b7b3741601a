"""Choose hyper-parameters of a suite's system on VALID, with Ray Tune.

The search space stands beside the system in its suite. Trials are drawn at random from a seed and the hopeless ones
are stopped early (ASHA: Li et al., MLSys 2020). TEST is never read. A run that was stopped goes on where it was, trial
by trial and epoch by epoch, and never draws more than ``--trials``. What was chosen is written as YAML, to be copied
into the suite.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from jobs import cli
from jobs._ray import ray_session
from jobs.artifacts import Embedded, Prepared
from jobs.benchmark import SUITES, BenchmarkConfig, Range, SystemConfig
from recsys.cli import command, readable_errors
from recsys.config import parse, to_yaml
from recsys.data.dataset import Split
from recsys.errors import ConfigError
from recsys.files import atomic_path, fingerprint, write_json
from recsys.models.base import FitData, RetrieverConfig
from recsys.models.retrievers import AnyRetriever
from recsys.training.runtime import Runtime

console = Console(stderr=True, markup=False)
METRIC = "ndcg@10"


class TrialRuntime(Runtime):
    """One trial: reports every epoch to Ray Tune, and resumes from what it kept."""

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self._open = ExitStack()

    def report(self, metrics: Mapping[str, float], save: Callable[[Path], None] | None = None) -> None:
        """Every epoch of a trial is judged, so ``metrics`` always has ``ndcg@10``."""
        from ray import tune

        values = {"epoch": int(metrics["epoch"]), METRIC: metrics[METRIC]}
        if save is None:
            tune.report(values)
            return
        with tempfile.TemporaryDirectory() as scratch:
            save(Path(scratch))
            tune.report(values, checkpoint=tune.Checkpoint.from_directory(scratch))

    def restore(self) -> Path | None:
        """The newest checkpoint of this trial."""
        from ray import tune

        checkpoint = tune.get_checkpoint()
        return None if checkpoint is None else Path(self._open.enter_context(checkpoint.as_directory()))


def trial(
    sampled: Mapping[str, Any], *, model: Mapping[str, Any], prepared: Prepared, embedded: Embedded | None
) -> None:
    """Fit one configuration on TRAIN, judged on VALID after every epoch."""
    torch.set_num_threads(1)
    logging.getLogger("recsys").setLevel(logging.WARNING)
    config = configuration(model, sampled)
    dataset, text = prepared.dataset(), embedded and embedded.vectors()
    data = FitData.of(dataset, Split.TRAIN, text_vectors=text, valid=dataset.targets(Split.VALID))
    config.fit(data, TrialRuntime("cpu"))


def configuration(model: Mapping[str, Any], sampled: Mapping[str, Any]) -> RetrieverConfig:
    """``model`` with the dotted keys of ``sampled`` set.

    :raises ConfigError: when a key or a value is none of the model's.
    """
    tree: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in model.items()}
    for key, value in sampled.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node[parent] if isinstance(node.get(parent), dict) else node.setdefault(parent, {})
        node[last] = value
    return parse(AnyRetriever, tree, where=f"search {dict(sampled)}")


def space(system: SystemConfig) -> dict[str, Any]:
    """The search space as Ray Tune knows it."""
    from ray import tune

    found: dict[str, Any] = {}
    for key, values in system.search.items():
        if isinstance(values, Range):
            found[key] = (
                tune.loguniform(values.low, values.high) if values.log else tune.uniform(values.low, values.high)
            )
        else:
            found[key] = tune.choice(list(values))
    return found


def run(config: BenchmarkConfig, system: SystemConfig, num_trials: int, seed: int = 0) -> Path:
    """Search; the folder with ``trials.json`` and ``best.yaml``."""
    if system.model is None or not system.search:
        raise ConfigError(f"system {system.name} has no search space: give it the key search in the suite's file")
    prepared, embedded = config.prepared(text=system.text)
    model = system.model.model_dump(mode="json")
    if "train" not in model:
        raise ConfigError(
            f"system {system.name}: a model of kind {system.model.kind} has no epochs to compare trials by"
        )
    epochs = model["train"]["epochs"]
    model["train"]["eval_every"] = 1
    # What is searched, and in what: a search that was interrupted goes on only where all of it is the same.
    asked = [model, system.model_dump(mode="json")["search"], prepared.key, embedded and embedded.key]
    digest = fingerprint(asked)[:12]
    folder = Path(config.workdir).absolute() / config.name / "tune" / f"{system.name}-{num_trials}-{seed}-{digest}"
    with ray_session():
        results = _search(folder, system, model, prepared, embedded, num_trials, epochs, seed)
    rows = sorted(results, key=lambda row: (-row["best"], json.dumps(row["config"], sort_keys=True)))
    write_json(folder / "trials.json", rows)
    chosen = configuration(model, rows[0]["config"])
    with atomic_path(folder / "best.yaml") as temporary:
        temporary.write_text(
            to_yaml({"model": chosen.model_dump(mode="json", exclude_defaults=True) | {"kind": chosen.kind}})
        )
    _show(system, rows)
    return folder


def _search(
    folder: Path,
    system: SystemConfig,
    model: Mapping[str, Any],
    prepared: Prepared,
    embedded: Embedded | None,
    num_trials: int,
    epochs: int,
    seed: int,
) -> list[dict[str, Any]]:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    trainable = tune.with_resources(
        tune.with_parameters(trial, model=model, prepared=prepared, embedded=embedded), resources={"cpu": 1}
    )
    if tune.Tuner.can_restore(str(folder / "ray")):
        tuner = tune.Tuner.restore(
            str(folder / "ray"), trainable, resume_unfinished=True, restart_errored=True, param_space=space(system)
        )
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=space(system),
            tune_config=tune.TuneConfig(
                metric=METRIC,
                mode="max",
                num_samples=num_trials,
                search_alg=BasicVariantGenerator(random_state=seed),
                scheduler=ASHAScheduler("epoch", max_t=epochs, grace_period=max(1, epochs // 8), reduction_factor=3),
            ),
            run_config=tune.RunConfig(
                name="ray",
                storage_path=str(folder),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=1),
                verbose=1,
            ),
        )
    found: list[dict[str, Any]] = []
    for result in tuner.fit():
        curve: Any = result.metrics_dataframe
        if curve is None or METRIC not in curve:
            raise ConfigError(f"a trial failed before its first epoch: {result.error}; see {folder}/ray")
        row = curve.loc[curve[METRIC].idxmax()]
        found.append(
            {
                "config": result.config,
                "best": float(row[METRIC]),
                "best_epoch": int(row["epoch"]),
                "epochs": int(curve["epoch"].max()),
                "error": None if result.error is None else str(result.error),
            }
        )
    return found


def _show(system: SystemConfig, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{system.name}: {len(rows)} trials by NDCG@10 on validation", show_edge=False)
    for column in ("NDCG@10", "best epoch", "epochs", *system.search):
        table.add_column(column)
    for row in rows:
        values = (row["config"][key] for key in system.search)
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
        table.add_row(f"{row['best']:.4f}", str(row["best_epoch"]), str(row["epochs"]), *cells)
    console.print(table)


def main(
    suite: Annotated[str, typer.Option(help="a file of configs/benchmark without its ending, or the path of one")],
    system: Annotated[str, typer.Option(help="the system of the suite to tune")],
    trials: Annotated[int, typer.Option(help="budget: configurations tried in all", min=1, max=10_000)] = 20,
    seed: Annotated[int, typer.Option(help="seed of the draws", min=0)] = 0,
    set_: cli.SuiteOverrides = None,
) -> None:
    """Try configurations of one system and write the best one, by validation alone."""
    with readable_errors():
        config = cli.read_suite(BenchmarkConfig, SUITES, suite, set_)
        folder = run(config, config.system(system), trials, seed)
    console.print(f"chosen: {folder}/best.yaml", highlight=False)


app = command(main)

if __name__ == "__main__":
    app()
