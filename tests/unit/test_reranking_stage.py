from __future__ import annotations

import logging
from datetime import UTC, datetime

import numpy as np
import pytest
from pydantic import ValidationError

from recsys.data.catalogue import Catalogue
from recsys.pipeline.rules import RuleConfig
from recsys.pipeline.rules.boost import BoostRule
from recsys.pipeline.rules.bury import BuryRule
from recsys.pipeline.rules.creator_cap import CreatorCapRule
from recsys.pipeline.rules.diversity import DiversityRule
from recsys.pipeline.rules.exploration import PROPENSITY, ExplorationRule
from recsys.pipeline.rules.pin import PinRule
from recsys.pipeline.stages.reranking import RerankingStage
from recsys.testing.pipeline import items_table, make_query
from recsys.types import Candidates, Filters, Query

CREATORS = ["ann", "ann", "ann", "bob", None, None, None, "eve", "eve", "bob"]


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    categories = [["x"] if row < 5 else ["y"] for row in range(10)]
    return Catalogue.build(
        items_table(10, categories=categories, creators=CREATORS, available=[row != 9 for row in range(10)])
    )


def rerank(
    catalogue: Catalogue,
    *rules: RuleConfig,
    items: list[int] | None = None,
    query: Query | None = None,
    vectors: np.ndarray | None = None,
) -> Candidates:
    items = list(range(8)) if items is None else items
    score = np.linspace(2.0, -3.0, len(items), dtype=np.float32)
    candidates = Candidates.from_source("source", np.array(items, np.int32), score, stage="retrieval")
    stage = RerankingStage("bundle", catalogue, rules, vectors)
    (found,) = stage.run_batch([query or make_query(top_k=4)], [candidates])
    return found


def reasons(candidates: Candidates) -> dict[str, list[int]]:
    return {removal.reason: sorted(removal.item_idx.tolist()) for removal in candidates.dropped + candidates.removed}


def test_by_default_the_order_stands_and_the_rest_is_accounted_for(catalogue: Catalogue):
    found = rerank(catalogue)
    assert found.item_idx.tolist() == [0, 1, 2, 3]
    assert reasons(found) == {"below_top_k": [4, 5, 6, 7]}
    assert found.stage_scores["reranking"].tolist() == pytest.approx([1, 6 / 7, 5 / 7, 4 / 7])


def test_diversity_follows_maximal_marginal_relevance(catalogue: Catalogue):
    rng = np.random.default_rng(3)
    vectors = rng.standard_normal((10, 4)).astype(np.float32) * 5
    for diversity in (0.3, 0.8, 1.0):
        found = rerank(catalogue, DiversityRule(strength=diversity), vectors=vectors)
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        relevance, chosen = np.linspace(1, 0, 8), list[int]()
        while len(chosen) < 4:
            value = [
                (1 - diversity) * relevance[i]
                - diversity * max([0.0, *(float(unit[i] @ unit[j]) for j in chosen)])
                - (99 if i in chosen else 0)
                for i in range(8)
            ]
            chosen.append(int(np.argmax(value)))
        assert found.item_idx.tolist() == chosen


def test_diversity_by_categories_alternates_and_the_request_overrides(catalogue: Catalogue):
    assert rerank(catalogue, DiversityRule(strength=0.6)).item_idx.tolist()[:2] == [0, 5]
    query = make_query(top_k=4, diversity=0.0)
    assert rerank(catalogue, DiversityRule(strength=0.6), query=query).item_idx.tolist() == [0, 1, 2, 3]
    query = make_query(top_k=4, diversity=0.6)
    found = rerank(catalogue, query=query)
    assert found.item_idx.tolist()[:2] == [0, 5]
    assert "diversity" in reasons(found)


def test_the_creator_cap_spares_items_without_a_creator(catalogue: Catalogue):
    found = rerank(catalogue, CreatorCapRule(num_items=1), query=make_query(top_k=5))
    assert found.item_idx.tolist() == [0, 3, 4, 5, 6]
    assert reasons(found) == {"creator_cap": [1, 2], "below_top_k": [7]}


