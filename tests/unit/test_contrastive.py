"""Contrastive fine-tuning: pairs, false negatives, the loss, determinism, leaks and resuming."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys import schema
from recsys.data.dataset import Dataset, DatasetInfo, Split
from recsys.data.histories import Histories
from recsys.errors import EmptyDataError
from recsys.models.text.adapters import LoRA, Prefix
from recsys.models.text.contrastive import (
    PairData,
    PairStep,
    consecutive_pairs,
    false_negatives,
    finetune,
    info_nce,
    pair_keys,
    partner_mrr,
    sample_epoch,
)
from recsys.models.text.encoder import TextEncoder, TextEncoderConfig, TextTrainConfig
from recsys.models.text.tiny_encoder import tiny_encoder
from recsys.training.runtime import Runtime

WORDS = ["red", "green", "blue", "car", "bike", "boat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_encoder(tmp_path_factory.mktemp("bert"), WORDS)


def config_of(folder, **train) -> TextEncoderConfig:
    settings = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 1, **train}
    return TextEncoderConfig(model=str(folder), backend="torch", train=TextTrainConfig(**settings))


@pytest.fixture(scope="module")
def data() -> PairData:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 4)) for _ in range(30)]
    histories = Histories.from_lists([rng.permutation(30)[:6].tolist() for _ in range(12)])
    return PairData(texts, consecutive_pairs(histories, 1), seed=3)


def dataset(splits: list[list[tuple[int, Split]]], num_items: int) -> Dataset:
    rows = [
        {"user_idx": user, "item_idx": item, "position": place, "event": "view", "weight": 1.0, "split": int(split)}
        for user, log in enumerate(splits)
        for place, (item, split) in enumerate(log)
    ]
    info = DatasetInfo(
        name="toy",
        fingerprint="",
        id_map_fingerprint="",
        has_time=False,
        protocol="leave_one_out",
        num_users=len(splits),
        num_items=num_items,
        num_interactions=len(rows),
        num_positives=len(rows),
        num_quarantined=0,
        counts_by_split={},
    )
    return Dataset(pa.Table.from_pylist(rows, schema=schema.PREPARED_INTERACTIONS), pa.table({}), pa.table({}), info)


def test_pairs_are_neighbours_in_one_history():
    histories = Histories.from_lists([[3, 1, 1, 2], [], [5], [2, 1]])
    assert consecutive_pairs(histories, 1).tolist() == [[1, 2], [1, 3]]
    assert consecutive_pairs(histories, 2).tolist() == [[1, 2], [1, 3]]
    assert consecutive_pairs(histories, 3).tolist() == [[1, 2], [1, 3], [2, 3]]
    assert consecutive_pairs(Histories.from_lists([]), 2).shape == (0, 2)


def test_only_the_train_split_makes_pairs():
    train, valid, test = Split.TRAIN, Split.VALID, Split.TEST
    toy = dataset([[(0, train), (1, train), (2, valid), (3, test)], [(4, train), (0, train), (5, test)]], 6)
    pairs = PairData.of(toy, [""] * 6, window=3).pairs
    assert pairs.tolist() == [[0, 1], [0, 4]]


def test_fine_tuning_without_pairs_is_refused():
    alone = PairData.of(dataset([[(0, Split.TRAIN)], [(1, Split.TRAIN)]], 2), ["", ""], window=1)
    assert not len(alone.pairs)
    config = TextEncoderConfig.parse({"train": {"epochs": 1}}, where="encoder")
    with pytest.raises(EmptyDataError, match="one after the other"):
        finetune(config, alone, Runtime("cpu"))


def test_false_negatives():
    pairs = np.array([[0, 1], [2, 3], [4, 1], [5, 0], [6, 7]], np.int32)
    known = np.unique(np.concatenate([pair_keys(pairs[:, 0], pairs[:, 1], 8), [0 * 8 + 3]]))
    expected = np.zeros((5, 5), bool)
    expected[0, 1] = True  # 0 and 3 are known to go together
    expected[0, 2] = expected[2, 0] = True  # the same positive, item 1
    expected[0, 3] = True  # the positive of row 3 is the anchor of row 0
    np.testing.assert_array_equal(false_negatives(pairs, known, 8), expected)


def test_loss_against_plain_arithmetic():
    rng = np.random.default_rng(1)
    anchors, positives = (torch.nn.functional.normalize(torch.tensor(rng.normal(size=(4, 3)))) for _ in range(2))
    forbidden = torch.zeros(4, 4, dtype=torch.bool)
    forbidden[0, 2] = True
    scores = (anchors @ positives.T / 0.1).numpy()
    scores[0, 2] = -np.inf
    exp = np.exp(scores)
    forth = -np.log(np.diag(exp) / exp.sum(1)).sum()
    back = -np.log(np.diag(exp) / exp.sum(0)).sum()
    assert info_nce(anchors, positives, forbidden, 0.1).item() == pytest.approx((forth + back) / 2)


def test_a_step_is_shared_among_workers_without_loss_or_overlap(data):
    tokens = [[2, 5, 3]] * 30
    known = np.unique(pair_keys(data.pairs[:, 0], data.pairs[:, 1], 30))
    step = PairStep(data.pairs[:9], tokens, known, 0)
    shares = [step.part(index, 2, torch.device("cpu")) for index in range(2)]
    assert [len(share.anchors_P) for share in shares] == [5, 4]


def test_epochs_differ_and_repeat_exactly(data):
    settings = TextTrainConfig(batch_size=8, max_pairs=20)
    one = sample_epoch(data.pairs, settings, 0, seed=1, world_size=2)
    np.testing.assert_array_equal(one, sample_epoch(data.pairs, settings, 0, seed=1, world_size=2))
    assert not np.array_equal(one, sample_epoch(data.pairs, settings, 1, seed=1, world_size=2))
    known = set(map(tuple, data.pairs.tolist()))
    assert len(one) == 20
    assert {(min(pair), max(pair)) for pair in one.tolist()} <= known


def test_the_last_step_leaves_no_worker_without_a_negative(data):
    settings = TextTrainConfig(batch_size=8, max_pairs=18)
    assert len(sample_epoch(data.pairs, settings, 0, seed=1, world_size=2)) == 16
    assert len(sample_epoch(data.pairs, settings, 0, seed=1, world_size=1)) == 18


def test_fine_tuning_lowers_the_loss_and_is_deterministic(folder, data):
    config = config_of(folder, epochs=8)
    tuned = finetune(config, data, Runtime("cpu"))
    encoder, curve = tuned.encoder, tuned.curve
    assert curve[-1]["loss"] < curve[0]["loss"]
    tuned = finetune(config, data, Runtime("cpu"))
    again, curve_again = tuned.encoder, tuned.curve
    assert curve == curve_again
    np.testing.assert_array_equal(encoder.encode(data.texts), again.encode(data.texts))
    assert not np.allclose(encoder.encode(data.texts), TextEncoder.load(config).encode(data.texts), atol=1e-3)


def test_only_the_topmost_layers_learn(folder, data):
    before = TextEncoder.load(config_of(folder)).module.state_dict()
    tuned = finetune(config_of(folder, trainable_layers=1), data, Runtime("cpu"))
    encoder = tuned.encoder
    changed = {name for name, value in encoder.module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("encoder.layer.1." in name for name in changed)
    tuned = finetune(config_of(folder, trainable_layers=0), data, Runtime("cpu"))
    whole = tuned.encoder
    changed = {name for name, value in whole.module.state_dict().items() if not torch.equal(value, before[name])}
    assert any("word_embeddings" in name for name in changed)
    assert not any("pooler" in name for name in changed), "sentence vectors do not use the pooler"


class StoppedError(Exception):
    pass


def test_an_interrupted_training_goes_on_where_it_was(folder, data, tmp_path):
    config = config_of(folder, epochs=4)
    tuned = finetune(config, data, Runtime("cpu"))
    expected, expected_curve = tuned.encoder, tuned.curve

    def stop_after_two(metrics):
        if metrics["epoch"] == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        finetune(config, data, Runtime("cpu", checkpoints=tmp_path, report=stop_after_two))
    epochs: list[float] = []
    runtime = Runtime("cpu", checkpoints=tmp_path, report=lambda metrics: epochs.append(metrics["epoch"]))
    tuned = finetune(config, data, runtime)
    encoder, curve = tuned.encoder, tuned.curve
    assert epochs == [3, 4], "the first two epochs are not trained again"
    assert curve == expected_curve
    np.testing.assert_array_equal(encoder.encode(data.texts), expected.encode(data.texts))
    assert not [path for path in tmp_path.rglob("*") if path.suffix in {".pt", ".bin", ".pkl"}]


def test_what_was_learned_is_kept_only_where_it_finds_held_out_partners_better(folder, data):
    judged = dataclasses.replace(data, held_out=data.pairs)
    good = finetune(config_of(folder, epochs=8), judged, Runtime("cpu"))
    assert good.metrics["kept"] and good.metrics["held_out_mrr_after"] > good.metrics["held_out_mrr_before"]
    # Partners that training pushed apart: pairs it never saw, of items it met as negatives of each other.
    never = np.array([[0, 1]], np.int32)
    worse = finetune(config_of(folder, epochs=8), dataclasses.replace(data, held_out=never), Runtime("cpu"))
    untouched = TextEncoder.load(config_of(folder)).encode(data.texts)
    kept = worse.metrics["held_out_mrr_after"] > worse.metrics["held_out_mrr_before"]
    assert worse.metrics["kept"] == kept
    assert np.allclose(worse.encoder.encode(data.texts), untouched, atol=1e-6) != kept


def test_partner_mrr_is_one_for_twins_and_counts_both_directions(folder):
    encoder = TextEncoder.load(config_of(folder))
    texts = [WORDS[0], WORDS[0], f"{WORDS[1]} {WORDS[2]}", f"{WORDS[1]} {WORDS[2]}"]
    twins = PairData(texts, np.array([[0, 1]], np.int32), np.array([[0, 1], [2, 3]], np.int32))
    assert partner_mrr(encoder, twins, 10) == 1.0
    assert partner_mrr(encoder, dataclasses.replace(twins, held_out=np.array([[0, 2], [1, 3]], np.int32)), 10) <= 0.5


def test_lora_learns_little_and_leaves_an_ordinary_encoder(folder, data, tmp_path):
    config = config_of(folder, adapter=LoRA(rank=2), trainable_layers=0)
    result = finetune(config, replace(data, held_out=data.held_out[:0]), Runtime("cpu"))
    whole = finetune(config_of(folder, trainable_layers=0), replace(data, held_out=data.held_out[:0]), Runtime("cpu"))
    assert result.curve[-1]["loss"] < result.curve[0]["loss"]
    assert 0 < result.metrics["trained_share"] < 0.5 < whole.metrics["trained_share"]
    before, after = (one.module.transformer.state_dict() for one in (TextEncoder.load(config), result.encoder))
    assert set(before) == set(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("embeddings" not in name for name in changed)
    result.encoder.save(tmp_path / "merged")
    loaded = TextEncoder.load(config, tmp_path / "merged")
    np.testing.assert_allclose(loaded.encode(data.texts), result.encoder.encode(data.texts), atol=1e-6)


@pytest.mark.parametrize("adapter", [LoRA(rank=2), Prefix(num_tokens=3)], ids=["lora", "prefix"])
def test_adapters_begin_the_same_whatever_was_drawn_before(folder, data, adapter):
    config = config_of(folder, adapter=adapter, learning_rate=1e-2)
    losses = []
    for before in (1, 2):
        torch.manual_seed(before)
        losses.append([row["loss"] for row in finetune(config, data, Runtime("cpu")).curve])
    assert losses[0] == losses[1]


def test_a_prefix_is_saved_beside_the_encoder(folder, data, tmp_path):
    config = config_of(folder, adapter=Prefix(num_tokens=3), learning_rate=1e-2)
    result = finetune(config, replace(data, held_out=data.held_out[:0]), Runtime("cpu"))
    result.encoder.save(tmp_path / "prefixed")
    loaded = TextEncoder.load(config.encoding(), tmp_path / "prefixed")  # all that a Bundle says of it
    assert loaded.max_tokens == result.encoder.max_tokens == TextEncoder.load(config).max_tokens - 3
    vectors = loaded.encode(data.texts)
    np.testing.assert_allclose(vectors, result.encoder.encode(data.texts), atol=1e-6)
    assert np.abs(vectors - TextEncoder.load(config).encode(data.texts)).max() > 1e-3


def test_fine_tuning_goes_on_from_pretrained_weights(folder, data):
    """Without epochs of its own it only decides: weights that find partners no better are left."""
    config = config_of(folder, epochs=0)
    before = TextEncoder.load(config).module.transformer.state_dict()
    pretrained = {name: value.numpy() * 1.5 for name, value in before.items()}
    taken = finetune(config, replace(data, held_out=data.held_out[:0]), Runtime("cpu"), pretrained)
    state = taken.encoder.module.transformer.state_dict()
    assert all(np.array_equal(state[name].numpy(), value) for name, value in pretrained.items())
    assert taken.curve == []
    zeros = {name: value * 0 for name, value in pretrained.items()}
    left = finetune(config, replace(data, held_out=data.pairs[:20]), Runtime("cpu"), zeros)
    assert left.metrics["kept"] == 0
