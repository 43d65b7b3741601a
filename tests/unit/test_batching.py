"""Batches of a stage replica: formed by load, never by waiting."""

from __future__ import annotations

import asyncio
import threading

import pytest

from serve.batching import Batcher


class Stage:
    """Adds one to each call, as soon as it may."""

    def __init__(self):
        self.batches = []
        self.started = threading.Event()
        self.may_go_on = threading.Event()
        self.failing = False

    def compute(self, calls):
        self.batches.append(list(calls))
        self.started.set()
        self.may_go_on.wait(20)
        if self.failing:
            raise ValueError("broken")
        return [call + 1 for call in calls]


@pytest.fixture
def stage():
    stage = Stage()
    yield stage
    stage.may_go_on.set()


async def test_an_idle_stage_starts_at_once_and_a_busy_one_batches(stage):
    batcher = Batcher(stage.compute, 3, inline=False)
    first = asyncio.create_task(batcher.submit(0))
    assert await asyncio.to_thread(stage.started.wait, 20)
    others = [asyncio.create_task(batcher.submit(call)) for call in range(1, 6)]
    await asyncio.sleep(0.01)
    assert stage.batches == [[0]]
    stage.may_go_on.set()
    assert await asyncio.gather(first, *others) == [1, 2, 3, 4, 5, 6]
    assert stage.batches == [[0], [1, 2, 3], [4, 5]]
    assert await batcher.submit(9) == 10
    assert stage.batches[-1] == [9]


async def test_inline_takes_together_what_arrives_together(stage):
    stage.may_go_on.set()
    batcher = Batcher(stage.compute, 16, inline=True)
    assert await asyncio.gather(*(batcher.submit(call) for call in range(4))) == [1, 2, 3, 4]
    assert stage.batches == [[0, 1, 2, 3]]


@pytest.mark.parametrize("inline", [True, False])
async def test_an_error_reaches_every_caller_of_the_batch_and_nobody_else(stage, inline):
    stage.may_go_on.set()
    stage.failing = True
    batcher = Batcher(stage.compute, 16, inline=inline)
    answers = await asyncio.gather(*(batcher.submit(call) for call in range(3)), return_exceptions=True)
    assert [str(answer) for answer in answers] == ["broken"] * 3
    stage.failing = False
    assert await batcher.submit(1) == 2


async def test_nothing_is_computed_for_a_caller_that_has_given_up(stage):
    batcher = Batcher(stage.compute, 16, inline=False)
    first = asyncio.create_task(batcher.submit(0))
    assert await asyncio.to_thread(stage.started.wait, 20)
    gone, stays = asyncio.create_task(batcher.submit(1)), asyncio.create_task(batcher.submit(2))
    await asyncio.sleep(0.01)
    gone.cancel()
    first.cancel()
    stage.may_go_on.set()
    assert await stays == 3
    assert stage.batches == [[0], [2]]
    assert gone.cancelled() and first.cancelled()