def test_the_creator_cap_gives_way_before_the_slate_gets_short(catalogue: Catalogue):
    found = rerank(catalogue, CreatorCapRule(num_items=1), items=[0, 1, 2, 3])
    assert found.item_idx.tolist() == [0, 3, 1, 2]


def test_pins_take_their_places(catalogue: Catalogue):
    found = rerank(catalogue, PinRule(item_ids=("i8", "i2"), position=1), PinRule(categories=("y",), position=1))
    assert found.item_idx.tolist() == [0, 8, 2, 5]
    assert found.sources_of(1) == ["pinned"]
    assert np.isnan(found.stage_scores["retrieval"][1])
    assert reasons(found) == {"below_top_k": [1, 3, 4, 6, 7]}


def test_pins_obey_hard_rules_and_the_size_of_the_slate(catalogue: Catalogue):
    query = make_query(top_k=3, excluded=[8], filters=Filters(categories_any=("y",)))
    found = rerank(
        catalogue,
        PinRule(item_ids=("i9",)),
        PinRule(item_ids=("i8",)),
        PinRule(item_ids=("i0",)),
        PinRule(item_ids=("i6",), position=900),
        items=[5, 6, 7],
        query=query,
    )
    assert found.item_idx.tolist() == [5, 6, 7]
    assert reasons(found) == {
        "pinned_but_unavailable": [9],
        "pinned_but_excluded": [8],
        "pinned_but_category": [0],
    }


def test_a_pin_far_down_ends_a_short_slate(catalogue: Catalogue):
    query = make_query(top_k=10)
    found = rerank(catalogue, PinRule(item_ids=("i1",), position=5), items=[1, 0], query=query)
    assert found.item_idx.tolist() == [0, 1]
    assert rerank(catalogue, PinRule(item_ids=("i1",)), items=[], query=query).item_idx.tolist() == [1]


def test_a_pin_counts_for_the_creator_cap_and_for_diversity(catalogue: Catalogue):
    found = rerank(catalogue, PinRule(item_ids=("i2",)), CreatorCapRule(num_items=1))
    assert found.item_idx.tolist() == [2, 3, 4, 5]


def test_boosts_add_to_relevance(catalogue: Catalogue):
    found = rerank(catalogue, BoostRule(item_ids=("i7",), amount=1.0), BoostRule(categories=("y",), amount=0.05))
    assert found.item_idx.tolist()[:2] == [7, 0]
    assert rerank(catalogue, BoostRule(item_ids=("i0",), amount=-1.0)).item_idx.tolist() == [1, 2, 3, 4]


def test_the_buried_come_last_but_before_a_short_slate(catalogue: Catalogue):
    found = rerank(catalogue, BuryRule(categories=("x",)), query=make_query(top_k=4))
    assert found.item_idx.tolist() == [5, 6, 7, 0]
    assert reasons(found) == {"buried": [1, 2, 3, 4]}


def test_equal_scores_and_no_candidates(catalogue: Catalogue):
    stage = RerankingStage("bundle", catalogue, [DiversityRule(strength=0.5)])
    same = Candidates.from_source("source", np.array([4, 2], np.int32), np.full(2, 3.0, np.float32), stage="retrieval")
    found, empty = stage.run_batch([make_query(), make_query()], [same, Candidates.empty()])
    assert found.item_idx.tolist() == [4, 2]
    assert len(empty) == 0


def test_exploration_shows_what_it_says_with_the_probability_it_says(catalogue: Catalogue):
    share = 0.4
    shown, promised = np.zeros((3, 8)), np.zeros((3, 8))
    num_draws = 4000
    for number in range(num_draws):
        query = make_query(top_k=3, request_id=str(number))
        found = rerank(catalogue, ExplorationRule(share=share), query=query)
        items, propensity = found.item_idx.tolist(), found.stage_scores[PROPENSITY]
        assert len(set(items)) == 3
        above: set[int] = set()
        for place, item in enumerate(items):
            shown[place, item] += 1
            left = [each for each in range(8) if each not in above]
            for each in left:  # what was to be expected, given what is above
                promised[place, each] += share / len(left) + (1 - share) * (each == left[0])
            assert propensity[place] == pytest.approx(share / len(left) + (1 - share) * (item == left[0]))
            above.add(item)
    spread = np.sqrt(promised * (1 - promised / num_draws)) + 1
    assert (np.abs(shown - promised) < 5 * spread).all()
    query = make_query(top_k=3, request_id="7")
    once, again = (rerank(catalogue, ExplorationRule(share=share), query=query) for _ in range(2))
    assert once.item_idx.tolist() == again.item_idx.tolist()


