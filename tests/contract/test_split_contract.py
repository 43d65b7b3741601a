"""What every split must do, run over all kinds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recsys import schema
from recsys.data.dataset import Split
from recsys.data.splits import KINDS, SplitPolicy, check_not_empty
from recsys.errors import LeakageError, NoTimeError
from recsys.testing.samples import sample_of

NUM_USERS, LENGTH = 60, 12
USER = np.repeat(np.arange(NUM_USERS, dtype=np.int32), LENGTH)
_RNG = np.random.default_rng(0)
_HOURS = _RNG.permutation(100 * LENGTH)[: NUM_USERS * LENGTH].reshape(NUM_USERS, LENGTH)
TIME = (10**12 + np.sort(_HOURS) * 3_600_000).ravel()
POSITIVE = _RNG.random(len(USER)) < 0.8


@pytest.fixture(params=KINDS.names)
def split(request: pytest.FixtureRequest, tmp_path: Path) -> SplitPolicy:
    return sample_of(KINDS.get(request.param), tmp_path)


def log(labels: np.ndarray, *, has_time: bool = True) -> pa.Table:
    """As ``prepare`` writes it: each user's interactions by time, a fifth of them with no weight."""
    num = len(USER)
    times = pa.array(TIME if has_time else [None] * num, pa.int64()).cast(schema.TIMESTAMP_TYPE)
    columns = {
        schema.USER_IDX: USER,
        schema.ITEM_IDX: np.arange(num) % 50,
        schema.TIMESTAMP: times,
        schema.POSITION: np.tile(np.arange(LENGTH), NUM_USERS),
        schema.EVENT: ["view"] * num,
        schema.VALUE: pa.nulls(num, pa.float32()),
        schema.WEIGHT: POSITIVE.astype(np.float32),
        schema.SPLIT: labels,
    }
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in schema.PREPARED_INTERACTIONS})


@pytest.mark.parametrize("has_time", [True, False])
def test_every_part_has_its_share_and_nothing_leaks(split: SplitPolicy, has_time: bool) -> None:
    try:
        labels = split.assign(USER, TIME if has_time else None, POSITIVE)
    except NoTimeError:
        assert not has_time
        return
    assert labels.split.shape == USER.shape
    assert labels.split.dtype == np.int8
    assert (np.diff(labels.split.reshape(NUM_USERS, LENGTH)) >= 0).all()
    check_not_empty(labels.split, POSITIVE)
    split.check(log(labels.split, has_time=has_time), labels.borders_ms)


def test_an_older_interaction_in_a_later_part_is_refused(split: SplitPolicy) -> None:
    labels = split.assign(USER, TIME, POSITIVE)
    user = int(USER[np.flatnonzero(labels.split == Split.TEST)[0]])
    broken = labels.split.copy()
    rows = np.flatnonzero(user == USER)
    broken[rows] = broken[rows][::-1]
    with pytest.raises(LeakageError):
        split.check(log(broken), labels.borders_ms)


def test_a_log_that_is_not_in_order_is_refused(split: SplitPolicy) -> None:
    labels = split.assign(USER, TIME, POSITIVE)
    backwards = np.arange(len(USER)).reshape(NUM_USERS, LENGTH)[:, ::-1].ravel()
    with pytest.raises(LeakageError, match="older than the one before"):
        split.check(log(labels.split).take(backwards), labels.borders_ms)


def test_it_survives_a_round_trip(split: SplitPolicy) -> None:
    assert KINDS.parse(split.model_dump(mode="json"), where="test") == split
    assert split.protocol


def test_every_setting_is_described() -> None:
    for kind in KINDS.classes:
        for name, field in kind.model_fields.items():
            assert name == "kind" or field.description, f"{kind.__name__}.{name} has no description"
