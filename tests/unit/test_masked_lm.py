"""Continued pretraining on the catalogue's texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recsys.errors import EmptyDataError
from recsys.models.text.encoder import TextEncoder, TextEncoderConfig, TextPretrainConfig
from recsys.models.text.masked_lm import MaskedModule, MaskedStep, _hide, pretrain
from recsys.models.text.tiny_encoder import tiny_encoder
from recsys.training.runtime import Runtime

WORDS = ["red", "green", "blue", "car", "bike", "boat"]
PAIRED = [f"{colour} {thing}" for colour, thing in zip(WORDS[:3], WORDS[3:], strict=True) for _ in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("bert"), WORDS)


def config_of(folder, **pretrain) -> TextEncoderConfig:
    settings = {"epochs": 3, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 1, "mask_share": 0.4, **pretrain}
    return TextEncoderConfig(model=str(folder), pretrain=TextPretrainConfig(**settings))


def steps(folder, num: int = 1) -> tuple[TextEncoder, list[MaskedStep], list[list[int]]]:
    encoder = TextEncoder.load(config_of(folder))
    tokens = encoder.tokenize(["red car red car red car", "green bike", "blue"])
    special = set(encoder.tokenizer.all_special_ids)
    rng = np.random.default_rng(0)
    return encoder, [_hide(tokens, encoder.tokenizer, special, 0.3, rng) for _ in range(num)], tokens


def test_words_are_hidden_and_asked_for_and_nothing_else(folder) -> None:
    encoder, made, tokens = steps(folder, 300)
    special = set(encoder.tokenizer.all_special_ids)
    num_words = sum(token not in special for ids in tokens for token in ids)
    shown = np.zeros(3)
    for step in made:
        share = step.part(0, 1, torch.device("cpu"))
        assert not set(share.token_M.tolist()) & special
        now = share.ids_BL.flatten()[share.place_M]
        mask = now == encoder.tokenizer.mask_token_id
        shown += [int(mask.sum()), int((now == share.token_M).sum()), len(now)]
        assert len(share.place_M) == step.weight >= len(tokens)  # at least one of each text
    asked = shown[2] / (300 * num_words)
    # The text of one word is always asked for, and the others almost as often as the share says.
    assert 0.3 < asked < 0.5
    assert 0.77 < shown[0] / shown[2] < 0.83
    assert 0.09 < shown[1] / shown[2] < 0.14  # those that stay, and random words that hit


def test_a_step_is_shared_among_workers_without_loss_or_overlap(folder) -> None:
    encoder, (step,), _ = steps(folder)
    module = MaskedModule(encoder.module.transformer).eval()
    with torch.no_grad():
        whole = module(step.part(0, 1, torch.device("cpu")))
        parts = [module(step.part(index, 5, torch.device("cpu"))) for index in range(5)]
    assert [float(part) for part in parts[3:]] == [0, 0]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


def test_it_learns_what_stands_beside_a_word_and_repeats_exactly(folder) -> None:
    """Each colour has one thing. A word is told by the other one; guessing among three costs log(3) = 1.1."""
    texts = [*PAIRED, *(f"{text} {text}" for text in PAIRED), *(f"{text} {text} {text}" for text in PAIRED)]
    config = config_of(folder, epochs=140, learning_rate=3e-3)
    _, curve = pretrain(config, texts, Runtime("cpu"), seed=3)
    assert curve[-1]["loss"] < 0.6 < curve[0]["loss"]
    again, same = pretrain(config_of(folder), texts, Runtime("cpu"), seed=3)
    more, other = (pretrain(config_of(folder), texts, Runtime("cpu"), seed=seed) for seed in (3, 4))
    assert same == more[1] != other[1]
    a, b = (one.module.transformer.state_dict() for one in (again, more[0]))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert set(a) == set(TextEncoder.load(config).module.transformer.state_dict())


def test_texts_without_words_are_refused(folder) -> None:
    with pytest.raises(EmptyDataError, match="no item has a text"):
        pretrain(config_of(folder), ["", ""], Runtime("cpu"), seed=0)
