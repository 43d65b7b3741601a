"""Rankers that read the texts of history and candidate with a Hugging Face model: what they share.

A family is a :class:`TextRankerConfig` and a network with the parts ``transformer`` and whatever comes after it. The
retriever's score, in deviations from its mean, is added with a learned weight, and what the text adds begins at zero:
a fresh ranker keeps the retriever's order, and training only has to improve on it.

Shape legend: B queries, C candidates, N items, L tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from recsys.errors import ConfigError, ModelError
from recsys.files import atomic_path, map_arrow, read_json, write_arrow, write_json
from recsys.models.rankers.base import Ranker, RankerConfig
from recsys.models.rankers.examples import RankingExamples
from recsys.models.rankers.loop import train_ranker
from recsys.models.rankers.queries import (
    PADDING,
    RankingBatch,
    RankingCatalogue,
    RankingItems,
    load_ranking_items,
    save_ranking_items,
)
from recsys.models.text.adapters import Adapter, merged, save_transformer
from recsys.models.text.encoder import TextEncoderConfig, TextField, item_texts
from recsys.training.runtime import Runtime
from recsys.types import BoolArray, FloatArray

_TRANSFORMER = "transformer"


class TextRankerConfig(RankerConfig, ABC):
    """Hyper-parameters of every such ranker."""

    fields: tuple[TextField, ...] = Field(
        default=("title", "categories"), min_length=1, description="columns of the item table that are read"
    )
    max_item_tokens: int = Field(default=16, ge=1, le=4096, description="tokens read of each item")
    max_history: int = Field(default=8, ge=1, description="newest history entries read")
    num_negatives: int = Field(default=7, ge=1, description="candidates sampled beside the relevant ones per query")
    epochs: int = Field(default=3, ge=0, description="most passes over the queries; 0 keeps the retriever's order")
    batch_queries: int = Field(default=8, ge=1, description="queries per optimizer step, over all workers")
    learning_rate: float = Field(default=5e-5, gt=0, description="peak step size of the transformer")
    head_learning_rate: float = Field(default=1e-3, gt=0, description="peak step size of what comes after it")
    weight_decay: float = Field(default=0.01, ge=0, description="decoupled weight decay of AdamW")
    trainable_layers: int = Field(
        default=0,
        ge=0,
        description="topmost layers that learn; 0 is the whole transformer; not read with an adapter",
    )
    adapter: Adapter | None = Field(default=None, description="learn a few new weights instead of the transformer's")

    @abstractmethod
    def network(self, texts: Sequence[str]) -> tuple[Any, TextRankerNetwork]:
        """A tokenizer and a fresh network; ``texts`` are those of the catalogue."""

    @abstractmethod
    def saved_network(self, folder: Path) -> tuple[Any, TextRankerNetwork]:
        """A tokenizer and a network with the transformer of ``folder``."""

    @abstractmethod
    def loss(self, output: Any, batch: RankingBatch, relevant: BoolArray) -> Tensor:
        """The mean loss of what the network's forward pass returned."""

    @abstractmethod
    def item_tokens(self, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each item as they stand in an input, at least one."""

    def learning_rate_of(self, parameter: str) -> float:
        return self.learning_rate if parameter.startswith(_TRANSFORMER) else self.head_learning_rate

    def tokens_of(self, tokenizer: Any, table: pa.Table) -> pa.ListArray:
        """Tokens of each row of ``table`` (``ITEMS``).

        :raises ConfigError: when no item has a text.
        """
        texts = self._texts(table)
        return pa.array(self.item_tokens(tokenizer, texts), pa.list_(pa.int32()))

    def _texts(self, table: pa.Table) -> list[str]:
        texts = item_texts(table, TextEncoderConfig(fields=self.fields))
        if not any(texts):
            raise ConfigError(f"{self.kind}.fields {', '.join(self.fields)}: no item has a text in them")
        return texts

    def fit(
        self,
        examples: RankingExamples,
        catalogue: RankingCatalogue,
        runtime: Runtime,
        *,
        holdout: RankingExamples | None,
        seed: int,
    ) -> TextRanker:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            tokenizer, network = self.network(self._texts(catalogue.table))
        used = examples.batch.candidate_item_idx != PADDING
        retrieval = examples.batch.features[..., 0][used]
        if len(retrieval):
            network.retrieval_mean.fill_(float(retrieval.mean()))
            network.retrieval_scale.fill_(1 / max(float(retrieval.std()), 1e-3))
        tokens = self.tokens_of(tokenizer, catalogue.table)
        ranker = TextRanker(self, tokenizer, network, catalogue.items, tokens, uses_time=examples.uses_time)

        def loss(model: nn.Module, batch: RankingBatch, relevant: BoolArray) -> Tensor:
            return self.loss(model(ranker.inputs(batch), runtime.device), batch, relevant)

        ranker.history = train_ranker(
            network,
            examples,
            loss=loss,
            scorer=lambda: ranker.score,
            config=self,
            runtime=runtime,
            holdout=holdout,
            seed=seed,
        )
        network.transformer = merged(network.transformer)
        network.eval()
        return ranker

    def load(self, folder: Path) -> TextRanker:
        """Read what :meth:`TextRanker.save` wrote."""
        items = load_ranking_items(folder)
        tokenizer, network = self.saved_network(folder / _TRANSFORMER)
        rest = load_file(folder / "model.safetensors")
        missing, unexpected = network.load_state_dict(rest, strict=False)
        missing = [name for name in missing if not name.startswith(_TRANSFORMER)]
        if missing or unexpected:
            names = ", ".join([*missing, *unexpected])
            raise ModelError(f"{folder}: the weights do not fit the configuration: {names}", path=str(folder))
        network.eval()
        fit = read_json(folder / "fit.json")
        tokens = map_arrow(folder / "tokens.arrow")["tokens"].combine_chunks()
        return TextRanker(self, tokenizer, network, items, tokens, fit["history"], uses_time=fit["uses_time"])


class TextRankerNetwork(nn.Module, ABC):
    """``forward(inputs, device)`` is what training needs of a batch; ``scores`` what serving does."""

    retrieval_mean: Tensor
    retrieval_scale: Tensor

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer
        self.retrieval_weight = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(()))
        self.register_buffer("retrieval_mean", torch.zeros(()))
        self.register_buffer("retrieval_scale", torch.ones(()))

    def prior(self, retrieval: Tensor) -> Tensor:
        """What the retriever's score alone says, in the shape of ``retrieval``."""
        return self.bias + self.retrieval_weight * (retrieval - self.retrieval_mean) * self.retrieval_scale

    @abstractmethod
    def scores(self, inputs: TextInputs, device: torch.device) -> Tensor:
        """float32 [B, C]."""


class TextInputs:
    """The texts of a batch, as tokens."""

    def __init__(self, batch: RankingBatch, tokens: pa.ListArray) -> None:
        self.candidate_item_idx = batch.candidate_item_idx
        self.retrieval_score = batch.features[..., 0]
        offsets, values = tokens.offsets.to_numpy(), tokens.values.to_numpy()

        def of(item: int) -> list[int]:
            return values[offsets[item] : offsets[item + 1]].tolist()

        self.histories = [[of(item) for item in row if item != PADDING] for row in batch.history_item_idx.tolist()]
        """per query the tokens of each item, oldest first"""
        self.candidates = [[of(item) for item in row if item != PADDING] for row in batch.candidate_item_idx.tolist()]
        """per query the tokens of each candidate; padding stands at the end of a row and is left out"""

    def prior_of(self, network: TextRankerNetwork, device: torch.device) -> Tensor:
        """float32 [B, C]."""
        return network.prior(torch.tensor(self.retrieval_score, device=device))


class TextRanker(Ranker):
    """A fitted network, its tokenizer, and the tokens of the items."""

    config: TextRankerConfig

    def __init__(
        self,
        config: TextRankerConfig,
        tokenizer: Any,
        network: TextRankerNetwork,
        items: RankingItems,
        tokens: pa.ListArray,
        history: Sequence[Mapping[str, float]] = (),
        *,
        uses_time: bool,
    ) -> None:
        self.config = config
        self.items = items
        self.max_history = config.max_history
        self.uses_time = uses_time
        self.history = history
        self.network = network.eval()
        self.tokenizer = tokenizer
        self._tokens = tokens

    def inputs(self, batch: RankingBatch) -> TextInputs:
        """What the network reads of ``batch``."""
        return TextInputs(batch, self._tokens)

    def score(self, batch: RankingBatch) -> FloatArray:
        scores = np.zeros(batch.candidate_item_idx.shape, np.float32)
        device = self.network.bias.device
        with torch.inference_mode():
            for row in range(len(batch)):  # one query at a time: many candidates make a batch of their own
                one = batch[row : row + 1]
                if one.candidate_item_idx.size:
                    scores[row] = self.network.scores(self.inputs(one), device).float().cpu().numpy()[0]
        return scores

    def with_items(self, catalogue: RankingCatalogue) -> Self:
        tokens = self.config.tokens_of(self.tokenizer, catalogue.table)
        return type(self)(
            self.config, self.tokenizer, self.network, catalogue.items, tokens, self.history, uses_time=self.uses_time
        )

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_transformer(self.network.transformer, folder / _TRANSFORMER)
        self.tokenizer.save_pretrained(folder / _TRANSFORMER)
        rest = {name: value for name, value in self.network.state_dict().items() if not name.startswith(_TRANSFORMER)}
        with atomic_path(folder / "model.safetensors") as temporary:
            save_file({name: value.contiguous() for name, value in rest.items()}, temporary)
        save_ranking_items(self.items, folder)
        write_arrow(folder / "tokens.arrow", pa.table({"tokens": self._tokens}))
        write_json(folder / "fit.json", {"uses_time": self.uses_time, "history": [dict(row) for row in self.history]})
        write_json(folder / "config.json", self.config.model_dump(mode="json"))
