"""The six kinds of rules give what one function that knows them all gives, in whatever order they are listed.

Shape legend: C candidates.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from recsys.data.catalogue import Catalogue
from recsys.pipeline.rules import KINDS, RuleConfig
from recsys.pipeline.rules.exploration import PROPENSITY
from recsys.pipeline.stages.reranking import RerankingStage
from recsys.testing.pipeline import items_table, make_query
from recsys.types import Candidates, Filters, Query

NUM_ITEMS = 30
CATEGORIES = ("a", "b", "c")
CREATOR_HANDICAP, BURY_HANDICAP = 1e3, 1e6


def in_one_loop(
    query: Query, candidates: Candidates, catalogue: Catalogue, rules: list[RuleConfig], embeddings: np.ndarray | None
) -> dict[str, Any]:
    """The slate: its items, what each is worth, its propensities, and why the others are not in it."""
    by_kind: dict[str, list[Any]] = {kind: [rule for rule in rules if rule.kind == kind] for kind in KINDS.names}
    items, score, gone, pinned = with_pins(query, candidates, catalogue, by_kind["pin"])
    size = min(query.top_k, len(items))
    if not size:
        return {"items": [], "values": [], "propensity": [], "gone": gone}
    strengths = [rule.strength for rule in by_kind["diversity"]][:1] or [0.0]
    diversity = strengths[0] if query.diversity is None else query.diversity
    relevance = scaled(score)
    boost_N = np.zeros(len(catalogue), np.float32)
    for rule in by_kind["boost"]:
        boost_N += np.float32(rule.amount) * members(catalogue, rule)
    if by_kind["boost"]:
        relevance += boost_N[items]
    buried = np.zeros(len(items), np.bool_)
    for rule in by_kind["bury"]:
        buried |= members(catalogue, rule)[items]
    handicap = np.where(buried, BURY_HANDICAP, 0.0)
    handicap[[row for _, row in pinned]] = np.inf
    cap = by_kind["creator_cap"][0].num_items if by_kind["creator_cap"] else 0
    creators = catalogue.creator_codes[items]
    over_cap, counts = np.zeros(len(items), np.bool_), dict[int, int]()
    vectors = unit_vectors(catalogue, items, embeddings)
    nearest = np.zeros(len(items), np.float32)
    merit = (1.0 - diversity) * relevance
    exploration = by_kind["exploration"][0] if by_kind["exploration"] else None
    share = exploration.share if exploration else 0.0
    digest = hashlib.sha256(query.request_id.encode()).digest()
    chance = np.random.default_rng((exploration.seed if exploration else 0, int.from_bytes(digest[:8], "big")))
    picks: list[int] = []
    values: list[float] = []
    propensities: list[float] = []
    num_free = len(items) - len(pinned)
    while len(picks) < size:
        value = merit - diversity * nearest
        propensity = 1.0
        if pinned and (pinned[0][0] <= len(picks) or not num_free):
            row = pinned.pop(0)[1]
        else:
            row = best = int(np.argmax(value - handicap))
            num_free -= 1
            drawable = np.flatnonzero(handicap < CREATOR_HANDICAP)
            if share and len(drawable):
                if chance.random() < share:
                    row = int(chance.choice(drawable))
                propensity = share / len(drawable) + (1 - share) * (row == best)
        propensities.append(propensity)
        picks.append(row)
        values.append(float(value[row]))
        handicap[row] = np.inf
        np.maximum(nearest, vectors @ vectors[row], out=nearest)
        creator = int(creators[row])
        if cap and creator >= 0:
            counts[creator] = counts.get(creator, 0) + 1
            if counts[creator] == cap:
                handicap[creators == creator] += CREATOR_HANDICAP
                over_cap |= creators == creator
    among_best = np.zeros(len(items), np.bool_)
    if diversity > 0:
        among_best[np.argsort(-relevance, kind="stable")[: len(picks)]] = True
    left = np.ones(len(items), np.bool_)
    left[picks] = False
    for reason, concerned in (
        ("buried", buried),
        ("creator_cap", over_cap),
        ("diversity", among_best),
        ("below_top_k", left),
    ):
        if (left & concerned).any():
            gone[reason] = sorted(items[left & concerned].tolist())
        left = left & ~concerned
    return {
        "items": items[picks].tolist(),
        "values": np.array(values, np.float32).tolist(),
        "propensity": np.array(propensities, np.float32).tolist() if share else [],
        "gone": gone,
    }


def with_pins(
    query: Query, candidates: Candidates, catalogue: Catalogue, pins: list[Any]
) -> tuple[np.ndarray, np.ndarray, dict[str, list[int]], list[tuple[int, int]]]:
    """All items and their scores, what was refused, and (place, row) of each pin, by place."""
    items, score = candidates.item_idx, candidates.score
    row_of = {item: row for row, item in enumerate(items.tolist())}
    rows_of = [catalogue.id_map.rows(pin.item_ids) for pin in pins]
    rows_of = [rows[rows >= 0] for rows in rows_of]
    named = np.unique(np.concatenate([*rows_of, np.zeros(0, np.int32)]))
    absent = np.array([item for item in named.tolist() if item not in row_of], np.int32)
    refused: dict[str, list[int]] = {}
    for reason, concerned in catalogue.violations(absent, query.filters, query.excluded_item_idx):
        refused[f"pinned_but_{reason}"] = sorted(absent[concerned].tolist())
    bad = {item for found in refused.values() for item in found}
    place_of: dict[int, int] = {}
    for pin, rows in zip(pins, rows_of, strict=True):
        wanted = [item for item in rows.tolist() if item not in bad]
        if pin.categories:
            of_category = in_categories(catalogue, pin)[items]
            wanted += [item for item in items[of_category].tolist() if item not in place_of][:1]
        place = pin.position
        for item in wanted:
            if item in place_of:
                continue
            while place in place_of.values():
                place += 1
            if place < query.top_k:
                place_of[item] = place
    fresh = [item for item in place_of if item not in row_of]
    row_of |= {item: len(items) + row for row, item in enumerate(fresh)}
    lowest = np.full(len(fresh), score.min(initial=0.0), np.float32)
    items, score = np.concatenate([items, np.array(fresh, np.int32)]), np.concatenate([score, lowest])
    return items, score, refused, sorted((place, row_of[item]) for item, place in place_of.items())


def scaled(score: np.ndarray) -> np.ndarray:
    wide = score.astype(np.float64)
    low, high = wide.min(), wide.max()
    return (wide - low) / (high - low) if high > low else np.ones(len(wide))


def in_categories(catalogue: Catalogue, rule: Any) -> np.ndarray:
    mask = np.zeros(len(catalogue), np.bool_)
    for category in rule.categories:
        mask[catalogue.in_category(category)] = True
    return mask


def members(catalogue: Catalogue, rule: Any) -> np.ndarray:
    mask = in_categories(catalogue, rule)
    rows = catalogue.id_map.rows(rule.item_ids)
    mask[rows[rows >= 0]] = True
    return mask


def unit_vectors(catalogue: Catalogue, items: np.ndarray, embeddings: np.ndarray | None) -> np.ndarray:
    if embeddings is None:
        return catalogue.category_rows(items)
    vectors = embeddings[items]
    return vectors / np.maximum(np.sqrt(np.einsum("cd,cd->c", vectors, vectors))[:, None], np.float32(1e-12))


# --- what is drawn ----------------------------------------------------------------------------------------------------

item_lists = st.lists(st.integers(0, NUM_ITEMS - 1), unique=True, max_size=NUM_ITEMS)
few = st.lists(st.integers(0, NUM_ITEMS - 1), unique=True, max_size=4)
some_categories = st.lists(st.sampled_from(CATEGORIES), max_size=2, unique=True).map(tuple)
ids = st.lists(st.integers(0, NUM_ITEMS + 2).map("i{}".format), max_size=4).map(tuple)
selections = st.fixed_dictionaries({"item_ids": ids, "categories": some_categories}).filter(
    lambda chosen: chosen["item_ids"] or chosen["categories"]
)
amounts = st.floats(-1, 1, width=16)


def maybe(kind: str, **settings: Any) -> Any:
    return st.lists(st.fixed_dictionaries({"kind": st.just(kind), **settings}), max_size=1)


rule_lists = st.tuples(
    st.lists(st.builds(lambda s, p: s | {"kind": "pin", "position": p}, selections, st.integers(0, 9)), max_size=4),
    st.lists(st.builds(lambda s, a: s | {"kind": "boost", "amount": a}, selections, amounts), max_size=3),
    st.lists(st.builds(lambda s: s | {"kind": "bury"}, selections), max_size=2),
    maybe("creator_cap", num_items=st.integers(1, 3)),
    maybe("diversity", strength=st.sampled_from([0.0, 0.3, 0.7, 1.0])),
    maybe("exploration", share=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 3)),
).flatmap(lambda lists: st.permutations([rule for rules in lists for rule in rules]))


@settings(max_examples=500)
@given(
    found=st.permutations(range(NUM_ITEMS)).flatmap(lambda order: st.integers(0, NUM_ITEMS).map(lambda n: order[:n])),
    equal_scores=st.sampled_from([None, 1, 3]),
    rules=rule_lists,
    top_k=st.integers(1, 12) | st.integers(1, NUM_ITEMS + 5),
    excluded=few,
    unavailable=few,
    wanted=st.sampled_from([Filters(), Filters(categories_any=("a",)), Filters(categories_none=("b",), price_max=0.5)]),
    diversity=st.none() | st.sampled_from([0.0, 0.4]),
    embedded=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_same_as_one_loop(
    found: list[int],
    equal_scores: int | None,
    rules: list[dict[str, Any]],
    top_k: int,
    excluded: list[int],
    unavailable: list[int],
    wanted: Filters,
    diversity: float | None,
    embedded: bool,
    seed: int,
):
    rng = np.random.default_rng(seed)
    catalogue = Catalogue.build(
        items_table(
            NUM_ITEMS,
            categories=[rng.choice(CATEGORIES, rng.integers(0, 3), replace=False).tolist() for _ in range(NUM_ITEMS)],
            creators=[None if n == 3 else f"creator {n}" for n in rng.integers(0, 4, NUM_ITEMS)],
            prices=rng.random(NUM_ITEMS).tolist(),
            available=[row not in unavailable for row in range(NUM_ITEMS)],
        )
    )
    embeddings = rng.normal(size=(NUM_ITEMS, 5)).astype(np.float32) if embedded else None
    score = rng.normal(size=len(found)) if equal_scores is None else rng.integers(0, equal_scores, len(found))
    candidates = Candidates.from_source(
        "fake", np.array(found, np.int32), np.sort(score.astype(np.float32))[::-1].copy(), stage="retrieval"
    )
    query = make_query(
        top_k=top_k, excluded=excluded, filters=wanted, diversity=diversity, request_id=str(seed), now_ms=seed
    )
    configs = [KINDS.parse(rule, where="test") for rule in rules]
    expected = in_one_loop(query, candidates, catalogue, configs, embeddings)
    (slate,) = RerankingStage("bundle", catalogue, configs, embeddings).run_batch([query], [candidates])
    assert slate.item_idx.tolist() == expected["items"]
    assert slate.stage_scores.get("reranking", np.zeros(0)).tolist() == expected["values"]
    assert slate.stage_scores.get(PROPENSITY, np.zeros(0)).tolist() == expected["propensity"]
    gone: dict[str, list[int]] = {}
    for removal in (*slate.removed, *slate.dropped):
        gone[removal.reason] = sorted([*gone.get(removal.reason, []), *removal.item_idx.tolist()])
    assert gone == expected["gone"]
