from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from recsys.data.catalogue import Catalogue
from recsys.errors import StageError, StageOverloadedError
from recsys.pipeline.config import BreakerConfig, BudgetsConfig, PipelineConfig
from recsys.pipeline.hard_rules import HardRules
from recsys.pipeline.popular import PopularItems
from recsys.pipeline.rules.boost import BoostRule
from recsys.pipeline.runner import CircuitBreaker, LocalStage, Runner
from recsys.pipeline.selection import Selection
from recsys.pipeline.stages.reranking import RerankingStage
from recsys.testing.pipeline import (
    FunctionStage,
    items_table,
    make_query,
    raises,
    ranks_backwards,
    retrieves,
    sleeps,
)
from recsys.types import Candidates, Filters, Query, Slate

NUM_ITEMS = 40
CONFIG = PipelineConfig(
    deadline_ms=900,
    budgets_ms=BudgetsConfig(retrieval=250, ranking=250, reranking=250),
    breaker=BreakerConfig(failures=3, open_s=0.2),
)
PATIENT = BudgetsConfig(retrieval=3000, ranking=3000, reranking=3000)
BEST = [10, 11, 12, 13, 14, 15]


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return Catalogue.build(
        items_table(
            NUM_ITEMS,
            categories=[["even"] if row % 2 == 0 else ["odd"] for row in range(NUM_ITEMS)],
            available=[row not in (1, 12) for row in range(NUM_ITEMS)],
        )
    )


def make_runner(
    catalogue: Catalogue, *stages: Any, config: PipelineConfig = CONFIG, inline: bool = False, newcomers: str = "models"
) -> Runner:
    local = [LocalStage(s, inline=inline) if isinstance(s, FunctionStage | RerankingStage) else s for s in stages]
    popular = PopularItems(NUM_ITEMS, np.array([30, 31, 1, 32], np.int32), np.array([4, 3, 2, 1], np.float32))
    return Runner(local, Selection(HardRules(catalogue), popular), config.model_copy(update={"newcomers": newcomers}))


def run(runner: Runner, query: Query | None = None, deadline_ms: float | None = None) -> Slate:
    return asyncio.run(runner.run(query or make_query(top_k=3), deadline_ms))


def all_three(catalogue: Catalogue) -> list[Any]:
    return [retrieves(*BEST), ranks_backwards(), RerankingStage("bundle", catalogue)]


def ids(slate: Slate) -> list[int]:
    return slate.selected.item_idx.tolist()


@pytest.mark.parametrize("inline", [True, False])
def test_all_stages_in_order(catalogue: Catalogue, inline: bool):
    slate = run(make_runner(catalogue, *all_three(catalogue), inline=inline))
    assert ids(slate) == [15, 14, 13]
    assert slate.degraded == ()
    assert slate.provenance == dict.fromkeys(("retrieval", "ranking", "reranking"), "bundle")
    assert set(slate.timings_ms) == {"retrieval", "ranking", "reranking", "total"}
    assert set(slate.selected.stage_scores) == {"retrieval", "ranking", "reranking"}


def test_of_a_newcomer_models_are_not_asked(catalogue: Catalogue):
    """What is popular, by the rules, reranked; that is no lower rung."""
    odd = Filters(categories_any=("odd",))
    boosted = [BoostRule(item_ids=("i32",), amount=1.0)]
    stages = [raises("retrieval"), raises("ranking"), RerankingStage("bundle", catalogue, boosted)]
    runner = make_runner(catalogue, *stages, newcomers="popular")
    slate = run(runner)
    assert ids(slate) == [32, 30, 31]  # 1 is not available
    assert slate.degraded == ()
    assert slate.outcomes == {"retrieval": "unasked", "ranking": "unasked", "reranking": "ok"}
    assert slate.provenance == {"popular": "bundle", "reranking": "bundle"}
    assert set(slate.timings_ms) == {"reranking", "total"}
    assert ids(run(runner, make_query(top_k=1, filters=odd))) == [31]
    assert run(runner, make_query(history=[0], top_k=3)).degraded == ("retrieval", "ranking")


LADDER = [
    ("reranking", ("reranking",), [15, 14, 13]),
    ("ranking", ("ranking",), [10, 11, 13]),
    ("retrieval", ("retrieval", "ranking"), [30, 31, 32]),
]


