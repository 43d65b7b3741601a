"""A Hugging Face encoder of random weights, small enough for samples and tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from recsys.libraries import library


def tiny_encoder(folder: Path, words: Sequence[str], *, dim: int = 16, max_tokens: int = 16) -> Path:
    """Write a two-layer BERT that knows ``words`` into ``folder``.

    :raises NotInstalledError: where transformers is not installed.
    """
    transformers = library("transformers", "a text encoder", extra="text")
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * dim,
        max_position_embeddings=max_tokens,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    numbers = {word: row for row, word in enumerate(vocabulary)}
    transformers.BertTokenizerFast(vocab=numbers, model_max_length=max_tokens).save_pretrained(folder)
    return folder
