"""The retriever job: one run fits base, judged and final; a lost worker does not repeat what was done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs.steps.train_retriever import Payload, fit, summary
from recsys.data.dataset import Split
from recsys.data.histories import Histories
from recsys.files import read_json
from recsys.models.base import FitData, RetrieverConfig
from recsys.models.retrievers import load_retriever
from recsys.models.retrievers.popularity import Popularity
from recsys.models.retrievers.sequences.esasrec import ESASRec
from recsys.testing.planted import planted_clusters
from recsys.training.loop import TrainConfig
from recsys.training.runtime import Runtime

TRAIN = TrainConfig(epochs=5, batch_tokens=100, learning_rate=1e-2, patience=2)
CONFIG = ESASRec(dim=16, num_blocks=1, hidden_dim=16, max_length=10, num_negatives=16, train=TRAIN)


def payload(config: RetrieverConfig) -> Payload:
    dataset = planted_clusters(num_users=40)
    base = FitData.of(dataset, Split.TRAIN, valid=dataset.targets(Split.VALID), seed=1)
    refits = {
        name: replace(base, histories=dataset.positives.histories(until), valid=None)
        for name, until in (("judged", Split.VALID), ("final", Split.TEST))
    }
    return Payload(config, {"base": base, **refits})


class KilledError(Exception):
    pass


class DyingRuntime(Runtime):
    reports = 0

    def report(self, metrics: Mapping[str, float], save: Callable[[Path], None] | None = None) -> None:
        super().report(metrics, save)
        self.reports += 1
        if self.reports == self.limit:
            raise KilledError

    limit = 0


class CountingRuntime(Runtime):
    reports = 0

    def report(self, metrics: Mapping[str, float], save: Callable[[Path], None] | None = None) -> None:
        self.reports += 1
        super().report(metrics, save)


def test_base_and_final(tmp_path: Path) -> None:
    fit(payload(CONFIG), Runtime("cpu"))(tmp_path)
    history = read_json(tmp_path / "history.json")
    chosen = summary(history["base"])
    assert len(history["final"]) == len(history["judged"]) == chosen["epochs"] <= 5
    assert chosen["valid_ndcg@10"] == max(row["ndcg@10"] for row in history["base"])
    base, final = load_retriever(tmp_path / "base"), load_retriever(tmp_path / "final")
    assert isinstance(final.config, ESASRec)
    assert final.config.train.epochs == chosen["epochs"]
    histories = Histories.from_lists([[1, 2, 3]])
    assert not np.allclose(base.score(histories), final.score(histories))


def test_the_base_is_not_trained_twice(tmp_path: Path) -> None:
    fit(payload(CONFIG), whole := CountingRuntime("cpu"))(tmp_path / "whole")
    base_epochs = len(read_json(tmp_path / "whole" / "history.json")["base"])
    dying = DyingRuntime("cpu", checkpoints=tmp_path / "checkpoints")
    dying.limit = base_epochs + 1
    with pytest.raises(KilledError):
        fit(payload(CONFIG), dying)
    resumed = CountingRuntime("cpu", checkpoints=tmp_path / "checkpoints")
    fit(payload(CONFIG), resumed)(tmp_path / "resumed")
    assert resumed.reports == whole.reports - dying.limit
    for part in ("base", "final"):
        name = f"{part}/model.safetensors"
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


def test_a_family_without_epochs(tmp_path: Path) -> None:
    fit(payload(Popularity()), Runtime("cpu"))(tmp_path)
    assert load_retriever(tmp_path / "final").score(Histories.from_lists([[]])).sum() > 0
    assert summary(read_json(tmp_path / "history.json")["base"]) == {}
