"""The step sizes of ranker training."""

from __future__ import annotations

import pytest
import torch

from recsys.models.rankers.loop import one_cycle


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 8, 9, 10, 11, 19, 40])
def test_any_number_of_steps_rises_to_the_peak_and_falls(num_steps: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = one_cycle(optimizer, [0.5], num_steps)
    rates = [optimizer.param_groups[0]["lr"]]
    for _ in range(num_steps):
        optimizer.step()
        schedule.step()
        rates.append(optimizer.param_groups[0]["lr"])
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) > 0.45 and rates[0] < 0.05
