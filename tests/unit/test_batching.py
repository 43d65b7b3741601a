"""Batches of a stage replica: formed by load, never by waiting."""

from __future__ import annotations

import asyncio

import pytest

from serve.batching import Batcher


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
