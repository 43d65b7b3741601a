"""The loss curve is the same however a step is shared out; a restored run continues as if it had never stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recsys.data.dataset import Split
from recsys.data.histories import Histories
from recsys.errors import ModelError
from recsys.models.base import FitData, Retriever
from recsys.models.retrievers.sequences.base import SequenceRetriever
from recsys.models.retrievers.sequences.esasrec import ESASRec
from recsys.testing.planted import planted_clusters
from recsys.training.loop import TrainConfig, best_epoch, sample_targets, validation_ndcg
from recsys.training.runtime import Runtime

TRAIN = TrainConfig(epochs=3, batch_tokens=100, learning_rate=1e-2, warmup_steps=3)
CONFIG = ESASRec(dim=16, num_blocks=1, hidden_dim=16, max_length=5, dropout=0.0, num_negatives=16, train=TRAIN)
DATASET = planted_clusters(num_users=40)


def data(*, valid: bool = False) -> FitData:
    text = np.random.default_rng(0).normal(size=(DATASET.num_items, 6)).astype(np.float32)
    targets = DATASET.targets(Split.VALID) if valid else None
    return FitData.of(DATASET, Split.TRAIN, text_vectors=text, valid=targets, seed=3)


def with_train(**changes: Any) -> ESASRec:
    return CONFIG.model_copy(update={"train": TRAIN.model_copy(update=changes)})


def losses(retriever: Retriever) -> list[float]:
    return [row["loss"] for row in retriever.history]


def probe(retriever: Retriever) -> np.ndarray:
    return retriever.score(Histories.from_lists([[], [1, 2, 3], list(range(40))]))


class TwoWorkers:
    """Two threads that average gradients as DistributedDataParallel does, without its processes."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60)
        self.first: torch.nn.Module | None = None
        self.initialised = threading.Event()
        self.values: list[Any] = [None, None]

    def sum(self, rank: int, value: torch.Tensor) -> torch.Tensor:
        self.values[rank] = value.clone()
        self.barrier.wait()
        total = self.values[0] + self.values[1]
        self.barrier.wait()
        return total

    def run(self, fit: Callable[[Runtime], Retriever]) -> list[Retriever]:
        results: list[Any] = [None, None]

        def work(rank: int) -> None:
            # Threads share torch's random state: the first must have drawn its weights before the second begins.
            if rank == 1:
                assert self.initialised.wait(60)
            results[rank] = fit(Worker(rank, self))

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class Worker(Runtime):
    world_size = 2

    def __init__(self, rank: int, workers: TwoWorkers) -> None:
        super().__init__("cpu")
        self.rank, self.workers = rank, workers

    def prepare(self, module: Any) -> Any:
        if self.rank == 0:
            self.workers.first = module
            self.workers.initialised.set()
        else:
            module.load_state_dict(self.workers.first.state_dict())  # as DistributedDataParallel does
        return _Averaging(module, self)

    def all_reduce_sum(self, value: torch.Tensor) -> torch.Tensor:
        return self.workers.sum(self.rank, value)


class _Averaging(torch.nn.Module):
    def __init__(self, module: torch.nn.Module, worker: Worker) -> None:
        super().__init__()
        self.module, self.worker = module, worker

    def parameters(self, recurse: bool = True) -> Any:
        """The loop asks for them once per step, to clip gradients: the moment to average them."""
        for parameter in self.module.parameters():
            assert parameter.grad is not None, "every worker must have a gradient for every parameter"
            parameter.grad = self.worker.all_reduce_sum(parameter.grad) / 2
        return self.module.parameters()

    def forward(self, part: Any) -> torch.Tensor:
        return self.module(part)


def test_accumulation_changes_nothing() -> None:
    whole, parts = (with_train(accumulation=n).fit(data(), Runtime("cpu")) for n in (1, 3))
    np.testing.assert_allclose(losses(parts), losses(whole), rtol=1e-5)
    np.testing.assert_allclose(probe(parts), probe(whole), atol=1e-3)


