"""One place makes Bundles: of models in memory or in folders, whole or not at all."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from recsys.bundle.assemble import BundleParts, assemble, popular_items
from recsys.bundle.golden import golden_question
from recsys.bundle.histories import histories_table
from recsys.bundle.reader import Bundle
from recsys.bundle.slates import SLATES_SCHEMA
from recsys.data.dataset import Dataset, Split
from recsys.data.id_map import fingerprint_ids
from recsys.data.positives import PositivePolicy
from recsys.errors import BundleError
from recsys.evaluation.protocol import EvaluationConfig
from recsys.files import write_arrow
from recsys.index.flat import FlatIndex
from recsys.models.base import FitData, Retriever
from recsys.models.rankers.export import ExportConfig
from recsys.models.retrievers.matrices.svd import SVD
from recsys.models.retrievers.popularity import Popularity
from recsys.pipeline.bundle_config import BundleConfig
from recsys.pipeline.config import PipelineConfig
from recsys.pipeline.golden import golden_answer
from recsys.testing.planted import planted_clusters
from recsys.training.runtime import Runtime

CONFIG = BundleConfig(
    positives=PositivePolicy(),
    protocol="rolling_next_item",
    index=FlatIndex(),
    pipeline=PipelineConfig(),
    export=ExportConfig(),
    popular=Popularity(),
    num_popular=5,
    max_history=4,
    evaluation=EvaluationConfig(),
    seed=0,
)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return planted_clusters()


@pytest.fixture(scope="module")
def parts(dataset: Dataset) -> BundleParts:
    return BundleParts(
        info=dataset.info.model_copy(update={"id_map_fingerprint": fingerprint_ids(dataset.items["item_id"])}),
        items=dataset.items,
        config=CONFIG,
        retriever=SVD(dim=4).fit(FitData.of(dataset, Split.TEST), Runtime("cpu")),
        index=CONFIG.index,
        slates=SLATES_SCHEMA.empty_table(),
        popular=popular_items(dataset, CONFIG.popular, CONFIG.num_popular),
        histories=histories_table(dataset, CONFIG.max_history),
        question=golden_question(dataset),
        metrics={"ndcg@10": 0.5},
    )


def test_parts_in_memory_and_in_folders_are_one_bundle(parts: BundleParts, tmp_path: Path) -> None:
    assert isinstance(parts.retriever, Retriever)
    parts.retriever.save(tmp_path / "retriever")
    write_arrow(tmp_path / "slates", parts.slates)
    saved = replace(parts, retriever=tmp_path / "retriever", slates=tmp_path / "slates", parent="p" * 64)
    first = assemble(tmp_path / "first", parts, answer=golden_answer)
    second = assemble(tmp_path / "second", saved, answer=golden_answer)
    assert first.bundle_id == second.bundle_id
    for file in (tmp_path / "retriever").rglob("*"):
        assert file.samefile(second.part("retriever") / file.relative_to(tmp_path / "retriever"))
    shutil.rmtree(tmp_path / "retriever")
    Bundle.open(second.path).check()
    assert (first.manifest.parent, second.manifest.parent) == (None, "p" * 64)
    assert first.section(BundleConfig) == CONFIG
    assert first.golden is not None and first.golden.history == parts.question.history


def test_what_cannot_answer_is_not_written(parts: BundleParts, tmp_path: Path) -> None:
    def refuse(*_: object) -> NoReturn:
        raise BundleError("no answer")

    with pytest.raises(BundleError, match="no answer"):
        assemble(tmp_path, parts, answer=refuse)
    assert list(tmp_path.iterdir()) == []


def test_histories_are_the_newest_interactions(dataset: Dataset) -> None:
    table = histories_table(dataset, 3)
    assert len(table) == dataset.info.num_users
    mine = dataset.interactions["item_idx"].to_numpy()[dataset.interactions["user_idx"].to_numpy() == 7]
    assert len(mine) > 3
    assert table["item_ids"][7].as_py() == dataset.items["item_id"].take(mine[-3:]).to_pylist()


def test_popular_items_do_not_look_ahead(dataset: Dataset) -> None:
    """Counted up to a split, best first."""
    item_idx, score = popular_items(dataset, Popularity(), 5, until=Split.TRAIN)
    log = dataset.positives.histories(Split.TRAIN)
    counts = np.bincount(log.item_idx[log.rows()], minlength=dataset.num_items)
    assert counts[item_idx].tolist() == sorted(counts, reverse=True)[:5]
    assert (np.diff(score) <= 0).all()
