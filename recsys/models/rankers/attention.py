"""A candidate-isolated ranker: every candidate attends to the user's history and meets its features in an MLP.

Target attention after DIN (Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", KDD 2018), with
multi-head scaled dot-product attention in place of DIN's activation unit, a learned null entry so that an empty
history is ordinary, additive biases by recency rank and age, and the retrieval score as a residual. Trained with a
listwise softmax over the retriever's own candidates (ListNet top-one, Cao et al., ICML 2007).

Items enter by content (text vector and categories), not by id: the weights stay valid when the retriever is
refitted, and a new item can be ranked at once. Every projection of an item alone is linear up to its use, so the
export computes it once per item and keeps it as an int8 row (:mod:`recsys.models.rankers.export`).

Shape legend: B queries, C candidates, L history, N items, E content dimension, D model dimension, H heads, M MLP width,
F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, field_validator
from safetensors.torch import load_file
from torch import Tensor, nn

from recsys.data.features import FEATURE_NAMES, NUM_FEATURES, matrix
from recsys.files import map_arrow, read_json
from recsys.models.base import UpdateConfig
from recsys.models.rankers.attention_network import AttentionRanker, RankerNetwork, inputs_of, project
from recsys.models.rankers.base import Ranker, RankerConfig
from recsys.models.rankers.examples import RankingExamples
from recsys.models.rankers.export import load_exported
from recsys.models.rankers.loop import listwise_loss, train_ranker
from recsys.models.rankers.queries import PADDING, RankingBatch, RankingCatalogue, load_ranking_items
from recsys.training.runtime import Runtime
from recsys.types import BoolArray


class AttentionRankerConfig(RankerConfig):
    """Target attention over the history and an MLP over features."""

    kind: Literal["attention"] = "attention"
    dim: int = Field(default=32, ge=8, description="model dimension; a multiple of num_heads")
    num_heads: int = Field(default=2, ge=1, description="attention heads")
    hidden: int = Field(default=64, ge=8, description="width of the MLP's first layer; the second has half")
    dropout: float = Field(default=0.2, ge=0, lt=1, description="dropout of attention output and MLP, share of units")
    left_out: tuple[str, ...] = Field(
        default=(), description="features that are not read, by name; `recsys features` says which"
    )

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls(
            dim=16, hidden=32, max_history=2, num_negatives=3, epochs=40, patience=40, batch_queries=4, dropout=0.0
        )

    @field_validator("left_out")
    @classmethod
    def _known_features(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        strange = [name for name in names if name not in FEATURE_NAMES[1:]]
        if strange:
            raise ValueError(
                f"{', '.join(strange)}: not a feature that can be left out of {', '.join(FEATURE_NAMES[1:])}"
            )
        return names

    def network(self, content_dim: int) -> RankerNetwork:
        """A fresh one, its weights drawn from torch's generator."""
        return RankerNetwork(
            content_dim,
            dim=self.dim,
            num_heads=self.num_heads,
            hidden=self.hidden,
            max_history=self.max_history,
            dropout=self.dropout,
        )

    def fit(
        self,
        examples: RankingExamples,
        catalogue: RankingCatalogue,
        runtime: Runtime,
        *,
        holdout: RankingExamples | None,
        seed: int,
    ) -> AttentionRanker:
        content = catalogue.content
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = self.network(content.shape[1])
        used = examples.batch.candidate_item_idx != PADDING
        values = examples.batch.features[used] if used.any() else np.zeros((1, NUM_FEATURES), np.float32)
        network.feature_mean.copy_(torch.from_numpy(values.mean(axis=0)))
        spread = values.std(axis=0)
        # A feature that was constant in training tells nothing, and must not shout when it varies in serving.
        scale = np.where(spread > 1e-3, 1.0 / np.maximum(spread, 1e-3), 0.0)
        scale[[FEATURE_NAMES.index(name) for name in self.left_out]] = 0.0
        network.feature_scale.copy_(torch.from_numpy(scale))
        return self._trained(network, examples, catalogue, runtime, holdout, seed)

    def update(
        self,
        fitted: Ranker,
        examples: RankingExamples,
        catalogue: RankingCatalogue,
        runtime: Runtime,
        how: UpdateConfig,
        *,
        seed: int,
    ) -> AttentionRanker:
        """Train on from the weights of ``fitted``, whose features keep their scale."""
        assert isinstance(fitted, AttentionRanker)
        network = self.network(catalogue.content.shape[1])
        network.load_state_dict(fitted.network.state_dict())
        train = {"epochs": how.epochs, "learning_rate": self.learning_rate * how.rate}
        done = self.model_copy(update=train)._trained(network, examples, catalogue, runtime, None, seed)
        return AttentionRanker(self, network, done.items, done.projected, done.history, uses_time=fitted.uses_time)

    def _trained(
        self,
        network: RankerNetwork,
        examples: RankingExamples,
        catalogue: RankingCatalogue,
        runtime: Runtime,
        holdout: RankingExamples | None,
        seed: int,
    ) -> AttentionRanker:
        content = catalogue.content

        def ranker(history: Sequence[Mapping[str, float]] = ()) -> AttentionRanker:
            projected = project(network, content)
            return AttentionRanker(self, network, catalogue.items, projected, history, uses_time=examples.uses_time)

        def loss(model: nn.Module, batch: RankingBatch, relevant: BoolArray) -> Tensor:
            return listwise_loss(model(*inputs_of(batch, content, runtime.device)), batch, relevant)

        history = train_ranker(
            network,
            examples,
            loss=loss,
            scorer=lambda: ranker().score,
            config=self,
            runtime=runtime,
            holdout=holdout,
            seed=seed,
        )
        return ranker(history)

    def load(self, folder: Path) -> Ranker:
        """Its compressed form where one was exported and this machine can run it."""
        weights = load_file(folder / "model.safetensors")
        network = self.network(weights["item.weight"].shape[1])
        network.load_state_dict(weights)
        projected = matrix(map_arrow(folder / "projected.arrow")["vector"])
        fit = read_json(folder / "fit.json")
        items = load_ranking_items(folder)
        ranker = AttentionRanker(self, network, items, projected, fit["history"], uses_time=fit["uses_time"])
        return load_exported(folder, ranker)
