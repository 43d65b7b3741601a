"""Every kind of retriever keeps the contract; and what is more in some of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys.data.dataset import Dataset, Split
from recsys.data.histories import Histories
from recsys.errors import ConfigError, ModelError, NoTimeError
from recsys.models.base import FitData, Retriever, VectorRetriever
from recsys.models.layers.packing import PackedLayout
from recsys.models.retrievers import KINDS
from recsys.models.retrievers.blend import Blend
from recsys.models.retrievers.neighbours.item_knn import ItemKNN
from recsys.models.retrievers.neighbours.user_knn import UserKNN
from recsys.models.retrievers.popularity import Popularity
from recsys.models.retrievers.sequences.base import SequenceConfig, SequenceRetriever
from recsys.models.retrievers.sequences.cnn_lstm import CNNLSTM
from recsys.models.retrievers.sequences.esasrec import ESASRec
from recsys.models.retrievers.sequences.gru4rec import GRU4Rec
from recsys.models.retrievers.sequences.text_two_tower import TextTwoTower
from recsys.models.retrievers.towers.mind import MIND
from recsys.testing.planted import planted_chain, planted_clusters, planted_fashion
from recsys.testing.retriever_contract import RetrieverContract, with_text_vectors
from recsys.testing.samples import sample_of
from recsys.training.loop import validation_ndcg
from recsys.training.runtime import Runtime

NOWHERE = Path("samples that write nothing")
SMALL = ESASRec.sample(NOWHERE)
SEQUENCE_KINDS = [name for name in KINDS.names if issubclass(KINDS.get(name), SequenceConfig)]


class TestEveryKind(RetrieverContract):
    @pytest.fixture(autouse=True, scope="class", params=KINDS.names)
    @classmethod
    def _sample(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
        cls.take_sample(KINDS.get(request.param), tmp_path_factory.mktemp(request.param))


# --- sequence models --------------------------------------------------------------------------------------------------


class SequenceContract:
    """What a model of packed sequences may look at, and that it reads them in order."""

    config: ClassVar[SequenceConfig]

    def test_no_position_sees_another_sequence_or_what_comes_after(self) -> None:
        torch.manual_seed(0)
        encoder = self.config.encoder().eval()
        lengths = np.array([3, 9, 1, 4])
        times = np.cumsum(np.full((17, 2), 60_000), axis=0)
        layout = PackedLayout.of(lengths, times)
        before = torch.randn(17, self.config.dim)
        after = before.clone()
        after[8:12] += torch.randn(4, self.config.dim)
        with torch.no_grad():
            changed = ((encoder(after, layout) - encoder(before, layout)).abs() > 1e-4).any(1).numpy()
        # The last four of the second sequence are others.
        assert changed[8:12].all()
        assert not changed[12:].any()
        assert not changed[:3].any()
        assert changed[3:8].all() if self.config.reads_both_ways else not changed[3:8].any()

    def test_order_matters(self) -> None:
        """A planted Markov chain: the next item depends on the last one alone, and the model finds it."""
        if self.config.sample_reads != "ids":
            pytest.skip("knows items by what they say, and here they say nothing")
        dataset = planted_chain()
        data = FitData.of(dataset, Split.TRAIN, valid=dataset.targets(Split.VALID), seed=7)
        changes = {"epochs": self.config.sample_epochs, "patience": 100, "eval_exclude_seen": False}
        train = self.config.train.model_copy(update=changes)
        fitted = self.config.model_copy(update={"train": train}).fit(data, Runtime("cpu"))
        ndcg = validation_ndcg(
            fitted.score,
            dataset.targets(Split.VALID),
            Runtime("cpu"),
            num_items=dataset.num_items,
            exclude_seen=False,
            k=1,
        )
        # Of twelve items one follows with probability .8; chance hits it in a twelfth of all cases.
        assert ndcg >= 0.6


class TestEverySequenceModel(SequenceContract):
    @pytest.fixture(autouse=True, scope="class", params=SEQUENCE_KINDS)
    @classmethod
    def _sample(cls, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
        cls.config = sample_of(KINDS.get(request.param), tmp_path_factory.mktemp(request.param))


class TestTwoLayersOfGRU(SequenceContract, RetrieverContract):
    config = GRU4Rec.sample(NOWHERE).model_copy(update={"num_layers": 2})


class TestESASRecSampled(RetrieverContract):
    config = SMALL.model_copy(update={"num_negatives": 32})


class TestESASRecWithText(RetrieverContract):
    config = SMALL.model_copy(update={"id_dropout": 0.3})

    def fit_data(self, dataset: Dataset) -> FitData:
        return with_text_vectors(super().fit_data(dataset))


class TestESASRecWithTrends(TestESASRecWithText):
    config = SMALL.model_copy(update={"id_dropout": 0.3, "trend_half_lives_days": (0.5, 3.0)})

    def test_items_are_compared_without_their_demand(self, fitted: Retriever) -> None:
        assert isinstance(fitted, SequenceRetriever)
        assert fitted.item_vectors().shape[1] == fitted.item_embeddings().shape[1] + 2
        assert fitted.item_vectors()[:, 16:].max() > 0
        np.testing.assert_array_equal(fitted.item_embeddings(), fitted.item_vectors()[:, :16])


class TestESASRecWithHabits(TestESASRecWithText):
    config = SMALL.model_copy(
        update={"id_dropout": 0.3, "trend_half_lives_days": (1.0,), "habit_half_lives_days": (0.5, 30.0)}
    )


class TestESASRecSampledWithHabits(RetrieverContract):
    config = SMALL.model_copy(update={"num_negatives": 32, "habit_half_lives_days": (30.0,)})


class TestESASRecWithMaskedItems(RetrieverContract):
    config = SMALL.model_copy(update={"item_mask_share": 0.2})

    def test_another_model_comes_of_it(self, fitted: Retriever, histories: Histories) -> None:
        plain = SMALL.fit(self.fit_data(self.dataset), Runtime("cpu"))
        assert np.abs(plain.score(histories) - fitted.score(histories)).max() > 1e-3


def test_texts_are_needed() -> None:
    with pytest.raises(ModelError, match="text: true"):
        TextTwoTower.sample(NOWHERE).fit(FitData.of(planted_clusters(), Split.TRAIN), Runtime("cpu"))


def test_words_are_needed() -> None:
    dataset = planted_clusters()
    items = dataset.items
    no_titles = items.set_column(items.column_names.index("title"), "title", pa.array([""] * len(items)))
    data = replace(FitData.of(dataset, Split.TRAIN), items=no_titles)
    with pytest.raises(ConfigError, match="no item has a word"):
        CNNLSTM.sample(NOWHERE).fit(data, Runtime("cpu"))


# --- others -----------------------------------------------------------------------------------------------------------


def test_every_interest_of_a_user_is_found() -> None:
    """Histories of two clusters each: some vector of the user is nearest to the one, another to the other."""
    clusters = planted_clusters(num_users=240, length=6)
    first = clusters.positives.item_idx.reshape(120, 2, 6)
    lists = [np.random.default_rng(pair).permutation(items.ravel()).tolist() for pair, items in enumerate(first)]
    histories = Histories.from_lists(lists)
    data = FitData(histories, np.ones(len(histories.item_idx), np.float32), clusters.items)
    sample = MIND.sample(NOWHERE)
    config = sample.model_copy(update={"max_length": 16, "train": sample.train.model_copy(update={"epochs": 30})})
    fitted = config.fit(data, Runtime("cpu"))
    assert isinstance(fitted, VectorRetriever)
    nearest = (fitted.encode_users(histories) @ fitted.item_vectors().T).argmax(-1) // 12
    both = [
        set(own) == {items[0] // 12, items[6] // 12} for own, items in zip(nearest, first.reshape(120, 12), strict=True)
    ]
    assert np.mean(both) > 0.5


class TestWindowedPopularity(RetrieverContract):
    """The fashion changed two days before the end."""

    config = Popularity(window_days=1.5)
    min_ndcg = 0.3

    @cached_property
    def dataset(self) -> Dataset:
        return planted_fashion(num_last=2)

    def test_all_time_does_not_find_it(self) -> None:
        everything = Popularity().fit(self.fit_data(self.dataset), Runtime("cpu"))
        assert self.ndcg(everything.score) < 0.2


class TestPearsonItemKNN(RetrieverContract):
    config = ItemKNN.sample(NOWHERE).model_copy(update={"similarity": "pearson"})


class TestRecentItemKNN(RetrieverContract):
    config = ItemKNN.sample(NOWHERE).model_copy(update={"half_life": 3.0})


class TestPearsonUserKNN(RetrieverContract):
    config = UserKNN.sample(NOWHERE).model_copy(update={"similarity": "pearson"})


def test_an_interrupted_training_goes_on_with_the_source_that_was_not_done(tmp_path: Path) -> None:
    """Two sequence models; stopped in the second, the first is not trained again."""
    other = SMALL.model_copy(update={"dim": 8})
    sources = {"first": {"retriever": SMALL}, "second": {"retriever": other}}
    config = Blend.parse({"sources": sources}, where="test")
    dataset = planted_clusters()
    data = FitData.of(dataset, Split.TRAIN, valid=dataset.targets(Split.VALID), seed=7)
    whole = config.fit(data, Runtime("cpu"))
    seen: list[float] = []

    def stop(metrics: Mapping[str, float]) -> None:
        seen.append(metrics["loss"])
        if len(seen) == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        config.fit(data, Runtime("cpu", checkpoints=tmp_path, report=stop))
    resumed: list[float] = []
    again = config.fit(data, Runtime("cpu", checkpoints=tmp_path, report=lambda row: resumed.append(row["loss"])))
    assert len(resumed) < 6  # epochs of the second alone
    histories = Histories.from_lists([[1, 5], []])
    np.testing.assert_array_equal(again.score(histories), whole.score(histories))


def test_a_blend_of_blends_is_refused() -> None:
    with pytest.raises(ConfigError, match="no blend itself"):
        Blend.parse({"sources": {"a": {"retriever": Blend.sample(NOWHERE)}, "b": {"retriever": SMALL}}}, where="test")


def test_window_needs_time() -> None:
    dataset = planted_clusters()
    histories = dataset.positives.histories(Split.TRAIN)
    timeless = Histories(histories.item_idx, histories.starts, histories.stops)
    with pytest.raises(NoTimeError, match="order only"):
        Popularity(window_days=1).fit(FitData(timeless, dataset.positives.weight, dataset.items), Runtime("cpu"))
