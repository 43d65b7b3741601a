"""What sequence models share: a history becomes one vector per position, and items vectors it is compared with.

A model of this family is a :class:`SequenceConfig` with an encoder of its own (:mod:`recsys.models.layers.encoder`).
Training foretells every item of a history from what came before it; input and output item vectors are tied. Sequences
are packed, not padded; a learned start vector stands before the first item and answers the empty history. With
``objective: next_basket`` every item of a basket is foretold from what came before the basket.
``trend_half_lives_days`` lengthens user and item vectors by recent demand (:mod:`recsys.models.layers.trend`), and
``habit_half_lives_days`` the scores of the items that the user knows by how often they came back to them
(:mod:`recsys.models.layers.habit`).

Shape legend: B histories, T tokens, D dim, N items, S sampled negatives, F half-lives, V = D and both kinds of F: user
vectors end with the weights of habits, where item vectors have zeros.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from recsys.data.histories import Histories
from recsys.errors import NoTimeError
from recsys.models.base import FitData, ItemBonus, Retriever, UpdateConfig, check_items
from recsys.models.layers.encoder import Encoder
from recsys.models.layers.habit import Habits, PastOfTargets
from recsys.models.layers.items import ItemTower
from recsys.models.layers.packing import PackedLayout
from recsys.models.layers.trend import Trends, TrendWeights
from recsys.models.retrievers.towers.base import (
    SAMPLE_TRAIN,
    NetworkRetriever,
    Plan,
    TowerConfig,
    TowerNetwork,
    TowerRetriever,
    hidden_ids,
    sampler_of,
    target_weights,
)
from recsys.training.losses import Habit, Trend, softmax_loss
from recsys.training.runtime import Runtime
from recsys.training.sampling import (
    PackedWindows,
    Windows,
    cut_windows,
    first_of_basket,
    plan_epoch,
    rng_for,
    split_batch,
    token_weight,
    total_weight,
)
from recsys.types import BoolArray, Float64Array, FloatArray, Int64Array

_SMALL: Mapping[str, Any] = {
    "dim": 16,
    "num_blocks": 1,
    "hidden_dim": 16,
    "max_length": 10,
    "dropout": 0.1,
    "num_negatives": 0,
    "train": SAMPLE_TRAIN,
}
"""what a sample sets of the fields that its model has"""


class SequenceConfig(TowerConfig, ABC):
    """Hyper-parameters of every sequence model."""

    objective: Literal["next_item", "next_basket"] = Field(
        default="next_item",
        description="what a history must foretell: the next item, or all items of the user's next moment (needs time)",
    )
    trend_half_lives_days: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(),
        max_length=16,
        description="let demand of late speak: per half-life a dimension with each item's faded count (needs time)",
    )
    habit_half_lives_days: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(),
        max_length=16,
        description="where users come back to the same: per half-life, how often they did adds to a score (needs time)",
    )
    item_mask_share: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="augmentation: share of the read interactions that an epoch blanks out (CL4SRec, arXiv 2010.14395)",
    )

    reads_both_ways: ClassVar[bool] = False
    """positions also see what comes after them: then what is asked for must be blank, not read"""
    reads_time: ClassVar[bool] = False
    """the encoder uses the times of the layout, where the data has them"""
    sample_epochs: ClassVar[int] = 6
    """in which the sample learns that an item follows from the one before it alone"""

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls(**{name: value for name, value in _SMALL.items() if name in cls.model_fields})

    @abstractmethod
    def encoder(self) -> Encoder:
        """A fresh one, its weights drawn from torch's generator."""

    def blanks(self, windows: PackedWindows, chance: Float64Array) -> BoolArray:
        """bool [T], for a model that reads both ways: the targets that training hides and asks for.

        ``chance``: float64 [R], uniform in [0, 1), one of each row of the log.
        """
        raise NotImplementedError

    def plan(self, data: FitData) -> SequencePlan:
        return SequencePlan(self, data)

    def network(self, items: ItemTower, plan: Plan | None) -> SequenceNetwork:
        trend_MFN: Tensor | None = None
        if self.trend_half_lives_days:
            num_items, num_trends = items.num_items, len(self.trend_half_lives_days)
            trends = plan.trends if isinstance(plan, SequencePlan) else None
            trend_MFN = torch.zeros(0, num_trends, num_items) if trends is None else torch.from_numpy(trends.table_MFN)
        return SequenceNetwork(self, items, trend_MFN)

    def update(self, fitted: Retriever, data: FitData, runtime: Runtime, how: UpdateConfig) -> NetworkRetriever:
        """Continue with the lesson of ``data``."""
        return self.continued(fitted, data, runtime, how)

    def retriever(
        self, network: TowerNetwork, num_items: int, item_vectors_NV: Tensor | None = None
    ) -> SequenceRetriever:
        assert isinstance(network, SequenceNetwork)
        return SequenceRetriever(self, network, num_items, item_vectors_NV)


