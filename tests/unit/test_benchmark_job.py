"""The benchmark job: trains what is missing, judges it on TEST, reports; refuses a suite that makes no sense."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import typer
import yaml

from jobs import benchmark, benchmark_ratings
from jobs.benchmark import BenchmarkConfig
from jobs.benchmark_ratings import RatingSuite
from recsys.config import load_config
from recsys.errors import ConfigError, ModelError
from recsys.files import read_json
from recsys.training.runtime import Runtime

ROOT = Path(__file__).resolve().parents[2]
SUITE = {
    "name": "tiny",
    "data": {
        "source": {"kind": "synthetic", "num_users": 60, "num_items": 40, "mean_length": 12},
        "split": {"kind": "leave_one_out"},
    },
    "seeds": [0, 1],
    "systems": [
        {
            "name": "sequence",
            "model": {
                "kind": "esasrec",
                "dim": 8,
                "num_blocks": 1,
                "hidden_dim": 8,
                "max_length": 10,
                "num_negatives": 0,
                "train": {"epochs": 2, "batch_tokens": 200},
            },
        },
        {"name": "popularity", "baseline": True, "seeds": [0], "model": {"kind": "popularity"}},
        {"name": "item_knn", "baseline": True, "seeds": [0], "model": {"kind": "item_knn"}},
    ],
    "anchors": [{"name": "published", "metrics": {"ndcg@10": 0.3}, "source": "somewhere"}],
    "evaluation": {"num_bootstrap": 100},
    "compute": {"num_workers": 0},
}
BASELINES = SUITE["systems"][1:]


def test_a_suite_is_trained_once_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = BenchmarkConfig.parse(SUITE | {"workdir": str(tmp_path)}, where="test")
    folder = benchmark.run(config, "the command").folder
    report = read_json(folder / "suite.json")
    (systems,) = report["views"].values()
    found = [(one["name"], one["seeds"]) for one in systems]
    assert found == [("sequence", [0, 1]), ("popularity", [0]), ("item_knn", [0])]
    sequence = systems[0]
    assert len(sequence["curves"]) == 2
    assert all(len(curve) == 2 and curve[0]["loss"] > 0 for curve in sequence["curves"])
    assert sequence["train_seconds"] > 0 and sequence["peak_memory_bytes"] > 1e6 and sequence["num_parameters"] > 320
    assert 0 <= sequence["metrics"]["ndcg@10"]["low"] <= sequence["metrics"]["ndcg@10"]["high"] <= 1
    assert {path.name for path in folder.iterdir()} == {"suite.json", "suite.md", "suite.html"}
    text = (folder / "suite.md").read_text()
    assert "published" in text and "`the command`" in text

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a finished training is not done again")

    monkeypatch.setattr(benchmark, "fit_distributed", never)
    again = benchmark.run(config, "the command", only=("popularity",)).folder
    (systems,) = read_json(again / "suite.json")["views"].values()
    assert [one["name"] for one in systems] == ["popularity"]


def test_what_the_report_needs_is_asked_for_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not after hours of training; and the brackets of what to install reach the terminal."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(SUITE | {"workdir": str(tmp_path / "work")}))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(typer.Exit) as ended:
        benchmark.main(str(path))
    assert ended.value.exit_code == 2
    assert "a report with plots needs matplotlib" in (told := capsys.readouterr().err)
    assert "pip install 'recsys-ray[report]'" in told
    assert not (tmp_path / "work").exists()


def test_a_ranker_takes_part_with_its_retriever(tmp_path: Path) -> None:
    ranker = {"kind": "attention", "dim": 8, "hidden": 8, "epochs": 1}
    _, popularity, knn = SUITE["systems"]
    systems = [popularity, knn, knn | {"name": "ranked", "ranker": ranker, "num_candidates": 20}]
    config = BenchmarkConfig.parse(SUITE | {"workdir": str(tmp_path), "systems": systems}, where="test")
    judged = benchmark.run(config, "the command")
    alone, ranked = (judged.report.summary(name) for name in ("item_knn", "ranked"))
    assert ranked.num_parameters > alone.num_parameters > 0
    assert alone.cpu_seconds is not None and alone.recommend_ms is not None and alone.recommend_ms > 0
    (folder,) = [path.parent for path in tmp_path.glob("benchmark/*/ranker")]
    assert (folder / "ranker" / "model.safetensors").exists() and not list((folder / "fit_ranker").iterdir())
    table = (judged.folder / "suite.md").read_text()
    assert "p50 ms" in table and "accuracy against latency" in (judged.folder / "suite.html").read_text()


def test_cpu_time_is_that_of_all_workers(tmp_path: Path) -> None:
    class Several(Runtime):
        def all_reduce_sum(self, value: torch.Tensor) -> torch.Tensor:
            return value + 100.0

    model = SimpleNamespace(network=torch.nn.Linear(1, 1), history=[], save=lambda _: None)
    config: Any = SimpleNamespace(fit=lambda *_, **__: model)
    nothing: Any = None
    of_both = (
        benchmark.fit(benchmark.Payload(config, nothing), Several("cpu")),
        benchmark.fit_ranker(benchmark.RankerPayload(config, nothing, nothing, nothing, 0), Several("cpu")),
    )
    for save in of_both:
        save(tmp_path)
        took = read_json(tmp_path / "training.json")
        assert took["cpu_seconds"] >= 100 and took["train_seconds"] < 100


POPULAR = """
import json, sys
import sys
from pathlib import Path
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
folder = Path(sys.argv[-1])
task = json.loads((folder / "task.json").read_text())
train, valid, test = (pq.read_table(folder / f"{name}.parquet") for name in ("train", "valid", "test"))
assert "relevant" in valid.column_names and "relevant" not in test.column_names
best = np.argsort(-np.bincount(train["item_idx"].to_numpy(), minlength=task["num_items"]), kind="stable")
depth = task["depth"]
new = [best[~np.isin(best, seen)][:depth] for seen in test["seen"].to_numpy()]
new = [np.concatenate([items, np.full(depth - len(items), -1)]) for items in new]
every = [best[:depth]] * len(test)
LAST
pq.write_table(pa.table({"ranked": every, "ranked_new": new}), folder / "ranked.parquet")
said = {"train_seconds": 1.5, "peak_memory_bytes": 1, "num_parameters": 7, "num_workers": 1, "curve": []}
(folder / "training.json").write_text(json.dumps(said))
"""


def with_program(tmp_path: Path, last: str = "") -> dict[str, object]:
    """The suite with our popularity and a program that ranks by popularity too."""
    (tmp_path / "program.py").write_text(POPULAR.replace("LAST", last))
    command = f"{sys.executable} {tmp_path / 'program.py'} --option 'of its own'"
    program = {"name": "program", "baseline": True, "seeds": [0], "command": command}
    return SUITE | {"workdir": str(tmp_path), "systems": [program, *BASELINES]}


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_a_program_is_judged_like_a_model(tmp_path: Path, exclude_seen: bool) -> None:
    tree = with_program(tmp_path) | {"evaluation": {"num_bootstrap": 100, "exclude_seen": exclude_seen}}
    done = benchmark.run(BenchmarkConfig.parse(tree, where="test"), "the command")
    theirs, ours, _ = done.runs
    (view,) = theirs.views
    for metric, values in theirs.views[view].items():
        np.testing.assert_array_equal(values, ours.views[view][metric])
    assert (theirs.cost.train_seconds, theirs.cost.num_parameters) == (1.5, 7)
    assert not list(tmp_path.glob("benchmark/*/exchange"))


@pytest.mark.parametrize(
    ("last", "error", "words"),
    [
        ("raise SystemExit('no memory left')", ModelError, "no memory left"),
        ("every, new = every[1:], new[1:]", ModelError, "ranked [0-9]+ of [0-9]+ queries"),
        ("new = every", ModelError, "has seen"),
        ("new = [np.full(depth, items[0]) for items in new]", ModelError, "twice"),
    ],
)
def test_a_program_that_goes_wrong_is_named(tmp_path: Path, last: str, error: type[Exception], words: str) -> None:
    config = BenchmarkConfig.parse(with_program(tmp_path, last), where="test")
    with pytest.raises(error, match=words):
        benchmark.run(config, "the command")


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    tree = with_program(tmp_path)
    tree["systems"] = [{"name": "gone", "command": str(tmp_path / "gone")}, *BASELINES]
    with pytest.raises(ConfigError, match=r"gone: No such file.*installed"):
        benchmark.run(BenchmarkConfig.parse(tree, where="test"), "the command")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"systems": [{"name": "neither"}]}, "either a model or a command"),
        ({"systems": [SUITE["systems"][1] | {"command": "x"}]}, "either a model or a command"),
        ({"systems": [{"name": "x", "command": "x", "text": True}]}, "text, ranker and search are for models"),
        ({"systems": [SUITE["systems"][1], SUITE["systems"][1]]}, "same name"),
        ({"systems": [SUITE["systems"][0] | {"text": True}]}, "need an encoder"),
        ({"systems": []}, "systems"),
        ({"systems": SUITE["systems"][:1]}, r"each with baseline: true: {kind: popularity}, {kind: item_knn}$"),
        ({"systems": [BASELINES[0], BASELINES[1] | {"baseline": False}]}, r"baseline: true: {kind: item_knn}$"),
        ({"systems": [BASELINES[0], BASELINES[1] | {"ranker": {"kind": "attention"}}]}, r"true: {kind: item_knn}$"),
        ({"data": SUITE["data"] | {"split": {"kind": "global_time"}}}, r"true: {kind: popularity, window_days: ...}"),
        ({"seeds": []}, "seeds"),
    ],
)
def test_a_suite_that_makes_no_sense_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        BenchmarkConfig.parse(SUITE | change, where="test")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "benchmark").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_suite_is_valid(path: Path) -> None:
    config = load_config(BenchmarkConfig, path)
    assert config.name == path.stem
    assert yaml.safe_load(path.read_text())


def test_a_suite_of_ratings_is_judged(tmp_path: Path) -> None:
    """Rows of 1 to 5 that the user's own mean foretells better than the mean of all."""
    rng = np.random.default_rng(0)
    rows = [
        {"user_id": f"u{user}", "item_id": f"i{item}", "timestamp": 1000 + 60 * place, "event": "rating",
         "value": float(np.clip(1 + user % 5 + rng.normal(scale=0.2), 1, 5))}
        for user in range(30)
        for place, item in enumerate(rng.permutation(20)[:8].tolist())
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "ratings.parquet")
    tree = {
        "name": "tiny",
        "workdir": str(tmp_path / "runs"),
        "data": {
            "source": {
                "kind": "parquet",
                "path": str(tmp_path / "ratings.parquet"),
                "timestamp_unit": "s",
                "columns": {"event": "event", "value": "value"},
            },
            "positives": {"events": {"rating": {"weight": 1.0}}},
            "split": {"kind": "leave_one_out"},
        },
        "models": {
            "mean": {"kind": "biases", "user_shrinkage": 1e9},
            "biases": {"kind": "biases", "user_shrinkage": 0.1},
        },
        "num_bootstrap": 100,
    }
    folder, (mean, biases) = benchmark_ratings.run(RatingSuite.parse(tree, where="test"), "the command")
    assert biases.rmse.mean < 0.4
    assert mean.rmse.mean > 1.0
    assert biases.rmse.low < biases.rmse.mean < biases.rmse.high
    assert biases.mae.mean <= biases.rmse.mean
    text = (folder / "ratings.md").read_text()
    assert f"| biases | {biases.rmse.mean:.4f} |" in text and "30 ratings of the test split" in text


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "ratings").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_suite_of_ratings_is_valid(path: Path) -> None:
    assert load_config(RatingSuite, path).models
