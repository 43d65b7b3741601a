"""Every kind of reranking rule keeps the same promises: no candidate is lost, no slate is short, no hard rule gives."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from recsys.data.catalogue import Catalogue
from recsys.pipeline.config import PipelineConfig
from recsys.pipeline.hard_rules import HardRules
from recsys.pipeline.popular import PopularItems
from recsys.pipeline.rules import KINDS, RuleConfig
from recsys.pipeline.runner import LocalStage, Runner
from recsys.pipeline.selection import Selection
from recsys.pipeline.stages.reranking import RerankingStage
from recsys.testing.pipeline import items_table, make_query, retrieves
from recsys.types import Candidates, Filters, History, Query, Removal

NUM_ITEMS = 20
UNAVAILABLE, EXCLUDED, FILTERED = (1, 11), (3, 12), (5, 13)
START, END = datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 4, 1, tzinfo=UTC)
START_MS, END_MS = (int(moment.timestamp() * 1000) for moment in (START, END))


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue.build(
        items_table(
            NUM_ITEMS,
            categories=[["a"] if row % 3 else ["b"] for row in range(NUM_ITEMS)],
            creators=[None if row % 4 == 3 else f"creator {row % 4}" for row in range(NUM_ITEMS)],
            prices=[100.0 if row in FILTERED else 1.0 for row in range(NUM_ITEMS)],
            available=[row not in UNAVAILABLE for row in range(NUM_ITEMS)],
        )
    )


@pytest.fixture(params=KINDS.names)
def rule(request, tmp_path) -> RuleConfig:
    return KINDS.get(request.param).sample(tmp_path)


def candidates(rng: np.random.Generator, num: int, among: list[int] | None = None) -> Candidates:
    items = rng.permutation(NUM_ITEMS if among is None else among)[:num].astype(np.int32)
    score = np.sort(rng.normal(size=len(items)).astype(np.float32))[::-1].copy()
    return Candidates.from_source("source", items, score, stage="retrieval")


def rerank(catalogue: Catalogue, rules: list[RuleConfig], query: Query, found: Candidates) -> Candidates:
    (slate,) = RerankingStage("bundle", catalogue, rules).run_batch([query], [found])
    return slate


def plain(slate: Candidates) -> dict[str, Any]:
    """All that a stage says, as plain values."""
    return {
        "items": slate.item_idx.tolist(),
        "scores": {stage: np.nan_to_num(values, nan=-9).tolist() for stage, values in slate.stage_scores.items()},
        "sources": [slate.sources_of(row) for row in range(len(slate))],
        "gone": [(r.stage, r.reason, r.item_idx.tolist()) for r in (*slate.removed, *slate.dropped)],
    }


def items_of(removals: tuple[Removal, ...]) -> list[int]:
    return [item for removal in removals for item in removal.item_idx.tolist()]


def test_the_kind_is_the_name(rule: RuleConfig):
    assert KINDS.get(rule.kind) is type(rule)


def test_every_setting_is_described(rule: RuleConfig):
    fields = type(rule).model_fields
    assert [name for name, field in fields.items() if name != "kind" and not field.description] == []


def test_json_and_back(rule: RuleConfig):
    timed = timed_like(rule)
    for each in (rule, timed):
        again = KINDS.parse(json.loads(json.dumps(each.model_dump(mode="json"))), where="test")
        assert again == each
        assert again.content_hash() == each.content_hash()
        config = PipelineConfig(rules=(each, each))
        assert PipelineConfig.parse(config.model_dump(mode="json"), where="test") == config


@pytest.mark.parametrize("num", [0, 1, 7, NUM_ITEMS])
@pytest.mark.parametrize("top_k", [1, 5, NUM_ITEMS + 3])
def test_no_candidate_is_lost_and_no_slate_is_short(catalogue: Catalogue, rule: RuleConfig, num: int, top_k: int):
    rng = np.random.default_rng(num * 100 + top_k)
    for number in range(20):
        found = candidates(rng, num)
        slate = rerank(catalogue, [rule], make_query(top_k=top_k, request_id=str(number)), found)
        selected = slate.item_idx.tolist()
        everything = selected + items_of(slate.dropped) + items_of(slate.removed)
        assert len(everything) == len(set(everything))
        assert set(found.item_idx.tolist()) <= set(everything)
        assert min(top_k, num) <= len(selected) <= top_k
        assert all(len(values) == len(selected) for values in slate.stage_scores.values())
        assert all(slate.sources_of(row) for row in range(len(selected)))
        assert all(removal.reason for removal in (*slate.dropped, *slate.removed))


def test_what_must_not_be_shown_stays_out(catalogue: Catalogue, rule: RuleConfig):
    query = make_query(top_k=NUM_ITEMS, excluded=EXCLUDED, filters=Filters(price_max=10.0))
    forbidden = {*UNAVAILABLE, *EXCLUDED, *FILTERED}
    allowed = [item for item in range(NUM_ITEMS) if item not in forbidden]
    rng = np.random.default_rng(0)
    for num in (0, 3, len(allowed)):
        slate = rerank(catalogue, [rule], query, candidates(rng, num, allowed))
        assert not forbidden & set(slate.item_idx.tolist())
    # Nor where retrieval forgets itself.
    stages = [retrieves(*range(NUM_ITEMS)), RerankingStage("bundle", catalogue, [rule])]
    popular = PopularItems(NUM_ITEMS, np.arange(NUM_ITEMS, dtype=np.int32), np.ones(NUM_ITEMS, np.float32))
    runner = Runner([LocalStage(stage, inline=True) for stage in stages], Selection(HardRules(catalogue), popular))
    served = asyncio.run(runner.run(replace(query, history=History(np.array([3], np.int32), np.zeros(1, np.int64)))))
    assert served.degraded == ()
    assert sorted(served.selected.item_idx.tolist()) == allowed


def test_who_shares_the_batch_changes_nothing(catalogue: Catalogue, rule: RuleConfig):
    rng = np.random.default_rng(1)
    stage = RerankingStage("bundle", catalogue, [rule, timed_like(rule)])
    queries = [
        make_query(top_k=1 + n % 6, request_id=str(n), excluded=(n,), now_ms=START_MS + (n % 3 - 1) * 10**9,
                   diversity=(None, 0.0, 0.7)[n % 3])
        for n in range(12)
    ]  # fmt: skip
    found = [candidates(rng, n + 1) for n in range(12)]
    together = [plain(slate) for slate in stage.run_batch(queries, found)]
    backwards = [plain(slate) for slate in stage.run_batch(queries[::-1], found[::-1])]
    alone = [plain(stage.run_batch([q], [c])[0]) for q, c in zip(queries, found, strict=True)]
    assert together == alone == backwards[::-1]


def timed_like(rule: RuleConfig) -> RuleConfig:
    """The same rule for a month."""
    return KINDS.parse(rule.model_dump() | {"starts_at": START, "ends_at": END}, where="test")


def test_a_rule_holds_in_its_period_alone(catalogue: Catalogue, rule: RuleConfig):
    timed, differs = timed_like(rule), 0
    rng = np.random.default_rng(2)
    for number in range(10):
        found = candidates(rng, 12)
        for now_ms, holds in ((START_MS - 1, False), (START_MS, True), (END_MS - 1, True), (END_MS, False)):
            query = make_query(top_k=6, now_ms=now_ms, request_id=str(number))
            with_rule, without = (plain(rerank(catalogue, rules, query, found)) for rules in ([rule], []))
            assert plain(rerank(catalogue, [timed], query, found)) == (with_rule if holds else without)
            differs += with_rule != without
    assert differs  # else this says nothing


@pytest.mark.parametrize("bounds", [{"starts_at": END}, {"ends_at": START}])
def test_one_bound_is_enough(catalogue: Catalogue, rule: RuleConfig, bounds: dict[str, datetime]):
    timed = KINDS.parse(rule.model_dump() | bounds, where="test")
    query = make_query(top_k=6, now_ms=(START_MS + END_MS) // 2)
    found = candidates(np.random.default_rng(3), 12)
    assert plain(rerank(catalogue, [timed], query, found)) == plain(rerank(catalogue, [], query, found))


def test_unknown_names_are_told_and_ignored(catalogue: Catalogue, rule: RuleConfig):
    if "item_ids" not in type(rule).model_fields:
        assert rule.unknown(catalogue) == ([], [])
        return
    named = KINDS.parse(
        rule.model_dump() | {"item_ids": ["i1", "gone"], "categories": ["a", "none such"]}, where="test"
    )
    assert named.unknown(catalogue) == (["gone"], ["none such"])
    only_known = KINDS.parse(rule.model_dump() | {"item_ids": ["i1"], "categories": ["a"]}, where="test")
    found = candidates(np.random.default_rng(4), 12)
    both = [plain(rerank(catalogue, [each], make_query(top_k=6), found)) for each in (named, only_known)]
    assert both[0] == both[1]
