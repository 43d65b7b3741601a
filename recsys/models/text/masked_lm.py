"""Continued pretraining of a text encoder on the catalogue's own texts, by filling in hidden words.

Masked language modelling (Devlin et al., NAACL 2019) on the task's texts ("Don't Stop Pretraining", Gururangan et al.,
ACL 2020): of the tokens drawn, 80 % become the mask, 10 % a random token, 10 % stay. Sentence encoders come without the
head that names words, so a fresh one stands on the embeddings of the words and is thrown away afterwards.

Shape legend: B texts, L tokens, M hidden tokens, D dim, V words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.errors import ConfigError, EmptyDataError
from recsys.models.text.encoder import TextEncoder, TextEncoderConfig, pad
from recsys.training.freezing import freeze_unreached
from recsys.training.loop import Row, TrainConfig, train
from recsys.training.runtime import Runtime
from recsys.training.sampling import rng_for
from recsys.types import Int64Array

_SEEDS = 21
"""sets the random numbers of this training apart from those of others with the same seed"""


Asked = tuple[Int64Array, Int64Array]
"""places of a text that are hidden, and the tokens that stood there"""
_NOTHING: Asked = (np.zeros(0, np.int64), np.zeros(0, np.int64))


@dataclass(frozen=True)
class MaskedShare:
    """What one worker computes of one step, on its device."""

    ids_BL: Tensor
    mask_BL: Tensor
    place_M: Tensor
    """int64, places of hidden tokens in the flattened ``ids``"""
    token_M: Tensor
    """int64, what they were"""


class MaskedStep:
    """One optimizer step: a global batch of texts."""

    def __init__(self, read: Sequence[Sequence[int]], asked: Sequence[Asked], pad_id: int) -> None:
        """``read`` are the tokens of each text as they are shown, ``asked`` what was hidden of it."""
        self._read, self._asked, self._pad_id = read, asked, pad_id

    @property
    def weight(self) -> float:
        return float(sum(len(places) for places, _ in self._asked))

    @property
    def num_tokens(self) -> int:
        return int(self.weight)

    def part(self, index: int, num_parts: int, device: torch.device) -> MaskedShare:
        """Every ``num_parts``-th text from ``index`` on; an empty share takes a text of which nothing is asked."""
        rows = range(index, len(self._read), num_parts)
        ids_BL, mask_BL = pad([self._read[row] for row in rows] or [self._read[0]], self._pad_id)
        asked = [self._asked[row] for row in rows] or [_NOTHING]
        place = np.concatenate([places + row * ids_BL.shape[1] for row, (places, _) in enumerate(asked)])
        token = np.concatenate([tokens for _, tokens in asked])
        moved = (tensor.to(device) for tensor in (ids_BL, mask_BL, torch.from_numpy(place), torch.from_numpy(token)))
        return MaskedShare(*moved)


class MaskedModule(nn.Module):
    """The encoder with a head that names hidden words, in the form that the training loop takes."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer
        words_VD: Tensor = transformer.get_input_embeddings().weight
        dim = words_VD.shape[1]
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim))
        self.bias_V = nn.Parameter(torch.zeros(len(words_VD)))

    def forward(self, share: MaskedShare) -> Tensor:
        """Summed loss of a share."""
        hidden_BLD = self.transformer(input_ids=share.ids_BL, attention_mask=share.mask_BL).last_hidden_state
        asked_MD = self.head(hidden_BLD.flatten(0, 1).index_select(0, share.place_M))
        logits_MV = asked_MD @ self.transformer.get_input_embeddings().weight.T + self.bias_V
        return F.cross_entropy(logits_MV.float(), share.token_M, reduction="sum")


def pretrain(
    config: TextEncoderConfig, texts: Sequence[str], runtime: Runtime, *, seed: int
) -> tuple[TextEncoder, list[Row]]:
    """Train ``config.model`` on ``texts``; the encoder, and the learning curve (loss per hidden token).

    Deterministic for one seed, machine and number of workers. Continues from ``runtime``'s newest checkpoint.

    :raises ConfigError: when the encoder's tokenizer has no mask.
    :raises EmptyDataError: when no text has a word.
    """
    settings = config.pretrain
    encoder = TextEncoder.load(config.model_copy(update={"backend": "torch"}))
    tokenizer = encoder.tokenizer
    if tokenizer.mask_token_id is None:
        raise ConfigError(f"encoder.pretrain: {config.model} has no mask token: set pretrain.epochs to 0")
    special = set(tokenizer.all_special_ids)
    tokens = [ids for ids in encoder.tokenize(list(dict.fromkeys(texts))) if any(token not in special for token in ids)]
    if not tokens:
        raise EmptyDataError("encoder.pretrain: no item has a text to learn from")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = MaskedModule(encoder.module.transformer)

    def plan(epoch: int) -> list[MaskedStep]:
        rng = rng_for(seed, _SEEDS, epoch)
        order = rng.permutation(len(tokens))[: settings.max_texts]
        steps: list[MaskedStep] = []
        for start in range(0, len(order), settings.batch_size):
            batch = [tokens[row] for row in order[start : start + settings.batch_size]]
            steps.append(_hide(batch, tokenizer, special, settings.mask_share, rng))
        return steps

    freeze_unreached(module, module.eval()(plan(0)[0].part(0, 1, torch.device("cpu"))))
    shared = settings.model_dump(include={"epochs", "learning_rate", "weight_decay", "warmup_steps"})
    curve = train(
        module,
        plan=plan,
        validate=None,
        config=TrainConfig.parse(shared, where="encoder.pretrain"),
        runtime=runtime,
        seed=seed,
        fingerprint=f"masked:{config.content_hash()}:{seed}:{len(tokens)}",
    )
    encoder.module.to("cpu").requires_grad_(True)
    return encoder, curve


def _hide(
    texts: Sequence[Sequence[int]], tokenizer: Any, special: set[int], share: float, rng: np.random.Generator
) -> MaskedStep:
    """Draw the tokens that are asked for, at least one of each text, and what is shown in their place."""
    read: list[list[int]] = []
    asked: list[Asked] = []
    for ids in texts:
        words = np.flatnonzero([token not in special for token in ids])
        chosen = words[rng.random(len(words)) < share]
        chosen = chosen if len(chosen) else rng.choice(words, 1)
        shown = list(ids)
        for place, fate in zip(chosen.tolist(), rng.random(len(chosen)), strict=True):
            if fate < 0.8:
                shown[place] = tokenizer.mask_token_id
            elif fate < 0.9:
                shown[place] = int(rng.integers(len(tokenizer)))
        read.append(shown)
        asked.append((chosen.astype(np.int64), np.array(ids, np.int64)[chosen]))
    return MaskedStep(read, asked, tokenizer.pad_token_id)