def test_exploration_keeps_to_the_rules(catalogue: Catalogue):
    for number in range(200):
        query = make_query(top_k=4, request_id=str(number))
        rules = [ExplorationRule(share=1.0), BuryRule(item_ids=("i0",)), CreatorCapRule(num_items=1)]
        found = rerank(catalogue, *rules, PinRule(position=1, item_ids=("i5",)), query=query)
        assert found.item_idx[1] == 5
        assert found.stage_scores[PROPENSITY][1] == 1
        assert 0 not in found.item_idx
        creators = [CREATORS[item] for item in found.item_idx if CREATORS[item] is not None]
        assert len(creators) == len(set(creators))
    assert PROPENSITY not in rerank(catalogue).stage_scores


def test_rules_for_unknown_items_are_reported_and_ignored(catalogue: Catalogue, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        found = rerank(catalogue, PinRule(item_ids=("gone",)))
    assert found.item_idx.tolist() == [0, 1, 2, 3]
    assert "gone" in caplog.text


def test_a_rule_about_nothing_is_a_mistake():
    with pytest.raises(ValidationError, match="name at least one"):
        PinRule()


# --- the time in which a rule holds -----------------------------------------------------------------------------------

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
NOON_MS = int(NOON.timestamp() * 1000)


def test_of_rules_that_act_alone_the_first_that_holds_counts(catalogue: Catalogue):
    """A season's rule stands before the usual one."""
    season = DiversityRule(strength=0, starts_at=NOON)
    rules = [season, DiversityRule(strength=0.6), DiversityRule(strength=1)]
    before, after = make_query(top_k=4, now_ms=NOON_MS - 1), make_query(top_k=4, now_ms=NOON_MS)
    assert rerank(catalogue, *rules, query=before).item_idx.tolist()[:2] == [0, 5]
    assert rerank(catalogue, *rules, query=after).item_idx.tolist() == [0, 1, 2, 3]
    never = [ExplorationRule(share=0), ExplorationRule(share=1)]
    assert PROPENSITY not in rerank(catalogue, *never).stage_scores


def test_a_request_asks_for_diversity_where_the_rule_does_not_hold(catalogue: Catalogue):
    query = make_query(top_k=4, diversity=0.6, now_ms=NOON_MS)
    found = rerank(catalogue, DiversityRule(strength=0.1, ends_at=NOON), query=query)
    assert found.item_idx.tolist()[:2] == [0, 5]


@pytest.mark.parametrize(
    ("period", "problem"),
    [
        ({"starts_at": "2026-03-01T12:00:00"}, "timezone"),
        ({"ends_at": "2026-03-01"}, "timezone"),
        ({"starts_at": 1_772_366_400}, "with its zone"),
        ({"starts_at": NOON, "ends_at": NOON}, "after starts_at"),
        ({"starts_at": "2026-03-01T13:00:00+01:00", "ends_at": "2026-03-01T12:00:00Z"}, "after starts_at"),
        ({"ends_at": "0001-01-01T00:00:00+01:00"}, "1000 to 2999"),
    ],
)
def test_a_period_that_is_none_is_a_mistake(period, problem):
    with pytest.raises(ValidationError, match=problem):
        CreatorCapRule(num_items=1, **period)


@pytest.mark.parametrize("period", [{"starts_at": NOON}, {"ends_at": NOON}])
def test_what_has_a_period_does_not_hold_where_the_time_is_not_known(period):
    start_ms, end_ms = CreatorCapRule(num_items=1, **period).period_ms
    assert not start_ms <= 0 < end_ms


def test_periods_are_exact_to_the_millisecond():
    rule = CreatorCapRule(num_items=1, starts_at="2026-03-01T13:00:00.000001+01:00", ends_at="2026-03-01T12:00:01Z")
    assert rule.period_ms == (NOON_MS + 1, NOON_MS + 1000)