@pytest.mark.parametrize(("broken", "degraded", "expected"), LADDER)
@pytest.mark.parametrize(
    "how", ["raises", "is slow", "hangs", "answers from another Bundle", "names no item", "scores NaN"]
)
def test_the_ladder(catalogue: Catalogue, broken: str, degraded: tuple[str, ...], expected: list[int], how: str):
    release = threading.Event()
    stages = all_three(catalogue)
    position = [stage.name for stage in stages].index(broken)
    good = stages[position]

    def hang(query: Query, candidates: Candidates) -> Candidates:
        release.wait(20)
        return candidates

    if how == "raises":
        stages[position] = raises(broken)
    elif how == "is slow":
        stages[position] = sleeps(FunctionStage(broken, lambda _q, c: c), 1.2)
    elif how == "hangs":
        stages[position] = FunctionStage(broken, hang)
    elif how == "answers from another Bundle":
        stages[position] = FunctionStage(broken, lambda q, c: good.run_batch([q], [c])[0], bundle_id="older")
    else:
        item, score = (NUM_ITEMS, 1.0) if how == "names no item" else (0, np.nan)
        wrong = Candidates.from_source(
            "x", np.array([item], np.int32), np.array([score], np.float32), stage="retrieval"
        )
        stages[position] = FunctionStage(broken, lambda _q, _c: wrong)
    try:
        slate = run(make_runner(catalogue, *stages))
    finally:
        release.set()
    assert ids(slate) == expected
    assert slate.degraded == degraded
    assert broken not in slate.provenance
    assert broken in slate.failures
    assert ("popular" in slate.provenance) == (broken == "retrieval")


@pytest.mark.parametrize("inline", [True, False])
def test_everything_broken_gives_popular_items_that_obey_the_rules(catalogue: Catalogue, inline: bool):
    runner = make_runner(catalogue, raises("retrieval"), raises("ranking"), raises("reranking"), inline=inline)
    slate = run(runner, make_query(top_k=5, excluded=[31, 0]))
    assert ids(slate) == [30, 32, 2, 3, 4]  # 1 is unavailable
    assert slate.degraded == ("retrieval", "ranking", "reranking")
    assert [slate.selected.sources_of(row)[0] for row in range(5)] == ["popular"] * 2 + ["catalogue"] * 3


def test_hard_rules_hold_whatever_a_stage_answers(catalogue: Catalogue):
    query = make_query(top_k=3, excluded=[11], filters=Filters(categories_any=("even",)))
    slate = run(make_runner(catalogue, *all_three(catalogue)[:2], raises("reranking")), query)
    assert ids(slate) == [14, 10, 30]  # 15 and 13 are odd, 12 unavailable, 11 excluded; 30 is a popular even item
    filtered = {removal.reason: removal.item_idx.tolist() for removal in slate.filtered}
    assert filtered == {"unavailable": [12], "excluded": [11], "category": [15, 13]}


def test_a_slate_shortened_by_the_rules_is_filled_from_what_was_ranked(catalogue: Catalogue):
    bad_rerank = FunctionStage("reranking", lambda _q, c: c.take(np.array([0, 3])))  # 12 is unavailable
    slate = run(make_runner(catalogue, retrieves(10, 13, 14, 12), bad_rerank), make_query(top_k=3))
    assert ids(slate) == [10, 13, 14]


@pytest.mark.parametrize("num_allowed", [0, 1, 4])
def test_a_filter_that_matches_little_gets_all_of_it(catalogue: Catalogue, num_allowed: int):
    allowed = [3, 8, 20, 33][:num_allowed]
    query = make_query(top_k=10, excluded=[row for row in range(NUM_ITEMS) if row not in allowed])
    for stages in (all_three(catalogue), [raises("retrieval")]):
        slate = run(make_runner(catalogue, *stages), query)
        assert sorted(ids(slate)) == allowed


@pytest.mark.parametrize("deadline_ms", [-5, 0, 1, 30])
def test_no_deadline_is_too_short_for_an_answer(catalogue: Catalogue, deadline_ms: float):
    stages = [sleeps(retrieves(*BEST), 0.2), ranks_backwards(), RerankingStage("bundle", catalogue)]
    runner = make_runner(catalogue, *stages)
    started = time.perf_counter()
    slate = run(runner, deadline_ms=deadline_ms)
    assert time.perf_counter() - started < 0.19  # retrieval alone sleeps longer
    assert ids(slate) == [30, 31, 32]
    assert "retrieval" in slate.degraded
    assert not any(breaker.open for breaker in runner.breakers.values())


