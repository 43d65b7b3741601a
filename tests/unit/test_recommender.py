from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys.bundle.slates import SLATES, SLATES_SCHEMA, Slates
from recsys.data.catalogue import Catalogue
from recsys.data.positives import PositivePolicy
from recsys.errors import BundleMismatchError, EventStoreError, RequestError
from recsys.events import UserState
from recsys.index.flat import FlatIndex
from recsys.pipeline.config import PipelineConfig
from recsys.pipeline.hard_rules import HardRules
from recsys.pipeline.popular import PopularItems
from recsys.pipeline.recommender import Recommender
from recsys.pipeline.requests import RecommendRequest, SimilarRequest
from recsys.pipeline.runner import LocalStage, Runner
from recsys.pipeline.selection import Selection
from recsys.pipeline.similarity import ItemSimilarity
from recsys.pipeline.stages.reranking import RerankingStage
from recsys.pipeline.users import HistoriesTable, Profiles
from recsys.testing.pipeline import FunctionStage, items_table, raises
from recsys.types import Candidates, Filters, HistoryItem, Query

NUM_ITEMS = 30
POLICY = PositivePolicy()
CONFIG = PipelineConfig(max_history=4, max_top_k=50, max_request_items=20)


@dataclass
class Users:
    states: dict[str, UserState] = field(default_factory=dict)
    error: Exception | None = None
    is_remote: bool = False
    wait_s: float = 0.0

    def user(self, user_id: str) -> UserState | None:
        time.sleep(self.wait_s)
        if self.error is not None:
            raise self.error
        return self.states.get(user_id)


def state(user_id: str, *rows: tuple[str, str, float], version: int = 1) -> UserState:
    return UserState(
        user_id,
        version,
        tuple(row[0] for row in rows),
        np.arange(len(rows), dtype=np.int64) + 100,
        tuple(row[1] for row in rows),
        np.array([row[2] for row in rows], np.float32),
    )


ANN = state(
    "ann",
    ("i0", "rating", 5.0),
    ("i1", "rating", 1.0),  # seen, no positive
    ("gone", "rating", 5.0),
    ("i2", "click", np.nan),
    ("i3", "view", np.nan),  # no rule: seen, no positive
)


class Fixture:
    """A recommender over a retrieval stage that finds the first allowed items and remembers the queries."""

    def __init__(self, *, broken: bool = False, index: bool = True, config: PipelineConfig = CONFIG) -> None:
        vectors = np.random.default_rng(0).standard_normal((NUM_ITEMS, 6)).astype(np.float32)
        vectors[20] = vectors[0] * 3
        self.catalogue = Catalogue.build(items_table(NUM_ITEMS, available=[row != 7 for row in range(NUM_ITEMS)]))
        self.queries: list[Query] = []
        self.users = Users({"ann": ANN})
        rules = HardRules(self.catalogue)

        def find(query: Query, _candidates: Candidates) -> Candidates:
            self.queries.append(query)
            found = np.flatnonzero(rules.allowed(query)).astype(np.int32)[: query.num_candidates]
            return Candidates.from_source("fake", found, -found.astype(np.float32), stage="retrieval")

        first = raises("retrieval") if broken else FunctionStage("retrieval", find)
        stages = [LocalStage(first, inline=True), LocalStage(RerankingStage("bundle", self.catalogue), inline=True)]
        popular = PopularItems(NUM_ITEMS, np.array([9, 8], np.int32), np.array([2, 1], np.float32))
        runner = Runner(stages, Selection(rules, popular), config)
        similarity = ItemSimilarity(self.catalogue, vectors, FlatIndex().build(vectors) if index else None)
        self.recommender = Recommender(self.catalogue, runner, self.users, POLICY, "bundle", config, similarity)


@pytest.fixture
def fixture() -> Iterator[Fixture]:
    fixture = Fixture()
    yield fixture
    fixture.recommender.close()


def test_a_known_user(fixture: Fixture):
    answer = fixture.recommender.recommend(user_id="ann", top_k=3)
    (query,) = fixture.queries
    assert query.history.item_idx.tolist() == [0, 2]
    assert query.history.timestamp_ms.tolist() == [100, 103]
    assert query.excluded_item_idx.tolist() == [0, 1, 2, 3]
    assert [(item.item_id, item.title, item.rank) for item in answer.items] == [
        ("i4", "Item 4", 0),
        ("i5", "Item 5", 1),
        ("i6", "Item 6", 2),
    ]
    assert answer.items[0].sources == ("fake",)
    assert answer.items[0].score == -4.0
    assert set(answer.items[0].stage_scores) == {"retrieval", "reranking"}
    assert answer.items[0].reasons is None
    assert (answer.user_id, answer.bundle_id, answer.degraded) == ("ann", "bundle", ())
    assert {"total", "state", "retrieval", "reranking"} <= set(answer.timings_ms)
    assert len(answer.request_id) == 32


