"""Batches of a stage replica: formed by load, never by waiting."""

from __future__ import annotations

import asyncio
import time

import pytest

from recsys.errors import StageError
from serve.graph.batching import Batcher


class Stage:
    """Adds one to each call."""

    def __init__(self):
        self.batches = []
        self.failing = False

    def compute(self, calls):
        self.batches.append(list(calls))
        if self.failing:
            raise ValueError("broken")
        return [call + 1 for call in calls]


@pytest.fixture
def stage():
    return Stage()


async def test_an_idle_stage_starts_at_once(stage):
    batcher = Batcher(stage.compute, 16)
    assert [await batcher.submit(0), await batcher.submit(1)] == [1, 2]
    assert stage.batches == [[0], [1]]


async def test_what_arrives_together_is_computed_together_in_order_up_to_the_largest_batch(stage):
    batcher = Batcher(stage.compute, 3)
    assert await asyncio.gather(*(batcher.submit(call) for call in range(5))) == [1, 2, 3, 4, 5]
    assert stage.batches == [[0, 1, 2], [3, 4]]
    assert await batcher.submit(9) == 10


async def test_what_arrives_while_a_batch_is_computed_makes_up_the_next(stage):
    async def late(call):
        await asyncio.sleep(0)  # its turn in the loop comes after the first batch
        await asyncio.sleep(0)
        return await batcher.submit(call)

    batcher = Batcher(stage.compute, 16)
    assert await asyncio.gather(batcher.submit(0), late(1), late(2)) == [1, 2, 3]
    assert stage.batches == [[0], [1, 2]]


async def test_an_error_reaches_every_caller_of_the_batch_and_nobody_else(stage):
    stage.failing = True
    batcher = Batcher(stage.compute, 16)
    answers = await asyncio.gather(*(batcher.submit(call) for call in range(3)), return_exceptions=True)
    assert [str(answer) for answer in answers] == ["broken"] * 3
    stage.failing = False
    assert await batcher.submit(1) == 2


async def test_nothing_is_computed_for_a_caller_that_has_given_up(stage):
    batcher = Batcher(stage.compute, 16)
    gone, stays = (asyncio.ensure_future(batcher.submit(call)) for call in (1, 2))
    asyncio.get_running_loop().call_soon(gone.cancel)  # after both were submitted, before the batch is taken
    assert await stays == 3
    assert stage.batches == [[2]]
    assert gone.cancelled()


async def test_answers_leave_between_two_batches(stage):
    batcher = Batcher(stage.compute, 1)
    left = []

    async def ask(call):
        left.append((await batcher.submit(call), len(stage.batches)))

    await asyncio.gather(*(ask(call) for call in range(3)))
    assert left == [(1, 1), (2, 2), (3, 3)]


async def test_a_caller_whose_time_is_up_while_another_batch_is_computed_is_not_computed_for(stage):
    def slowly(calls):
        time.sleep(0.05)
        return stage.compute(calls)

    batcher = Batcher(slowly, 1)

    async def impatient():
        async with asyncio.timeout(0.02):
            await batcher.submit(2)

    answers = await asyncio.gather(batcher.submit(1), impatient(), batcher.submit(3), return_exceptions=True)
    assert (answers[0], type(answers[1]), answers[2]) == (2, TimeoutError, 4)
    assert stage.batches == [[1], [3]]


class Panic(BaseException):
    """What a library written in another language raises when it breaks."""


@pytest.mark.parametrize(
    "failure", [lambda calls: [0], StopIteration("over"), Panic("broken")], ids=["short", "stop", "panic"]
)
async def test_whatever_goes_wrong_every_caller_hears_of_it_and_the_next_is_answered(failure):
    broken = [failure]

    def compute(calls):
        if not broken:
            return [call + 1 for call in calls]
        problem = broken.pop()
        if isinstance(problem, BaseException):
            raise problem
        return problem(calls)

    batcher = Batcher(compute, 2)
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)  # it is told of the panic
    asked = [asyncio.ensure_future(batcher.submit(call)) for call in range(3)]
    done, pending = await asyncio.wait(asked, timeout=5)
    assert not pending and len(done) == 3
    assert all(isinstance(one.exception(), (StageError, Panic)) for one in asked[:2])
    assert asked[2].result() == 3
    assert await asyncio.wait_for(batcher.submit(9), 5) == 10


async def test_an_exception_among_the_results_is_for_that_call_alone():
    def compute(calls):
        return [ValueError("odd") if call % 2 else call for call in calls]

    batcher = Batcher(compute, 16)
    answers = await asyncio.gather(*(batcher.submit(call) for call in range(4)), return_exceptions=True)
    assert [answer if isinstance(answer, int) else str(answer) for answer in answers] == [0, "odd", 2, "odd"]
