"""Contrastive fine-tuning of a text encoder: items that one user consumed one after the other get similar vectors.

InfoNCE with in-batch negatives (van den Oord et al., 2018), in both directions. Deviation: a negative that is the
positive itself, the anchor itself, or known to be consumed together with the anchor is left out of the softmax.
Negatives come from a worker's own share of the batch.

What was learned is kept only where it finds the partners of held-out pairs better than the encoder did before: on a
small log fine-tuning can hurt a good general encoder.

Shape legend: P pairs of a share, U different items of a share, D dimensions.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from recsys.data.dataset import Dataset, Split
from recsys.data.histories import Histories
from recsys.data.leaks import check_blind
from recsys.errors import EmptyDataError
from recsys.models.text.adapters import adapt, merged
from recsys.models.text.encoder import SentenceModule, TextEncoder, TextEncoderConfig, TextTrainConfig, pad
from recsys.training.freezing import freeze_unreached, learn_top_layers
from recsys.training.loop import Row, TrainConfig, train
from recsys.training.runtime import Runtime
from recsys.types import BoolArray, Int32Array, Int64Array

Pairs = Int32Array
"""int32 [N, 2], the smaller item_idx first, sorted, no pair twice"""


@dataclass(frozen=True)
class PairData:
    """What fine-tuning reads: it learns from the train split, and is judged on the validation split."""

    texts: Sequence[str]
    """one per item, in order of ``item_idx``"""
    pairs: Pairs
    held_out: Pairs = field(default_factory=lambda: np.zeros((0, 2), np.int32))
    """pairs of the validation split, for the decision whether to keep what was learned"""
    seed: int = 0

    @classmethod
    def of(cls, dataset: Dataset, texts: Sequence[str], window: int, *, seed: int = 0) -> PairData:
        """Pairs from the positives of ``dataset``.

        :raises LeakageError: when a pair comes from a later split than it should.
        """

        def learned(source: Dataset) -> Pairs:
            return consecutive_pairs(source.positives.histories(Split.TRAIN), window)

        def held_out(source: Dataset) -> Pairs:
            log = source.positives
            begin, end = log.histories(Split.TRAIN).stops, log.histories(Split.VALID).stops
            return consecutive_pairs(Histories(log.item_idx, begin, end), window)

        pairs = check_blind("text pairs", learned, dataset, Split.TRAIN, read=_named)
        return cls(texts, pairs, check_blind("held-out text pairs", held_out, dataset, Split.VALID, read=_named), seed)


def _named(pairs: Pairs) -> dict[str, NDArray[Any]]:
    return {"pairs": pairs}


def consecutive_pairs(histories: Histories, window: int) -> Pairs:
    """Pairs of different items at most ``window`` steps apart in one history."""
    packed = histories.pack()
    owner = np.repeat(np.arange(len(histories)), packed.lengths)
    found: list[Int32Array] = []
    for step in range(1, window + 1):
        left, right = packed.item_idx[:-step], packed.item_idx[step:]
        keep = (owner[:-step] == owner[step:]) & (left != right)
        found.append(np.stack([np.minimum(left, right)[keep], np.maximum(left, right)[keep]], axis=1))
    return np.unique(np.concatenate(found), axis=0).astype(np.int32)


@dataclass(frozen=True)
class PairShare:
    """What one worker computes of one step, on its device."""

    ids_UL: Tensor
    mask_UL: Tensor
    anchors_P: Tensor
    """int64, rows of ``ids_UL``"""
    positives_P: Tensor
    """int64, rows of ``ids_UL``"""
    forbidden_PP: Tensor
    """bool: column j is no negative of row i"""


class PairStep:
    """One optimizer step: a global batch of pairs."""

    def __init__(self, pairs: Pairs, tokens: Sequence[Sequence[int]], known: Int64Array, pad_id: int) -> None:
        self._pairs, self._tokens, self._known, self._pad_id = pairs, tokens, known, pad_id

    @property
    def weight(self) -> float:
        return float(len(self._pairs))

    @property
    def num_tokens(self) -> int:
        return len(self._pairs)

    def part(self, index: int, num_parts: int, device: torch.device) -> PairShare:
        """Every ``num_parts``-th pair from ``index`` on."""
        pairs = self._pairs[index::num_parts]
        items, rows = np.unique(pairs, return_inverse=True)
        ids_UL, mask_UL = pad((self._tokens[item] for item in items), self._pad_id)
        rows = torch.from_numpy(rows.reshape(pairs.shape)).to(device)
        forbidden = torch.from_numpy(false_negatives(pairs, self._known, len(self._tokens)))
        return PairShare(ids_UL.to(device), mask_UL.to(device), rows[:, 0], rows[:, 1], forbidden.to(device))


def pair_keys(left: Int32Array, right: Int32Array, num_items: int) -> Int64Array:
    """One int64 per unordered pair; broadcasts."""
    return np.minimum(left, right).astype(np.int64) * num_items + np.maximum(left, right)


def false_negatives(pairs: Pairs, known: Int64Array, num_items: int) -> BoolArray:
    """bool [P, P]: the second item of pair j is no negative for the first of pair i: it is that item itself, the
    positive of i, or ``known`` (sorted keys) to be consumed together with it. The diagonal, the positive, is False.
    """
    anchors, positives = pairs[:, 0], pairs[:, 1]
    keys = pair_keys(anchors[:, None], positives[None, :], num_items)
    place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    forbidden = (known[place] == keys) | (anchors[:, None] == positives[None, :])
    forbidden |= positives[:, None] == positives[None, :]
    np.fill_diagonal(forbidden, False)
    return forbidden


def info_nce(anchors_PD: Tensor, positives_PD: Tensor, forbidden_PP: Tensor, temperature: float) -> Tensor:
    """Summed over pairs, the mean of both directions. Vectors are unit vectors."""
    logits_PP = (anchors_PD @ positives_PD.T / temperature).masked_fill(forbidden_PP, -torch.inf)
    target_P = torch.arange(len(logits_PP), device=logits_PP.device)
    forth = nn.functional.cross_entropy(logits_PP, target_P, reduction="sum")
    back = nn.functional.cross_entropy(logits_PP.T, target_P, reduction="sum")
    return (forth + back) / 2


class PairModule(nn.Module):
    """The encoder with its loss, in the form that the training loop takes."""

    def __init__(self, sentence: SentenceModule, temperature: float) -> None:
        super().__init__()
        self.sentence = sentence
        self.temperature = temperature

    def forward(self, share: PairShare) -> Tensor:
        """Summed loss of a share."""
        vectors_UD = self.sentence(share.ids_UL, share.mask_UL)
        anchors_PD, positives_PD = vectors_UD[share.anchors_P], vectors_UD[share.positives_P]
        return info_nce(anchors_PD, positives_PD, share.forbidden_PP, self.temperature)


@dataclass(frozen=True)
class Finetuned:
    """The encoder to use from now on, and how that was decided."""

    encoder: TextEncoder
    curve: list[Row]
    """``epoch`` and ``loss`` per pair"""
    metrics: dict[str, float]
    """``held_out_mrr_before`` and ``held_out_mrr_after`` (see :func:`partner_mrr`), ``kept``: 1 where the fine-tuned
    encoder is the one that goes on, 0 where it was no better; ``trained_share`` of the encoder's weights that learned,
    and the ``train_seconds`` of that"""


Weights = Mapping[str, NDArray[Any]]
"""a state dict, in a form that travels"""


def finetune(
    config: TextEncoderConfig, data: PairData, runtime: Runtime, pretrained: Weights | None = None
) -> Finetuned:
    """Fine-tune ``config.model``, or what continued pretraining made of its weights (``pretrained``).

    With ``train.epochs`` 0 nothing is learned here, and it is only decided whether to keep ``pretrained``.

    Deterministic for one seed, machine and number of workers. Continues from ``runtime``'s newest checkpoint.

    :raises EmptyDataError: when there are epochs and no pairs to learn from.
    """
    settings = config.train
    if settings.epochs and len(data.pairs) < 2:
        raise EmptyDataError(
            "the encoder cannot be fine-tuned, as no two items were consumed one after the other: "
            "set encoder.train.epochs to 0"
        )
    # Training and the few texts of the decision are not worth converting the model for another backend.
    config = config.model_copy(update={"backend": "torch"})
    encoder = TextEncoder.load(config)
    sentence = encoder.module
    if pretrained is not None:
        sentence.transformer.load_state_dict({name: torch.tensor(value) for name, value in pretrained.items()})
    curve: list[Row] = []
    trained_share = seconds = 0.0
    if settings.epochs:
        if settings.adapter is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(data.seed)  # an adapter begins with random numbers
                sentence.transformer = adapt(sentence.transformer, settings.adapter, "FEATURE_EXTRACTION")
        started = time.perf_counter()
        curve, trained_share = _train(encoder, data, settings, config.content_hash(), runtime)
        seconds = time.perf_counter() - started
        sentence.transformer = merged(sentence.transformer)
    sentence.to("cpu").eval().requires_grad_(True)
    original = TextEncoder.load(config)
    before, after = (partner_mrr(one, data, settings.num_held_out) for one in (original, encoder))
    kept = after > before or not len(data.held_out)
    metrics = {"held_out_mrr_before": before, "held_out_mrr_after": after, "kept": float(kept)}
    metrics |= {"trained_share": trained_share, "train_seconds": seconds}
    return Finetuned(encoder if kept else original, curve, metrics)


def _train(
    encoder: TextEncoder, data: PairData, settings: TextTrainConfig, config_hash: str, runtime: Runtime
) -> tuple[list[Row], float]:
    """The learning curve, and the share of weights that learned."""
    tokens = encoder.tokenize(data.texts)
    pad_id: int = encoder.tokenizer.pad_token_id
    known = np.unique(pair_keys(data.pairs[:, 0], data.pairs[:, 1], len(tokens)))
    module = PairModule(encoder.module, settings.temperature)

    def plan(epoch: int) -> list[PairStep]:
        pairs = sample_epoch(data.pairs, settings, epoch, data.seed, runtime.world_size)
        starts = range(0, len(pairs), settings.batch_size)
        return [PairStep(pairs[start : start + settings.batch_size], tokens, known, pad_id) for start in starts]

    layers = 0 if settings.adapter is not None else settings.trainable_layers
    learn_top_layers(module, module.sentence.transformer, layers)
    freeze_unreached(module, module.eval()(plan(0)[0].part(0, 1, torch.device("cpu"))))
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    share = sum(size for size, learns in sizes if learns) / sum(size for size, _ in sizes)
    fingerprint = f"{config_hash}:{data.seed}:{len(tokens)}:{len(data.pairs)}"
    shared = settings.model_dump(include={"epochs", "learning_rate", "weight_decay", "warmup_steps"})
    loop = TrainConfig.parse(shared, where="encoder.train")
    curve = train(
        module, plan=plan, validate=None, config=loop, runtime=runtime, seed=data.seed, fingerprint=fingerprint
    )
    return curve, share


def partner_mrr(encoder: TextEncoder, data: PairData, num_pairs: int) -> float:
    """Mean reciprocal rank, over a seeded sample of held-out pairs and both directions, of an item's partner among
    all items of the sample by cosine. 0 where nothing is held out, and everything that was learned is kept.
    """
    if not len(data.held_out):
        return 0.0
    rng = np.random.default_rng([data.seed, 11])
    pairs = data.held_out[rng.choice(len(data.held_out), min(num_pairs, len(data.held_out)), replace=False)]
    items, rows = np.unique(pairs, return_inverse=True)
    rows = rows.reshape(pairs.shape)
    vectors_UD = encoder.encode([data.texts[int(item)] for item in items])
    anchors, partners = np.concatenate([rows, rows[:, ::-1]]).T
    scores = vectors_UD[anchors] @ vectors_UD.T
    own = np.arange(len(anchors))
    wanted = scores[own, partners]
    scores[own, anchors] = -np.inf
    return float((1.0 / (scores >= wanted[:, None]).sum(axis=1)).mean())


def sample_epoch(pairs: Pairs, config: TextTrainConfig, epoch: int, seed: int, world_size: int) -> Pairs:
    """The pairs of an epoch: a seeded sample in random order, either item first; the last step is never so small
    that a worker would be without a pair and a negative.
    """
    rng = np.random.default_rng([seed, epoch, 7])
    size = min(config.max_pairs, len(pairs))
    size -= size % config.batch_size if size % config.batch_size < 2 * world_size and size > config.batch_size else 0
    chosen = pairs[rng.choice(len(pairs), size, replace=False)]
    flip = rng.random(size) < 0.5
    return np.where(flip[:, None], chosen[:, ::-1], chosen)