def test_what_the_store_learns_is_in_the_next_request(fixture: Fixture):
    fixture.recommender.recommend(user_id="ann")
    fixture.users.states["ann"] = state("ann", ("i9", "click", np.nan), version=2)
    fixture.recommender.recommend(user_id="ann")
    assert fixture.queries[-1].history.item_idx.tolist() == [9]


def test_seen_items_come_back_when_asked_for(fixture: Fixture):
    answer = fixture.recommender.recommend(user_id="ann", exclude_seen=False, top_k=3)
    assert answer.item_ids == ["i0", "i1", "i2"]


def test_history_of_the_request_follows_what_is_known_for_this_request_only(fixture: Fixture):
    history = [
        HistoryItem("i10", 500),
        HistoryItem("unheard of"),
        HistoryItem("i11", 501, "rating", 2.0),
        HistoryItem("i12", event="click"),
        HistoryItem("i13"),
    ]
    request = RecommendRequest("ann", history, top_k=2)
    answer = asyncio.run(fixture.recommender.arecommend(request, now_ms=999))
    (query,) = fixture.queries
    assert query.history.item_idx.tolist() == [2, 10, 12, 13]  # the newest four
    assert query.history.timestamp_ms.tolist() == [103, 500, 999, 999]
    assert sorted(query.excluded_item_idx.tolist()) == [0, 1, 2, 3, 10, 11, 12, 13]
    assert (answer.unknown_items, query.now_ms) == (1, 999)
    fixture.recommender.recommend(user_id="ann")
    assert fixture.queries[-1].history.item_idx.tolist() == [0, 2]


@pytest.mark.parametrize(
    "fields",
    [{}, {"user_id": "nobody"}, {"history": ["unheard of"]}, {"history": [], "user_id": None}],
)
def test_nothing_known_is_answered(fixture: Fixture, fields: dict[str, Any]):
    answer = fixture.recommender.recommend(top_k=5, explain=True, **fields)
    assert answer.item_ids == ["i0", "i1", "i2", "i3", "i4"]
    assert answer.degraded == ()
    assert answer.items[0].reasons == ("a good start for someone new",)


def test_filters_and_excluded_items(fixture: Fixture):
    assert fixture.recommender.recommend(exclude_items=["i0", "i2", "unheard of"], top_k=2).item_ids == ["i1", "i3"]
    assert fixture.recommender.recommend(filters=Filters(categories_any=["none such"])).items == ()
    assert fixture.recommender.recommend(filters=Filters(price_min=1.0)).items == ()


def test_all_items_come_when_more_are_asked_for(fixture: Fixture):
    assert len(fixture.recommender.recommend(top_k=50).items) == NUM_ITEMS - 1


def test_a_store_that_fails_degrades_the_answer(fixture: Fixture):
    fixture.users.error = EventStoreError("disk full")
    answer = fixture.recommender.recommend(user_id="ann", top_k=1)
    assert (answer.item_ids, answer.degraded) == (["i0"], ("state",))


def test_degraded_answers_explain_themselves():
    answer = Fixture(broken=True).recommender.recommend(user_id="ann", top_k=4, explain=True)
    assert answer.item_ids == ["i9", "i8", "i4", "i5"]
    assert answer.degraded == ("retrieval",)
    assert "popular now" in (answer.items[0].reasons or ())
    assert set(answer.items[0].stage_scores) == {"popular", "reranking"}


def test_without_retrieval_a_user_gets_the_slate_that_was_made_for_them():
    fixture = Fixture(broken=True)
    table = pa.table(
        {"user_id": ["bob", "ann"], "item_idx": [[5], [0, 7, 12, 4]], "score": [[1.0], [4.0, 3.0, 2.0, 1.0]]}
    ).cast(SLATES_SCHEMA)
    fixture.recommender.slates = Slates(table, NUM_ITEMS)
    # i0 was seen, i7 is not to be had; popular items fill up.
    answer = fixture.recommender.recommend(user_id="ann", top_k=4)
    assert answer.item_ids == ["i12", "i4", "i9", "i8"]
    assert [item.sources[0] for item in answer.items] == [SLATES, SLATES, "popular", "popular"]
    assert answer.degraded == ("retrieval",)
    assert fixture.recommender.recommend(user_id="ann", top_k=1, exclude_items=["i12"]).item_ids == ["i4"]
    assert fixture.recommender.recommend(user_id="nobody", top_k=2).item_ids == ["i9", "i8"]
    assert fixture.recommender.recommend(top_k=2).item_ids == ["i9", "i8"]