def test_a_hanging_stage_does_not_hold_the_request(catalogue: Catalogue):
    release = threading.Event()
    hang = FunctionStage("ranking", lambda _q, c: (release.wait(20), c)[1])
    runner = make_runner(catalogue, retrieves(*BEST), hang)

    async def go() -> float:
        started = time.perf_counter()
        slate = await runner.run(make_query(top_k=3), 60)
        elapsed = time.perf_counter() - started
        assert slate.degraded == ("ranking",)
        return elapsed

    try:
        assert asyncio.run(go()) < 0.060 + 0.150
    finally:
        release.set()


@pytest.mark.parametrize("place", [0, 2])
def test_what_stages_leave_of_their_time_is_for_those_after_them(catalogue: Catalogue, place: int):
    """Reranking, with 250 ms of its own, may take 500 where ranking took none; nobody has left retrieval anything."""
    stages = all_three(catalogue)
    stages[place] = sleeps(stages[place], 0.4)
    runner = make_runner(catalogue, *stages)
    slates = [run(runner) for _ in range(3)]
    late = {0: ("retrieval", "ranking"), 2: ()}[place]
    assert [slate.degraded for slate in slates] == [late] * 3
    assert runner.breakers[stages[place].name].open, "time of others is a loan"


def test_stages_that_hang_one_after_another_open_all_their_breakers(catalogue: Catalogue):
    release = threading.Event()
    names = ("retrieval", "reranking")
    # Budgets that have no exact binary form: a time limit that rounds to less would be taken for a short deadline.
    budgets = BudgetsConfig(retrieval=150, ranking=150, reranking=70)
    config = PipelineConfig(deadline_ms=900, budgets_ms=budgets, breaker=BreakerConfig(failures=3, open_s=5))
    stages = [FunctionStage(name, lambda _q, c: (release.wait(20), c)[1]) for name in names]
    runner = make_runner(catalogue, *stages, config=config)
    try:
        for _ in range(3):
            assert run(runner).degraded == names
    finally:
        release.set()
    assert [runner.breakers[name].open for name in names] == [True, True]


def test_the_short_deadlines_of_some_do_not_open_the_breaker_for_all(catalogue: Catalogue):
    runner = make_runner(catalogue, sleeps(retrieves(*BEST), 0.04))

    async def go() -> Slate:
        await asyncio.gather(*(runner.run(make_query(), 10) for _ in range(8)))
        await asyncio.sleep(0.5)  # until the threads are free again
        return await runner.run(make_query(top_k=3))

    assert ids(asyncio.run(go())) == [10, 11, 13]


def test_the_breaker_opens_probes_and_closes(catalogue: Catalogue):
    broken = [True]

    def sometimes(query: Query, candidates: Candidates) -> Candidates:
        if broken[0]:
            raise StageError("down")
        return retrieves(*BEST).run_batch([query], [candidates])[0]

    stage = FunctionStage("retrieval", sometimes)
    runner = make_runner(catalogue, stage, inline=True)

    async def go() -> None:
        for _ in range(10):
            assert (await runner.run(make_query())).degraded == ("retrieval",)
        assert stage.calls == 3
        slate = await runner.run(make_query())
        assert "circuit breaker is open" in slate.failures["retrieval"]
        await asyncio.sleep(0.21)
        for _ in range(3):
            await runner.run(make_query())
        assert stage.calls == 4  # one probe, which failed
        await asyncio.sleep(0.21)
        broken[0] = False
        assert (await runner.run(make_query())).degraded == ()
        assert not runner.breakers["retrieval"].open

    asyncio.run(go())


def test_the_half_open_breaker_lets_one_call_through():
    now = [0.0]
    breaker = CircuitBreaker(BreakerConfig(failures=1, open_s=1), lambda: now[0])
    assert breaker.allow()
    breaker.failure()
    assert not breaker.allow()
    now[0] = 1.5
    assert [breaker.allow(), breaker.allow()] == [True, False]
    breaker.undecided()  # the probe was cancelled: the next one may try
    assert [breaker.allow(), breaker.allow()] == [True, False]
    breaker.success()
    assert [breaker.allow(), breaker.allow()] == [True, True]


