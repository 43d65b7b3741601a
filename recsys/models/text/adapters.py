"""Fine-tuning of large text models by a few new weights (library ``peft``), and what is saved of it.

LoRA adds products of two thin matrices to every linear layer (Hu et al., ICLR 2022, arXiv 2106.09685) and is merged
into them afterwards, so the result costs nothing more and is an ordinary model. Prefix tuning puts learned keys and
values before every layer's own (Li and Liang, ACL 2021, arXiv 2101.00190); it cannot be merged and is saved beside the
model, in ``adapter/``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from torch import nn

from recsys.config import StrictConfig
from recsys.libraries import library

_FOLDER = "adapter"
Task = Literal["FEATURE_EXTRACTION", "CAUSAL_LM"]


class LoRA(StrictConfig):
    """Low-rank additions to every linear layer."""

    kind: Literal["lora"] = "lora"
    rank: int = Field(default=8, ge=1, le=4096, description="width of the thin matrices")
    alpha: float = Field(default=16.0, gt=0, description="the addition is scaled by alpha / rank")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="share of the addition's inputs dropped in training")


class Prefix(StrictConfig):
    """Learned keys and values before every layer's own."""

    kind: Literal["prefix"] = "prefix"
    num_tokens: int = Field(default=8, ge=1, le=4096, description="places of the prefix")


def places(adapter: LoRA | Prefix | None) -> int:
    """How many of a transformer's places ``adapter`` takes up."""
    return adapter.num_tokens if isinstance(adapter, Prefix) else 0


Adapter = Annotated[LoRA | Prefix, Field(discriminator="kind")]


def adapt(transformer: Any, adapter: LoRA | Prefix, task: Task) -> nn.Module:
    """``transformer`` (of Hugging Face) with new weights, which alone can learn.

    :raises NotInstalledError: where peft is not installed.
    """
    peft = library("peft", f"the adapter {adapter.kind}", extra="adapters")
    if isinstance(adapter, LoRA):
        settings = peft.LoraConfig(
            r=adapter.rank,
            lora_alpha=adapter.alpha,
            lora_dropout=adapter.dropout,
            target_modules="all-linear",
            task_type=task,
        )
    else:
        settings = peft.PrefixTuningConfig(num_virtual_tokens=adapter.num_tokens, task_type=task)
    return peft.get_peft_model(transformer, settings)


def merged(transformer: Any) -> Any:
    """LoRA merged into the weights; anything else as it is."""
    return transformer.merge_and_unload() if hasattr(transformer, "merge_and_unload") else transformer


def save_transformer(transformer: Any, folder: Path) -> None:
    """A Hugging Face folder (safetensors), and ``adapter/`` for what could not be merged."""
    if hasattr(transformer, "get_base_model"):
        transformer.save_pretrained(folder / _FOLDER)
        transformer = transformer.get_base_model()
    transformer.save_pretrained(folder)


def with_saved_adapter(transformer: Any, folder: Path) -> Any:
    """``transformer``, which was read from ``folder``, with the adapter beside it if there is one."""
    if not (folder / _FOLDER).exists():
        return transformer
    peft = library("peft", "the adapter prefix", extra="adapters")
    return peft.PeftModel.from_pretrained(transformer, folder / _FOLDER)


def is_adapted(transformer: Any) -> bool:
    """Whether something beside the model's own weights takes part."""
    return hasattr(transformer, "get_base_model")


def places_taken(transformer: Any) -> int:
    """How many of its places the adapters of ``transformer`` take up."""
    adapters = transformer.peft_config.values() if is_adapted(transformer) else ()
    return sum(getattr(adapter, "num_virtual_tokens", 0) for adapter in adapters)