def test_slates_that_do_not_fit_are_refused():
    good = {"user_id": ["ann"], "item_idx": [[1]], "score": [[1.0]]}
    for change, message in (
        ({"item_idx": [[NUM_ITEMS]]}, "beyond the catalogue"),
        ({"score": [[1.0, 2.0]]}, "different lengths"),
    ):
        with pytest.raises(BundleMismatchError, match=message):
            Slates(pa.table(good | change).cast(SLATES_SCHEMA), NUM_ITEMS)
    with pytest.raises(BundleMismatchError, match="columns"):
        Slates(pa.table({"user_id": ["ann"]}), NUM_ITEMS)
    assert len(Slates(SLATES_SCHEMA.empty_table(), NUM_ITEMS).of("ann")) == 0


def test_reasons_name_the_most_similar_history(fixture: Fixture):
    history = [HistoryItem("i20"), HistoryItem("i5")]
    request = RecommendRequest(history=history, top_k=1, explain=True)
    (item,) = fixture.recommender.recommend(request).items
    assert item.item_id == "i0"
    assert (item.reasons or ())[0] == "because of Item 20"


BAD = [
    ({"top_k": 0}, "top_k"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 10**9}, "top_k"),
    ({"top_k": True}, "top_k"),
    ({"top_k": 2.0}, "top_k"),
    ({"user_id": ""}, "user_id"),
    ({"user_id": 7}, "user_id"),
    ({"history": [HistoryItem("")]}, "history[0].item_id"),
    ({"history": [HistoryItem("i0", -1)]}, "history[0].timestamp_ms"),
    ({"history": [HistoryItem("i0", 10**30)]}, "history[0].timestamp_ms"),
    ({"history": [HistoryItem("i0", 1, "")]}, "history[0].event"),
    ({"history": [HistoryItem("i0", 1, "click", float("nan"))]}, "history[0].value"),
    ({"history": [HistoryItem("i0")] * 21}, "history"),
    ({"history": [3]}, "history[0]"),
    ({"filters": Filters(categories_any="drama")}, "filters.categories_any"),
    ({"exclude_items": [1]}, "exclude_items[0]"),
    ({"user_id": "\ud800"}, "user_id"),
    ({"filters": Filters(price_min=float("nan"))}, "filters.price_min"),
    ({"filters": Filters(price_min=2.0, price_max=1.0)}, "filters.price_min"),
    ({"diversity": 1.5}, "diversity"),
    ({"diversity": "much"}, "diversity"),
    ({"deadline_ms": 0}, "deadline_ms"),
    ({"deadline_ms": 1e9}, "deadline_ms"),
]


