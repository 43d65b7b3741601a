"""What sequence models share: a history becomes one vector per position, and items vectors it is compared with.

A model of this family is a :class:`SequenceConfig` with an encoder of its own (:mod:`.layers.encoder`). Training
foretells every item of a history from what came before it: softmax over sampled or all items, input and output item
vectors tied. Sequences are packed, not padded; a learned start vector stands before the first item and answers the
empty history; item vectors add a projection of the item's text to the ID embedding, so that new items are
retrievable. With ``objective: next_basket`` every item of a basket is foretold from what came before the basket.
``trend_half_lives_days`` lengthens user and item vectors by what is in demand of late (:mod:`.layers.trend`).

Shape legend: B histories, T tokens, D dim, N items, S sampled negatives, F trends, V = D + F.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from recsys.data.histories import Histories
from recsys.errors import EmptyDataError, ModelError, NoTimeError
from recsys.files import read_json, write_json
from recsys.models.base import FitData, Retriever, RetrieverConfig, VectorRetriever
from recsys.models.layers.encoder import Encoder
from recsys.models.layers.items import ItemVectors
from recsys.models.layers.packing import PackedLayout
from recsys.models.layers.trend import Trends, TrendWeights
from recsys.training.checkpoint import load_tensors, save_tensors
from recsys.training.loop import TrainConfig, best_epoch, sample_targets, train, validation_ndcg
from recsys.training.losses import Trend, softmax_loss
from recsys.training.runtime import Runtime
from recsys.training.sampling import (
    NegativeSampler,
    PackedWindows,
    Windows,
    cut_windows,
    first_of_basket,
    plan_epoch,
    recency_weight,
    rng_for,
    split_batch,
    token_weight,
    total_weight,
)


class SequenceConfig(RetrieverConfig, ABC):
    """Hyper-parameters of every sequence model."""

    dim: int = Field(default=64, ge=4, le=4096, description="size of user and item vectors")
    max_length: int = Field(default=100, ge=1, le=65536, description="newest interactions of a history that are read")
    dropout: float = Field(default=0.2, ge=0, lt=1, description="share of activations dropped in training")
    text_hidden_dim: int = Field(
        default=0, ge=0, le=65536, description="hidden size of the text projection; 0 is linear"
    )
    id_dropout: float = Field(
        default=0.2, ge=0, le=1, description="share of items whose ID is hidden in a training step"
    )
    num_negatives: int = Field(
        default=1024, ge=0, le=1 << 22, description="negatives sampled per step; 0 is softmax over all items"
    )
    negative_power: float = Field(
        default=0.5, ge=0, le=1, description="negatives are drawn by count to this power; 0 is uniform"
    )
    objective: Literal["next_item", "next_basket"] = Field(
        default="next_item",
        description="what a history must foretell: the next item, or all items of the user's next moment (needs time)",
    )
    recency_half_life_days: float | None = Field(
        default=None,
        gt=0,
        description="an interaction this many days before the newest weighs half as a target; null weighs all alike",
    )
    trend_half_lives_days: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        default=(),
        max_length=16,
        description="let demand of late speak: per half-life a dimension with each item's faded count (needs time)",
    )
    train: TrainConfig = Field(default=TrainConfig(), description="how long and how fast to train")

    reads_both_ways: ClassVar[bool] = False
    """positions also see what comes after them: then what is asked for must be blank, not read"""
    reads_time: ClassVar[bool] = False
    """the encoder uses the times of the layout, where the data has them"""

    @abstractmethod
    def encoder(self) -> Encoder:
        """A fresh one, its weights drawn from torch's generator."""

    def blanks(self, windows: PackedWindows, rng: np.random.Generator) -> NDArray[np.bool_]:
        """bool [T], for a model that reads both ways: the targets that training hides and asks for."""
        raise NotImplementedError

    def fit(self, data: FitData, runtime: Runtime) -> SequenceRetriever:
        """Train on all positives; with ``data.valid`` the weights of the best epoch are kept."""
        if not data.histories.lengths.sum():
            raise EmptyDataError("there is no positive interaction to train on: check the positives' configuration")
        if self.objective == "next_basket" and data.histories.timestamp_ms is None:
            raise NoTimeError("objective next_basket needs timestamps to tell baskets apart: use next_item")
        plan = _Plan(self, data)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(data.seed)
            network = _Network(self, _has_interactions(data), _text(data), plan.trend_table())
        retriever = SequenceRetriever(self, network, data.num_items)
        valid = None
        if data.valid is not None and len(data.valid):
            valid = sample_targets(data.valid, self.train.eval_max_queries, data.seed)

        def validate() -> float:
            assert valid is not None
            retriever.refresh()
            return validation_ndcg(retriever.score_prefixes, valid, runtime, exclude_seen=self.train.eval_exclude_seen)

        retriever.history = train(
            network,
            plan=plan.epoch,
            validate=None if valid is None else validate,
            config=self.train,
            runtime=runtime,
            seed=data.seed,
            fingerprint=_fingerprint(self, data),
        )
        network.to("cpu")
        retriever.refresh()
        return retriever

    def load(self, folder: Path) -> SequenceRetriever:
        """Read a saved model; the text vectors of the catalogue are not needed for it."""
        tensors = load_tensors(folder / "model.safetensors")
        item_vectors_NV = tensors.pop("item_vectors")
        has_id = tensors["items.has_id"]
        text_dim = tensors["items.text.weight" if "items.text.weight" in tensors else "items.text.0.weight"].shape[1] \
            if any(name.startswith("items.text.") for name in tensors) else 0  # fmt: skip
        num_trends = len(self.trend_half_lives_days)
        network = _Network(
            self,
            has_id,
            torch.zeros(0, text_dim) if text_dim else None,
            torch.zeros(0, num_trends, len(has_id)) if num_trends else None,
        )
        try:
            network.load_state_dict(tensors)
        except RuntimeError as error:
            raise ModelError(f"{folder}: the weights do not fit the configuration: {error}", path=str(folder)) from None
        network.eval()
        retriever = SequenceRetriever(self, network, len(has_id), item_vectors_NV)
        retriever.history = read_json(folder / "history.json")
        return retriever

    def refit(self, fitted: Retriever) -> Self:
        """The same with exactly the number of epochs that was best for ``fitted``."""
        chosen = best_epoch([dict(row) for row in fitted.history])
        if chosen is None:
            return self
        return self.model_copy(update={"train": self.train.model_copy(update={"epochs": chosen})})


