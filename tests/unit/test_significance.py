"""Intervals and p values: reproducible, clustered, and calibrated."""

from __future__ import annotations

import numpy as np
import pytest

from recsys.errors import DataError
from recsys.evaluation import significance
from recsys.evaluation.significance import bootstrap, paired_difference


def test_equal_input_gives_equal_output_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values, users = rng.random((200, 3)), rng.integers(40, size=200).astype(np.int32)
    whole = bootstrap(values, users, seed=5)
    monkeypatch.setattr(significance, "_CHUNK_CELLS", 40 * 7)
    assert bootstrap(values, users, seed=5) == whole
    assert bootstrap(values, users, seed=6) != whole
    np.testing.assert_allclose([i.mean for i in whole], values.mean(axis=0))
    assert all(i.low < i.mean < i.high for i in whole)


def test_repeating_each_users_queries_does_not_narrow_the_interval() -> None:
    rng = np.random.default_rng(1)
    values = rng.random((60, 1))
    users = np.arange(60, dtype=np.int32)
    [once] = bootstrap(values, users)
    [often] = bootstrap(np.repeat(values, 25, axis=0), np.repeat(users, 25))
    assert often.high - often.low == pytest.approx(once.high - once.low, rel=1e-9)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    # Users of different sizes whose queries share an effect: unclustered intervals would cover far less.
    rng = np.random.default_rng(2)
    covered = []
    for trial in range(200):
        effect = rng.normal(size=80)
        users = np.repeat(np.arange(80), rng.integers(1, 9, 80))
        values = effect[users] + 0.3 * rng.normal(size=len(users))
        [interval] = bootstrap(values[:, None], users.astype(np.int32), num_resamples=300, seed=trial)
        covered.append(interval.low <= 0 <= interval.high)
    assert 0.89 <= np.mean(covered) <= 0.99


def test_p_values_are_uniform_without_a_difference_and_small_with_one() -> None:
    rng = np.random.default_rng(3)
    users = np.repeat(np.arange(50), 4).astype(np.int32)
    p_values = []
    for trial in range(200):
        a, b = (rng.normal(size=50)[users] + rng.normal(size=200) for _ in range(2))
        p_values.append(paired_difference(a[:, None], b[:, None], users, num_resamples=300, seed=trial)[0].p_value)
    assert 0.01 <= np.mean(np.array(p_values) <= 0.05) <= 0.10
    assert 0.4 <= np.mean(p_values) <= 0.6
    [clear] = paired_difference(b[:, None] + 1.0, b[:, None] + 0.01 * rng.normal(size=(200, 1)), users)
    assert clear.low > 0 and clear.p_value < 0.01 and clear.mean == pytest.approx(1.0, abs=0.01)


def test_a_system_does_not_differ_from_itself() -> None:
    values, users = np.random.default_rng(4).random((30, 2)), np.arange(30, dtype=np.int32)
    for difference in paired_difference(values, values, users):
        assert (difference.mean, difference.low, difference.high, difference.p_value) == (0, 0, 0, 1)


def test_unusable_input_is_refused() -> None:
    users = np.zeros(2, np.int32)
    with pytest.raises(DataError, match="same queries"):
        paired_difference(np.zeros((2, 1)), np.zeros((3, 1)), users)
    with pytest.raises(DataError, match="do not fit"):
        bootstrap(np.zeros((3, 1)), users)
    with pytest.raises(DataError, match="no queries"):
        bootstrap(np.zeros((0, 1)), users[:0])
