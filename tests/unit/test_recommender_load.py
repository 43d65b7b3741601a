"""From a Bundle on disk to an answer, with real models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from recsys import Recommender
from recsys.bundle import HISTORIES_SCHEMA, Bundle, GoldenQuestion
from recsys.bundle.assemble import BundleParts, assemble
from recsys.bundle.store import BundleStore
from recsys.config import StrictConfig
from recsys.data.catalogue import Catalogue
from recsys.data.dataset import DatasetInfo
from recsys.data.histories import Histories
from recsys.data.positives import PositivePolicy
from recsys.events import Event
from recsys.events.sqlite import SqliteEventStoreConfig
from recsys.index.flat import FlatIndex
from recsys.models.base import FitData, RetrieverConfig
from recsys.models.retrievers.neighbours.item_knn import ItemKNN
from recsys.models.retrievers.sequences.esasrec import ESASRec
from recsys.pipeline.config import PipelineConfig
from recsys.pipeline.golden import golden_answer
from recsys.testing.pipeline import items_table
from recsys.training.loop import TrainConfig
from recsys.training.runtime import Runtime
from recsys.types import HistoryItem

NUM_ITEMS, NUM_USERS = 60, 80
MODELS: dict[str, RetrieverConfig] = {
    "esasrec": ESASRec(dim=16, hidden_dim=16, num_blocks=1, max_length=10, train=TrainConfig(epochs=1)),
    "item_knn": ItemKNN(),
}
PATIENT = PipelineConfig.parse(
    {"deadline_ms": 9000, "budgets_ms": {"retrieval": 3000, "ranking": 3000, "reranking": 3000}, "num_candidates": 30},
    where="test",
)


class Resolved(StrictConfig):
    positives: PositivePolicy = PositivePolicy()
    pipeline: PipelineConfig = PATIENT


@pytest.fixture(scope="module", params=list(MODELS))
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder: Path = tmp_path_factory.mktemp(request.param)
    rng = np.random.default_rng(0)
    sequences = [((np.arange(8) + start) % NUM_ITEMS).tolist() for start in rng.integers(0, NUM_ITEMS, NUM_USERS)]
    items = items_table(NUM_ITEMS, categories=[[f"c{row % 3}"] for row in range(NUM_ITEMS)])
    catalogue = Catalogue.build(items)
    times = [list(range(1000, 1008))] * NUM_USERS
    data = FitData(Histories.from_lists(sequences, times), np.ones(8 * NUM_USERS, np.float32), items)
    model = MODELS[request.param].fit(data, Runtime("cpu"))
    info = DatasetInfo(
        name="tiny",
        fingerprint="0" * 64,
        id_map_fingerprint=catalogue.id_map_fingerprint,
        has_time=True,
        protocol="rolling_next_item",
        num_users=NUM_USERS,
        num_items=NUM_ITEMS,
        num_interactions=8 * NUM_USERS,
        num_positives=8 * NUM_USERS,
        num_quarantined=0,
        counts_by_split={},
    )
    histories = {
        "user_id": [f"u{row}" for row in range(NUM_USERS)],
        "item_ids": [[f"i{item}" for item in sequence] for sequence in sequences],
        "timestamps_ms": times,
        "events": [["interaction"] * 8] * NUM_USERS,
        "values": [[float("nan")] * 8] * NUM_USERS,
    }
    parts = BundleParts(
        info=info,
        items=items,
        config=Resolved(),
        retriever=model,
        index=FlatIndex(),
        popular=(np.arange(5, dtype=np.int32), np.arange(5, 0, -1).astype(np.float32)),
        histories=pa.table(histories, schema=HISTORIES_SCHEMA),
        question=GoldenQuestion(
            history=tuple(HistoryItem(item_id=f"i{row}", event="interaction", timestamp_ms=5) for row in (3, 4)),
            now_ms=10_000,
            top_k=5,
        ),
        metrics={},
    )
    return assemble(folder, parts, answer=golden_answer)


@pytest.mark.parametrize("inline", [True, False])
def test_loads_answers_and_proves_itself(bundle: Bundle, inline: bool):
    with Recommender.load(bundle.path, inline=inline) as recommender:
        state = recommender.user("u0")
        assert state is not None
        answer = recommender.recommend(user_id="u0", top_k=10, explain=True)
        assert answer.degraded == ()
        assert answer.bundle_id == bundle.bundle_id
        assert len(set(answer.item_ids)) == 10
        assert not set(answer.item_ids) & set(state.item_ids)
        assert all(item.reasons for item in answer.items)
        assert recommender.recommend(user_id="u0", top_k=10).item_ids == answer.item_ids
        assert len(recommender.recommend().items) == 10
        assert len(recommender.similar("i3").items) == 10
        golden = bundle.golden
        assert golden is not None
        answer = recommender.answer_golden(golden)
        golden.check(answer.item_ids, answer.scores)


def test_a_store_answers_by_the_changes_of_its_items_and_rules(bundle: Bundle, tmp_path: Path):
    store = BundleStore(tmp_path / "store")
    store.publish(bundle.path, None)
    store.rules.append([{"kind": "pin", "item_ids": ["i7"]}], after=0, by="test")
    with Recommender.load(store.root.local or "") as recommender:
        answer = recommender.recommend(history=[HistoryItem("i3")], top_k=5)
    assert answer.item_ids[0] == "i7"
    assert answer.bundle_id == f"{bundle.bundle_id}+0.1"


def test_an_event_is_in_the_next_answer(bundle: Bundle, tmp_path: Path):
    with SqliteEventStoreConfig(path=str(tmp_path / "events.sqlite")).open() as store:
        store.seed(bundle.bundle_id, bundle.histories())
        with Recommender.load(bundle.path, store) as recommender:
            before = recommender.recommend(user_id="u0", top_k=5)
            item_id = before.item_ids[0]
            store.append([Event("e1", "u0", item_id, "click", 2000)])
            after = recommender.recommend(user_id="u0", top_k=5)
    assert item_id not in after.item_ids
    assert len(after.items) == 5


def test_importing_the_package_loads_nothing_heavy() -> None:
    import subprocess
    import sys

    def loaded(statement: str) -> set[str]:
        code = f"import sys; {statement}; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return set(result.stdout.split())

    heavy = {"torch", "transformers", "tokenizers", "ray", "openvino", "nncf", "faiss", "scipy", "pandas", "rich"}
    assert loaded("import recsys") & {*heavy, "numpy", "pyarrow", "pydantic"} == set()
    assert loaded("from recsys import Recommender") & {*heavy, "fsspec", "safetensors"} == set()


def test_a_configuration_of_ones_own_reaches_every_stage(bundle: Bundle) -> None:
    """Rules that the Bundle does not have hold in the slate."""
    buried = PipelineConfig.parse(
        {**PATIENT.model_dump(), "rules": [{"kind": "bury", "categories": ["c0", "c1"]}]}, where="test"
    )
    with Recommender.load(bundle.path, config=buried) as recommender:
        shown = bundle.catalogue().id_map.rows(recommender.recommend(user_id="u1", top_k=5).item_ids)
    assert (shown % 3 == 2).all()
    with Recommender.load(bundle.path) as recommender:
        usual = bundle.catalogue().id_map.rows(recommender.recommend(user_id="u1", top_k=5).item_ids)
    assert (usual % 3 != 2).any()
