"""Faded counts: as they were before a moment, never as they became."""

from __future__ import annotations

import numpy as np
import pytest

from recsys.data.histories import Histories
from recsys.errors import ModelError, NoTimeError
from recsys.models.base import FitData
from recsys.models.layers import trend
from recsys.models.layers.trend import Trends
from recsys.models.retrievers.sequences.esasrec import ESASRec
from recsys.testing.planted import planted_clusters
from recsys.training.loop import TrainConfig
from recsys.training.runtime import Runtime

DAY = 86_400_000


def _histories(days: list[float]) -> Histories:
    """One user who took item 0 on every one of ``days``."""
    return Histories.from_lists([[0] * len(days)], [[round(day * DAY) for day in days]])


def test_counts_fade_by_half_per_half_life() -> None:
    trends = Trends.of(_histories([0, 0, 4]), np.array([1, 2, 1], np.float32), 2, [2.0, 4.0])
    assert trends.spacing_ms == DAY
    # Days 0 to 5: three on day 0, then nothing but fading until day 4 adds one.
    faded = np.expm1(trends.table_MFN)
    np.testing.assert_allclose(faded[:, 0, 0], [0, 3 / 2**0.5, 1.5, 1.5 / 2**0.5, 0.75, 1.75 / 2**0.5], rtol=1e-5)
    np.testing.assert_allclose(faded[-1, 1, 0], (1.5 + 1) / 2**0.25, rtol=1e-5)
    assert (faded[:, :, 1] == 0).all()


def test_a_target_never_sees_itself_nor_what_came_after_it() -> None:
    """Every target's row is the same whatever happens from its moment on."""
    days = [0.0, 0.4, 1.5, 2.0, 2.9, 7.2]
    histories = _histories(days)
    times = histories.timestamp_ms
    assert times is not None
    weights = np.ones(len(days), np.float32)
    trends = Trends.of(histories, weights, 1, [2.0])
    for row, moment in enumerate(trends.moment(times)):
        future = times >= trends.origin_ms + moment * trends.spacing_ms
        assert future[row]
        other = Trends.of(histories, np.where(future, 50, weights).astype(np.float32), 1, [2.0])
        np.testing.assert_array_equal(other.table_MFN[moment], trends.table_MFN[moment])


def test_what_cannot_be_counted_is_refused() -> None:
    histories = _histories([0, 1])
    with pytest.raises(NoTimeError, match="trend_half_lives_days"):
        Trends.of(Histories.from_lists([[0]]), np.ones(1, np.float32), 1, [1.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trend, "_MAX_ELEMENTS", 3)
        with pytest.raises(ModelError, match="longer shortest half-life"):
            Trends.of(histories, np.ones(2, np.float32), 2, [1.0])


def test_what_is_in_demand_now_is_recommended() -> None:
    """Two halves of a catalogue, one in demand early and one late: the trend knows, histories of old do not tell."""
    rng = np.random.default_rng(0)
    items = [[*rng.integers(0, 10, 6), *rng.integers(10, 20, 2)] for _ in range(150)]
    times = [[*range(0, 6 * DAY, DAY), 30 * DAY, 31 * DAY] for _ in range(150)]
    histories = Histories.from_lists([[int(i) for i in user] for user in items], times)
    table = planted_clusters().items.slice(0, 20)
    data = FitData(histories, np.ones(len(histories.item_idx), np.float32), table)
    train = TrainConfig(epochs=8, batch_tokens=256, learning_rate=1e-2)
    config = ESASRec(dim=8, num_blocks=1, hidden_dim=8, num_heads=1, dropout=0.0, num_negatives=0, train=train)
    late = []
    for half_lives in ((), (2.0, 10.0)):
        fitted = replace_trends(config, half_lives).fit(data, Runtime("cpu"))
        best = fitted.score(Histories.from_lists([[1, 2, 3]])).argsort(axis=1)[0, -10:]
        late.append(int((best >= 10).sum()))
    assert late[1] >= 8 > late[0]


def replace_trends(config: ESASRec, half_lives: tuple[float, ...]) -> ESASRec:
    return config.model_copy(update={"trend_half_lives_days": half_lives})
