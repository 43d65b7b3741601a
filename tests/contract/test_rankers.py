"""Every kind of ranker keeps the contract, in each form that may be served."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest

from recsys import schema
from recsys.data.features import ITEM_COLUMNS, ItemFeatures
from recsys.errors import ConfigError
from recsys.models import RANKER_KINDS
from recsys.models.rankers.attention import AttentionRanker, AttentionRankerConfig
from recsys.models.rankers.base import Ranker, RankerConfig, RankingCatalogue, RankingItems, item_content, ranking_batch
from recsys.models.rankers.causal_lm import CausalLMConfig, SmallDecoder
from recsys.models.rankers.cross_encoder import CrossEncoderConfig
from recsys.models.rankers.examples import RankingExamples
from recsys.models.rankers.export import ExportConfig, ExportedRanker, export_ranker, openvino_available
from recsys.models.rankers.text_ranker import TextRanker, TextRankerConfig
from recsys.models.text.adapters import LoRA, Prefix
from recsys.testing.covered import configured_kinds
from recsys.testing.planted import random_numeric
from recsys.testing.ranker_contract import RankerContract, ranking_query
from recsys.testing.tiny_encoder import tiny_encoder
from recsys.training.runtime import Runtime

CONFIG = AttentionRankerConfig(dim=16, hidden=16, max_history=8, epochs=1)


def fitted() -> tuple[AttentionRanker, RankingExamples]:
    rng = np.random.default_rng(0)
    features = ItemFeatures(
        random_numeric(rng, 50),
        np.eye(5, dtype=np.float32)[rng.integers(0, 5, 50)],
        rng.integers(-1, 5, 50).astype(np.int32),
        rng.integers(0, 10**12, 50),
    )
    items = RankingItems.of(features, rng.normal(size=(50, 8)).astype(np.float32))
    batch = ranking_batch([ranking_query(seed, 50) for seed in range(64)], items, CONFIG.max_history)
    relevant = np.eye(40, dtype=bool)[rng.integers(0, 40, 64)]
    examples = RankingExamples(batch, relevant, np.arange(64, dtype=np.int32), 0, np.ones(64, np.int64), uses_time=True)
    catalogue = RankingCatalogue(items, item_content(None, features), pa.table({}))
    return CONFIG.fit(examples, catalogue, Runtime("cpu"), holdout=None, seed=0), examples


def exported(precision: str) -> ExportedRanker:
    if not openvino_available():
        pytest.skip("openvino is not installed on this platform")
    ranker, examples = fitted()
    (form,) = export_ranker(ranker, ExportConfig(precisions=(precision,)), examples.batch)
    return form


class TestAttentionExportedF32(RankerContract):
    def fit(self) -> ExportedRanker:
        return exported("f32")


class TestAttentionExportedInt8(RankerContract):
    def fit(self) -> ExportedRanker:
        return exported("int8")


COLOURS = ("red", "blue", "green", "white", "black")


def planted() -> tuple[RankingExamples, RankingExamples, RankingCatalogue]:
    """The user always takes the one candidate whose title has the word of the newest history item."""
    rng = np.random.default_rng(1)
    colour = np.arange(50) % 5
    features = ItemFeatures(
        np.zeros((50, len(ITEM_COLUMNS)), np.float32),
        np.zeros((50, 1), np.float32),
        np.zeros(50, np.int32),
        np.zeros(50, np.int64),
    )
    items = RankingItems.of(features, rng.normal(size=(50, 8)).astype(np.float32))
    queries, relevant = [], np.zeros((120, 4), bool)
    for row in range(120):
        query = ranking_query(row, 50, length=2, num_candidates=4)
        same = colour == colour[query.history.item_idx[-1]]
        candidates = np.concatenate([rng.choice(np.flatnonzero(same), 1), rng.choice(np.flatnonzero(~same), 3, False)])
        candidates = rng.permutation(candidates).astype(np.int32)
        relevant[row] = same[candidates]
        queries.append(replace(query, candidate_item_idx=candidates))
    batch = ranking_batch(queries, items, 2)
    users = np.arange(120, dtype=np.int32)
    examples = RankingExamples(batch, relevant, users, 0, np.ones(120, np.int64), uses_time=True)
    table = schema.ITEMS.empty_table()
    columns = {name: pa.nulls(50, table.schema.field(name).type) for name in table.column_names}
    columns["title"] = pa.array([f"{COLOURS[item % 5]} thing" for item in range(50)])
    catalogue = RankingCatalogue(items, np.eye(5, dtype=np.float32)[colour], pa.table(columns))
    return *examples.split_by_user(0.25, 0), catalogue


class PlantedContract(RankerContract):
    """Besides: it learns. Chance orders four candidates with an NDCG@10 of 0.64."""

    config: ClassVar[RankerConfig]

    def fit(self) -> Ranker:
        train, holdout, catalogue = planted()
        return self.config.fit(train, catalogue, Runtime("cpu"), holdout=holdout, seed=0)

    def test_it_finds_what_is_planted(self, ranker: Ranker) -> None:
        _, holdout, _ = planted()
        assert holdout.ndcg10(ranker.score(holdout.batch)).mean() > 0.85
        assert ranker.num_epochs > 0

    def test_it_learns_alike_in_mixed_precision(self) -> None:
        train, _, catalogue = planted()
        short = self.config.model_copy(update={"epochs": 3})
        whole, mixed = (
            [row["loss"] for row in short.fit(train, catalogue, runtime, holdout=None, seed=0).history]
            for runtime in (Runtime("cpu"), Runtime("cpu", precision="bf16"))
        )
        assert whole != mixed
        np.testing.assert_allclose(mixed, whole, rtol=0.05)


class TestAttention(PlantedContract):
    """The colour is in the content vectors."""

    config = AttentionRankerConfig(
        dim=16, hidden=32, max_history=2, num_negatives=3, epochs=40, patience=40, batch_queries=4, dropout=0.0
    )


class TextRankerContract(PlantedContract):
    """Besides: it reads."""

    config: ClassVar[TextRankerConfig]

    def test_an_untrained_one_keeps_the_order_of_retrieval(self) -> None:
        train, holdout, catalogue = planted()
        fresh = self.config.model_copy(update={"epochs": 0}).fit(train, catalogue, Runtime("cpu"), holdout=None, seed=0)
        retrieval = holdout.batch.features[..., 0]
        np.testing.assert_array_equal(np.argsort(fresh.score(holdout.batch)), np.argsort(retrieval))

    def test_other_items_of_another_bundle(self, ranker: Ranker) -> None:
        """Items in the opposite order have the same scores under their new numbers."""
        _, holdout, catalogue = planted()
        swapped = RankingCatalogue(catalogue.items, catalogue.content, catalogue.table.take(np.arange(50)[::-1]))
        batch = holdout.batch
        turned = replace(
            batch,
            candidate_item_idx=np.where(batch.candidate_item_idx < 0, -1, 49 - batch.candidate_item_idx),
            history_item_idx=np.where(batch.history_item_idx < 0, -1, 49 - batch.history_item_idx),
        )
        np.testing.assert_allclose(ranker.with_items(swapped).score(turned), ranker.score(batch), atol=1e-5)

    def test_texts_are_needed(self) -> None:
        train, _, catalogue = planted()
        without = with_titles(catalogue, pa.nulls(50, pa.string()))
        with pytest.raises(ConfigError, match="no item has a text"):
            self.config.fit(train, without, Runtime("cpu"), holdout=None, seed=0)

    def test_texts_longer_than_the_model(self) -> None:
        check_long_texts(self.config)


def with_titles(catalogue: RankingCatalogue, titles: pa.Array) -> RankingCatalogue:
    at = catalogue.table.column_names.index("title")
    return replace(catalogue, table=catalogue.table.set_column(at, "title", titles))


def check_long_texts(config: TextRankerConfig) -> None:
    """Texts longer than what the model can read are cut, whatever else takes places."""
    train, _, catalogue = planted()
    catalogue = with_titles(catalogue, pa.array(["red blue green " * 60] * 50))
    for max_item_tokens in (20, 31, 32, 63, 64, 200):
        long = config.model_copy(update={"epochs": 0, "max_item_tokens": max_item_tokens})
        ranker = long.fit(train, catalogue, Runtime("cpu"), holdout=None, seed=0)
        assert np.isfinite(ranker.score(train.batch[:2])).all()


SMALL_TEXT = {"max_history": 2, "fields": ("title",), "patience": 40, "num_negatives": 3}
SMALL_DECODER = SmallDecoder(num_layers=1, dim=32, vocabulary=320, max_tokens=64)


class TestCausalLM(TextRankerContract):
    config = CausalLMConfig(**SMALL_TEXT, epochs=32, small=SMALL_DECODER, learning_rate=1e-2, head_learning_rate=0.1)


CROSS_ENCODER = CrossEncoderConfig(
    **SMALL_TEXT, epochs=30, batch_queries=4, learning_rate=2e-3, head_learning_rate=1e-2
)


class TinyEncoder:
    """``config`` with an encoder that knows the planted words."""

    config: ClassVar[CrossEncoderConfig]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _with_a_tiny_encoder(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        folder = tiny_encoder(tmp_path_factory.mktemp("bert"), [*COLOURS, "thing"], dim=32)
        cls.config = cls.config.model_copy(update={"model": str(folder)})


class TestCrossEncoder(TinyEncoder, TextRankerContract):
    config = CROSS_ENCODER


class TestCrossEncoderWithSquaredError(TinyEncoder, TextRankerContract):
    config = CROSS_ENCODER.model_copy(update={"objective": "mse"})


class TestCrossEncoderWithLoRA(TinyEncoder, TextRankerContract):
    config = CROSS_ENCODER.model_copy(update={"adapter": LoRA(rank=8), "learning_rate": 4e-3})


class PrefixContract(RankerContract):
    """A prefix steers what a model knows; one of random weights knows nothing to be steered to."""

    config: ClassVar[TextRankerConfig]

    def fit(self) -> TextRanker:
        train, _, catalogue = planted()
        return self.config.fit(train, catalogue, Runtime("cpu"), holdout=None, seed=0)

    def test_the_prefix_alone_has_learned(self, ranker: TextRanker) -> None:
        learned = [name for name, weight in ranker.network.transformer.named_parameters() if weight.requires_grad]
        assert learned
        assert all("prompt" in name for name in learned)

    def test_texts_longer_than_the_model(self) -> None:
        check_long_texts(self.config)


class TestCausalLMWithPrefix(PrefixContract):
    config = CausalLMConfig(**SMALL_TEXT, epochs=1, small=SMALL_DECODER, adapter=Prefix(num_tokens=4))


class TestCrossEncoderWithPrefix(TinyEncoder, PrefixContract):
    config = CROSS_ENCODER.model_copy(update={"adapter": Prefix(num_tokens=4), "epochs": 1})


def test_every_kind_learns_what_is_planted() -> None:
    assert set(RANKER_KINDS) <= configured_kinds(PlantedContract)
