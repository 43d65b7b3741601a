"""Whatever the rules, the filters and the failures: no candidate is lost, no rule is broken, no slate is short."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.data.catalogue import Catalogue
from recsys.pipeline.config import PipelineConfig
from recsys.pipeline.hard_rules import HardRules
from recsys.pipeline.popular import PopularItems
from recsys.pipeline.rules import KINDS, RuleConfig
from recsys.pipeline.runner import LocalStage, Runner
from recsys.pipeline.selection import Selection
from recsys.pipeline.stages.reranking import RerankingStage
from recsys.testing.pipeline import FunctionStage, items_table, make_query, raises
from recsys.types import Candidates, Filters, Removal

NUM_ITEMS = 24
CATEGORIES = ("a", "b", "c")

item_lists = st.lists(st.integers(0, NUM_ITEMS - 1), unique=True, max_size=NUM_ITEMS)
few_items = st.lists(st.integers(0, NUM_ITEMS - 1), unique=True, max_size=5) | item_lists
item_ids = st.lists(st.integers(0, NUM_ITEMS + 2).map("i{}".format), min_size=1, max_size=4).map(tuple)
some_categories = st.lists(st.sampled_from(CATEGORIES), max_size=2, unique=True).map(tuple)
selections = st.fixed_dictionaries({"item_ids": item_ids, "categories": some_categories})
moments = st.none() | st.sampled_from([datetime(1969, 1, 1, tzinfo=UTC), datetime(1970, 1, 1, tzinfo=UTC)])
periods = st.fixed_dictionaries(
    {"starts_at": moments, "ends_at": st.none() | st.just(datetime(1970, 1, 2, tzinfo=UTC))}
)
kinds = st.one_of(
    st.builds(lambda s, p: s | {"kind": "pin", "position": p}, selections, st.integers(0, 12)),
    st.builds(lambda s, a: s | {"kind": "boost", "amount": a}, selections, st.sampled_from([-1.0, 0.5])),
    st.builds(lambda s: s | {"kind": "bury"}, selections),
    st.builds(lambda n: {"kind": "creator_cap", "num_items": n}, st.integers(1, 2)),
    st.builds(lambda s: {"kind": "diversity", "strength": s}, st.sampled_from([0.0, 0.4, 1.0])),
    st.builds(lambda s: {"kind": "exploration", "share": s}, st.sampled_from([0.0, 0.5, 1.0])),
)
rule_lists = st.lists(
    st.builds(lambda rule, period: KINDS.parse(rule | period, where="test"), kinds, periods), max_size=8
)
filters = st.builds(
    Filters,
    some_categories,
    some_categories,
    st.none() | st.floats(0, 1, width=32),
    st.none() | st.floats(0, 1, width=32),
)


def items_of(removals: tuple[Removal, ...]) -> list[int]:
    return [item for removal in removals for item in removal.item_idx.tolist()]


@settings(max_examples=200)
@given(
    found=st.permutations(range(NUM_ITEMS)).flatmap(lambda order: st.integers(0, NUM_ITEMS).map(lambda n: order[:n])),
    proposed_again=item_lists,
    excluded=few_items,
    unavailable=few_items,
    wanted=filters,
    rules=rule_lists,
    diversity=st.none() | st.sampled_from([0.0, 0.7]),
    top_k=st.integers(1, 8) | st.integers(1, NUM_ITEMS + 5),
    broken=st.just(set[str]()) | st.sets(st.sampled_from(["retrieval", "ranking", "reranking"])),
    history=st.sampled_from([(), (0,)]),
    newcomers=st.sampled_from(["models", "popular"]),
    seed=st.integers(0, 1000),
)
def test_every_candidate_ends_in_exactly_one_place(
    found: list[int],
    proposed_again: list[int],
    excluded: list[int],
    unavailable: list[int],
    wanted: Filters,
    rules: list[RuleConfig],
    diversity: float | None,
    top_k: int,
    broken: set[str],
    history: tuple[int, ...],
    newcomers: Literal["models", "popular"],
    seed: int,
):
    rng = np.random.default_rng(seed)
    catalogue = Catalogue.build(
        items_table(
            NUM_ITEMS,
            categories=[rng.choice(CATEGORIES, rng.integers(0, 3), replace=False).tolist() for _ in range(NUM_ITEMS)],
            creators=[None if n == 3 else f"creator {n}" for n in rng.integers(0, 4, NUM_ITEMS)],
            prices=[None if p < 0.2 else float(p) for p in rng.random(NUM_ITEMS)],
            available=[row not in unavailable for row in range(NUM_ITEMS)],
        )
    )
    entered: set[int] = set()

    def noting(function: Any) -> Any:
        def wrapped(query: Any, candidates: Candidates) -> Candidates:
            entered.update(candidates.item_idx.tolist())
            output = function(query, candidates)
            entered.update(output.item_idx.tolist())
            return output

        return wrapped

    # A retrieval that knows no rules: worse than any real one.
    score = np.sort(rng.random(len(found)).astype(np.float32))[::-1]
    retrieved = Candidates.from_source("fake", np.array(found, np.int32), score, stage="retrieval")
    reranking = RerankingStage("bundle", catalogue, rules)
    working = {
        "retrieval": lambda _q, _c: retrieved,
        "ranking": lambda _q, c: c.scored("ranking", rng.standard_normal(len(c)).astype(np.float32)),
        "reranking": lambda q, c: reranking.run_batch([q], [c])[0],
    }
    stages = [
        LocalStage(raises(name) if name in broken else FunctionStage(name, noting(function)), inline=True)
        for name, function in working.items()
    ]
    popular = PopularItems(
        NUM_ITEMS, np.array(proposed_again, np.int32), np.arange(len(proposed_again), 0, -1).astype(np.float32)
    )
    query = make_query(
        history=history, excluded=excluded, top_k=top_k, num_candidates=max(10, top_k), filters=wanted,
        diversity=diversity,
    )  # fmt: skip
    runner = Runner(stages, Selection(HardRules(catalogue), popular), PipelineConfig(newcomers=newcomers))
    slate = asyncio.run(runner.run(query))

    selected = slate.selected.item_idx.tolist()
    filtered, not_selected = items_of(slate.filtered), items_of(slate.not_selected)
    everything = selected + filtered + not_selected
    assert len(everything) == len(set(everything))
    assert entered <= set(everything)

    allowed = catalogue.allowed(wanted, query.excluded_item_idx)
    assert allowed[selected].all()
    assert not allowed[filtered].any()
    assert len(selected) == min(top_k, int(allowed.sum()))
    assert np.isfinite(slate.selected.score).all()
    asked = set(working) if history or newcomers == "models" else {"reranking"}
    assert broken & asked <= set(slate.degraded) <= asked
    for removal in slate.filtered + slate.not_selected:
        assert removal.stage
        assert removal.reason
    for values in slate.selected.stage_scores.values():
        assert len(values) == len(selected)
    assert all(slate.selected.sources_of(row) for row in range(len(selected)))
