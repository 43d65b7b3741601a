"""Item vectors begin from what the texts say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys import schema
from recsys.data.histories import Histories
from recsys.models.base import FitData
from recsys.models.layers.items import ItemVectors
from recsys.models.retrievers import load_retriever
from recsys.models.retrievers.sequences.bert4rec import BERT4Rec
from recsys.models.retrievers.sequences.esasrec import ESASRec
from recsys.models.retrievers.towers import base as towers
from recsys.models.retrievers.towers.base import TowerConfig
from recsys.models.retrievers.towers.mind import MIND
from recsys.models.retrievers.towers.neumf import NeuMF
from recsys.training.runtime import Runtime

TABLE = "items.id_embedding.weight"


def _texts(num: int = 200, dim: int = 12) -> torch.Tensor:
    """Crowded as text vectors are: far from the origin, most of the spread in few directions."""
    generator = torch.Generator().manual_seed(3)
    spread = torch.logspace(0, -2, dim)
    return torch.randn(num, dim, generator=generator) * spread + 5


def test_training_begins_from_uncorrelated_directions_of_the_texts() -> None:
    items = ItemVectors(torch.ones(200, dtype=torch.bool), _texts(), dim=4, text_hidden_dim=0)
    vectors = items().detach()
    torch.testing.assert_close(vectors.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(vectors.T @ vectors / 200, torch.eye(4) / 4, atol=1e-3, rtol=0)
    hidden = ItemVectors(torch.ones(200, dtype=torch.bool), _texts(), dim=4, text_hidden_dim=6)
    assert isinstance(hidden.text, torch.nn.Sequential)
    torch.testing.assert_close(hidden.text[0](_texts()).std(0), torch.ones(6), atol=1e-2, rtol=0)


def test_an_id_adds_nothing_before_it_has_learned_and_only_where_it_is_shown() -> None:
    has_id = torch.arange(200) < 150
    items = ItemVectors(has_id, _texts(), dim=4, text_hidden_dim=0)
    assert items.text is not None
    told = items.text(_texts())
    torch.testing.assert_close(items(), told)
    with torch.no_grad():
        items.id_embedding.weight.fill_(1.0)
    keep = torch.arange(200) % 2 == 0
    added = (items(None, keep) - told)[:, 0] > 0.5
    assert added.equal(has_id & keep)


@pytest.mark.parametrize("num", [1, 3])
def test_texts_that_span_fewer_directions_than_there_are_dimensions(num: int) -> None:
    """One text, or all alike, say nothing about what tells items apart; the rest stays random and finite."""
    alike = torch.ones(5, 12)
    alike[:num] += torch.eye(12)[:num]
    for texts in (alike, torch.ones(5, 12)):
        vectors = ItemVectors(torch.ones(5, dtype=torch.bool), texts, dim=8, text_hidden_dim=0)()
        assert torch.isfinite(vectors).all()
        assert vectors.abs().max() < 10


@pytest.mark.parametrize(
    ("kind", "num_negatives"), [(ESASRec, 0), (ESASRec, 64), (MIND, 0), (MIND, 64), (NeuMF, 64), (BERT4Rec, 0)]
)
def test_what_nobody_could_take_teaches_nothing(kind: type[TowerConfig], num_negatives: int) -> None:
    """The loss does not read the texts of items without interactions: they are nobody's negatives."""
    config = kind(dim=8, dropout=0.0, num_negatives=num_negatives)
    histories = Histories.from_lists([[item % 15, (item + 1) % 15, (item + 2) % 15] for item in range(30)])
    columns = {name: pa.nulls(20, schema.ITEMS.field(name).type) for name in schema.ITEMS.names}
    texts = _texts(20).numpy()
    data = FitData(histories, np.ones(len(histories.item_idx), np.float32), pa.table(columns), texts)
    plan = config.plan(data)
    torch.manual_seed(0)
    network = config.network(config.items(data), plan)
    network.leave_out_unmet()
    part = plan.epoch(0)[0].part(0, 1, torch.device("cpu"))
    loss = network(part).item()
    assert isinstance(network.items, ItemVectors)
    assert network.items.text_vectors is not None
    network.items.text_vectors[15:] += 3.0
    assert network(part).item() == loss
    network.items.text_vectors[0] += 3.0
    assert network(part).item() != loss


def test_the_table_of_a_loaded_model_stays_where_it_is_mapped(tmp_path: Path) -> None:
    """Replicas of a machine share them: a copy of a million items' IDs is a quarter of a gigabyte for each."""
    config = ESASRec.parse({"dim": 8, "num_blocks": 1, "train": {"epochs": 1}}, where="test")
    histories = Histories.from_lists([[0, 1, 2]] * 4)
    columns = {name: pa.nulls(3, schema.ITEMS.field(name).type) for name in schema.ITEMS.names}
    data = FitData(histories, np.ones(len(histories.item_idx), np.float32), pa.table(columns))
    config.fit(data, Runtime("cpu")).save(tmp_path / "model")
    loaded = load_retriever(tmp_path / "model")
    assert isinstance(loaded, towers.NetworkRetriever)
    spans = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    bounds = [[int(end, 16) for end in span.split("-")] for span in spans]
    (address,) = (weight.data_ptr() for name, weight in loaded.network.named_parameters() if name == TABLE)
    assert any(low <= address < high for low, high in bounds)
