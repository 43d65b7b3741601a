"""What is learned of a grown log: everything new once, and of the old so much that its share is what was asked for."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.data.histories import Histories
from recsys.online.replay import lesson_of
from recsys.training.sampling import cut_windows, rng_for, split_batch


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 6)), min_size=1, max_size=12),
    st.integers(1, 10),
    st.sampled_from([0.0, 0.3, 0.5, 0.9]),
    st.integers(0, 100),
)
def test_a_lesson_has_all_that_is_new_and_the_replay_it_was_asked_for(
    users: list[tuple[int, int]], max_length: int, replay: float, seed: int
) -> None:
    """``users``: how many old interactions each has, and how many new ones after them."""
    lengths = np.array([old + new for old, new in users])
    stops = np.cumsum(lengths)
    fresh = np.concatenate([np.arange(old + new) >= old for old, new in users]).astype(bool)
    log = np.arange(len(fresh), dtype=np.int32)
    lesson = lesson_of(Histories(log, stops - lengths, stops), fresh, max_length=max_length, replay=replay, seed=seed)
    rows = lesson.histories.rows()
    assert len(np.unique(rows)) == len(rows)
    assert set(np.flatnonzero(fresh)) <= set(rows.tolist())
    user_of = np.repeat(np.arange(len(users)), lengths)
    for start, stop, head in zip(lesson.histories.starts, lesson.histories.stops, lesson.heads, strict=True):
        assert len(set(user_of[start:stop])) == 1
        assert head == (start == 0 or user_of[start - 1] != user_of[start])
    assert (lesson.weight > 0).all()
    assert (lesson.weight[fresh] == 1).all()
    old = rows[~fresh[rows]]
    if fresh.any() and len(old):
        share = lesson.weight[old].sum() / (lesson.weight[old].sum() + fresh.sum())
        assert share <= replay + 1e-3
        if (lesson.weight[old] < 1).all():
            np.testing.assert_allclose(share, replay, atol=1e-3)
    if len(rows):
        windows = cut_windows(lesson.histories, max_length, rng_for(seed, 1), lesson.heads)
        (packed,) = split_batch(windows, 1)
        assert sorted(packed.target_row.tolist()) == sorted(rows.tolist())
        reads = packed.input_row >= 0
        # What is read is what came right before, of the same user; only a user's first interaction has nothing before.
        np.testing.assert_array_equal(packed.input_row[reads], packed.target_row[reads] - 1)
        np.testing.assert_array_equal(user_of[packed.input_row[reads]], user_of[packed.target_row[reads]])
        first = packed.target_row[~reads]
        assert all(row == 0 or user_of[row - 1] != user_of[row] for row in first.tolist())
