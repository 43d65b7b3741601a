"""User vectors and item vectors that are trained for each other: what all models of this kind share.

A model is a :class:`TowerConfig` with a plan of training steps and a network that makes user vectors from histories and
item vectors from what is known of the items; for most the score is their inner product, and the loss softmax over
sampled or all items. The usual item tower adds a projection of the item's text to the ID embedding, so that new items
are retrievable.

Shape legend: B histories, T targets, D dim, N items, V length of the vectors that are compared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, Self

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.data.histories import Histories
from recsys.errors import EmptyDataError, ModelError
from recsys.files import fingerprint, read_json, write_json
from recsys.models.base import FitData, Retriever, RetrieverConfig, UpdateConfig, VectorRetriever
from recsys.models.layers.items import ItemTower, ItemVectors
from recsys.training.checkpoint import load_tensors, save_tensors
from recsys.training.loop import Step, TrainConfig, best_epoch, sample_targets, train, validation_ndcg
from recsys.training.runtime import Runtime
from recsys.training.sampling import NegativeSampler, recency_weight
from recsys.types import BoolArray, FloatArray, Int64Array

SAMPLE_TRAIN = TrainConfig(epochs=6, batch_tokens=64, learning_rate=1e-2, warmup_steps=5, patience=6)
"""how samples are trained"""
_VERSION = 2
"""raised when what is trained changes, so that a checkpoint of before is not gone on from"""


class Plan(Protocol):
    """What a training consists of."""

    def epoch(self, epoch: int) -> Sequence[Step]:
        """The steps of an epoch (numbered from 0)."""
        ...


class TowerNetwork(nn.Module, ABC):
    """Items, and whatever makes user vectors; ``forward(part)`` is the summed weighted loss of a part of a step."""

    unmet_N: Tensor | None
    """float [N]: 0, and -inf for items that training has not met; None where there are none"""

    def __init__(self, items: ItemTower) -> None:
        super().__init__()
        self.items = items
        self.register_buffer("unmet_N", None, persistent=False)

    def look_up(
        self, input_T: Tensor, positive_P: Tensor, candidate_C: Tensor | None, id_keep: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors [T, D], [P, D] and [C, D] of the items (int64) read, to be found, and to be told from them.

        ``candidate_C`` None is all items; ``id_keep`` is as for :class:`recsys.models.layers.items.ItemTower`.
        """
        if candidate_C is None:
            vectors_ND = self.items(None, id_keep)
            return vectors_ND[input_T], vectors_ND[positive_P], vectors_ND
        asked = (input_T, positive_P, candidate_C)
        unique, place = torch.cat(asked).unique(return_inverse=True)
        input_TD, positive_PD, candidate_CD = self.items(unique, id_keep)[place].split([len(items) for items in asked])
        return input_TD, positive_PD, candidate_CD

    def leave_out_unmet(self) -> None:
        """Where all items are candidates, those that training has not met count no more.

        That nobody took what nobody could take says nothing of what it is like, and would teach the text projection
        that its like is wanted by nobody. Items known by their IDs alone all count as met. Drawn candidates are met
        ones already (:func:`sampler_of`).
        """
        met_N = self.items.has_id
        all_met = bool(met_N.all())
        self.unmet_N = None if all_met else torch.zeros(len(met_N)).masked_fill(~met_N, -torch.inf)

    def correction(self, log_correction_C: Tensor | None) -> Tensor | None:
        """float [C], added to the logits of candidates: as given for drawn ones, ``unmet_N`` for all items."""
        return self.unmet_N if log_correction_C is None else log_correction_C

    def item_vectors(self) -> Tensor:
        """[N, V]: all items."""
        return self.items()