class SequenceRetriever(VectorRetriever):
    """A fitted sequence model."""

    def __init__(
        self, config: SequenceConfig, network: _Network, num_items: int, item_vectors_NV: Tensor | None = None
    ) -> None:
        self.config: SequenceConfig = config
        self.num_items = num_items
        self._network = network
        self._items_NV = item_vectors_NV

    def refresh(self) -> None:
        """Forget the cached item vectors, after the network has changed."""
        self._items_NV = None

    def _items(self) -> Tensor:
        if self._items_NV is None:
            with torch.no_grad():
                self._items_NV = self._network.item_vectors().float().clone()
        return self._items_NV

    def item_vectors(self) -> NDArray[np.float32]:
        """float32 [N, V]: ID embedding (where the item has one) plus projected text; then the trends, if any."""
        return self._items().cpu().numpy()

    def item_embeddings(self) -> NDArray[np.float32]:
        """float32 [N, D]: the item vectors without the trends."""
        return self.item_vectors()[:, : self.config.dim]

    def vectors_from_text(self, text_vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [n, V] item vectors of new items from their text vectors, float32 [n, D_text]; no demand so far."""
        if self._network.items.text is None:
            raise ModelError("this model was fitted without text: it has no vectors for new items")
        device = self._items().device
        with torch.inference_mode():
            vectors = self._network.items.from_text(torch.tensor(text_vectors, device=device))
        return np.pad(vectors.cpu().numpy(), [(0, 0), (0, len(self.config.trend_half_lives_days))])

    def encode_users(self, histories: Histories, now_ms: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
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

    def encode_prefixes(self, histories: Histories) -> NDArray[np.float32]:
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

    def score_prefixes(self, histories: Histories, now_ms: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """float32 [B, N]: scores of :meth:`encode_prefixes`, where prefixes can share a pass."""
        if self.config.reads_both_ways or self.config.reads_time:
            return self.score(histories, now_ms)
        return self.encode_prefixes(histories) @ self.item_vectors().T

    def _encode(
        self,
        histories: Histories,
        has_start: NDArray[np.bool_] | None = None,
        now_ms: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
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
        if packed.item_idx.size and not 0 <= packed.item_idx.min() <= packed.item_idx.max() < self.num_items:
            raise ModelError(f"a history holds an item_idx outside 0..{self.num_items - 1}")
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
            if self._network.trend is not None:
                user_TD = torch.cat([user_TD, self._network.trend(user_TD)], dim=1)
            return user_TD.float().cpu().numpy(), lengths

    @property
    def _num_dimensions(self) -> int:
        return self.config.dim + len(self.config.trend_half_lives_days)

    def save_weights(self, folder: Path) -> None:
        """Weights, the finished item vectors, and the learning curve."""
        save_tensors(folder / "model.safetensors", {**self._network.state_dict(), "item_vectors": self._items()})
        write_json(folder / "history.json", list(self.history))


_INFERENCE_TOKENS = 1 << 15


def _token_times(
    item_time: NDArray[np.int64],
    is_item: NDArray[np.bool_],
    lengths: NDArray[np.int64],
    now_ms: NDArray[np.int64] | None,
) -> NDArray[np.int64]:
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


class _Network(nn.Module):
    def __init__(
        self, config: SequenceConfig, has_id: Tensor, text_vectors: Tensor | None, trend_MFN: Tensor | None
    ) -> None:
        super().__init__()
        dim = config.dim
        self.items = ItemVectors(has_id, text_vectors, dim, config.text_hidden_dim)
        self.start = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.encoder = config.encoder()
        self.trend: TrendWeights | None = None
        if trend_MFN is not None:
            self.trend = TrendWeights(dim, len(config.trend_half_lives_days), trend_MFN)

    def item_vectors(self) -> Tensor:
        """[N, V]: all items, at the end of the log."""
        vectors_ND = self.items()
        return vectors_ND if self.trend is None else torch.cat([vectors_ND, self.trend.table_MFN[-1].T], dim=1)

    def encode(self, input_TD: Tensor, is_start_T: Tensor, layout: PackedLayout) -> Tensor:
        """[T, D] item vectors (rows where ``is_start`` are replaced) to [T, D] user vectors, one per position."""
        return self.encoder(torch.where(is_start_T.unsqueeze(-1), self.start, input_TD), layout)

    def forward(self, part: _Part) -> Tensor:
        """The summed weighted loss of a part of a step."""
        if part.candidate is None:
            vectors = self.items(None, part.id_keep)
            input_TD, positive_TD, candidate_CD = vectors[part.input_T], vectors[part.positive_T], vectors
        else:
            asked = (part.input_T, part.positive_T, part.candidate)
            lengths = [len(items) for items in asked]
            unique, place = torch.cat(asked).unique(return_inverse=True)
            input_TD, positive_TD, candidate_CD = self.items(unique, part.id_keep)[place].split(lengths)
        user_TD = self.encode(input_TD, part.is_start_T, part.layout)
        if part.query_T is not None:
            user_TD = user_TD.index_select(0, part.query_T)
        trend = None
        if self.trend is not None:
            assert part.moment_T is not None
            trend = Trend(self.trend(user_TD), part.moment_T, self.trend.table_MFN)
        return softmax_loss(
            user_TD,
            positive_TD.to(user_TD.dtype),
            candidate_CD.to(user_TD.dtype),
            positive_T=part.positive_T,
            weight_T=part.weight_T,
            candidate_C=part.candidate,
            log_correction_C=part.log_correction,
            trend=trend,
        )


@dataclass(frozen=True)
class _Part:
    """One worker's part of a step, on its device."""

    input_T: Tensor
    is_start_T: Tensor
    positive_T: Tensor
    weight_T: Tensor
    layout: PackedLayout
    query_T: Tensor | None
    """int64 [T]: the token whose output must foretell target ``t``; None where that is token ``t`` itself"""
    moment_T: Tensor | None
    """int64 [T]: the moment of each target among those of the trends"""
    id_keep: Tensor | None
    candidate: Tensor | None
    log_correction: Tensor | None


class _Plan:
    """Turns histories into the steps of each epoch."""

    def __init__(self, config: SequenceConfig, data: FitData) -> None:
        self.config, self.data = config, data
        counts = np.bincount(data.histories.pack().item_idx, minlength=data.num_items).astype(np.float64)
        self.sampler = NegativeSampler(counts, config.negative_power)
        self.weights = recency_weight(data.weights, data.histories, config.recency_half_life_days)
        self.running_weight = np.concatenate([np.zeros(1), np.cumsum(self.weights, dtype=np.float64)])
        self.trends: Trends | None = None
        if config.trend_half_lives_days:
            self.trends = Trends.of(data.histories, data.weights, data.num_items, config.trend_half_lives_days)

    def trend_table(self) -> Tensor | None:
        return None if self.trends is None else torch.from_numpy(self.trends.table_MFN)

    def epoch(self, epoch: int) -> Sequence[_Step]:
        rng = rng_for(self.data.seed, 3, epoch)
        windows = cut_windows(self.data.histories, self.config.max_length, rng)
        batches = plan_epoch(windows, self.config.train.batch_tokens, rng)
        return [_Step(self, batch, epoch, step) for step, batch in enumerate(batches)]


@dataclass(frozen=True)
class _Step:
    plan: _Plan
    batch: Windows
    epoch: int
    number: int

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

        id_keep = candidate = log_correction = None
        if config.id_dropout and data.text_vectors is not None:
            id_keep = tensor(rng.random(data.num_items) >= config.id_dropout)
        times = data.histories.timestamp_ms
        input_row, target_row, weight = windows.input_row, windows.target_row, token_weight(windows, self.plan.weights)
        query = moment = layout_times = None
        if config.reads_both_ways:
            blank = config.blanks(windows, rng)
            query = np.flatnonzero(blank)
            input_row = np.where(blank, -1, target_row)
            # What is asked for stands for all: the step's weight is that of every target.
            weight = weight[query] * np.float32(len(target_row) / max(1, len(query)))
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
        return _Part(
            input_T=tensor(log[np.maximum(input_row, 0)].astype(np.int64)),
            is_start_T=tensor(input_row < 0),
            positive_T=tensor(log[target_row].astype(np.int64)),
            weight_T=tensor(weight),
            layout=PackedLayout.of(windows.lengths, layout_times).to(device),
            query_T=None if query is None else tensor(query),
            moment_T=moment,
            id_keep=id_keep,
            candidate=candidate,
            log_correction=log_correction,
        )


def _has_interactions(data: FitData) -> Tensor:
    return torch.from_numpy(np.bincount(data.histories.pack().item_idx, minlength=data.num_items) > 0)


def _text(data: FitData) -> Tensor | None:
    if data.text_vectors is None:
        return None
    if len(data.text_vectors) != data.num_items:
        raise ModelError(f"{len(data.text_vectors)} text vectors for {data.num_items} items: embed the items again")
    finite = np.isfinite(data.text_vectors).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise ModelError(f"the text vector of item_idx {row} is not finite: embed the items again", item_idx=row)
    return torch.tensor(data.text_vectors, dtype=torch.float32)


def _fingerprint(config: SequenceConfig, data: FitData) -> str:
    parts: Mapping[str, object] = {
        "config": config.content_hash(),
        "seed": data.seed,
        "validated": data.valid is not None,
        "rows": int(data.histories.lengths.sum()),
        "items": data.num_items,
    }
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()
