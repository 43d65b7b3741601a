"""What features are worth: found where it was planted, and what is left out is not read."""

import json

import numpy as np
import pytest

from jobs import features, pipeline
from jobs.steps import train_ranker
from recsys.data.features import FEATURE_NAMES, NUM_FEATURES
from recsys.errors import ConfigError
from recsys.evaluation.importance import ndcg10, permutation_importance, worthless
from recsys.models.rankers.attention import AttentionRankerConfig
from recsys.models.rankers.examples import RankingExamples
from recsys.models.rankers.queries import PADDING, RankingBatch


@pytest.fixture
def examples():
    """Two hundred queries of up to twelve candidates; the chosen one has the highest ``item_mean_value``."""
    generator = np.random.default_rng(0)
    shape = 200, 12
    values = generator.normal(size=(*shape, NUM_FEATURES)).astype(np.float32)
    items = np.tile(np.arange(12, dtype=np.int32), (200, 1))
    short = np.arange(12) >= generator.integers(4, 13, 200)[:, None]
    items[short] = PADDING
    column = FEATURE_NAMES.index("item_mean_value")
    values[short, column] = -np.inf
    relevant = values[:, :, column] == values[:, :, column].max(axis=1, keepdims=True)
    values[short] = 0
    nothing = np.full((200, 1), PADDING, np.int32)
    batch = RankingBatch(items, nothing, np.zeros((200, 1), np.float32), values)
    return RankingExamples(batch, relevant, np.arange(200, dtype=np.int32) // 2, 0, np.ones(200, np.int64), True)


def score(batch):
    """A ranker that reads two features, one of which means nothing."""
    right, wrong = (batch.features[:, :, FEATURE_NAMES.index(name)] for name in ("item_mean_value", "creator_share"))
    return right + 0.001 * wrong


def test_what_matters_is_found_and_nothing_else(examples):
    assert ndcg10(score, examples).mean() > 0.99
    importance = permutation_importance(score, examples)
    assert importance["item_mean_value"].low > 0.3
    assert importance["similarity_last"].mean == 0
    assert set(worthless(importance)) == set(FEATURE_NAMES[1:]) - {"item_mean_value"}
    again = permutation_importance(score, examples)
    assert {name: each.mean for name, each in again.items()} == {name: each.mean for name, each in importance.items()}


def test_the_job_writes_what_it_found(trained_job):
    artifact = features.run(trained_job)
    record = json.loads((artifact.path / "features.json").read_text())
    assert set(record["importance"]) == set(FEATURE_NAMES)
    table = (artifact.path / "features.md").read_text()
    assert all(name in table for name in FEATURE_NAMES)
    assert record["ndcg@10"]["all"] > 0
    assert "retrieval_score" not in record["left_out"]
    assert features.run(trained_job).reused


def test_a_feature_that_is_left_out_is_not_read(trained_job, tmp_path):
    left_out = ("creator_share", "category_overlap")
    model = trained_job.ranking.model.model_copy(update={"left_out": left_out, "epochs": 1})
    config = trained_job.model_copy(
        update={"ranking": trained_job.ranking.model_copy(update={"model": model}), "workdir": str(tmp_path)}
    )
    done = pipeline.run(config, train_ranker.STEP)
    ranker = done[train_ranker.STEP].load("judged")
    generator = np.random.default_rng(0)
    batch = RankingBatch(
        np.arange(8, dtype=np.int32)[None],
        np.arange(ranker.max_history, dtype=np.int32)[None] % 8,
        np.zeros((1, ranker.max_history), np.float32),
        generator.normal(size=(1, 8, NUM_FEATURES)).astype(np.float32),
    )
    before = ranker.score(batch)
    for name in left_out:
        batch.features[:, :, FEATURE_NAMES.index(name)] += 100
    np.testing.assert_array_equal(ranker.score(batch), before)
    batch.features[:, :, FEATURE_NAMES.index("similarity_last")] += 100
    assert (ranker.score(batch) != before).any()


@pytest.mark.parametrize("name", ["retrieval_score", "no_such"])
def test_only_features_can_be_left_out(name):
    with pytest.raises(ConfigError, match=name):
        AttentionRankerConfig.parse({"left_out": [name]}, where="test")
