"""Compare models that predict ratings, by RMSE and MAE.

A suite is a file of ``configs/ratings``. Every rating of the TEST split is a question: what would this user, given
all they rated before, rate this item? Models learn from TRAIN; the report (JSON, Markdown) goes to
``WORKDIR/SUITE/report``.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from pydantic import Field
from rich.console import Console
from rich.markdown import Markdown
from rich.text import Text

from jobs import cli
from jobs.benchmark import hardware
from jobs.config import JobConfig
from jobs.steps import prepare
from recsys.cli import command, readable_errors
from recsys.config import StrictConfig
from recsys.data.config import DataConfig
from recsys.data.dataset import Split
from recsys.evaluation.significance import Interval, bootstrap
from recsys.files import atomic_path, write_json
from recsys.models.ratings import AnyRatingModel
from recsys.models.ratings.base import Rated, RatingQuestions
from recsys.types import FloatArray

SUITES = Path("configs/ratings")
console = Console(stderr=True, markup=False)


class RatingSuite(StrictConfig):
    """One dataset, several models."""

    name: str = Field(..., pattern=r"^[A-Za-z0-9_-]+$", description="name of the suite: letters, digits, - and _")
    workdir: str = Field(default="runs/ratings", description="folder of all results")
    data: DataConfig = Field(..., description="source, filters, split; every interaction needs a value")
    models: dict[str, AnyRatingModel] = Field(..., min_length=1, description="models by their names")
    num_bootstrap: int = Field(default=1000, ge=100, description="resamples of users for each interval")
    confidence: float = Field(default=0.95, gt=0.5, lt=1.0, description="coverage of the intervals, as a fraction")
    seed: int = Field(default=0, ge=0, description="seed of trainings and resampling")


@dataclass(frozen=True)
class RatingResult:
    """One model, judged."""

    name: str
    rmse: Interval
    """root of the mean squared error, in units of the ratings"""
    mae: Interval
    """mean absolute error"""
    train_seconds: float


def errors(predicted: FloatArray, questions: RatingQuestions, config: RatingSuite) -> tuple[Interval, Interval]:
    """RMSE and MAE, with intervals clustered by user."""
    error = predicted.astype(np.float64) - questions.answers
    square, absolute = bootstrap(
        np.stack([error**2, np.abs(error)], axis=1),
        questions.user_idx,
        num_resamples=config.num_bootstrap,
        confidence=config.confidence,
        seed=config.seed,
    )
    return Interval(*(float(np.sqrt(value)) for value in (square.mean, square.low, square.high))), absolute


def run(config: RatingSuite, command: str) -> tuple[Path, list[RatingResult]]:
    """Train and judge all of ``config``; the folder of the report, and what it says."""
    dataset = prepare.run(JobConfig(name=config.name, workdir=config.workdir, data=config.data)).dataset()
    train, questions = Rated.of(dataset, Split.TRAIN), RatingQuestions.of(dataset, Split.TEST)
    results: list[RatingResult] = []
    for name, model in config.models.items():
        started = time.perf_counter()
        fitted = model.fit(train, config.seed)
        seconds = time.perf_counter() - started
        rmse, mae = errors(fitted.predict(questions.rated, questions.item_idx), questions, config)
        results.append(RatingResult(name, rmse, mae, seconds))
        console.print(Text.assemble((name, "bold"), f" RMSE {rmse.mean:.4f}, MAE {mae.mean:.4f}"))
    folder = Path(config.workdir) / config.name / "report"
    conditions = (
        f"{dataset.info.name}, {len(questions.item_idx)} ratings of the test split, each given all that its user had "
        f"rated before; learned from train alone; {config.confidence:.0%} bootstrap intervals clustered by user; seed "
        f"{config.seed}; {hardware()}; split {dataset.info.fingerprint[:16]}; `{command}`."
    )
    models = [asdict(one) for one in results]
    write_json(folder / "ratings.json", {"suite": config.name, "conditions": conditions, "models": models})
    with atomic_path(folder / "ratings.md") as temporary:
        temporary.write_text(_markdown(config.name, conditions, results))
    return folder, results


def _markdown(name: str, conditions: str, results: list[RatingResult]) -> str:
    lines = [f"# Ratings {name}", "", conditions, "", "| model | RMSE | interval | MAE | interval | training s |"]
    lines.append("| :-- | --: | --: | --: | --: | --: |")
    for one in results:
        cells = [one.name]
        for value in (one.rmse, one.mae):
            cells += [f"{value.mean:.4f}", f"{value.low:.4f} to {value.high:.4f}"]
        lines.append("| " + " | ".join([*cells, f"{one.train_seconds:.1f}"]) + " |")
    return "\n".join([*lines, ""])


def main(
    suite: Annotated[str, typer.Option(help="a file of configs/ratings without its ending, or the path of one")],
    set_: cli.SuiteOverrides = None,
) -> None:
    """Train, judge and compare all models of ratings that a suite lists."""
    with readable_errors():
        config = cli.read_suite(RatingSuite, SUITES, suite, set_)
        changed = "".join(f" --set {override}" for override in set_ or ())
        folder, _ = run(config, f"recsys ratings --suite {suite}{changed}")
    Console(markup=False).print(Markdown((folder / "ratings.md").read_text()))


app = command(main)

if __name__ == "__main__":
    app()