class TowerConfig(RetrieverConfig, ABC):
    """Hyper-parameters of every such model."""

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
    recency_half_life_days: float | None = Field(
        default=None,
        gt=0,
        description="an interaction this many days before the newest weighs half as a target; null weighs all alike",
    )
    train: TrainConfig = Field(default=TrainConfig(), description="how long and how fast to train")

    def items(self, data: FitData) -> ItemTower:
        """A fresh item tower, its weights drawn from torch's generator."""
        return ItemVectors(has_interactions(data), text_of(data), self.dim, self.text_hidden_dim)

    def saved_items(self, tensors: Mapping[str, Tensor]) -> ItemTower:
        """An item tower that saved weights (their names begin with ``items.``) fit into."""
        return saved_id_and_text(tensors, self.dim, self.text_hidden_dim)

    @abstractmethod
    def plan(self, data: FitData) -> Plan:
        """The training steps."""

    @abstractmethod
    def network(self, items: ItemTower, plan: Plan | None) -> TowerNetwork:
        """A fresh one, its weights drawn from torch's generator; without a plan for weights that are read."""

    @abstractmethod
    def retriever(
        self, network: TowerNetwork, num_items: int, item_vectors_NV: Tensor | None = None
    ) -> NetworkRetriever:
        """What scores with ``network``."""

    def fit(self, data: FitData, runtime: Runtime) -> NetworkRetriever:
        """Train on all positives; with ``data.valid`` the weights of the best epoch are kept."""
        if not data.histories.lengths.sum():
            raise EmptyDataError("there is no positive interaction to train on: check the positives' configuration")
        plan, network = self._begun(data)
        return self._trained(network, plan, data, runtime, self.train)

    def continued(self, fitted: Retriever, data: FitData, runtime: Runtime, how: UpdateConfig) -> NetworkRetriever:
        """Train on from the weights of ``fitted``; new items begin as what stands in for them, or as what they say."""
        assert isinstance(fitted, NetworkRetriever)
        plan, network = self._begun(data)
        known = dict(fitted.network.named_parameters())
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                _continue(name, known[name], parameter, data)
            # Histories are cut, but who was learned once is known.
            met = fitted.network.items.has_id
            network.items.has_id[: len(met)] |= met
        train_config = self.train.model_copy(
            update={"epochs": how.epochs, "learning_rate": self.train.learning_rate * how.rate, "warmup_steps": 5}
        )
        return self._trained(network, plan, replace(data, valid=None), runtime, train_config)

    def _begun(self, data: FitData) -> tuple[Plan, TowerNetwork]:
        plan = self.plan(data)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(data.seed)
            return plan, self.network(self.items(data), plan)

    def _trained(
        self, network: TowerNetwork, plan: Plan, data: FitData, runtime: Runtime, how: TrainConfig
    ) -> NetworkRetriever:
        network.leave_out_unmet()
        retriever = self.retriever(network, data.num_items)
        valid = None
        if data.valid is not None and len(data.valid):
            valid = sample_targets(data.valid, self.train.eval_max_queries, data.seed)

        def validate() -> float:
            assert valid is not None
            retriever.refresh()
            score, exclude_seen = retriever.score_for_validation, self.train.eval_exclude_seen
            return validation_ndcg(score, valid, runtime, num_items=data.num_items, exclude_seen=exclude_seen)

        retriever.history = train(
            network,
            plan=plan.epoch,
            validate=None if valid is None else validate,
            config=how,
            runtime=runtime,
            seed=data.seed,
            fingerprint=_fingerprint(self, data, how),
        )
        network.to("cpu")
        retriever.refresh()
        return retriever

    def load(self, folder: Path) -> NetworkRetriever:
        """Read a saved model; the text vectors of the catalogue are not needed for it."""
        tensors = load_tensors(folder / "model.safetensors")
        item_vectors_NV = tensors.pop("item_vectors")
        network = self.network(self.saved_items(tensors), None)
        try:
            # What is as long as the catalogue stays where it is mapped, and replicas on a machine share it. What is
            # multiplied by is copied: in a file it lies at any address, which costs time and the last digit.
            weights = {name: value if name.startswith("items.") else value.clone() for name, value in tensors.items()}
            network.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise ModelError(f"{folder}: the weights do not fit the configuration: {error}", path=str(folder)) from None
        network.eval()
        retriever = self.retriever(network, network.items.num_items, item_vectors_NV)
        retriever.history = read_json(folder / "history.json")
        return retriever

    def refit(self, fitted: Retriever) -> Self:
        """The same with exactly the number of epochs that was best for ``fitted``."""
        chosen = best_epoch([dict(row) for row in fitted.history])
        if chosen is None:
            return self
        return self.model_copy(update={"train": self.train.model_copy(update={"epochs": chosen})})


class NetworkRetriever(Retriever):
    """A fitted :class:`TowerConfig`."""

    def __init__(
        self, config: TowerConfig, network: TowerNetwork, num_items: int, item_vectors_NV: Tensor | None = None
    ) -> None:
        self.config: TowerConfig = config
        self.num_items = num_items
        self._network = network
        self._items_NV = item_vectors_NV

    @property
    def network(self) -> TowerNetwork:
        """The weights."""
        return self._network

    def refresh(self) -> None:
        """Forget the cached item vectors, after the network has changed."""
        self._items_NV = None

    def _items(self) -> Tensor:
        if self._items_NV is None:
            with torch.no_grad():
                self._items_NV = self._network.item_vectors().float().clone()
        return self._items_NV

    def score_for_validation(self, histories: Histories, now_ms: Int64Array | None = None) -> FloatArray:
        """float32 [B, N]: what :meth:`score` says, or what is close to it and sooner there."""
        return self.score(histories, now_ms)

    def save_weights(self, folder: Path) -> None:
        """Weights, the finished item vectors, and the learning curve."""
        save_tensors(folder / "model.safetensors", {**self._network.state_dict(), "item_vectors": self._items()})
        write_json(folder / "history.json", list(self.history))


