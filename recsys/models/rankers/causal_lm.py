"""A GPT-style decoder that has read the history and says how likely each candidate's text is next.

After "GPT4Rec" (Li et al., 2023, arXiv 2304.03879) and ranking by likelihood (Sachan et al., EMNLP 2022): the texts of
the history stand in order, one per line, and a candidate's score is the mean log-probability of the tokens of its line.
Trained by a softmax over the candidates of a query, with the language model's own loss on history and choice beside it.
Any causal language model of Hugging Face will do; without one a small decoder and its tokenizer are made from the
catalogue. The history is read once and its keys and values are shared by all candidates.

Shape legend: B queries, C candidates, L tokens of the history, l tokens of the longest candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from recsys.config import StrictConfig
from recsys.errors import ModelError
from recsys.libraries import library
from recsys.models.rankers.loop import listwise_loss
from recsys.models.rankers.queries import PADDING, RankingBatch
from recsys.models.rankers.text_ranker import TextInputs, TextRankerConfig, TextRankerNetwork
from recsys.models.text.adapters import adapt, is_adapted, places, with_saved_adapter
from recsys.models.text.encoder import model_folder, pad
from recsys.training.freezing import learn_top_layers
from recsys.types import BoolArray

_BEGIN, _UNKNOWN = "<s>", "<unk>"


class SmallDecoder(StrictConfig):
    """A decoder made from nothing, with byte pairs learned from the catalogue."""

    num_layers: int = Field(default=2, ge=1, le=1000, description="transformer blocks")
    num_heads: int = Field(default=2, ge=1, le=1000, description="attention heads")
    dim: int = Field(default=64, ge=4, le=65536, description="width; a multiple of num_heads")
    vocabulary: int = Field(default=2000, ge=300, le=1 << 20, description="tokens, bytes included")
    max_tokens: int = Field(default=512, ge=2, le=1 << 20, description="longest input")


class CausalLMConfig(TextRankerConfig):
    """Ranking by the likelihood that a language model gives to a candidate's text."""

    kind: Literal["causal_lm"] = "causal_lm"
    model: str | None = Field(
        default=None, description="folder of a causal language model, or package:NAME; null makes a small one"
    )
    small: SmallDecoder = Field(default=SmallDecoder(), description="the decoder that is made where model is null")
    fields: tuple[Literal["title", "categories", "creator", "description"], ...] = Field(
        default=("title",), min_length=1, description="columns of the item table that are read"
    )
    language_loss: float = Field(
        default=0.5, ge=0, description="weight of the language model's own loss beside that of the ranking"
    )

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls(
            small=SmallDecoder(num_layers=1, dim=32, vocabulary=320, max_tokens=64),
            max_history=2,
            num_negatives=3,
            epochs=32,
            patience=40,
            learning_rate=1e-2,
            head_learning_rate=0.1,
        )

    def network(self, texts: Sequence[str]) -> tuple[Any, TextRankerNetwork]:
        if self.model is None:
            tokenizer, transformer = _make(self.small, texts)
        else:
            tokenizer, transformer = _read(model_folder(self.model, "causal_lm.model"))
        if self.adapter is None:
            learn_top_layers(transformer, transformer, self.trainable_layers)
        else:
            transformer = adapt(transformer, self.adapter, "CAUSAL_LM")
        return tokenizer, _DecoderNetwork(self, tokenizer, transformer)

    def saved_network(self, folder: Path) -> tuple[Any, TextRankerNetwork]:
        tokenizer, transformer = _read(folder)
        return tokenizer, _DecoderNetwork(self, tokenizer, with_saved_adapter(transformer, folder))

    def item_tokens(self, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
        batch = tokenizer(list(texts), truncation=True, max_length=self.max_item_tokens, add_special_tokens=False)
        end: list[int] = tokenizer("\n", add_special_tokens=False)["input_ids"][-1:]
        return [[*ids, *end] for ids in batch["input_ids"]]

    def loss(self, output: Any, batch: RankingBatch, relevant: BoolArray) -> Tensor:
        read: _Read = output
        ranking = listwise_loss(read.scores_BC, batch, relevant)
        return ranking + self.language_loss * read.language(torch.from_numpy(relevant))


class _Read(NamedTuple):
    """What a pass gives training."""

    scores_BC: Tensor
    log_likelihood_BC: Tensor
    """mean over the candidate's tokens"""
    history_loss: Tensor
    """mean over the history's tokens of all queries"""

    def language(self, relevant_BC: Tensor) -> Tensor:
        """The language model's loss: on the histories, and on what was chosen."""
        chosen = self.log_likelihood_BC[relevant_BC.to(self.log_likelihood_BC.device)]
        return self.history_loss - chosen.mean()


class _DecoderNetwork(TextRankerNetwork):
    def __init__(self, config: CausalLMConfig, tokenizer: Any, transformer: Any) -> None:
        super().__init__(transformer)
        self.likelihood_weight = nn.Parameter(torch.zeros(()))
        begin = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, 0]
        self._begin: int = next(token for token in begin if token is not None)
        self._max_tokens: int = transformer.config.get_text_config().max_position_embeddings - places(config.adapter)

    def forward(self, inputs: TextInputs, device: torch.device) -> _Read:
        prior_BC = inputs.prior_of(self, device)
        real_BC = torch.from_numpy(inputs.candidate_item_idx != PADDING).to(device)
        found: list[Tensor] = []
        losses: list[Tensor] = []
        num_read = 0
        for history, candidates in zip(inputs.histories, inputs.candidates, strict=True):
            if candidates:
                candidates = [candidate[: self._max_tokens - 1] for candidate in candidates]
                room = self._max_tokens - 1 - max(map(len, candidates))
                read = [token for item in history for token in item]
                read = read[max(0, len(read) - room) :]
                likelihood_C, loss = self._likelihoods([self._begin, *read], candidates, device)
                found.append(likelihood_C)
                losses.append(loss)
                num_read += len(read)
        flat = torch.cat(found) if found else prior_BC.new_zeros(0)
        likelihood_BC = torch.zeros_like(prior_BC).masked_scatter(real_BC, flat)
        history_loss = torch.stack(losses).sum() / max(1, num_read) if losses else prior_BC.sum() * 0
        return _Read(prior_BC + self.likelihood_weight * likelihood_BC, likelihood_BC, history_loss)

    def scores(self, inputs: TextInputs, device: torch.device) -> Tensor:
        return self(inputs, device).scores_BC

    def _likelihoods(self, read: list[int], candidates: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """float32 [C]: mean log-probability of a candidate's tokens after ``read``; and the summed loss of ``read``."""
        read_1L = torch.tensor([read], device=device)
        answer_Cl, mask_Cl = (tensor.to(device) for tensor in pad(candidates, 0))
        if is_adapted(self.transformer):
            # A prefix fills the cache itself.
            input_CT = torch.cat([read_1L.expand(len(candidates), -1), answer_Cl], dim=1)
            mask_CT = torch.cat([torch.ones_like(input_CT[:, : len(read)]), mask_Cl], dim=1)
            logits_CTV = self.transformer(input_ids=input_CT, attention_mask=mask_CT).logits
            read_logits, before_Cl = logits_CTV[:1, : len(read)], logits_CTV[:, len(read) - 1 : -1]
        else:
            output = self.transformer(input_ids=read_1L, use_cache=True)
            cache = output.past_key_values
            cache.batch_repeat_interleave(len(candidates))
            seen = torch.cat([read_1L.new_ones(len(candidates), len(read)), mask_Cl[:, :-1]], dim=1)
            read_logits = output.logits
            before_Cl = read_logits[:, -1:].expand(len(candidates), -1, -1)
            if answer_Cl.shape[1] > 1:
                rest = self.transformer(input_ids=answer_Cl[:, :-1], attention_mask=seen, past_key_values=cache).logits
                before_Cl = torch.cat([before_Cl, rest], dim=1)
        log_Cl = F.log_softmax(before_Cl.float(), dim=-1).gather(-1, answer_Cl.unsqueeze(-1)).squeeze(-1)
        likelihood_C = (log_Cl * mask_Cl).sum(1) / mask_Cl.sum(1)
        loss = F.cross_entropy(read_logits[0, :-1].float(), read_1L[0, 1:], reduction="sum")
        return likelihood_C, loss


def _read(folder: Path) -> tuple[Any, Any]:
    """A folder with safetensors, or with one file of quantized weights (``.gguf``), which are read into float32."""
    transformers = library("transformers", "a causal_lm ranker", extra="text")
    quantized = [path.name for path in sorted(folder.glob("*.gguf"))]
    source: dict[str, Any] = {"gguf_file": quantized[0]} if quantized else {"use_safetensors": True}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, **({"gguf_file": quantized[0]} if quantized else {})
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, **source
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{folder}: not a usable causal language model: {error}", path=str(folder)) from error
    return tokenizer, model


def _make(config: SmallDecoder, texts: Sequence[str]) -> tuple[Any, Any]:
    """Byte pairs of ``texts``, and a decoder with weights drawn from torch's generator."""
    transformers = library("transformers", "a causal_lm ranker", extra="text")
    tokenizers = library("tokenizers", "a causal_lm ranker", extra="text")
    if config.dim % config.num_heads:
        raise ModelError(f"causal_lm.small.dim {config.dim} must be a multiple of num_heads {config.num_heads}")
    pairs = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=_UNKNOWN))
    pairs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=[_BEGIN, _UNKNOWN],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pairs.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=pairs, bos_token=_BEGIN, eos_token=_BEGIN, unk_token=_UNKNOWN, pad_token=_BEGIN
    )
    begin = pairs.token_to_id(_BEGIN)
    settings = transformers.GPT2Config(
        vocab_size=pairs.get_vocab_size(),
        n_positions=config.max_tokens,
        n_embd=config.dim,
        n_layer=config.num_layers,
        n_head=config.num_heads,
        bos_token_id=begin,
        eos_token_id=begin,
    )
    return tokenizer, transformers.GPT2LMHeadModel(settings)