@pytest.mark.parametrize(("fields", "name"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_requests_name_the_field(fixture: Fixture, fields: dict[str, Any], name: str):
    with pytest.raises(RequestError) as caught:
        fixture.recommender.recommend(**fields)
    assert caught.value.details["field"] == name
    assert str(caught.value).startswith(name)
    assert fixture.queries == []


def test_a_misspelt_field_is_a_request_error(fixture: Fixture):
    with pytest.raises(RequestError, match="topk"):
        fixture.recommender.recommend(topk=3)


@pytest.mark.parametrize("index", [True, False])
def test_similar_items(index: bool):
    recommender = Fixture(index=index).recommender
    answer = recommender.similar("i0", 3)
    assert answer.item_ids[0] == "i20"
    assert answer.scores[0] == pytest.approx(1.0, abs=1e-5)
    assert answer.scores == sorted(answer.scores, reverse=True)
    everything = recommender.similar(SimilarRequest("i7", 50, "my id"))  # an unavailable item has neighbours
    assert set(everything.item_ids) == {f"i{row}" for row in range(NUM_ITEMS) if row != 7}
    assert everything.request_id == "my id"
    with pytest.raises(RequestError) as caught:
        recommender.similar("unheard of")
    assert caught.value.details == {"field": "item_id", "unknown": True}
    with pytest.raises(RequestError, match="top_k"):
        recommender.similar("i0", 0)


def test_look_ups(fixture: Fixture):
    assert fixture.recommender.user("ann") is ANN
    assert fixture.recommender.user("nobody") is None
    assert (fixture.recommender.item("i3") or {})["title"] == "Item 3"
    assert fixture.recommender.item("unheard of") is None


def test_blocking_calls_work_inside_a_running_event_loop(fixture: Fixture):
    async def notebook_cell() -> int:
        return len(fixture.recommender.recommend(top_k=2).items)

    assert asyncio.run(notebook_cell()) == 2
    fixture.recommender.close()
    assert len(fixture.recommender.recommend(top_k=2).items) == 2
    fixture.recommender.close()


def test_what_a_user_hides_never_comes_back_until_they_take_it_after_all(fixture: Fixture):
    def shown(*rows, **fields):
        fixture.users.states["eve"] = state("eve", *rows, version=len(rows))
        return fixture.recommender.recommend(user_id="eve", top_k=NUM_ITEMS, **fields).item_ids

    hidden = [("i4", "rating", 5.0), ("i4", "hide", np.nan), ("i6", "dislike", np.nan), ("i8", "view", np.nan)]
    assert not {"i4", "i6", "i8"} & set(shown(*hidden))
    assert {"i4", "i6", "i8"} & set(shown(*hidden, exclude_seen=False)) == {"i8"}
    assert "i4" in shown(*hidden, ("i4", "view", np.nan), ("i4", "purchase", np.nan), exclude_seen=False)
    told = [HistoryItem("i4"), HistoryItem("i6", event="hide")]
    answer = fixture.recommender.recommend(RecommendRequest(history=told, top_k=NUM_ITEMS, exclude_seen=False))
    assert "i4" in answer.item_ids
    assert "i6" not in answer.item_ids


def test_what_was_met_long_ago_may_come_back(fixture: Fixture):
    recommender = Fixture(config=CONFIG.model_copy(update={"repeat_after_days": 2.0})).recommender
    day_ms = 86_400_000

    def shown(now_ms):
        request = RecommendRequest(history=[HistoryItem("i4", timestamp_ms=day_ms)], top_k=NUM_ITEMS)
        return asyncio.run(recommender.arecommend(request, now_ms=now_ms)).item_ids

    assert "i4" not in shown(3 * day_ms - 1)
    assert "i4" in shown(3 * day_ms)
    order_only = RecommendRequest(history=[HistoryItem("i4", timestamp_ms=0)], top_k=NUM_ITEMS)
    assert "i4" not in asyncio.run(recommender.arecommend(order_only, now_ms=3 * day_ms)).item_ids


def test_a_store_on_another_machine_is_waited_for_within_its_budget(fixture: Fixture):
    async def together(number: int):
        return await asyncio.gather(
            *(fixture.recommender.arecommend(RecommendRequest(user_id="ann", top_k=2)) for _ in range(number))
        )

    fixture.users.is_remote = True
    assert not fixture.recommender.recommend(user_id="ann", top_k=2).degraded
    fixture.users.wait_s = 1.5
    started = time.monotonic()
    answers = asyncio.run(together(40))  # more than there are threads to wait
    assert time.monotonic() - started < 1.2
    assert {answer.degraded for answer in answers} == {("state",)}
    fixture.recommender.close()
    # Who has time waits for it: what was seen is not to be shown again.
    fixture.users.wait_s = 0.2
    assert fixture.recommender.recommend(user_id="ann", top_k=2).degraded == ("state",)
    assert not fixture.recommender.recommend(user_id="ann", top_k=2, deadline_ms=9000).degraded
    fixture.recommender.close()
    fixture.users.wait_s = 0.0
    assert not fixture.recommender.recommend(user_id="ann", top_k=2).degraded
    fixture.recommender.close()


def test_histories_of_a_bundle_are_states():
    table = pa.table(
        {
            "user_id": ["bob", "eve"],
            "item_ids": [["i1", "i2"], []],
            "timestamps_ms": [[5, 6], []],
            "events": [["click", "rating"], []],
            "values": pa.array([[float("nan"), 4.0], []], pa.list_(pa.float32())),
        }
    )
    users = HistoriesTable(table)
    bob = users.user("bob")
    assert bob is not None
    assert (bob.item_ids, bob.events, bob.timestamps_ms.tolist()) == (("i1", "i2"), ("click", "rating"), [5, 6])
    eve = users.user("eve")
    assert eve is not None
    assert len(eve) == 0
    assert users.user("nobody") is None
    profiles = Profiles(Catalogue.build(items_table(3)), POLICY, max_history=1, cache_size=0)
    assert profiles.of(bob).history.item_idx.tolist() == [2]
    assert profiles.of(eve).history.item_idx.tolist() == []


def test_the_profile_cache_is_bounded_and_follows_versions():
    profiles = Profiles(Catalogue.build(items_table(3)), POLICY, max_history=5, cache_size=2)
    first = state("a", ("i0", "click", np.nan))
    profile = profiles.of(first)
    assert profiles.of(first) is profile
    profiles.of(state("b", ("i0", "click", np.nan)))
    profiles.of(state("c", ("i0", "click", np.nan)))
    assert profiles.of(first) is not profile
    assert profiles.of(state("a", ("i1", "click", np.nan), version=2)).history.item_idx.tolist() == [1]
