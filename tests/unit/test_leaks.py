"""Leaks are planted in everything that is made of a log, and each is found and named.

Leaks in the cut itself (duplicates across the border, unstable ties) are planted in ``test_splits.py``, those in
evaluation queries in ``test_evaluation_protocol.py``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from recsys.data.config import DataConfig
from recsys.data.dataset import Dataset, Split
from recsys.data.features import ItemFeatures
from recsys.data.leaks import another_future, check_blind
from recsys.data.prepare import prepare
from recsys.errors import LeakageError
from recsys.evaluation.protocol import check_no_leak
from recsys.models.base import FitData
from recsys.models.text import contrastive
from recsys.models.text.contrastive import PairData
from recsys.training.sampling import NegativeSampler, rng_for

TRAIN, VALID, TEST = Split.TRAIN, Split.VALID, Split.TEST


@pytest.fixture(scope="module", params=["global_time", "leave_one_out", "next_basket"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    source = {"kind": "synthetic", "num_users": 60, "num_items": 50, "num_clusters": 5}
    config = DataConfig.parse({"source": source, "split": {"kind": request.param}}, where="test")
    return prepare(config, 0, tmp_path_factory.mktemp("data"))


def test_another_future_keeps_the_past_and_changes_all_that_follows(dataset: Dataset) -> None:
    other = another_future(dataset, TRAIN)
    past = dataset.log.split <= TRAIN
    for name in ("item_idx", "timestamp_ms", "weight", "user_idx", "split"):
        ours, theirs = getattr(dataset.log, name), getattr(other.log, name)
        np.testing.assert_array_equal(ours[past], theirs[past])
    assert (dataset.log.item_idx[~past] != other.log.item_idx[~past]).all()
    assert dataset.log.timestamp_ms is not None and other.log.timestamp_ms is not None
    assert (dataset.log.timestamp_ms[~past] < other.log.timestamp_ms[~past]).all()


def test_what_is_really_learned_from_is_blind(dataset: Dataset) -> None:
    FitData.of(dataset, TRAIN)
    FitData.of(dataset, VALID)
    ItemFeatures.of(dataset, TRAIN)
    PairData.of(dataset, [""] * dataset.num_items, window=2)
    check_no_leak(dataset.targets(TEST), dataset)


def test_a_feature_of_the_future_is_found(dataset: Dataset) -> None:
    with pytest.raises(LeakageError, match="item features: numeric depends on interactions after train") as caught:
        check_blind("item features", lambda source: ItemFeatures._of(source, TEST), dataset, TRAIN)
    assert caught.value.details["part"] == "numeric"

    def time_alone(source: Dataset) -> ItemFeatures:
        """The time of every item's first interaction ever, the popularity of the past."""
        return replace(ItemFeatures._of(source, TRAIN), created_ms=ItemFeatures._of(source, TEST).created_ms)

    late = dataset.log.split > TRAIN
    if set(dataset.log.item_idx[late]) - set(dataset.log.item_idx[~late]):
        with pytest.raises(LeakageError, match="created_ms"):
            check_blind("item features", time_alone, dataset, TRAIN)


def test_a_text_pair_of_the_future_is_found(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = contrastive.consecutive_pairs

    def to_the_end_of_the_log(histories: Any, window: int) -> Any:
        borders = np.append(histories.starts[1:], len(histories.item_idx))
        return honest(replace(histories, stops=borders), window)

    monkeypatch.setattr(contrastive, "consecutive_pairs", to_the_end_of_the_log)
    with pytest.raises(LeakageError, match="text pairs: pairs depends on interactions after train"):
        PairData.of(dataset, [""] * dataset.num_items, window=2)


@pytest.mark.parametrize("until", [VALID, TEST])
def test_a_negative_drawn_by_the_future_is_found(dataset: Dataset, until: Split) -> None:
    def drawn(source: Dataset, last: Split) -> dict[str, np.ndarray]:
        counts = source.train_counts(last).astype(np.float64)
        sampler = NegativeSampler(counts, 1.0)
        return {"negatives": sampler.draw(1000, rng_for(0)), "log_q": sampler.log_correction(np.arange(len(counts)))}

    check_blind("negatives", lambda source: drawn(source, TRAIN), dataset, TRAIN, read=dict)
    with pytest.raises(LeakageError, match="negatives: negatives depends"):
        check_blind("negatives", lambda source: drawn(source, until), dataset, TRAIN, read=dict)


def test_a_negative_that_spares_the_test_item_is_found(dataset: Dataset) -> None:
    """Negatives without what the user chose later tell a model what that was."""

    def spared(source: Dataset) -> dict[str, np.ndarray]:
        log = source.positives
        taken = np.zeros((source.num_users, source.num_items), bool)
        taken[log.user_idx, log.item_idx] = True
        drawn = rng_for(1).integers(0, source.num_items, (source.num_users, 20))
        return {"negatives": np.where(np.take_along_axis(taken, drawn, axis=1), -1, drawn)}

    with pytest.raises(LeakageError, match="negatives"):
        check_blind("negatives", spared, dataset, TRAIN, read=dict)


def test_a_training_history_one_too_long_is_found(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    log = type(dataset.positives)
    honest = log.histories
    monkeypatch.setattr(log, "histories", lambda self, until: honest(self, Split(min(until + 1, TEST))))
    with pytest.raises(LeakageError, match="training data: items depends on interactions after train"):
        FitData.of(dataset, TRAIN)
