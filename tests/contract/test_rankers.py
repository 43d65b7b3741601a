"""Every kind of ranker keeps the contract, in each form that may be served; and what is more in some of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest

from recsys.data.features import ItemFeatures
from recsys.errors import ConfigError
from recsys.libraries import installed
from recsys.models.rankers import KINDS
from recsys.models.rankers.attention import AttentionRankerConfig
from recsys.models.rankers.attention_network import AttentionRanker
from recsys.models.rankers.base import Ranker, RankerConfig
from recsys.models.rankers.causal_lm import CausalLMConfig
from recsys.models.rankers.cross_encoder import CrossEncoderConfig
from recsys.models.rankers.examples import RankingExamples
from recsys.models.rankers.export import ExportConfig, ExportedRanker, export_ranker
from recsys.models.rankers.queries import RankingCatalogue, RankingItems, item_content, ranking_batch
from recsys.models.rankers.text_ranker import TextRanker, TextRankerConfig
from recsys.models.text.adapters import LoRA, Prefix
from recsys.testing.planted import random_numeric
from recsys.testing.ranker_contract import PlantedContract, RankerContract, planted, ranking_query
from recsys.testing.samples import sample_of
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
    if not installed("openvino"):
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


class TextRankerContract(PlantedContract):
    """Besides: it reads."""

    @property
    def text_config(self) -> TextRankerConfig:
        if not isinstance(self.config, TextRankerConfig):
            pytest.skip("this kind reads no texts")
        return self.config

    def test_an_untrained_one_keeps_the_order_of_retrieval(self) -> None:
        train, holdout, catalogue = planted()
        fresh = self.text_config.model_copy(update={"epochs": 0}).fit(
            train, catalogue, Runtime("cpu"), holdout=None, seed=0
        )
        retrieval = holdout.batch.features[..., 0]
        np.testing.assert_array_equal(np.argsort(fresh.score(holdout.batch)), np.argsort(retrieval))

    def test_other_items_of_another_bundle(self, ranker: Ranker) -> None:
        """Items in the opposite order have the same scores under their new numbers."""
        assert self.text_config
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
            self.text_config.fit(train, without, Runtime("cpu"), holdout=None, seed=0)

    def test_texts_longer_than_the_model(self) -> None:
        check_long_texts(self.text_config)


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


class TestEveryKind(TextRankerContract):
    @pytest.fixture(autouse=True, scope="class", params=KINDS.names)
    @classmethod
    def _sample(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
        cls.take_sample(KINDS.get(request.param), tmp_path_factory.mktemp(request.param))


class Changed:
    """The sample of ``kind``, with ``changes``."""

    kind: ClassVar[type[RankerConfig]] = CrossEncoderConfig
    changes: ClassVar[dict[str, Any]]
    config: ClassVar[RankerConfig]

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _sample(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        cls.config = sample_of(cls.kind, tmp_path_factory.mktemp("sample")).model_copy(update=cls.changes)


class TestCrossEncoderWithSquaredError(Changed, TextRankerContract):
    changes: ClassVar = {"objective": "mse"}


class TestCrossEncoderWithLoRA(Changed, TextRankerContract):
    changes: ClassVar = {"adapter": LoRA(rank=8), "learning_rate": 4e-3}


class PrefixContract(Changed, RankerContract):
    """A prefix steers what a model knows; one of random weights knows nothing to be steered to."""

    def fit(self) -> Ranker:
        train, _, catalogue = planted()
        return self.config.fit(train, catalogue, Runtime("cpu"), holdout=None, seed=0)

    def test_the_prefix_alone_has_learned(self, ranker: TextRanker) -> None:
        learned = [name for name, weight in ranker.network.transformer.named_parameters() if weight.requires_grad]
        assert learned
        assert all("prompt" in name for name in learned)

    def test_texts_longer_than_the_model(self) -> None:
        check_long_texts(self.config)


class TestCausalLMWithPrefix(PrefixContract):
    kind = CausalLMConfig
    changes: ClassVar = {
        "adapter": Prefix(num_tokens=4),
        "epochs": 1,
        "learning_rate": 5e-5,
        "head_learning_rate": 1e-3,
    }


class TestCrossEncoderWithPrefix(PrefixContract):
    changes: ClassVar = {"adapter": Prefix(num_tokens=4), "epochs": 1}
