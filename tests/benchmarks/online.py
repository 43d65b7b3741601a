"""A year of Online Retail in order of time, week by week, written to ``results/realtime.json``: ``make bench-online``.

Every week three models foretell what is in the baskets of that week, all of them given the histories as they are at
that moment: one that was fitted before the first week and never again, one that is fitted anew every week on all that
there is, and one that goes on learning from the week that is over. ``--tune`` tries settings of the learning on weeks
before those that count.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import torch
import typer
from rows import RESULTS, write_row

from jobs.benchmark import SUITES, BenchmarkConfig
from recsys import schema
from recsys.config import load_config
from recsys.data.dataset import Dataset, Split
from recsys.data.prepare import prepare
from recsys.evaluation.protocol import EvaluationConfig, evaluate_ranker, retriever_ranker
from recsys.evaluation.suite import ratio_interval
from recsys.models.base import FitData, Retriever, UpdateConfig
from recsys.models.retrievers.sequences.esasrec import ESASRec
from recsys.online.config import OnlineConfig
from recsys.online.learn import lesson_data, teach_retriever
from recsys.training.loop import best_epoch
from recsys.training.runtime import Runtime

COMMAND = "make bench-online"
WEEK_MS = 7 * 86_400_000
NUM_WEEKS, NUM_TUNING_WEEKS = 20, 8
METRIC = "ndcg@10"
SYSTEMS = ("frozen", "retrained", "online")


@dataclass
class Judged:
    """What one system was worth, week by week."""

    values: list[np.ndarray] = field(default_factory=list)
    users: list[np.ndarray] = field(default_factory=list)
    seconds: float = 0.0
    """of training, the first fit not counted"""

    def all_values(self) -> np.ndarray:
        return np.concatenate(self.values)


def labelled(dataset: Dataset, valid_from_ms: int, test_from_ms: int, test_until_ms: int) -> Dataset:
    """``dataset`` until ``test_until_ms``, split at the other two."""
    times = dataset.interactions[schema.TIMESTAMP].cast(pa.int64()).to_numpy()
    kept = times < test_until_ms
    split = ((times >= valid_from_ms).astype(np.int8) + (times >= test_from_ms)).astype(np.int8)
    table = dataset.interactions
    place = table.schema.get_field_index(schema.SPLIT)
    table = table.set_column(place, table.schema.field(place), pa.array(split)).filter(pa.array(kept))
    info = dataset.info.model_copy(
        update={"num_interactions": len(table), "borders_ms": (valid_from_ms, test_from_ms), "protocol": "next_basket"}
    )
    return Dataset(table, dataset.items, dataset.users, info)


def weeks(dataset: Dataset, first: int, number: int, last_ms: int) -> Iterator[Dataset]:
    """Each week as ``TEST``, the week before it as ``VALID``; week ``first`` is that many weeks before the end."""
    for week in range(number):
        begin = last_ms - (first - week) * WEEK_MS
        yield labelled(dataset, begin - WEEK_MS, begin, begin + WEEK_MS)


def judge(model: Retriever, week: Dataset, evaluation: EvaluationConfig, into: Judged) -> None:
    result = evaluate_ranker(
        "one", retriever_ranker(model, week, evaluation), week.targets(Split.TEST), week, evaluation
    )
    whole = result.views[0].segments["all"]
    into.values.append(whole.values[METRIC])
    into.users.append(whole.user_idx)


def first_fit(model: ESASRec, week: Dataset) -> tuple[ESASRec, Retriever]:
    """The number of epochs that the week before the first one chooses, and the model fitted so on all before it."""
    chosen = model.fit(FitData.of(week, Split.TRAIN, valid=week.targets(Split.VALID)), Runtime("cpu"))
    fixed = model.refit(chosen)
    print("epochs:", best_epoch([dict(row) for row in chosen.history]), flush=True)
    return fixed, fixed.fit(FitData.of(week, Split.VALID), Runtime("cpu"))


def go_on(
    model: ESASRec, fitted: Retriever, weeks_: list[Dataset], evaluation: EvaluationConfig, how: UpdateConfig
) -> Judged:
    """The model that learns from each week once it is over; ``fitted`` knows all before the first."""
    judged, online = Judged(), OnlineConfig(learning=how)
    for number, week in enumerate(weeks_):
        if number:
            data = lesson_data(model, week, Split.VALID, None, online)
            started = time.perf_counter()
            fitted = teach_retriever(model, fitted, data, Runtime("cpu"), online)
            judged.seconds += time.perf_counter() - started
        judge(fitted, week, evaluation, judged)
    return judged


def retrain(model: ESASRec, fitted: Retriever, weeks_: list[Dataset], evaluation: EvaluationConfig) -> Judged:
    judged = Judged()
    for number, week in enumerate(weeks_):
        if number:
            data = FitData.of(week, Split.VALID)
            started = time.perf_counter()
            fitted = model.fit(data, Runtime("cpu"))
            judged.seconds += time.perf_counter() - started
            print(f"fitted anew for week {number + 1} in {judged.seconds / number:.0f} s each", flush=True)
        judge(fitted, week, evaluation, judged)
    return judged


def tune(model: ESASRec, dataset: Dataset, evaluation: EvaluationConfig, last_ms: int) -> None:
    """Settings of the learning on earlier weeks; prints a table."""
    some = list(weeks(dataset, NUM_WEEKS + NUM_TUNING_WEEKS, NUM_TUNING_WEEKS, last_ms))
    fixed, fitted = first_fit(model, some[0])
    frozen = Judged()
    for week in some:
        judge(fitted, week, evaluation, frozen)
    print(f"frozen {frozen.all_values().mean():.5f}", flush=True)
    for epochs, rate, share in itertools.product((1, 3), (0.1, 0.3, 1.0), (0.5, 0.8)):
        how = UpdateConfig(epochs=epochs, rate=rate, replay=share)
        found = go_on(fixed, fitted, some, evaluation, how)
        print(f"{how!r} {found.all_values().mean():.5f} in {found.seconds:.1f} s", flush=True)


def main(
    workdir: Annotated[Path, typer.Option(help="folder of the prepared data")] = Path("runs/benchmark/online"),
    tuning: Annotated[bool, typer.Option("--tune", help="try settings on earlier weeks, and write no rows")] = False,
) -> None:
    """Replay Online Retail."""
    torch.set_num_threads(2)
    config = load_config(BenchmarkConfig, SUITES / "online_retail.yaml")
    dataset = prepare(config.data, 0, workdir)
    model = config.system("esasrec").model
    assert isinstance(model, ESASRec)
    evaluation = config.evaluation.model_copy(update={"max_queries": None, "main_metric": METRIC})
    assert dataset.log.timestamp_ms is not None
    last_ms = int(dataset.log.timestamp_ms.max()) + 1
    if tuning:
        tune(model, dataset, evaluation, last_ms)
        return
    counted = list(weeks(dataset, NUM_WEEKS, NUM_WEEKS, last_ms))
    fixed, fitted = first_fit(model, counted[0])
    found = {"frozen": Judged()}
    for week in counted:
        judge(fitted, week, evaluation, found["frozen"])
    found["online"] = go_on(fixed, fitted, counted, evaluation, UpdateConfig())
    print({name: each.all_values().mean() for name, each in found.items()}, found["online"].seconds, flush=True)
    found["retrained"] = retrain(fixed, fitted, counted, evaluation)
    report(found, evaluation, fixed)


def report(found: dict[str, Judged], evaluation: EvaluationConfig, model: ESASRec) -> None:
    """Rows and the plot."""
    users = np.concatenate(found["online"].users)
    share = found["online"].seconds / found["retrained"].seconds
    means = {name: float(found[name].all_values().mean()) for name in SYSTEMS}
    by_week = {name: [float(values.mean()) for values in found[name].values] for name in SYSTEMS}
    details: dict[str, Any] = {
        "ndcg@10": means,
        "by_week": by_week,
        "seconds": {name: found[name].seconds for name in SYSTEMS},
        "num_queries": len(users),
        "learning": UpdateConfig().model_dump(),
        "epochs": model.train.epochs,
    }
    protocol = (
        f"Online Retail, the last {NUM_WEEKS} weeks in order: next baskets of each week, repeats included, full "
        "ranking; histories are up to date for all three, weights are not; model of the suite online_retail on ids; "
        "intervals clustered by user"
    )
    for name, other, bar, least in (
        ("online_over_frozen", "frozen", "> 1, interval excludes it", 1.0),
        ("online_over_retrained", "retrained", ">= 0.95", 0.95),
    ):
        ratio = ratio_interval(found["online"].all_values(), found[other].all_values(), users, evaluation)
        passes = ratio.low > 1 if other == "frozen" else ratio.mean >= least
        write_row(
            "realtime", name, ratio.mean, unit="x", bar=bar, passes=passes, protocol=protocol, command=COMMAND,
            seeds=[0], details=details | {"interval": [ratio.low, ratio.high]},
        )  # fmt: skip
    write_row(
        "realtime", "online_compute_share", share, unit="", bar="<= 0.1", passes=share <= 0.1, command=COMMAND,
        seeds=[0], protocol=protocol + "; seconds of training of the one that goes on, over those of the one fitted "
        "anew, the first fit of both left out", details=details,
    )  # fmt: skip
    (RESULTS / "realtime").mkdir(parents=True, exist_ok=True)
    (RESULTS / "realtime" / "online_retail.json").write_text(json.dumps(details, indent=2) + "\n")
    plot(by_week, RESULTS / "realtime" / "online_retail.svg")


def plot(by_week: dict[str, list[float]], path: Path) -> None:
    """NDCG@10 of every week."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 4))
    for name, values in by_week.items():
        axis.plot(np.arange(1, len(values) + 1), values, "o-", label=name)
    axis.set(xlabel="week", ylabel="NDCG@10 of the next basket", title="Online Retail, before each week is learned")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    typer.run(main)
