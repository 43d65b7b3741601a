"""Every kind of ranker keeps the contract, in each form that may be served."""

from __future__ import annotations

import numpy as np
import pytest

from recsys.data.features import ItemFeatures
from recsys.models import RANKER_KINDS
from recsys.models.attention_ranker import AttentionRanker, AttentionRankerConfig, fit_ranker, item_content
from recsys.models.ranker_export import ExportConfig, ExportedRanker, export_ranker, openvino_available
from recsys.models.ranking import RankingItems, ranking_batch
from recsys.testing.ranker_contract import RankerContract, ranking_query
from recsys.training.ranking_examples import RankingExamples
from recsys.training.runtime import Runtime

CONFIG = AttentionRankerConfig(dim=16, hidden=16, max_history=8, epochs=1)


def fitted() -> tuple[AttentionRanker, RankingExamples]:
    rng = np.random.default_rng(0)
    features = ItemFeatures(
        rng.normal(size=(50, 7)).astype(np.float32),
        np.eye(5, dtype=np.float32)[rng.integers(0, 5, 50)],
        rng.integers(-1, 5, 50).astype(np.int32),
        rng.integers(0, 10**12, 50),
    )
    items = RankingItems.of(features, rng.normal(size=(50, 8)).astype(np.float32))
    batch = ranking_batch([ranking_query(seed, 50) for seed in range(64)], items, CONFIG.max_history)
    relevant = np.eye(40, dtype=bool)[rng.integers(0, 40, 64)]
    examples = RankingExamples(batch, relevant, np.arange(64, dtype=np.int32), 0, np.ones(64, np.int64), uses_time=True)
    content = item_content(None, features)
    return fit_ranker(CONFIG, examples, items, content, Runtime("cpu"), holdout=None, seed=0), examples


def exported(precision: str) -> ExportedRanker:
    if not openvino_available():
        pytest.skip("openvino is not installed on this platform")
    ranker, examples = fitted()
    (form,) = export_ranker(ranker, ExportConfig(precisions=(precision,)), examples.batch)
    return form


class TestAttention(RankerContract):
    def fit(self) -> AttentionRanker:
        return fitted()[0]


class TestAttentionExportedF32(RankerContract):
    def fit(self) -> ExportedRanker:
        return exported("f32")


class TestAttentionExportedInt8(RankerContract):
    def fit(self) -> ExportedRanker:
        return exported("int8")


def test_every_kind_is_tested() -> None:
    assert (AttentionRankerConfig,) == RANKER_KINDS
