"""Suites on a real Ray: a search that keeps to its budget and resumes, and a system trained by several workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from jobs import benchmark, tune
from jobs.benchmark import BenchmarkConfig
from recsys.config import parse
from recsys.files import read_json
from recsys.models.retrievers import AnyRetriever
from recsys.models.retrievers.sequences.esasrec import ESASRec

ROOT = Path(__file__).resolve().parents[2]
MODEL = {
    "kind": "esasrec",
    "dim": 8,
    "num_blocks": 1,
    "hidden_dim": 8,
    "max_length": 10,
    "num_negatives": 0,
    "train": {"epochs": 3, "batch_tokens": 200},
}
SEARCH = {"dropout": [0.1, 0.4], "train.learning_rate": {"low": 1e-3, "high": 1e-2, "log": True}}
SUITE = {
    "name": "tiny",
    "data": {
        "source": {"kind": "synthetic", "num_users": 60, "num_items": 40, "mean_length": 12},
        "split": {"kind": "leave_one_out"},
    },
    "seeds": [0],
    "systems": [
        {"name": "sequence", "model": MODEL, "search": SEARCH},
        {"name": "popularity", "baseline": True, "model": {"kind": "popularity"}},
        {"name": "item_knn", "baseline": True, "model": {"kind": "item_knn"}},
    ],
    "evaluation": {"num_bootstrap": 100},
    "compute": {"num_workers": 2},
}


@pytest.mark.timeout(300)
def test_a_search_keeps_to_its_budget_and_is_not_repeated(local_ray, tmp_path):
    config = BenchmarkConfig.parse(SUITE | {"workdir": str(tmp_path)}, where="test")
    folder = tune.run(config, config.system("sequence"), 3)
    trials = read_json(folder / "trials.json")
    assert len(trials) == 3
    assert [trial["best"] for trial in trials] == sorted((trial["best"] for trial in trials), reverse=True)
    assert all(trial["error"] is None and 1 <= trial["best_epoch"] <= trial["epochs"] <= 3 for trial in trials)
    assert {trial["config"]["dropout"] for trial in trials} <= {0.1, 0.4}
    assert all(1e-3 <= trial["config"]["train.learning_rate"] <= 1e-2 for trial in trials)
    chosen = parse(AnyRetriever, yaml.safe_load((folder / "best.yaml").read_text())["model"], where="best.yaml")
    assert isinstance(chosen, ESASRec)
    assert (chosen.dropout, chosen.train.learning_rate) == tuple(trials[0]["config"].values())
    assert (chosen.dim, chosen.train.epochs) == (8, 3)
    started = time.monotonic()
    tune.run(config, config.system("sequence"), 3)
    assert read_json(folder / "trials.json") == trials
    assert time.monotonic() - started < 60


@pytest.mark.timeout(300)
def test_a_suite_is_trained_by_several_workers(local_ray, tmp_path):
    config = BenchmarkConfig.parse(SUITE | {"workdir": str(tmp_path)}, where="test")
    report = benchmark.run(config, "the command").folder
    (systems,) = read_json(report / "suite.json")["views"].values()
    assert [(one["name"], one["num_workers"]) for one in systems] == [
        ("sequence", 2),
        ("popularity", 1),
        ("item_knn", 1),
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_search_that_was_killed_goes_on(tmp_path):
    path = tmp_path / "tiny.yaml"
    longer = MODEL | {"train": {"epochs": 40, "batch_tokens": 50}}
    systems = [{"name": "sequence", "model": longer, "search": SEARCH}, *SUITE["systems"][1:]]
    path.write_text(yaml.safe_dump(SUITE | {"workdir": str(tmp_path / "work"), "systems": systems}))
    command = [sys.executable, "-m", "jobs.tune", "--suite", str(path), "--system", "sequence", "--trials", "4"]
    tried = tmp_path / "work" / "tiny" / "tune"
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 200
    while not list(tried.glob("sequence-4-0-*/ray/*/checkpoint_*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (folder,) = tried.iterdir()
    assert not (folder / "trials.json").exists()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tried.iterdir()) == [folder]
    trials = read_json(folder / "trials.json")
    assert len(trials) == 4 and all(trial["error"] is None for trial in trials)
