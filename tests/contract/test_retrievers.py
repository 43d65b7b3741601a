"""Every kind of retriever keeps the contract. A kind without a small configuration below fails here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys.data.dataset import Dataset, Split
from recsys.data.histories import Histories
from recsys.errors import ConfigError, ModelError, NoTimeError
from recsys.models import KINDS
from recsys.models.base import FitData, Retriever, RetrieverConfig, VectorRetriever
from recsys.models.layers.packing import PackedLayout
from recsys.models.retrievers.blend import Blend
from recsys.models.retrievers.matrices.als import ALS
from recsys.models.retrievers.matrices.bpr import BPR
from recsys.models.retrievers.matrices.ease import EASE
from recsys.models.retrievers.matrices.svd import SVD
from recsys.models.retrievers.neighbours.item_knn import ItemKNN
from recsys.models.retrievers.neighbours.tfidf import TfIdf
from recsys.models.retrievers.neighbours.user_knn import UserKNN
from recsys.models.retrievers.popularity import Popularity
from recsys.models.retrievers.sequences.base import SequenceConfig, SequenceRetriever
from recsys.models.retrievers.sequences.bert4rec import BERT4Rec
from recsys.models.retrievers.sequences.caser import Caser
from recsys.models.retrievers.sequences.cnn_lstm import CNNLSTM
from recsys.models.retrievers.sequences.esasrec import ESASRec
from recsys.models.retrievers.sequences.gru4rec import GRU4Rec
from recsys.models.retrievers.sequences.hstu import HSTU
from recsys.models.retrievers.sequences.lstm import LSTM
from recsys.models.retrievers.sequences.sasrec import SASRec
from recsys.models.retrievers.towers.mind import MIND
from recsys.models.retrievers.towers.neumf import NeuMF
from recsys.models.retrievers.towers.text_two_tower import TextTwoTower
from recsys.testing.covered import configured_kinds
from recsys.testing.planted import planted_chain, planted_clusters, planted_fashion
from recsys.testing.retriever_contract import RetrieverContract
from recsys.training.loop import TrainConfig, validation_ndcg
from recsys.training.runtime import Runtime

TRAIN = TrainConfig(epochs=6, batch_tokens=64, learning_rate=1e-2, warmup_steps=5, patience=6)
SMALL = ESASRec(dim=16, num_blocks=1, hidden_dim=16, max_length=10, dropout=0.1, num_negatives=0, train=TRAIN)


class TestESASRecSampled(RetrieverContract):
    config = SMALL.model_copy(update={"num_negatives": 32})
    min_ndcg = 0.35


class TestESASRecWithText(RetrieverContract):
    """Text vectors that tell the cluster: item 11 of each cluster is never interacted with."""

    config = SMALL.model_copy(update={"id_dropout": 0.3})
    min_ndcg = 0.35

    def fit_data(self, dataset: Dataset) -> FitData:
        cluster = np.arange(dataset.num_items) // 12
        noise = np.random.default_rng(3).normal(scale=0.1, size=(dataset.num_items, 8))
        text = (np.eye(8)[cluster] + noise).astype(np.float32)
        valid = dataset.targets(Split.VALID)
        return FitData.of(dataset, Split.TRAIN, text_vectors=text, valid=valid, seed=7)

    def test_an_item_is_found_by_its_text_alone(self, fitted: Retriever) -> None:
        """A new item ranks as its cluster does: its vector comes from its text alone."""
        assert isinstance(fitted, SequenceRetriever)
        text = self.fit_data(self.dataset).text_vectors
        assert text is not None
        new_items = fitted.vectors_of_new(self.dataset.items[:4], np.eye(8, dtype=np.float32)[:4])
        users = fitted.encode_users(Histories.from_lists([[12 * c + i for i in (1, 5, 3, 7)] for c in range(4)]))[:, 0]
        assert (users @ new_items.T).argmax(1).tolist() == [0, 1, 2, 3]


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
    min_ndcg = 0.35


class TestESASRecWithMaskedItems(RetrieverContract):
    config = SMALL.model_copy(update={"item_mask_share": 0.2})
    min_ndcg = 0.35

    def test_another_model_comes_of_it(self, fitted: Retriever, histories: Histories) -> None:
        plain = SMALL.fit(self.fit_data(self.dataset), Runtime("cpu"))
        assert np.abs(plain.score(histories) - fitted.score(histories)).max() > 1e-3


class ReadsInOrder:
    """What a model of packed sequences may look at."""

    config: RetrieverConfig

    def test_no_position_sees_another_sequence_or_what_comes_after(self) -> None:
        assert isinstance(self.config, SequenceConfig)
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


class SequenceContract(ReadsInOrder, RetrieverContract):
    min_ndcg = 0.35
    chain_epochs = 6

    def test_order_matters(self) -> None:
        """A planted Markov chain: the next item depends on the last one alone, and the model finds it."""
        dataset = planted_chain()
        data = FitData.of(dataset, Split.TRAIN, valid=dataset.targets(Split.VALID), seed=7)
        train = TRAIN.model_copy(update={"epochs": self.chain_epochs, "patience": 100, "eval_exclude_seen": False})
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


class TestGRU4Rec(SequenceContract):
    config = GRU4Rec(dim=16, hidden_dim=16, max_length=10, dropout=0.1, num_negatives=0, train=TRAIN)


class TestTwoLayersOfGRU(SequenceContract):
    config = GRU4Rec(dim=16, hidden_dim=16, num_layers=2, max_length=10, dropout=0.1, num_negatives=0, train=TRAIN)


class TestLSTM(SequenceContract):
    config = LSTM(dim=16, hidden_dim=16, max_length=10, dropout=0.1, num_negatives=0, train=TRAIN)


class TestCaser(SequenceContract):
    config = Caser(dim=16, max_length=10, dropout=0.1, num_negatives=0, train=TRAIN)


class TestESASRec(SequenceContract):
    config = SMALL


class TestBERT4Rec(SequenceContract):
    """Slow to find out what "the one before" is: it must come out of absolute positions and a fifth of the targets."""

    config = BERT4Rec(
        dim=16, num_blocks=1, max_length=10, dropout=0.0, num_negatives=0, train=TRAIN.model_copy(update={"epochs": 20})
    )
    chain_epochs = 60


class TestHSTU(SequenceContract):
    config = HSTU(dim=16, num_blocks=1, max_length=10, dropout=0.1, num_negatives=0, train=TRAIN)


class TestSASRec(SequenceContract):
    config = SASRec(dim=16, num_blocks=1, max_length=10, dropout=0.1, num_negatives=0, train=TRAIN)


class TestMIND(RetrieverContract):
    config = MIND(dim=16, num_interests=3, max_length=10, dropout=0.1, num_negatives=0, train=TRAIN)
    min_ndcg = 0.35

    def test_every_interest_of_a_user_is_found(self) -> None:
        """Histories of two clusters each: some vector of the user is nearest to the one, another to the other."""
        clusters = planted_clusters(num_users=240, length=6)
        first = clusters.positives.item_idx.reshape(120, 2, 6)
        lists = [np.random.default_rng(pair).permutation(items.ravel()).tolist() for pair, items in enumerate(first)]
        histories = Histories.from_lists(lists)
        data = FitData(histories, np.ones(len(histories.item_idx), np.float32), clusters.items)
        train = TRAIN.model_copy(update={"epochs": 30})
        config = self.config.model_copy(update={"max_length": 16, "train": train})
        fitted = config.fit(data, Runtime("cpu"))
        assert isinstance(fitted, VectorRetriever)
        nearest = (fitted.encode_users(histories) @ fitted.item_vectors().T).argmax(-1) // 12
        both = [
            set(own) == {items[0] // 12, items[6] // 12}
            for own, items in zip(nearest, first.reshape(120, 12), strict=True)
        ]
        assert np.mean(both) > 0.5


class TestPopularity(RetrieverContract):
    """Chance has an NDCG@10 of about 0.11 on the planted fashion."""

    config = Popularity()
    min_ndcg = 0.4
    reads_history = False

    @cached_property
    def dataset(self) -> Dataset:
        return planted_fashion()


class TestWindowedPopularity(RetrieverContract):
    """The fashion changed two days before the end."""

    config = Popularity(window_days=1.5)
    min_ndcg = 0.3
    reads_history = False

    @cached_property
    def dataset(self) -> Dataset:
        return planted_fashion(num_last=2)

    def test_all_time_does_not_find_it(self) -> None:
        everything = Popularity().fit(self.fit_data(self.dataset), Runtime("cpu"))
        assert (
            validation_ndcg(
                everything.score, self.dataset.targets(Split.VALID), Runtime("cpu"), num_items=self.dataset.num_items
            )
            < 0.2
        )


class TestItemKNN(RetrieverContract):
    config = ItemKNN(num_neighbours=11, shrinkage=1.0)
    min_ndcg = 0.35


class TestPearsonItemKNN(RetrieverContract):
    config = ItemKNN(num_neighbours=11, shrinkage=1.0, similarity="pearson")
    min_ndcg = 0.35


class TestUserKNN(RetrieverContract):
    config = UserKNN(num_neighbours=20, shrinkage=1.0)
    min_ndcg = 0.35


class TestPearsonUserKNN(RetrieverContract):
    config = UserKNN(num_neighbours=20, shrinkage=1.0, similarity="pearson")
    min_ndcg = 0.35


class PlantedWords(RetrieverContract):
    """Words that tell the cluster, planted in the titles."""

    min_ndcg = 0.35

    def fit_data(self, dataset: Dataset) -> FitData:
        data = FitData.of(dataset, Split.TRAIN, valid=dataset.targets(Split.VALID), seed=7)
        titles = [["red", "blue", "green", "white"][i // 12] + f" thing number{i}" for i in range(data.num_items)]
        at = data.items.column_names.index("title")
        return replace(data, items=data.items.set_column(at, "title", pa.array(titles)))


class TestTfIdf(PlantedWords):
    config = TfIdf()


class TestNeuMF(RetrieverContract):
    config = NeuMF(dim=8, hidden_dims=(16, 8), num_negatives=16, max_length=10, dropout=0.0, train=TRAIN)
    min_ndcg = 0.35


class TestTextTwoTower(ReadsInOrder, TestESASRecWithText):
    config = TextTwoTower(dim=16, hidden_dim=32, text_hidden_dim=16, max_length=10, num_negatives=0, train=TRAIN)

    def test_texts_are_needed(self) -> None:
        with pytest.raises(ModelError, match="text: true"):
            self.config.fit(FitData.of(self.dataset, Split.TRAIN), Runtime("cpu"))


class TestCNNLSTM(ReadsInOrder, PlantedWords):
    config = CNNLSTM(dim=16, hidden_dim=16, word_dim=8, num_filters=8, max_length=10, num_negatives=0, train=TRAIN)

    def test_an_item_is_found_by_its_words_alone(self, fitted: Retriever) -> None:
        assert isinstance(fitted, SequenceRetriever)
        items = self.dataset.items[:4]
        titles = pa.array([f"{colour} new words" for colour in ("red", "blue", "green", "white")])
        new_items = fitted.vectors_of_new(items.set_column(items.column_names.index("title"), "title", titles), None)
        users = fitted.encode_users(Histories.from_lists([[12 * c + i for i in (1, 5, 3, 7)] for c in range(4)]))[:, 0]
        assert (users @ new_items.T).argmax(1).tolist() == [0, 1, 2, 3]

    def test_words_are_needed(self) -> None:
        items = self.dataset.items
        no_titles = items.set_column(items.column_names.index("title"), "title", pa.array([""] * len(items)))
        data = replace(FitData.of(self.dataset, Split.TRAIN), items=no_titles)
        with pytest.raises(ConfigError, match="no item has a word"):
            self.config.fit(data, Runtime("cpu"))


class TestSVD(RetrieverContract):
    config = SVD(dim=8)
    min_ndcg = 0.35


class TestALS(RetrieverContract):
    config = ALS(dim=8, iterations=5, regularization=0.1)
    min_ndcg = 0.35


class TestBPR(RetrieverContract):
    config = BPR(dim=8, iterations=30)
    min_ndcg = 0.35


class TestBlend(RetrieverContract):
    config = Blend.parse(
        {"sources": {"knn": {"retriever": {"kind": "item_knn", "num_neighbours": 11, "shrinkage": 1.0}, "share": 2},
                     "sequence": {"retriever": SMALL.model_dump(mode="json")}}},
        where="test",
    )  # fmt: skip
    min_ndcg = 0.35

    def test_an_interrupted_training_goes_on_with_the_source_that_was_not_done(self, tmp_path: Path) -> None:
        """Two sequence models; stopped in the second, the first is not trained again."""
        other = SMALL.model_copy(update={"dim": 8})
        sources = {"first": {"retriever": SMALL}, "second": {"retriever": other}}
        config = Blend.parse({"sources": sources}, where="test")
        data = self.fit_data(self.dataset)
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

    def test_a_blend_of_blends_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="no blend itself"):
            Blend.parse({"sources": {"a": {"retriever": self.config}, "b": {"retriever": SMALL}}}, where="test")


class TestEASE(RetrieverContract):
    config = EASE(regularization=10.0)
    min_ndcg = 0.35


class TestRecentItemKNN(RetrieverContract):
    config = ItemKNN(num_neighbours=11, shrinkage=1.0, half_life=3)
    min_ndcg = 0.35


def test_every_kind_is_tested() -> None:
    assert set(KINDS) <= configured_kinds(RetrieverContract)


def test_window_needs_time() -> None:
    dataset = planted_clusters()
    histories = dataset.positives.histories(Split.TRAIN)
    timeless = Histories(histories.item_idx, histories.starts, histories.stops)
    with pytest.raises(NoTimeError, match="order only"):
        Popularity(window_days=1).fit(FitData(timeless, dataset.positives.weight, dataset.items), Runtime("cpu"))
