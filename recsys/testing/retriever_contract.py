"""What every retriever must do, whatever its family.

::

    class TestMyRetriever(RetrieverContract):
        config = MyRetriever(...)      # small enough to fit the planted data in seconds
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray

from recsys import schema
from recsys.config import parse
from recsys.data.catalogue import Catalogue
from recsys.data.dataset import Dataset, Split
from recsys.data.histories import Histories
from recsys.errors import EmptyDataError, ModelError, NoTimeError
from recsys.index.flat import FlatIndex
from recsys.models.base import FitData, Retriever, RetrieverConfig, UpdateConfig, VectorRetriever
from recsys.models.retrievers import AnyRetriever, load_retriever
from recsys.models.retrievers.towers.base import TowerConfig
from recsys.models.stand_in import StandIns
from recsys.online.replay import lesson_of
from recsys.pipeline.build import Parts
from recsys.pipeline.config import PipelineConfig
from recsys.pipeline.offline import OfflinePipeline
from recsys.pipeline.stage import RETRIEVAL
from recsys.testing.planted import CLUSTER_ITEMS, dataset_of, planted_clusters, planted_fashion
from recsys.testing.samples import sample_of
from recsys.training.loop import Score, validation_ndcg
from recsys.training.runtime import Runtime
from recsys.types import FloatArray, Int64Array

_TOLERANCE = 1e-4
_COLOURS = ("red", "blue", "green", "white")


def with_text_vectors(data: FitData) -> FitData:
    """``data`` of four planted clusters, with text vectors that tell the cluster."""
    cluster = np.arange(data.num_items) // CLUSTER_ITEMS
    noise = np.random.default_rng(3).normal(scale=0.1, size=(data.num_items, 8))
    return replace(data, text_vectors=(np.eye(8)[cluster] + noise).astype(np.float32))


def with_words(data: FitData) -> FitData:
    """``data`` of four planted clusters, with words in the titles that tell the cluster."""
    titles = [f"{_COLOURS[i // CLUSTER_ITEMS]} thing number{i}" for i in range(data.num_items)]
    return replace(data, items=_titled(data.items, titles))


def _titled(items: pa.Table, titles: list[str]) -> pa.Table:
    return items.set_column(items.column_names.index("title"), "title", pa.array(titles))


class RetrieverContract:
    """Inherit it under a name that begins with ``Test`` and set ``config``, or take a kind's sample."""

    config: ClassVar[RetrieverConfig]
    _fitted: ClassVar[dict[type, Retriever]] = {}

    @classmethod
    def take_sample(cls, kind: type[RetrieverConfig], folder: Path) -> None:
        """From now on the sample of ``kind`` is tested."""
        cls.config = sample_of(kind, folder)
        cls._fitted.pop(cls, None)

    @property
    def min_ndcg(self) -> float:
        """NDCG@10 on the planted data that ``config`` must reach."""
        return self.config.min_ndcg

    @cached_property
    def dataset(self) -> Dataset:
        """Four clusters of twelve items, and every user stays within one; or everybody follows one fashion."""
        return planted_clusters() if self.config.reads_history else planted_fashion()

    def ndcg(self, score: Score) -> float:
        """NDCG@10 of ``score`` on the planted data."""
        targets = self.dataset.targets(Split.VALID)
        return validation_ndcg(score, targets, Runtime("cpu"), num_items=self.dataset.num_items)

    def fit_data(self, dataset: Dataset) -> FitData:
        """What ``config`` is fitted on."""
        data = FitData.of(dataset, Split.TRAIN, valid=dataset.targets(Split.VALID), seed=7)
        if self.config.sample_reads == "text_vectors":
            return with_text_vectors(data)
        return with_words(data) if self.config.sample_reads == "words" else data

    @pytest.fixture
    def fitted(self) -> Retriever:
        """Fitted once per class."""
        fitted = type(self)._fitted.get(type(self))
        if fitted is None:
            fitted = type(self)._fitted[type(self)] = self.config.fit(self.fit_data(self.dataset), Runtime("cpu"))
        return fitted

    @pytest.fixture
    def histories(self) -> Histories:
        """An empty one, one item, a repeat, the same thing 3,000 times, and ordinary ones."""
        lists = [[], [0], [5, 5, 5], [3] * 3000, [0, 1, 2, 3], [47, 0, 46, 1]]
        return Histories.from_lists(lists, [[1_600_000_000_000 + i for i in range(len(items))] for items in lists])

    def test_is_listed(self) -> None:
        """The configuration survives JSON through the union of kinds, and unknown keys are refused."""
        tree = self.config.model_dump(mode="json")
        assert parse(AnyRetriever, tree, where="test") == self.config
        with pytest.raises(Exception, match="no_such_key"):
            parse(AnyRetriever, {**tree, "no_such_key": 1}, where="test")

    def test_scores_every_item(self, fitted: Retriever, histories: Histories) -> None:
        """One finite float32 score per history and item, unknown users (empty histories) included."""
        scores = fitted.score(histories, np.full(len(histories), 1_600_000_000_000, np.int64))
        assert scores.shape == (len(histories), self.dataset.num_items)
        assert scores.dtype == np.float32
        assert np.isfinite(scores).all()

    def test_vectors_change_with_the_clock_only_where_that_is_said(
        self, fitted: Retriever, histories: Histories
    ) -> None:
        """Else retrieval would remember what no longer holds."""
        if not isinstance(fitted, VectorRetriever):
            pytest.skip("this kind has no vectors")
        early, late = (
            fitted.encode_users(histories, np.full(len(histories), 1_600_000_100_000 + days * schema.DAY_MS, np.int64))
            for days in (0, 30)
        )
        assert np.array_equal(early, late) == (not fitted.reads_clock)

    def test_no_histories(self, fitted: Retriever) -> None:
        """A batch of none is answered with none."""
        assert fitted.score(Histories.from_lists([])).shape == (0, self.dataset.num_items)

    def test_an_item_outside_the_catalogue_is_refused(self, fitted: Retriever) -> None:
        """By those who read the history."""
        histories = Histories.from_lists([[1], [self.dataset.num_items]], [[0], [0]])
        if self.config.reads_history:
            with pytest.raises(ModelError, match=rf"outside 0\.\.{self.dataset.num_items - 1}"):
                fitted.score(histories)
        else:
            assert np.isfinite(fitted.score(histories)).all()

    def test_more_candidates_than_there_are_items(self, fitted: Retriever) -> None:
        """Retrieval then gives every item that the user has not seen, once."""
        targets = self.dataset.targets(Split.VALID)[:3]
        parts = Parts.of_models(Catalogue.build(self.dataset.items), fitted, FlatIndex())
        config = PipelineConfig(num_candidates=1000, max_history=100)
        candidates = OfflinePipeline(parts, config, stages=(RETRIEVAL,)).candidates(targets)
        for row, found in zip(range(len(targets)), candidates, strict=True):
            seen = targets.seen.items(row).tolist()
            assert sorted(found.item_idx.tolist()) == sorted(set(range(self.dataset.num_items)) - set(seen))

    def test_text_vectors_that_are_no_numbers(self) -> None:
        """Models that read them say whose they are; others do not look."""
        data = self.fit_data(self.dataset)
        if data.text_vectors is None:
            pytest.skip("fitted without text vectors here")
        broken = data.text_vectors.copy()
        broken[5, 1] = np.nan
        with pytest.raises(ModelError, match="item_idx 5 is not finite"):
            self.config.fit(replace(data, text_vectors=broken), Runtime("cpu"))

    @pytest.mark.parametrize("has_time", [True, False])
    def test_workers_can_share_a_step(self, has_time: bool) -> None:
        """The loss reaches every weight that learns, or data-parallel workers would wait for its gradient; and parts of
        a step agree on the negatives.
        """
        if not isinstance(self.config, TowerConfig):
            pytest.skip("this kind does not learn in steps")
        data = self.fit_data(self.dataset)
        if not has_time:
            data = replace(data, histories=replace(data.histories, timestamp_ms=None))
        try:
            plan = self.config.plan(data)
        except NoTimeError:
            assert not has_time
            return
        network = self.config.network(self.config.items(data), plan).train()
        step = plan.epoch(1)[0]
        parts = [step.part(index, 2, torch.device("cpu")) for index in range(2)]
        loss = network(parts[0])
        loss.backward()
        unreached = [
            name for name, weight in network.named_parameters() if weight.requires_grad and weight.grad is None
        ]
        assert not unreached
        first, second = (getattr(part, "candidate", None) for part in parts)
        assert (first is None) == (second is None)
        if first is not None:
            torch.testing.assert_close(first, second)

    def test_odd_times(self, fitted: Retriever) -> None:
        """Requests before the history, in 1970 or without any time are answered."""
        lists = [[1, 2, 3]] * 3
        times = Histories.from_lists(lists, [[0, 0, 0], [-5, 10**15, 0], [9, 8, 7]])
        for histories in (times, Histories.from_lists(lists)):
            for now in (None, np.array([0, -(10**15), 10**15], np.int64)):
                assert np.isfinite(fitted.score(histories, now)).all()

    def test_does_not_change_what_it_is_given(self, fitted: Retriever) -> None:
        """Scores may be written to by the caller without harm to the model."""
        histories = Histories.from_lists([[1, 2, 3]])
        first = fitted.score(histories)
        kept = first.copy()
        first[:] = np.nan
        np.testing.assert_array_equal(fitted.score(histories), kept)
        np.testing.assert_array_equal(histories.item_idx, [1, 2, 3])

    def test_a_score_does_not_depend_on_its_batch(self, fitted: Retriever, histories: Histories) -> None:
        """Alone or among others, in whatever order."""
        together = fitted.score(histories)
        order = np.arange(len(histories))[::-1].copy()
        _close(fitted.score(histories[order])[order], together)
        for row in range(len(histories)):
            _close(fitted.score(histories[slice(row, row + 1)])[0], together[row])

    def test_save_and_load(self, fitted: Retriever, histories: Histories, tmp_path: Path) -> None:
        """A saved folder answers exactly as what was saved; it holds no pickle."""
        fitted.save(tmp_path)
        loaded = load_retriever(tmp_path)
        assert loaded.config == fitted.config
        assert loaded.num_items == fitted.num_items
        np.testing.assert_array_equal(loaded.score(histories), fitted.score(histories))
        assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} <= {
            ".json",
            ".safetensors",
            ".parquet",
            ".arrow",
        }

    def test_same_seed_same_model(self, fitted: Retriever, histories: Histories) -> None:
        """A second fit scores the same, and has the same learning curve."""
        again = self.config.fit(self.fit_data(self.dataset), Runtime("cpu"))
        np.testing.assert_array_equal(again.score(histories), fitted.score(histories))
        assert list(again.history) == list(fitted.history)

    def test_never_learns_from_after_the_cut(self, fitted: Retriever, histories: Histories) -> None:
        """Other items after ``until`` in the same log leave the model unchanged."""
        dataset = self.dataset
        log = dataset.positives
        item_idx = np.where(log.split == Split.TRAIN, log.item_idx, 0)
        other = dataset_of(
            log.user_idx, item_idx, log.split, num_items=dataset.num_items, timestamp_ms=log.timestamp_ms
        )
        config = self.config.refit(fitted)
        data = [replace(self.fit_data(source), valid=None) for source in (dataset, other)]
        first, second = (config.fit(part, Runtime("cpu")).score(histories) for part in data)
        np.testing.assert_array_equal(first, second)

    def test_finds_the_planted_pattern(self, fitted: Retriever) -> None:
        """The withheld item ranks high: NDCG@10 above ``min_ndcg``."""
        assert self.ndcg(fitted.score) >= self.min_ndcg

    def test_finds_it_in_mixed_precision(self, fitted: Retriever, histories: Histories) -> None:
        """Products in bfloat16 make another network that is as good."""
        mixed = self.config.fit(self.fit_data(self.dataset), Runtime("cpu", precision="bf16"))
        if fitted.history:
            assert (mixed.score(histories) != fitted.score(histories)).any()
        assert self.ndcg(mixed.score) >= self.min_ndcg

    def test_goes_on_learning(self, fitted: Retriever, histories: Histories) -> None:
        """With newer interactions and one item more: it still answers for what it knew, and for the item too."""
        data = self.fit_data(self.dataset)
        items = pa.concat_tables([data.items, _named_anew(data.items.slice(0, 1))])
        text = data.text_vectors
        text = None if text is None else np.concatenate([text, text[:1]])
        log = self.dataset.positives
        whole = log.histories(Split.TEST)
        fresh = log.split > Split.TRAIN
        twin = StandIns(np.zeros((1, 1), np.int32), np.ones((1, 1), np.float32), data.num_items)
        lesson = lesson_of(whole, fresh, max_length=20, replay=0.5, seed=0, stand_ins=twin)
        grown = FitData(whole, log.weight, items, text, None, data.seed, lesson)
        how = UpdateConfig(epochs=1, rate=0.1)
        first, second = (self.config.update(fitted, grown, Runtime("cpu"), how) for _ in range(2))
        assert first.num_items == data.num_items + 1
        now_ms = np.full(len(histories), 1_600_000_000_000, np.int64)
        scores = first.score(histories, now_ms)
        assert scores.shape == (len(histories), data.num_items + 1)
        assert np.isfinite(scores).all()
        np.testing.assert_array_equal(second.score(histories, now_ms), scores)

        def known_items(part: Histories, times: Int64Array | None) -> FloatArray:
            return first.score(part, times)[:, : data.num_items]

        assert self.ndcg(known_items) >= self.min_ndcg

    def test_empty_data(self) -> None:
        """Nothing to learn from is an error that says so."""
        dataset = self.dataset
        histories = dataset.positives.histories(Split.TRAIN)
        nothing = Histories(histories.item_idx, histories.starts, histories.starts, histories.timestamp_ms)
        with pytest.raises(EmptyDataError, match="no positive interaction"):
            self.config.fit(replace(self.fit_data(dataset), histories=nothing), Runtime("cpu"))

    def test_vectors_agree_with_scores(self, fitted: Retriever, histories: Histories) -> None:
        """For families with vectors: inner product and bonus are the score, so an index finds what ``score`` ranks."""
        if not isinstance(fitted, VectorRetriever):
            pytest.skip("this kind has no vectors")
        users, items = fitted.encode_users(histories), fitted.item_vectors()
        assert users.shape == (len(histories), fitted.num_vectors, items.shape[1])
        assert users.dtype == items.dtype == np.float32
        scores = np.einsum("bkd,nd->bkn", users, items).max(1)
        bonus = fitted.bonus(histories, users)
        if bonus is not None:
            bonus.add_to(scores)
        _close(scores, fitted.score(histories))


def _named_anew(items: pa.Table) -> pa.Table:
    place = items.column_names.index("item_id")
    return items.set_column(place, items.schema.field(place), pa.array(["new"] * len(items), pa.string()))


def _close(actual: NDArray[Any], expected: NDArray[Any]) -> None:
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(actual, expected, atol=_TOLERANCE * scale, rtol=0)