class TowerRetriever(NetworkRetriever, VectorRetriever):
    """One whose score is the inner product of a user vector and an item vector."""

    def item_vectors(self) -> FloatArray:
        """float32 [N, V]: what the item tower says; then the trends, if any."""
        return self._items().cpu().numpy()

    def item_embeddings(self) -> FloatArray:
        """float32 [N, D]: the item vectors without what was added to them."""
        return self.item_vectors()[:, : self.config.dim]


def _continue(name: str, before: Tensor, parameter: Tensor, data: FitData) -> None:
    """Write weights of before into ``parameter``, which may have more rows: those of new items."""
    if before.shape == parameter.shape:
        parameter.copy_(before)
        return
    num_known = len(before)
    if before.shape[1:] != parameter.shape[1:] or len(parameter) != data.num_items or num_known > data.num_items:
        raise ModelError(f"{name} of shape {tuple(before.shape)} does not continue as {tuple(parameter.shape)}")
    parameter[:num_known] = before
    stand_ins = None if data.lesson is None else data.lesson.stand_ins
    if stand_ins is not None and data.text_vectors is None:
        values = before.numpy(force=True)
        new = stand_ins.vectors(values, values.shape[1]) if values.ndim == 2 else stand_ins.mean(values)
        parameter[num_known:] = torch.from_numpy(new).to(parameter.device)


def saved_id_and_text(tensors: Mapping[str, Tensor], dim: int, text_hidden_dim: int) -> ItemVectors:
    """The usual item tower, such that saved weights fit into it; without its texts, which item vectors stand for."""
    first = tensors.get("items.text.weight", tensors.get("items.text.0.weight"))
    text = None if first is None else torch.zeros(0, first.shape[1])
    return ItemVectors(tensors["items.has_id"], text, dim, text_hidden_dim)


def sampler_of(config: TowerConfig, data: FitData) -> NegativeSampler:
    """Draws negatives by how often items were interacted with; with texts, of the items that were."""
    counts = np.bincount(data.histories.pack().item_idx, minlength=data.num_items).astype(np.float64)
    return NegativeSampler(counts, config.negative_power, None if data.text_vectors is None else counts > 0)


def target_weights(config: TowerConfig, data: FitData) -> FloatArray:
    """float32 [R]: the weight of each row of the log as a target."""
    return recency_weight(data.weights, data.histories, config.recency_half_life_days)


def hidden_ids(config: TowerConfig, data: FitData, rng: np.random.Generator) -> BoolArray | None:
    """bool [N]: False for items whose ID is hidden in a step, where that is asked for."""
    if not config.id_dropout or data.text_vectors is None:
        return None
    return rng.random(data.num_items) >= config.id_dropout


def has_interactions(data: FitData) -> Tensor:
    """bool [N]."""
    return torch.from_numpy(np.bincount(data.histories.pack().item_idx, minlength=data.num_items) > 0)


def text_of(data: FitData) -> Tensor | None:
    """float32 [N, X]: the text vectors.

    :raises ModelError: when they are not those of the items, or not finite.
    """
    if data.text_vectors is None:
        return None
    if len(data.text_vectors) != data.num_items:
        raise ModelError(f"{len(data.text_vectors)} text vectors for {data.num_items} items: embed the items again")
    finite = np.isfinite(data.text_vectors).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        raise ModelError(f"the text vector of item_idx {row} is not finite: embed the items again", item_idx=row)
    return torch.tensor(data.text_vectors, dtype=torch.float32)


def _fingerprint(config: TowerConfig, data: FitData, how: TrainConfig) -> str:
    parts: Mapping[str, object] = {
        "version": _VERSION,
        "config": config.content_hash(),
        "train": how.content_hash(),
        "lesson": None if data.lesson is None else float(data.lesson.weight.sum()),
        "seed": data.seed,
        "validated": data.valid is not None,
        "rows": int(data.histories.lengths.sum()),
        "items": data.num_items,
    }
    return fingerprint(parts)
