"""Packed attention equals plain attention; windows cover every target once; sampled softmax estimates the full one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from recsys.data.histories import Histories
from recsys.errors import NoTimeError
from recsys.models.layers.packing import PackedLayout, packed_attention
from recsys.models.layers.rotary import rotate, rotation
from recsys.training import losses
from recsys.training.losses import Trend, interests_softmax_loss, softmax_loss
from recsys.training.sampling import (
    NegativeSampler,
    cut_windows,
    first_of_basket,
    plan_epoch,
    recency_weight,
    rng_for,
    split_batch,
    total_weight,
)

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)


@given(LENGTHS)
def test_packed_attention_is_attention_of_each_sequence(lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(len(lengths))
    qkv = torch.randn(sum(lengths), 3, 2, 4, generator=generator)
    packed = packed_attention(qkv, PackedLayout.of(np.array(lengths)))
    for own, result in zip(qkv.split(lengths), packed.split(lengths), strict=True):
        query, key, value = own.permute(1, 2, 0, 3)
        mask = torch.full((len(own), len(own)), -torch.inf).triu(1)
        expected = (query @ key.mT / 2 + mask).softmax(-1) @ value
        torch.testing.assert_close(result, expected.transpose(0, 1).reshape(len(own), 8), atol=1e-5, rtol=1e-4)


@given(LENGTHS)
def test_positions_count_from_each_start(lengths: list[int]) -> None:
    expected = [position for length in lengths for position in range(length)]
    assert PackedLayout.of(np.array(lengths)).position_T.tolist() == expected


@given(st.integers(0, 500), st.integers(0, 500), st.integers(0, 500))
def test_rotary_products_depend_on_the_distance_alone(first: int, second: int, shift: int) -> None:
    x = torch.randn(2, 1, 1, 8, generator=torch.Generator().manual_seed(1))

    def product(a: int, b: int) -> float:
        query, key = rotate(x, rotation(torch.tensor([a, b]), 8))[:, 0, 0]
        return float(query @ key)

    assert abs(product(first, second) - product(first + shift, second + shift)) < 1e-2


@given(st.lists(st.integers(0, 30), min_size=1, max_size=15), st.integers(1, 9), st.integers(1, 50), st.integers(0, 5))
def test_an_epoch_covers_every_target_once(lengths: list[int], max_length: int, batch_tokens: int, seed: int) -> None:
    lists = [[1] * length for length in lengths]
    histories = Histories.from_lists(lists)
    windows = cut_windows(histories, max_length, rng_for(seed, 0))
    assert windows.lengths.max(initial=1) <= max_length
    if not len(windows):
        return
    weights = rng_for(seed, 1).random(len(histories.item_idx)).astype(np.float32)
    running = np.concatenate([np.zeros(1), np.cumsum(weights, dtype=np.float64)])
    covered: list[int] = []
    for batch in plan_epoch(windows, batch_tokens, rng_for(seed, 2)):
        assert batch.lengths.sum() < batch_tokens + max_length
        parts = split_batch(batch, 3)
        counted = [part for part in parts if part.counts]
        assert abs(sum(weights[part.target_row].sum() for part in counted) - total_weight(batch, running)) < 1e-3
        for part in counted:
            covered += part.target_row.tolist()
            first = np.isin(part.target_row, histories.starts)
            assert (part.input_row[first] == -1).all()
            assert (part.input_row[~first] == part.target_row[~first] - 1).all()
    assert sorted(covered) == list(range(len(histories.item_idx)))


@given(st.lists(st.lists(st.integers(1, 4), max_size=6), min_size=1, max_size=6), st.integers(1, 9), st.integers(0, 5))
def test_a_basket_is_foretold_from_what_came_before_it(sizes: list[list[int]], max_length: int, seed: int) -> None:
    times = [[day for day, size in enumerate(user) for _ in range(size)] for user in sizes]
    histories = Histories.from_lists([[1] * len(user) for user in times], times)
    log_times = histories.timestamp_ms
    assert log_times is not None
    windows = cut_windows(histories, max_length, rng_for(seed, 0))
    if not len(windows):
        return
    (part,) = split_batch(windows, 1)
    query = first_of_basket(part, log_times)
    window_of = np.repeat(np.arange(len(part.lengths)), part.lengths)
    assert (window_of[query] == window_of).all()
    for token, asked in enumerate(query):
        read, target = part.input_row[asked], part.target_row[token]
        same_basket = read >= 0 and log_times[read] == log_times[target]
        begins_window = asked == 0 or window_of[asked - 1] != window_of[asked]
        # Nothing of the basket is read, but for what a cut through the basket left before its window.
        assert not same_basket or begins_window
        assert (log_times[part.target_row[asked : token + 1]] == log_times[target]).all()


def test_recent_targets_weigh_more_and_all_weigh_as_much_as_before() -> None:
    day = 86_400_000
    histories = Histories.from_lists([[1, 2, 3], [4]], [[0, 10 * day, 20 * day], [20 * day]])
    weights = np.array([1, 1, 1, 2], np.float32)
    recent = recency_weight(weights, histories, 10.0)
    np.testing.assert_allclose(recent / recent[2], [0.25, 0.5, 1.0, 2.0])
    assert abs(recent.sum() - weights.sum()) < 1e-5
    assert recency_weight(weights, histories, None) is weights
    # What comes after the histories' end decides nothing.
    until = Histories(histories.item_idx, histories.starts, histories.stops - 1, histories.timestamp_ms)
    np.testing.assert_allclose(recency_weight(weights, until, 10.0)[:2], [2 / 3, 4 / 3], rtol=1e-6)
    with pytest.raises(NoTimeError, match="recency_half_life_days"):
        recency_weight(weights, Histories.from_lists([[1, 2, 3], [4]]), 10.0)


def _plain(user: torch.Tensor, items: torch.Tensor, positive: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (F.cross_entropy(user @ items.T, positive, reduction="none") * weight).sum()


@given(st.integers(1, 20), st.integers(2, 15), st.integers(1, 60))
def test_full_softmax_and_its_gradient(tokens: int, num_items: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    user = torch.randn(tokens, 4, generator=generator, requires_grad=True)
    items = torch.randn(num_items, 4, generator=generator, requires_grad=True)
    positive = torch.randint(num_items, (tokens,), generator=generator)
    weight = torch.rand(tokens, generator=generator)
    elements = losses._CHUNK_ELEMENTS["cpu"]
    losses._CHUNK_ELEMENTS["cpu"] = chunk
    try:
        loss = softmax_loss(user, items[positive], items, positive_T=positive, weight_T=weight)
        named = softmax_loss(
            user, items[positive], items, positive_T=positive, weight_T=weight, candidate_C=torch.arange(num_items)
        )
    finally:
        losses._CHUNK_ELEMENTS["cpu"] = elements
    expected = _plain(user, items, positive, weight)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(named, expected)
    for actual, wanted in zip(
        torch.autograd.grad(3 * loss, [user, items]), torch.autograd.grad(3 * expected, [user, items]), strict=True
    ):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-4)


@given(st.integers(1, 20), st.integers(2, 15), st.integers(1, 60), st.booleans())
def test_softmax_with_trends_and_its_gradient(tokens: int, num_items: int, chunk: int, named: bool) -> None:
    generator = torch.Generator().manual_seed(tokens)
    user = torch.randn(tokens, 4, generator=generator, requires_grad=True)
    items = torch.randn(num_items, 4, generator=generator, requires_grad=True)
    demand = torch.randn(tokens, 3, generator=generator, requires_grad=True)
    moment, table = torch.randint(5, (tokens,), generator=generator), torch.rand(5, 3, num_items, generator=generator)
    positive = torch.randint(num_items, (tokens,), generator=generator)
    weight = torch.rand(tokens, generator=generator)
    order = torch.randperm(num_items, generator=generator) if named else torch.arange(num_items)
    elements = losses._CHUNK_ELEMENTS["cpu"]
    losses._CHUNK_ELEMENTS["cpu"] = chunk
    try:
        loss = softmax_loss(
            user,
            items[positive],
            items[order],
            positive_T=positive,
            weight_T=weight,
            candidate_C=order if named else None,
            trend=Trend(demand, moment, table),
        )
    finally:
        losses._CHUNK_ELEMENTS["cpu"] = elements
    logits = user @ items.T + torch.einsum("tf,tfn->tn", demand, table[moment])
    expected = (F.cross_entropy(logits, positive, reduction="none") * weight).sum()
    torch.testing.assert_close(loss, expected)
    leaves = [user, items, demand]
    for actual, wanted in zip(
        torch.autograd.grad(3 * loss, leaves), torch.autograd.grad(3 * expected, leaves), strict=True
    ):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-4)


@given(st.integers(1, 12), st.integers(1, 4), st.integers(2, 15), st.integers(1, 90), st.booleans())
def test_softmax_of_the_best_interest_and_its_gradient(
    tokens: int, num_interests: int, num_items: int, chunk: int, named: bool
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    user = torch.randn(tokens, num_interests, 4, generator=generator, requires_grad=True)
    items = torch.randn(num_items, 4, generator=generator, requires_grad=True)
    active = torch.rand(tokens, num_interests, generator=generator) < 0.5
    active[:, 0] = True
    positive = torch.randint(num_items, (tokens,), generator=generator)
    weight = torch.rand(tokens, generator=generator)
    order = torch.randperm(num_items, generator=generator) if named else torch.arange(num_items)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "_CHUNK_ELEMENTS", {"cpu": chunk})
        loss = interests_softmax_loss(
            user,
            active,
            items[positive],
            items[order],
            positive_T=positive,
            weight_T=weight,
            candidate_C=order if named else None,
        )
        found = torch.autograd.grad(3 * loss, [user, items])
    logits = torch.stack(
        [(items @ vectors[which].T).amax(1) for vectors, which in zip(user, active, strict=True)]
    )  # [T, N]
    expected = (F.cross_entropy(logits, positive, reduction="none") * weight).sum()
    torch.testing.assert_close(loss, expected)
    for actual, wanted in zip(found, torch.autograd.grad(3 * expected, [user, items]), strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-5, rtol=1e-4)


def test_sampled_softmax_estimates_the_full_one() -> None:
    """With the log-Q correction a skewed sample gives the full loss; without it the loss is far off."""
    generator = torch.Generator().manual_seed(0)
    user, items = torch.randn(8, 4, generator=generator), torch.randn(500, 4, generator=generator)
    positive, weight = torch.arange(8), torch.ones(8)
    sampler = NegativeSampler(np.arange(500, dtype=np.float64), power=1.0)
    drawn = sampler.draw(100_000, rng_for(0, 1))
    candidate, correction = torch.from_numpy(drawn), torch.from_numpy(sampler.log_correction(drawn))
    common = {"positive_T": positive, "weight_T": weight, "candidate_C": candidate}
    sampled = softmax_loss(user, items[positive], items[candidate], **common, log_correction_C=correction)
    uncorrected = softmax_loss(user, items[positive], items[candidate], **common)
    full = _plain(user, items, positive, weight)
    assert abs(float(sampled - full)) / float(full) < 0.02
    assert abs(float(uncorrected - full)) / float(full) > 0.2


@given(st.lists(st.integers(0, 100), min_size=1, max_size=20), st.sampled_from([0.0, 0.5, 1.0]))
def test_negatives_are_drawn_as_said(counts: list[int], power: float) -> None:
    sampler = NegativeSampler(np.array(counts, np.float64), power)
    drawn = sampler.draw(5000, rng_for(0, 1))
    assert 0 <= drawn.min() <= drawn.max() < len(counts)
    share = np.bincount(drawn, minlength=len(counts)) / 5000
    assert np.abs(share - sampler.probability).max() < 0.04


def test_a_target_that_is_the_only_candidate_costs_nothing() -> None:
    user, items = torch.randn(3, 4), torch.randn(1, 4)
    positive = torch.zeros(3, dtype=torch.int64)
    loss = softmax_loss(user, items[positive], items, positive_T=positive, weight_T=torch.ones(3))
    assert float(loss) == 0