def test_two_workers_change_nothing() -> None:
    one = CONFIG.fit(data(valid=True), Runtime("cpu"))
    first, second = TwoWorkers().run(lambda runtime: CONFIG.fit(data(valid=True), runtime))
    np.testing.assert_allclose(losses(first), losses(one), rtol=1e-5)
    np.testing.assert_allclose(probe(first), probe(one), atol=1e-3)
    np.testing.assert_array_equal(probe(first), probe(second))
    assert [row["ndcg@10"] for row in first.history] == [row["ndcg@10"] for row in second.history]


class KilledError(Exception):
    pass


class DyingRuntime(Runtime):
    def report(self, metrics: Mapping[str, float], save: Callable[[Path], None] | None = None) -> None:
        super().report(metrics, save)
        if metrics["epoch"] == 2:
            raise KilledError


@pytest.mark.parametrize("valid", [False, True])
def test_a_killed_run_continues_where_it_was(tmp_path: Path, valid: bool) -> None:
    config = with_train(epochs=4).model_copy(update={"dropout": 0.3})
    unbroken = config.fit(data(valid=valid), Runtime("cpu"))
    with pytest.raises(KilledError):
        config.fit(data(valid=valid), DyingRuntime("cpu", checkpoints=tmp_path))
    assert not [path for path in tmp_path.rglob("*") if path.suffix not in ("", ".json", ".safetensors")]
    resumed = config.fit(data(valid=valid), Runtime("cpu", checkpoints=tmp_path))
    assert list(resumed.history) == list(unbroken.history)
    np.testing.assert_array_equal(probe(resumed), probe(unbroken))