def test_a_full_queue_refuses_and_does_not_open_the_breaker(catalogue: Catalogue):
    release = threading.Event()
    hang = FunctionStage("retrieval", lambda _q, _c: (release.wait(20), retrieves(*BEST).function(_q, _c))[1])
    stage = LocalStage(hang, threads=1, max_queued=1)
    runner = Runner([stage], Selection(HardRules(catalogue), PopularItems(NUM_ITEMS, *_none())), CONFIG)

    async def go() -> None:
        waiting = [asyncio.create_task(stage.run(make_query(), Candidates.empty())) for _ in range(2)]
        await asyncio.sleep(0.01)
        with pytest.raises(StageOverloadedError):
            await stage.run(make_query(), Candidates.empty())
        for _ in range(5):
            assert (await runner.run(make_query(history=[0]))).degraded == ("retrieval",)
        assert not runner.breakers["retrieval"].open
        release.set()
        await asyncio.gather(*waiting)
        assert (await stage.run(make_query(), Candidates.empty())).bundle_id == "bundle"

    try:
        asyncio.run(go())
    finally:
        release.set()
        stage.close()


def test_a_closed_stage_refuses_and_one_nobody_holds_ends_its_threads():
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("stage-lonely")]

    stage = LocalStage(FunctionStage("lonely", retrieves(*BEST).function), threads=2)
    assert len(threads()) == 2
    stage.close()
    with pytest.raises(StageError, match="closed"):
        asyncio.run(stage.run(make_query(), Candidates.empty()))
    unused = LocalStage(FunctionStage("lonely", retrieves(*BEST).function), threads=2)
    asyncio.run(unused.run(make_query(), Candidates.empty()))
    del unused
    wait_for_none(threads)


def test_a_failed_call_keeps_nothing_alive():
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("stage-failing")]

    async def fail() -> None:
        stage = LocalStage(FunctionStage("failing", raises("retrieval").function), threads=2)
        with pytest.raises(RuntimeError):
            await stage.run(make_query(), Candidates.empty())

    gc.collect()
    gc.disable()
    try:
        asyncio.run(fail())
        wait_for_none(threads)
    finally:
        gc.enable()


def test_a_stage_that_stops_its_iteration_is_answered():
    def stop(*_: Any) -> Candidates:
        raise StopIteration("over")

    stage = LocalStage(FunctionStage("retrieval", stop), threads=1)
    with pytest.raises(StageError, match="over"):
        asyncio.run(asyncio.wait_for(stage.run(make_query(), Candidates.empty()), 10))
    stage.close()


def test_a_stage_in_threads_needs_one():
    with pytest.raises(ValueError, match="0 threads"):
        LocalStage(retrieves(*BEST), threads=0)


def wait_for_none(threads: Callable[[], list[str]]) -> None:
    deadline = time.monotonic() + 20
    while threads():
        assert time.monotonic() < deadline, threads()
        time.sleep(0.01)


def test_a_slow_inline_stage_is_used_but_held_against_it(catalogue: Catalogue):
    runner = make_runner(catalogue, sleeps(retrieves(*BEST), 0.26), inline=True)
    for _ in range(3):
        assert ids(run(runner))[:2] == [10, 11]
    assert runner.breakers["retrieval"].open


def test_a_cancelled_request_is_cancelled(catalogue: Catalogue):
    runner = make_runner(catalogue, sleeps(retrieves(*BEST), 0.05))

    async def go() -> None:
        task = asyncio.create_task(runner.run(make_query()))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())


def test_many_requests_at_once_do_not_mix(catalogue: Catalogue):
    echo = FunctionStage(
        "retrieval",
        lambda q, _c: Candidates.from_source(
            "echo", q.history.item_idx, np.ones(len(q.history.item_idx), np.float32), stage="retrieval"
        ),
    )
    runner = make_runner(catalogue, echo, config=PipelineConfig(deadline_ms=10_000, budgets_ms=PATIENT))

    async def go() -> Sequence[Slate]:
        return await asyncio.gather(*(runner.run(make_query(history=[20 + n % 20], top_k=1)) for n in range(60)))

    assert [ids(slate) for slate in asyncio.run(go())] == [[20 + n % 20] for n in range(60)]


def test_budgets_must_fit_the_deadline():
    with pytest.raises(ValueError, match="more than deadline_ms"):
        PipelineConfig(deadline_ms=100)
    with pytest.raises(ValueError, match="max_deadline_ms"):
        PipelineConfig(max_deadline_ms=499)


def _none() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(0, np.int32), np.zeros(0, np.float32)
