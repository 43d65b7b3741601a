"""A user's own counts: right to the fraction, blind to the target, the same in training, scoring and serving."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.data.histories import Histories
from recsys.errors import NoTimeError
from recsys.models.base import FitData
from recsys.models.layers.habit import Habits, PastOfTargets
from recsys.models.retrievers.sequences.esasrec import ESASRec
from recsys.testing.planted import planted_clusters
from recsys.training import losses
from recsys.training.loop import TrainConfig
from recsys.training.losses import Habit, softmax_loss
from recsys.training.runtime import Runtime

DAY = 86_400_000
HALF_LIVES = (2.0, 30.0)


def test_counts_fade_by_half_per_half_life() -> None:
    histories = Histories.from_lists([[7, 3, 7], [], [3]], [[0, 2 * DAY, 4 * DAY], [], [9 * DAY]])
    habits = Habits.of(histories, np.array([4, 4, 4], np.int64) * DAY, (2.0,), 10)
    np.testing.assert_array_equal(habits.item_idx, [3, 7, 3])
    np.testing.assert_array_equal(habits.offsets, [0, 2, 2, 3])
    # Once two days ago; four days ago and now; once in the future, which has not faded.
    np.testing.assert_allclose(np.expm1(habits.count_EF[:, 0]), [0.5, 1.25, 1.0], rtol=1e-6)
    counted = habits.count(np.array([0, 0, 1, 2]), np.array([7, 5, 7, 3]), 10)[:, 0]
    np.testing.assert_allclose(np.expm1(counted), [1.25, 0, 0, 1], rtol=1e-6)


def test_without_times_nothing_fades_and_without_a_moment_it_is_now() -> None:
    lists, times = [[1, 1, 2]], [[0, DAY, 3 * DAY]]
    plain = Habits.of(Histories.from_lists(lists), None, HALF_LIVES, 5)
    np.testing.assert_allclose(np.expm1(plain.count_EF), [[2, 2], [1, 1]], rtol=1e-6)
    histories = Histories.from_lists(lists, times)
    at_the_end = Habits.of(histories, np.array([3 * DAY]), HALF_LIVES, 5)
    np.testing.assert_array_equal(Habits.of(histories, None, HALF_LIVES, 5).count_EF, at_the_end.count_EF)


def test_no_history_at_all() -> None:
    habits = Habits.of(Histories.from_lists([[], []], [[], []]), np.zeros(2, np.int64), HALF_LIVES, 5)
    assert habits.offsets.tolist() == [0, 0, 0]
    assert (habits.count(np.array([0, 1]), np.array([1, 2]), 5) == 0).all()
    assert len(habits.among(np.array([1, 2])).item_idx) == 0


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.integers(0, 5), max_size=6), min_size=1, max_size=5), st.lists(st.integers(0, 5)))
def test_places_among_candidates(lists: list[list[int]], candidates: list[int]) -> None:
    """Every pair is found at every place of its item, and nothing else is."""
    habits = Habits.of(Histories.from_lists(lists), None, (1.0,), 6)
    moved = habits.among(np.array(candidates, np.int64))
    for row, items in enumerate(lists):
        part = slice(moved.offsets[row], moved.offsets[row + 1])
        found = dict(zip(moved.item_idx[part].tolist(), np.expm1(moved.count_EF[part, 0]), strict=True))
        expected = {place: items.count(item) for place, item in enumerate(candidates) if item in items}
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("by_basket", [False, True])
def test_a_target_sees_only_what_came_before_it(by_basket: bool) -> None:
    lists = [[1, 2, 1, 3], [1, 1]]
    times = [[0, DAY, DAY, 5 * DAY], [0, 0]]
    histories = Histories.from_lists(lists, times)
    past = PastOfTargets.of(histories, by_basket=by_basket)
    targets = np.arange(6)
    habits, query = past.habits(targets, (1e9,), 4)
    for row, target in enumerate(targets):
        user, place = (0, target) if target < 4 else (1, target - 4)
        before = [
            item
            for at, item in enumerate(lists[user])
            if (times[user][at] < times[user][place] if by_basket else at < place)
        ]
        asked = np.arange(4)
        counts = np.expm1(habits.count(np.full(4, query[row]), asked, 4)[:, 0])
        np.testing.assert_allclose(counts, [before.count(int(item)) for item in asked], rtol=1e-5)


def test_the_loss_is_that_of_all_logits() -> None:
    """Against cross-entropy over dense logits, gradients included, in chunks of a few tokens."""
    generator = torch.Generator().manual_seed(0)
    user, items, weight = (
        torch.randn(shape, generator=generator, requires_grad=True) for shape in ((50, 4), (30, 4), (50, 2))
    )
    positive, query = (torch.randint(high, (50,), generator=generator) for high in (30, 7))
    known = torch.rand(7, 1, 30, generator=generator) < 0.3
    known[3] = False
    count_QFN = torch.rand(7, 2, 30, generator=generator) * known
    pairs = known[:, 0].nonzero()
    habit = Habit(
        weight,
        count_QFN[query, :, positive],
        query,
        torch.cat([torch.zeros(1, dtype=torch.int64), known.sum((1, 2)).cumsum(0)]),
        pairs[:, 1],
        count_QFN.permute(0, 2, 1)[known[:, 0]],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "_CHUNK_ELEMENTS", {"cpu": 200})
        loss = softmax_loss(user, items[positive], items, positive_T=positive, weight_T=torch.ones(50), habit=habit)
    logits = user @ items.T + (weight.unsqueeze(-1) * count_QFN[query]).sum(1)
    expected = torch.nn.functional.cross_entropy(logits, positive, reduction="sum")
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss, (user, items, weight))
    torch.testing.assert_close(found, torch.autograd.grad(expected, (user, items, weight)))


def test_time_is_needed() -> None:
    with pytest.raises(NoTimeError, match="habit_half_lives_days"):
        PastOfTargets.of(Histories.from_lists([[0]]), by_basket=False)


def test_what_users_come_back_to_is_recommended() -> None:
    """Everybody repeats four items of their own, drawn at random: nothing but the user's history foretells them."""
    rng = np.random.default_rng(0)
    own = [rng.choice(40, 4, replace=False) for _ in range(150)]
    items = [[int(item) for _ in range(5) for item in rng.permutation(mine)] for mine in own]
    times = [[basket * 7 * DAY for basket in range(5) for _ in range(4)] for _ in own]
    histories = Histories.from_lists(items, times)
    data = FitData(histories, np.ones(len(histories.item_idx), np.float32), planted_clusters().items.slice(0, 40))
    train = TrainConfig(epochs=8, batch_tokens=256, learning_rate=1e-2)
    config = ESASRec(
        dim=4, num_blocks=1, hidden_dim=8, num_heads=1, dropout=0.0, num_negatives=0, train=train,
        objective="next_basket",
    )  # fmt: skip
    found = []
    for half_lives in ((), (30.0,)):
        fitted = config.model_copy(update={"habit_half_lives_days": half_lives}).fit(data, Runtime("cpu"))
        best = np.argsort(-fitted.score(histories), axis=1)[:, :4]
        found.append(np.mean([len(set(row) & set(mine)) for row, mine in zip(best, own, strict=True)]))
    assert found[1] > 3.6
    assert found[0] < 3