class AttentionConfig(SequenceConfig, ABC):
    """Hyper-parameters of every sequence model whose encoder is a stack of attention blocks."""

    num_blocks: int = Field(default=2, ge=1, le=64, description="attention blocks")
    num_heads: int = Field(default=2, ge=1, le=64, description="attention heads; divides dim")

    head_dim_multiple: ClassVar[int] = 1
    """what the dimensions of one head must be a multiple of"""

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> Self:
        if self.dim % (self.head_dim_multiple * self.num_heads):
            times = f"{self.head_dim_multiple} * " if self.head_dim_multiple > 1 else ""
            raise ValueError(f"dim ({self.dim}) must be a multiple of {times}num_heads ({self.num_heads})")
        return self


class SequenceRetriever(TowerRetriever):
    """A fitted sequence model."""

    def __init__(
        self, config: SequenceConfig, network: SequenceNetwork, num_items: int, item_vectors_NV: Tensor | None = None
    ) -> None:
        super().__init__(config, network, num_items, item_vectors_NV)
        self.config: SequenceConfig = config
        self._network: SequenceNetwork = network

    @property
    def reads_clock(self) -> bool:
        return self.config.reads_time

    def encode_users(self, histories: Histories, now_ms: Int64Array | None = None) -> FloatArray:
        """float32 [B, 1, V]: the last position's output; the start vector's for an empty history."""
        packed_lengths = np.minimum(histories.lengths + 1, self.config.max_length)
        users = np.empty((len(histories), 1, self._num_dimensions), np.float32)
        # Histories of like length share a pass; a pass is bounded so that a million users need no more memory.
        order = np.argsort(packed_lengths, kind="stable")
        passes = np.cumsum(packed_lengths[order]) // _INFERENCE_TOKENS
        for rows in np.split(order, np.flatnonzero(np.diff(passes)) + 1):
            if len(rows):
                output, lengths = self._encode(histories[rows], now_ms=None if now_ms is None else now_ms[rows])
                users[rows, 0] = output[np.cumsum(lengths) - 1]
        return users

    def encode_prefixes(self, histories: Histories) -> FloatArray:
        """float32 [B, V], for validation: histories that begin at one row of the log share their passes.

        Rolling evaluation asks for every prefix of a user's log. A prefix is read from a stretch of ``max_length``
        tokens that it shares with the prefixes near it, so it sees its newest ``max_length / 2`` interactions or
        more, where :meth:`encode_users` reads ``max_length`` for each: the same for short histories, close to it for
        long ones, at two tokens per prefix.
        """
        half = max(1, self.config.max_length // 2)
        block = np.stack([histories.starts, (histories.stops - histories.starts) // half], axis=1)
        stretches, inverse = np.unique(block, axis=0, return_inverse=True)
        starts, inverse = stretches[:, 0], inverse.ravel()
        begins = starts + np.maximum(stretches[:, 1] - 1, 0) * half
        ends = np.zeros_like(begins)
        np.maximum.at(ends, inverse, histories.stops)
        users = np.empty((len(histories), self._num_dimensions), np.float32)
        passes = np.cumsum(ends - begins + 1) // _INFERENCE_TOKENS
        for rows in np.split(np.arange(len(begins)), np.flatnonzero(np.diff(passes)) + 1):
            views = Histories(histories.item_idx, begins[rows], ends[rows])
            output, lengths = self._encode(views, has_start=begins[rows] == starts[rows])
            place = (np.cumsum(lengths) - lengths) + (begins[rows] == starts[rows]) - begins[rows] - 1
            mine = np.flatnonzero((inverse >= rows[0]) & (inverse <= rows[-1]))
            users[mine] = output[place[inverse[mine] - rows[0]] + histories.stops[mine]]
        return users

    def score_for_validation(self, histories: Histories, now_ms: Int64Array | None = None) -> FloatArray:
        """float32 [B, N]: scores of :meth:`encode_prefixes`, where prefixes can share a pass."""
        if self.config.reads_both_ways or self.config.reads_time or self.config.max_length == 1:
            return self.score(histories, now_ms)
        users_BV = self.encode_prefixes(histories)
        scores_BN = users_BV @ self.item_vectors().T
        bonus = self.bonus(histories, users_BV[:, None], now_ms)
        if bonus is not None:
            bonus.add_to(scores_BN)
        return scores_BN

    def _encode(
        self,
        histories: Histories,
        has_start: BoolArray | None = None,
        now_ms: Int64Array | None = None,
    ) -> tuple[FloatArray, Int64Array]:
        """User vectors [T, V] at every token, and the number of tokens of each history (its blank included)."""
        both_ways = self.config.reads_both_ways
        if both_ways:
            histories = histories.last(self.config.max_length - 1)
            has_start = np.ones(len(histories), bool)
        elif has_start is None:
            has_start = histories.lengths < self.config.max_length
            histories = histories.last(self.config.max_length)
        lengths = histories.lengths + has_start
        packed = histories.pack()
        check_items(packed.item_idx, self.num_items)
        is_item = np.ones(lengths.sum(), bool)
        ends = np.cumsum(lengths)
        # The blank stands before the first item, or, where it is asked for, after the last.
        is_item[ends - 1 if both_ways else (ends - lengths)[has_start]] = False
        item_T = np.full(len(is_item), -1, np.int64)
        item_T[is_item] = packed.item_idx
        items_ND = self._items()[:, : self.config.dim]
        device = items_ND.device
        times = None
        if self.config.reads_time and packed.timestamp_ms is not None:
            times = _token_times(packed.timestamp_ms, is_item, lengths, now_ms)
        layout = PackedLayout.of(lengths, times).to(device)
        with torch.inference_mode():
            token_T = torch.from_numpy(item_T).to(device)
            user_TD = self._network.encode(items_ND[token_T.clamp(min=0)], token_T < 0, layout)
            weights = [part(user_TD) for part in (self._network.trend, self._network.habit) if part is not None]
            return torch.cat([user_TD, *weights], dim=1).float().cpu().numpy(), lengths

    def bonus(self, histories: Histories, users_BKD: FloatArray, now_ms: Int64Array | None = None) -> ItemBonus | None:
        """What the user's habits add to the scores of the items of the history."""
        half_lives = self.config.habit_half_lives_days
        if not half_lives:
            return None
        habits = Habits.of(histories, now_ms, half_lives, self.num_items)
        weight_EF = np.repeat(users_BKD[:, 0, -len(half_lives) :], np.diff(habits.offsets), axis=0)
        return ItemBonus(habits.item_idx, habits.offsets, (weight_EF * habits.count_EF).sum(axis=1))

    @property
    def _num_dimensions(self) -> int:
        return self.config.dim + len(self.config.trend_half_lives_days) + len(self.config.habit_half_lives_days)


_INFERENCE_TOKENS = 1 << 15


def _token_times(
    item_time: Int64Array,
    is_item: BoolArray,
    lengths: Int64Array,
    now_ms: Int64Array | None,
) -> Int64Array:
    """int64 [T, 2]: a token answers when the next one happens; the last at ``now_ms``, or at once without it.

    A start is read when its first item happens, and where there is none, now.
    """
    ends = np.cumsum(lengths)
    read = np.zeros(len(is_item), np.int64)
    read[is_item] = item_time
    last = read[ends - 1] if now_ms is None else now_ms
    asked = np.append(read[1:], 0)
    asked[ends - 1] = last
    read[~is_item] = asked[~is_item]
    return np.stack([read, asked], axis=1)


class SequenceNetwork(TowerNetwork):
    """Reads packed sequences with the encoder of ``config``."""

    def __init__(self, config: SequenceConfig, items: ItemTower, trend_MFN: Tensor | None) -> None:
        super().__init__(items)
        dim = config.dim
        self.start = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.encoder = config.encoder()
        self.trend: TrendWeights | None = None
        if trend_MFN is not None:
            self.trend = TrendWeights(dim, len(config.trend_half_lives_days), trend_MFN)
        self.habit: nn.Linear | None = None
        if config.habit_half_lives_days:
            self.habit = nn.Linear(dim, len(config.habit_half_lives_days))
            nn.init.zeros_(self.habit.weight)
            nn.init.zeros_(self.habit.bias)

    def item_vectors(self) -> Tensor:
        """[N, V]: all items, at the end of the log."""
        vectors_NV = self.items()
        if self.trend is not None:
            vectors_NV = torch.cat([vectors_NV, self.trend.table_MFN[-1].T], dim=1)
        return vectors_NV if self.habit is None else nn.functional.pad(vectors_NV, (0, self.habit.out_features))

    def encode(self, input_TD: Tensor, is_start_T: Tensor, layout: PackedLayout) -> Tensor:
        """[T, D] item vectors (rows where ``is_start`` are replaced) to [T, D] user vectors, one per position."""
        return self.encoder(torch.where(is_start_T.unsqueeze(-1), self.start, input_TD), layout)

    def forward(self, part: _Part) -> Tensor:
        """The summed weighted loss of a part of a step."""
        input_TD, positive_TD, candidate_CD = self.look_up(part.input_T, part.positive_T, part.candidate, part.id_keep)
        if part.shown_T is not None:
            input_TD = input_TD * part.shown_T.unsqueeze(-1)
        user_TD = self.encode(input_TD, part.is_start_T, part.layout)
        if part.query_T is not None:
            user_TD = user_TD.index_select(0, part.query_T)
        trend = None
        if self.trend is not None:
            assert part.moment_T is not None
            trend = Trend(self.trend(user_TD), part.moment_T, self.trend.table_MFN)
        habit = None
        if self.habit is not None:
            assert part.habit is not None
            habit = Habit(self.habit(user_TD), *part.habit)
        return softmax_loss(
            user_TD,
            positive_TD.to(user_TD.dtype),
            candidate_CD.to(user_TD.dtype),
            positive_T=part.positive_T,
            weight_T=part.weight_T,
            candidate_C=part.candidate,
            log_correction_C=self.correction(part.log_correction),
            trend=trend,
            habit=habit,
        )


@dataclass(frozen=True)
class _Part:
    """One worker's part of a step, on its device."""

    input_T: Tensor
    shown_T: Tensor | None
    """bool [T]: False where what was read is blanked out; None where nothing is"""
    is_start_T: Tensor
    positive_T: Tensor
    weight_T: Tensor
    layout: PackedLayout
    query_T: Tensor | None
    """int64 [T]: the token whose output must foretell target ``t``; None where that is token ``t`` itself"""
    moment_T: Tensor | None
    """int64 [T]: the moment of each target among those of the trends"""
    habit: tuple[Tensor, ...] | None
    """the fields of :class:`recsys.training.losses.Habit` after the weights"""
    id_keep: Tensor | None
    candidate: Tensor | None
    log_correction: Tensor | None


class SequencePlan:
    """Turns histories into the steps of each epoch: windows of targets, each foretold from what came before it."""

    def __init__(self, config: SequenceConfig, data: FitData) -> None:
        self.config, self.data = config, data
        if config.objective == "next_basket" and data.histories.timestamp_ms is None:
            raise NoTimeError("objective next_basket needs timestamps to tell baskets apart: use next_item")
        self.sampler = sampler_of(config, data)
        self.weights = target_weights(config, data)
        if data.lesson is not None:
            self.weights = self.weights * data.lesson.weight
        self.running_weight = np.concatenate([np.zeros(1), np.cumsum(self.weights, dtype=np.float64)])
        self.trends: Trends | None = None
        if config.trend_half_lives_days:
            self.trends = Trends.of(data.histories, data.weights, data.num_items, config.trend_half_lives_days)
        self.past: PastOfTargets | None = None
        if config.habit_half_lives_days:
            self.past = PastOfTargets.of(data.histories, by_basket=config.objective == "next_basket")

    def epoch(self, epoch: int) -> Sequence[_Step]:
        rng = rng_for(self.data.seed, 3, epoch)
        lesson = self.data.lesson
        if lesson is None:
            windows = cut_windows(self.data.histories, self.config.max_length, rng)
        else:
            windows = cut_windows(lesson.histories, self.config.max_length, rng, lesson.heads)
        batches = plan_epoch(windows, self.config.train.batch_tokens, rng)
        shown = None
        if self.config.item_mask_share:
            shown = rng_for(self.data.seed, 5, epoch).random(len(self.weights)) >= self.config.item_mask_share
        chance = rng_for(self.data.seed, 6, epoch).random(len(self.weights)) if self.config.reads_both_ways else None
        return [_Step(self, batch, epoch, step, shown, chance) for step, batch in enumerate(batches)]


@dataclass(frozen=True)
class _Step:
    plan: SequencePlan
    batch: Windows
    epoch: int
    number: int
    shown: BoolArray | None
    """bool [R]: the rows of the log that this epoch shows"""
    chance: Float64Array | None
    """float64 [R]: what decides which rows are blank"""

    @property
    def weight(self) -> float:
        return total_weight(self.batch, self.plan.running_weight)

    @property
    def num_tokens(self) -> int:
        return int(self.batch.lengths.sum())

    def part(self, index: int, num_parts: int, device: torch.device) -> _Part:
        """Negatives and hidden IDs are drawn for the step as a whole, so every part has the same ones."""
        config, data, sampler = self.plan.config, self.plan.data, self.plan.sampler
        rng = rng_for(data.seed, 4, self.epoch, self.number)
        windows = split_batch(self.batch, num_parts)[index]
        log = data.histories.item_idx

        def tensor(array: NDArray[np.generic]) -> Tensor:
            return torch.from_numpy(array).to(device, non_blocking=True)

        candidate = log_correction = drawn = None
        hidden = hidden_ids(config, data, rng)
        times = data.histories.timestamp_ms
        input_row, target_row, weight = windows.input_row, windows.target_row, token_weight(windows, self.plan.weights)
        query = moment = layout_times = None
        if config.reads_both_ways:
            assert self.chance is not None
            blank = config.blanks(windows, self.chance)
            query = np.flatnonzero(blank)
            input_row = np.where(blank, -1, target_row)
            # What is asked for stands for all: the step's weight is that of every target.
            (whole,) = split_batch(self.batch, 1)
            weight = weight[query] * np.float32(len(whole.target_row) / config.blanks(whole, self.chance).sum())
            target_row = target_row[query]
        elif config.objective == "next_basket":
            assert times is not None
            query = first_of_basket(windows, times)
        if self.plan.trends is not None:
            assert times is not None
            moment = tensor(self.plan.trends.moment(times[target_row]))
        if config.reads_time and times is not None:
            asked = times[windows.target_row]
            layout_times = np.stack([np.where(input_row < 0, asked, times[np.maximum(input_row, 0)]), asked], axis=1)
        if config.num_negatives:
            drawn = sampler.draw(config.num_negatives, rng)
            candidate, log_correction = tensor(drawn), tensor(sampler.log_correction(drawn))
        habit = None
        if self.plan.past is not None:
            habits, query_T = self.plan.past.habits(target_row, config.habit_half_lives_days, data.num_items)
            positive_TF = habits.count(query_T, log[target_row].astype(np.int64), data.num_items)
            if drawn is not None:
                habits = habits.among(drawn)
            candidates = habits.item_idx.astype(np.int64)
            habit = tuple(map(tensor, (positive_TF, query_T, habits.offsets, candidates, habits.count_EF)))
        return _Part(
            input_T=tensor(log[np.maximum(input_row, 0)].astype(np.int64)),
            shown_T=None if self.shown is None else tensor(self.shown[np.maximum(input_row, 0)]),
            is_start_T=tensor(input_row < 0),
            positive_T=tensor(log[target_row].astype(np.int64)),
            weight_T=tensor(weight),
            layout=PackedLayout.of(windows.lengths, layout_times).to(device),
            query_T=None if query is None else tensor(query),
            moment_T=moment,
            habit=habit,
            id_keep=None if hidden is None else tensor(hidden),
            candidate=candidate,
            log_correction=log_correction,
        )
