"""How much in demand each item was at a moment: interaction counts that fade with several half-lives.

What sells now is not what sold last month, and a model whose item vectors stand still cannot know. Each half-life
gives every item one more dimension, ``log(1 + faded count)``, and each user vector a weight for it, so the score stays
an inner product. In training a target is weighed against the counts as they were before it, never as they became;
the fitted model holds those of the end of the log.

Shape legend: M moments, N items, F half-lives, T tokens, D dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from recsys.data.histories import Histories
from recsys.errors import ModelError, NoTimeError
from recsys.schema import DAY_MS
from recsys.types import FloatArray, Int64Array

_MAX_ELEMENTS = 1 << 28
"""1 GiB of float32"""


@dataclass(frozen=True)
class Trends:
    """The counts at equally spaced moments, half of the shortest half-life apart."""

    table_MFN: FloatArray
    """float32, ``log(1 + faded count)``: at moment ``m`` of what came before it; the last is the end of the log"""
    origin_ms: int
    spacing_ms: int

    @classmethod
    def of(cls, histories: Histories, weights: FloatArray, num_items: int, half_lives_days: Sequence[float]) -> Trends:
        """Count what ``histories`` hold, each row of their log by its weight (float32 [R]).

        :raises NoTimeError: when the data has order only.
        :raises ModelError: when the counts of all moments would not fit into memory.
        """
        if histories.timestamp_ms is None:
            raise NoTimeError("trend_half_lives_days needs timestamps, and this data has order only: leave it empty")
        rows = histories.rows()
        times = histories.timestamp_ms[rows]
        spacing_ms = max(1, round(min(half_lives_days) / 2 * DAY_MS))
        origin_ms = int(times.min())
        moment = (times - origin_ms) // spacing_ms
        num_moments = int(moment.max()) + 2
        num_elements = num_moments * len(half_lives_days) * num_items
        if num_elements > _MAX_ELEMENTS:
            raise ModelError(
                f"trends of {num_items} items at {num_moments} moments need {4 * num_elements / 2**30:.1f} GiB: "
                "give trend_half_lives_days a longer shortest half-life",
                num_elements=num_elements,
            )
        fade_F1 = np.exp2(-spacing_ms / DAY_MS / np.asarray(half_lives_days, np.float64))[:, None]
        counted_FN = np.zeros((len(half_lives_days), num_items))
        table_MFN = np.empty((num_moments, *counted_FN.shape), np.float32)
        order = np.argsort(moment, kind="stable")
        borders = np.searchsorted(moment[order], np.arange(num_moments + 1))
        items, amounts = histories.item_idx[rows][order], weights[rows][order]
        for m in range(num_moments):
            table_MFN[m] = np.log1p(counted_FN)
            during = slice(borders[m], borders[m + 1])
            # What happens between two moments has faded when the next one comes, by the whole stretch.
            counted_FN = (counted_FN + np.bincount(items[during], amounts[during], num_items)) * fade_F1
        return cls(table_MFN, origin_ms, spacing_ms)

    def moment(self, timestamp_ms: Int64Array) -> Int64Array:
        """int64: the newest moment that is not after each time of the log."""
        return (timestamp_ms - self.origin_ms) // self.spacing_ms


class TrendWeights(nn.Module):
    """How much each half-life counts for a user: a linear map of the user vector, zero before training."""

    table_MFN: Tensor

    def __init__(self, dim: int, num_half_lives: int, table_MFN: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, num_half_lives)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.register_buffer("table_MFN", table_MFN, persistent=False)

    def forward(self, user_TD: Tensor) -> Tensor:
        """[T, D] to [T, F]."""
        return self.linear(user_TD)