def test_a_checkpoint_of_another_training_is_not_used(tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        CONFIG.fit(data(), DyingRuntime("cpu", checkpoints=tmp_path))
    other = CONFIG.model_copy(update={"dropout": 0.1})
    fresh = other.fit(data(), Runtime("cpu"))
    assert losses(other.fit(data(), Runtime("cpu", checkpoints=tmp_path))) == losses(fresh)


def test_early_stopping_keeps_the_best_epoch() -> None:
    config = with_train(epochs=60, patience=2, learning_rate=3e-2)
    fitted = config.fit(data(valid=True), Runtime("cpu"))
    chosen = best_epoch([dict(row) for row in fitted.history])
    assert chosen is not None
    assert len(fitted.history) == chosen + 2 < 60
    assert isinstance(fitted, SequenceRetriever)
    kept = validation_ndcg(
        fitted.score_for_validation, DATASET.targets(Split.VALID), Runtime("cpu"), num_items=DATASET.num_items
    )
    assert kept == pytest.approx(fitted.history[chosen - 1]["ndcg@10"])
    refit = config.refit(fitted)
    assert isinstance(refit, ESASRec)
    assert refit.train.epochs == chosen
    assert len(refit.fit(data(), Runtime("cpu")).history) == chosen


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    whole = data()
    broken = FitData(whole.histories, np.full_like(whole.weights, 1e38), whole.items, whole.text_vectors)
    with pytest.raises(ModelError, match="learning_rate"):
        CONFIG.fit(broken, Runtime("cpu"))


def test_a_text_vector_that_is_not_finite_is_an_error() -> None:
    broken = data()
    assert broken.text_vectors is not None
    broken.text_vectors[5, 1] = np.nan
    with pytest.raises(ModelError, match="item_idx 5 is not finite"):
        CONFIG.fit(broken, Runtime("cpu"))


def test_weights_weigh() -> None:
    """A user whose interactions weigh next to nothing teaches nothing."""
    whole = data()
    few = np.where(DATASET.positives.user_idx < 20, 1.0, 1e-9).astype(np.float32)
    light = FitData(whole.histories, few, whole.items, whole.text_vectors, seed=3)
    assert losses(CONFIG.fit(light, Runtime("cpu")))[0] != losses(CONFIG.fit(whole, Runtime("cpu")))[0]
    same = FitData(whole.histories, np.full_like(few, 7.0), whole.items, whole.text_vectors, seed=3)
    np.testing.assert_allclose(
        losses(CONFIG.fit(same, Runtime("cpu"))), losses(CONFIG.fit(whole, Runtime("cpu"))), 1e-4
    )


@pytest.mark.parametrize("max_length", [1, 4, 10])
def test_prefixes_share_passes(max_length: int) -> None:
    """As one by one where histories are short; for longer ones at least half of ``max_length`` is read."""
    config = CONFIG.model_copy(update={"max_length": max_length})
    fitted = config.fit(data(), Runtime("cpu"))
    assert isinstance(fitted, SequenceRetriever)
    log = DATASET.positives
    users, stops = np.repeat(np.arange(5), 8), np.concatenate([np.arange(8)] * 5)
    starts = log.user_offsets[users]
    histories = Histories(log.item_idx, starts, starts + stops)[np.random.default_rng(0).permutation(40)]
    together = fitted.encode_prefixes(histories)
    assert np.isfinite(together).all()
    if max_length == 10:
        np.testing.assert_allclose(together, fitted.encode_users(histories)[:, 0], atol=1e-5)
    if max_length == 1:
        own = histories.lengths > 1
        np.testing.assert_allclose(together[own], fitted.encode_users(histories[own])[:, 0], atol=1e-5)


def test_sampled_targets_are_real_ones() -> None:
    targets = DATASET.targets(Split.VALID)
    sample = sample_targets(targets, 7, seed=1)
    assert len(sample) == 7
    assert sample.relevant_offsets.tolist() == list(range(8))
    whole = {int(user): row for row, user in enumerate(targets.user_idx)}
    for row, user in enumerate(sample.user_idx):
        assert sample.relevant(row).tolist() == targets.relevant(whole[int(user)]).tolist()
        assert sample.histories.items(row).tolist() == targets.histories.items(whole[int(user)]).tolist()
    again = sample_targets(targets, 7, seed=1)
    np.testing.assert_array_equal(again.user_idx, sample.user_idx)


def test_validation_ndcg_by_hand() -> None:
    targets = DATASET.targets(Split.VALID)[0:2]

    def score(histories: Histories, now_ms: Any) -> np.ndarray:
        scores = np.zeros((len(histories), DATASET.num_items), np.float32)
        for row in range(len(histories)):
            scores[row, targets.seen.items(row)] = 9  # seen: left out
        scores[0, targets.relevant(0)] = 5  # first
        scores[1, targets.relevant(1)] = 5
        scores[1, np.setdiff1d(np.arange(2), targets.seen.items(1))] = 6
        return scores

    better = len(np.setdiff1d(np.arange(2), np.append(targets.seen.items(1), targets.relevant(1))))
    expected = (1 + 1 / np.log2(2 + better)) / 2
    assert validation_ndcg(score, targets, Runtime("cpu"), num_items=DATASET.num_items) == pytest.approx(expected)


def test_validation_holds_no_more_scores_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a million items, a thousand queries at once would be four gigabytes."""
    targets, num_items = DATASET.targets(Split.VALID), DATASET.num_items
    asked: list[int] = []

    def score(histories: Histories, now_ms: Any) -> np.ndarray:
        asked.append(len(histories))
        return np.tile(np.arange(num_items, dtype=np.float32), (len(histories), 1))

    whole = validation_ndcg(score, targets, Runtime("cpu"), num_items=num_items)
    assert asked == [len(targets)]
    monkeypatch.setattr("recsys.training.loop._VALIDATION_SCORES", 3 * num_items)
    assert validation_ndcg(score, targets, Runtime("cpu"), num_items=num_items) == pytest.approx(whole)
    assert max(asked[1:]) == 3
