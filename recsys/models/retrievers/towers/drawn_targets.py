"""Training steps of models that read a whole history into few vectors, one target at a time.

Where a sequence model answers at every position of one pass, these must read what came before a target anew for each;
so an epoch draws some targets of each history.

Shape legend: B histories, L items read of each (padded at the end, newest first), N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recsys.data.histories import Histories
from recsys.models.base import FitData, check_items
from recsys.models.retrievers.towers.base import TowerConfig, hidden_ids, sampler_of, target_weights
from recsys.training.sampling import rng_for
from recsys.types import Int64Array

PADDING, START = -2, -1
"""in place of an ``item_idx``: nothing, and the beginning of the history"""


def newest_first(histories: Histories, max_length: int, num_items: int) -> Int64Array:
    """int64 [B, L]: items newest first, then the start where there is room, then padding; at least one column.

    :raises ModelError: when what is read of a history is not one of the ``num_items``.
    """
    histories = histories.last(max_length)
    lengths = histories.lengths
    back = np.arange(min(int(lengths.max(initial=0)) + 1, max_length))
    is_item = back < lengths[:, None]
    item = np.where(back == lengths[:, None], START, PADDING)
    item[is_item] = histories.item_idx[(histories.stops[:, None] - 1 - back)[is_item]]
    check_items(item[is_item], num_items)
    return item


@dataclass(frozen=True)
class Part:
    """One worker's part of a step, on its device."""

    item_BL: Tensor
    positive_B: Tensor
    weight_B: Tensor
    id_keep: Tensor | None
    candidate: Tensor | None
    log_correction: Tensor | None


class DrawnTargets:
    """Every epoch draws some targets of each history, each to be foretold from all that came before it."""

    def __init__(self, config: TowerConfig, data: FitData, targets_per_user: int) -> None:
        self.config, self.data, self.targets_per_user = config, data, targets_per_user
        self.sampler = sampler_of(config, data)
        self.weights = target_weights(config, data)

    def epoch(self, epoch: int) -> Sequence[_Step]:
        rng = rng_for(self.data.seed, 3, epoch)
        histories = self.data.histories
        rows, lengths = histories.rows(), histories.lengths
        begin, user = np.repeat(histories.starts, lengths), np.repeat(np.arange(len(histories)), lengths)
        shuffled = np.lexsort((rng.random(len(rows)), user))
        place = np.arange(len(rows)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        drawn = rng.permutation(shuffled[place < self.targets_per_user])
        cost = np.minimum(rows[drawn] - begin[drawn], self.config.max_length) + 1
        step = (np.cumsum(cost) - 1) // self.config.train.batch_tokens
        parts = np.split(drawn, np.flatnonzero(np.diff(step)) + 1)
        return [_Step(self, rows[part], begin[part], epoch, number) for number, part in enumerate(parts)]


@dataclass(frozen=True)
class _Step:
    plan: DrawnTargets
    target_row: Int64Array
    begin: Int64Array
    """int64: where the history of each target begins in the log"""
    epoch: int
    number: int

    @property
    def weight(self) -> float:
        return float(self.plan.weights[self.target_row].sum(dtype=np.float64))

    @property
    def num_tokens(self) -> int:
        return len(self.target_row)

    def part(self, index: int, num_parts: int, device: torch.device) -> Part:
        """Negatives and hidden IDs are drawn for the step as a whole, so every part has the same ones."""
        config, data, sampler = self.plan.config, self.plan.data, self.plan.sampler
        rng = rng_for(data.seed, 4, self.epoch, self.number)
        order = np.argsort(self.begin - self.target_row, kind="stable")
        counts = index < len(order)
        # A part left empty takes a target that does not count: data-parallel workers must all take part in a step.
        mine = order[index::num_parts] if counts else order[-1:]
        rows = self.target_row[mine]
        before = Histories(data.histories.item_idx, self.begin[mine], rows)

        def tensor(array: NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        hidden = hidden_ids(config, data, rng)
        candidate = log_correction = None
        if config.num_negatives:
            drawn = sampler.draw(config.num_negatives, rng)
            candidate, log_correction = tensor(drawn), tensor(sampler.log_correction(drawn))
        return Part(
            item_BL=tensor(newest_first(before, config.max_length, data.num_items)),
            positive_B=tensor(data.histories.item_idx[rows].astype(np.int64)),
            weight_B=tensor(self.plan.weights[rows] * np.float32(counts)),
            id_keep=None if hidden is None else tensor(hidden),
            candidate=candidate,
            log_correction=log_correction,
        )
