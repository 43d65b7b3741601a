"""The text encoder, on a tiny random BERT made here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError

from recsys import schema
from recsys.errors import ConfigError, ModelError
from recsys.models.text.encoder import (
    SentenceModule,
    TextEncoder,
    TextEncoderConfig,
    equal_length_batches,
    item_texts,
    pad,
)
from recsys.models.text.tiny_encoder import tiny_encoder

WORDS = ["red", "green", "blue", "car", "bike", "boat", "fast", "slow", "big", "small"]


def some_texts(count: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(0, 12))) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_encoder(tmp_path_factory.mktemp("bert"), [".", ",", *WORDS], dim=32, max_tokens=32)


@pytest.fixture(scope="module")
def config(folder) -> TextEncoderConfig:
    return TextEncoderConfig(model=str(folder), backend="torch", batch_tokens=64)


@pytest.fixture(scope="module")
def encoder(config) -> TextEncoder:
    return TextEncoder.load(config)


def test_vectors_are_unit_float32_and_deterministic(encoder, config):
    texts = some_texts(40)
    vectors = encoder.encode(texts)
    assert vectors.shape == (40, encoder.dim)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(vectors, TextEncoder.load(config).encode(texts))


def test_a_vector_depends_on_its_own_text_only(encoder):
    texts = some_texts(30)
    together = encoder.encode(texts)
    np.testing.assert_allclose(together, np.concatenate([encoder.encode([text]) for text in texts]), atol=1e-6)
    np.testing.assert_allclose(together[::-1], encoder.encode(texts[::-1]), atol=1e-6)


def test_padded_training_forward_agrees_with_unpadded_encoding(encoder):
    texts = some_texts(20)
    with torch.inference_mode():
        padded = encoder.module(*pad(encoder.tokenize(texts), encoder.tokenizer.pad_token_id)).numpy()
    np.testing.assert_allclose(padded, encoder.encode(texts), atol=1e-5)


def test_threads_change_nothing(encoder, config):
    texts = some_texts(40)
    alone = encoder.encode(texts)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        several = TextEncoder.load(config).encode(texts)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    np.testing.assert_allclose(several, alone, atol=1e-6)


def test_equal_texts_are_computed_once(encoder, monkeypatch):
    computed: list[str] = []
    tokenize = encoder.tokenize
    monkeypatch.setattr(encoder, "tokenize", lambda texts: computed.extend(texts) or tokenize(texts))
    vectors = encoder.encode(["red car", "blue boat", "red car"])
    assert computed == ["red car", "blue boat"]
    np.testing.assert_array_equal(vectors[0], vectors[2])
    assert not np.allclose(vectors[0], vectors[1])


def test_no_text_and_no_texts(encoder):
    assert encoder.encode([]).shape == (0, encoder.dim)
    assert np.isfinite(encoder.encode([""])).all()


def test_long_texts_are_cut(folder):
    encoder = TextEncoder.load(TextEncoderConfig(model=str(folder), backend="torch", max_tokens=6))
    assert max(len(ids) for ids in encoder.tokenize([" ".join(["car"] * 100)])) == 6
    wide = TextEncoder.load(TextEncoderConfig(model=str(folder), backend="torch", max_tokens=500))
    assert wide.max_tokens == 32, "never more than the model reads"


def test_cls_pooling_takes_the_first_token(encoder):
    ids = torch.tensor([[2, 7, 10, 3]])
    first = SentenceModule(encoder.module.transformer, "cls").eval()
    with torch.inference_mode():
        hidden = encoder.module.transformer(input_ids=ids).last_hidden_state[:, 0]
        torch.testing.assert_close(first(ids), torch.nn.functional.normalize(hidden))


def test_batches_share_one_length_within_the_budget():
    lengths = [*np.random.default_rng(0).integers(1, 20, 200).tolist(), 500]
    batches = list(equal_length_batches(lengths, 64))
    assert sorted(np.concatenate(batches).tolist()) == list(range(201))
    for rows in batches:
        assert len({lengths[row] for row in rows}) == 1
        assert len(rows) == 1 or len(rows) * lengths[rows[0]] <= 64


def test_saved_encoder_encodes_the_same_and_holds_no_pickle(encoder, config, tmp_path):
    encoder.save(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert "model.safetensors" in names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    texts = some_texts(5)
    np.testing.assert_array_equal(TextEncoder.load(config, tmp_path).encode(texts), encoder.encode(texts))


def test_openvino_agrees_with_torch(folder, encoder):
    pytest.importorskip("openvino", reason="openvino is not installed on this platform")
    texts = some_texts(30)
    other = TextEncoder.load(TextEncoderConfig(model=str(folder), backend="openvino")).encode(texts)
    np.testing.assert_allclose(other, encoder.encode(texts), atol=0.02)


def test_a_folder_without_safetensors_is_refused(folder, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(ModelError, match="not a usable"):
        TextEncoder.load(TextEncoderConfig(model=str(tmp_path)))


def test_wrong_model_names_say_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="pip install no-such-encoder"):
        TextEncoderConfig(model="package:no-such-encoder").model_folder()
    with pytest.raises(ConfigError, match=r"config\.json"):
        TextEncoderConfig(model=str(tmp_path)).model_folder()
    with pytest.raises(ValidationError):
        TextEncoderConfig(fields=("colour",))


def items() -> pa.Table:
    rows = [
        {"title": "Heat", "categories": ["Crime", "Drama"], "creator": "Mann", "description": " A thief. "},
        {"title": "Up", "categories": [], "creator": None, "description": None},
        {"title": "", "categories": ["Drama"], "creator": "", "description": None},
        {"title": "", "categories": [], "creator": None, "description": ""},
    ]
    full = [{"item_id": str(i), "available": True, **row} for i, row in enumerate(rows)]
    return pa.Table.from_pylist(full, schema=schema.ITEMS)


def test_text_of_an_item_joins_what_is_there():
    assert item_texts(items(), TextEncoderConfig()) == ["Heat. Crime, Drama. Mann. A thief.", "Up", "Drama", ""]
    chosen = TextEncoderConfig(fields=("creator", "title"), separator=" | ")
    assert item_texts(items(), chosen) == ["Mann | Heat", "Up", "", ""]
