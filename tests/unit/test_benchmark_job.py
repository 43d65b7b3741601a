"""The benchmark job: trains what is missing, judges it on TEST, reports; refuses a suite that makes no sense."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from jobs import benchmark
from jobs.benchmark import BenchmarkConfig
from recsys.config import load_config
from recsys.errors import ConfigError
from recsys.files import read_json

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
    ],
    "anchors": [{"name": "published", "metrics": {"ndcg@10": 0.3}, "source": "somewhere"}],
    "evaluation": {"num_bootstrap": 100},
    "compute": {"num_workers": 0},
}


def test_a_suite_is_trained_once_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = BenchmarkConfig.parse(SUITE | {"workdir": str(tmp_path)}, where="test")
    folder = benchmark.run(config, "the command")
    report = read_json(folder / "suite.json")
    (systems,) = report["views"].values()
    assert [(one["name"], one["seeds"]) for one in systems] == [("sequence", [0, 1]), ("popularity", [0])]
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
    again = benchmark.run(config, "the command", only=("popularity",))
    (systems,) = read_json(again / "suite.json")["views"].values()
    assert [one["name"] for one in systems] == ["popularity"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"systems": [SUITE["systems"][1], SUITE["systems"][1]]}, "same name"),
        ({"systems": [SUITE["systems"][0] | {"text": True}]}, "need an encoder"),
        ({"systems": []}, "systems"),
        ({"seeds": []}, "seeds"),
    ],
)
def test_a_suite_that_makes_no_sense_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        BenchmarkConfig.parse(SUITE | change, where="test")


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "benchmark").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_suite_is_valid_and_has_its_baselines(path: Path) -> None:
    config = load_config(BenchmarkConfig, path)
    assert config.name == path.stem
    assert {"popularity", "item_knn"} <= {s.model.kind for s in config.systems if s.baseline and s.model is not None}
    assert yaml.safe_load(path.read_text())
