"""The one async runner: it owns order, deadlines, the ladder of fallbacks, and provenance.

Stages run one after another, each within its budget and what those before it have left of theirs. One that raises, is
too slow, or has failed so often that its circuit breaker is open is skipped and named in ``degraded``: without
reranking the ranked order stands, without ranking the retrieved one, without retrieval the slate that was made for
the user offline does, and where there is none the popular items do. Hard rules are no stage and are never skipped.

With ``newcomers: popular``, retrieval and ranking are not asked for a user without history, and that degrades nothing:
the slate that was made offline answers, if there is one, else the popular items.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np

from recsys.errors import StageError, StageOverloadedError, StageSkippedError, StageTimeoutError
from recsys.pipeline.config import BreakerConfig, PipelineConfig
from recsys.pipeline.selection import Selection, Spare
from recsys.pipeline.stage import NEEDS_RETRIEVAL, AsyncStage, Stage, StageOutput
from recsys.types import Candidates, Query, Slate

OK = "ok"
"""the outcome of a stage that answered"""
UNASKED = "unasked"
"""the outcome of a stage that has nothing to say of a newcomer"""
_RESERVE_S = 0.002
"""seconds of the deadline kept for the final check and for composing the answer"""
_log = logging.getLogger(__name__)


class LocalStage:
    """A plain stage in this process. Its class is an :class:`~recsys.pipeline.stage.AsyncStage`.

    With threads, a request that gives up leaves its call running: Python cannot stop a thread. The calls in flight are
    bounded, and one that was given up while it waited counts until a thread comes to it, so that a stage that hangs
    costs no more than its threads and a full queue. ``inline`` calls the stage in the event loop itself: the lowest
    latency for one caller at a time, but nothing can interrupt it.
    """

    def __init__(self, stage: Stage, *, threads: int = 2, max_queued: int = 64, inline: bool = False) -> None:
        """``threads`` (1 or more) serve this stage alone; at most ``threads + max_queued`` calls are in flight."""
        if not inline and threads < 1:
            raise ValueError(f"{stage.name}: {threads} threads can serve nothing")
        self.stage = stage
        self.name = stage.name
        self._threads = 0 if inline else threads
        self._limit = threads + max_queued
        self._in_flight = 0
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        for number in range(self._threads):
            # A daemon, so that a stage that hangs does not keep the process from ending.
            name = f"stage-{stage.name}-{number}"
            threading.Thread(target=_work, args=(self._jobs,), name=name, daemon=True).start()
        self._dismiss = weakref.finalize(self, _dismiss, self._jobs, self._threads)

    async def run(self, query: Query, candidates: Candidates) -> StageOutput:
        """Run the stage on a batch of one."""
        if not self._threads:
            return self.call(query, candidates)
        with self._lock:
            if not self._dismiss.alive:
                raise StageError(f"{self.name}: closed", stage=self.name)
            if self._in_flight >= self._limit:
                raise StageOverloadedError(f"{self.name}: {self._limit} calls are in flight already", stage=self.name)
            self._in_flight += 1
            loop = asyncio.get_running_loop()
            answer: asyncio.Future[StageOutput] = loop.create_future()
            self._jobs.put(_Job(self, query, candidates, loop, answer))
        try:
            return await answer
        finally:
            del answer  # a failure holds this frame, and this frame must not hold the failure

    def close(self) -> None:
        """Accept no more work; calls that run or wait are still answered."""
        with self._lock:
            self._dismiss()

    def call(self, query: Query, candidates: Candidates) -> StageOutput:
        """Compute, on the calling thread."""
        started = time.perf_counter()
        (found,) = self.stage.run_batch([query], [candidates])
        return StageOutput(found, self.stage.bundle_id, (time.perf_counter() - started) * 1e3)

    @property
    def num_in_flight(self) -> int:
        """Calls that run or wait."""
        return self._in_flight

    def done(self) -> None:
        """One call in flight less."""
        with self._lock:
            self._in_flight -= 1


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    stage: LocalStage
    query: Query
    candidates: Candidates
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[StageOutput]

    def run(self) -> None:
        """In a thread. Futures of ``concurrent.futures`` are made for threads that wait for threads; for a coroutine
        that waits, this does the same in half the time.
        """
        output: StageOutput | None = None
        failure: BaseException | None = None
        try:
            if not self.answer.cancelled():
                output = self.stage.call(self.query, self.candidates)
        except BaseException as error:  # noqa: BLE001 it is raised where the answer is awaited
            # A future takes no StopIteration.
            failure = StageError(f"{error!r}", stage=self.stage.name) if isinstance(error, StopIteration) else error
        self.stage.done()
        try:
            self.loop.call_soon_threadsafe(self._settle, output, failure)
        except RuntimeError:
            if not self.loop.is_closed():  # else nobody waits any more
                raise
        finally:
            del output, failure, self  # see LocalStage.run

    def _settle(self, output: StageOutput | None, failure: BaseException | None) -> None:
        if self.answer.done():
            return  # the request gave up
        if failure is not None:
            self.answer.set_exception(failure)
        elif output is not None:
            self.answer.set_result(output)


def _work(jobs: SimpleQueue[_Job | None]) -> None:
    # Holds no stage while it waits: one that nobody uses any more can go, and its threads with it.
    while (job := jobs.get()) is not None:
        job.run()
        del job


def _dismiss(jobs: SimpleQueue[_Job | None], threads: int) -> None:
    for _ in range(threads):
        jobs.put(None)


class CircuitBreaker:
    """Closed until ``config.failures`` calls in a row have failed, then open for ``config.open_s`` seconds, then half
    open: one call probes, and closes or opens it again. For one event loop.
    """

    def __init__(self, config: BreakerConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._clock = clock
        self._failures = 0
        self._retry_at: float | None = None
        self._probing = False

    @property
    def open(self) -> bool:
        """Whether calls are being refused or only probing."""
        return self._retry_at is not None

    def allow(self) -> bool:
        """Whether to call now. A True must be followed by :meth:`success`, :meth:`failure` or :meth:`undecided`."""
        if self._retry_at is None:
            return True
        if self._probing or self._clock() < self._retry_at:
            return False
        self._probing = True
        return True

    def success(self) -> None:
        self._failures, self._retry_at, self._probing = 0, None, False

    def failure(self) -> None:
        self._failures += 1
        if self._failures >= self._config.failures:
            self._retry_at = self._clock() + self._config.open_s
        self._probing = False

    def undecided(self) -> None:
        """The call ended for a reason that says nothing about the stage."""
        self._probing = False


class Runner:
    """Runs the stages for one query after another or for many at once, all in one event loop."""

    def __init__(
        self,
        stages: Sequence[AsyncStage],
        selection: Selection,
        config: PipelineConfig | None = None,
    ) -> None:
        """``stages`` in order, the first one retrieves. Each name must have a budget in ``config.budgets_ms``."""
        self.stages = tuple(stages)
        self.selection = selection
        self.config = config or PipelineConfig()
        budgets = self.config.budgets_ms.model_dump()
        self._budgets_s = {stage.name: budgets[stage.name] / 1e3 for stage in stages}
        self.breakers = {stage.name: CircuitBreaker(self.config.breaker) for stage in stages}

    async def run(self, query: Query, deadline_ms: float | None = None, spare: Spare | None = None) -> Slate:
        """The slate for ``query``, within ``deadline_ms`` of now (None for the configured one). Where retrieval fails,
        ``spare`` gives this user's items, before the popular ones.

        It never raises for a stage's failure, and holds ``top_k`` items while so many are allowed.
        """
        started = time.perf_counter()
        end = started + (self.config.deadline_ms if deadline_ms is None else deadline_ms) / 1e3 - _RESERVE_S
        before, candidates = Candidates.empty(), Candidates.empty()
        failures: dict[str, str] = {}
        outcomes: dict[str, str] = {}
        provenance: dict[str, str] = {}
        timings_ms: dict[str, float] = {}
        busy_ms: dict[str, float] = {}
        is_newcomer = self.config.newcomers == "popular" and not len(query.history)
        spare_s = 0.0  # what stages have left of their budgets
        for position, stage in enumerate(self.stages):
            if is_newcomer and (position == 0 or stage.name in NEEDS_RETRIEVAL):
                if position == 0:
                    candidates = self.selection.without_retrieval(query, spare, provenance)
                outcomes[stage.name] = UNASKED
                continue
            if stage.name in NEEDS_RETRIEVAL and failures:
                failures[stage.name] = "skipped, because retrieval was"
                outcomes[stage.name] = StageSkippedError.outcome
                continue
            stage_started = time.perf_counter()
            allowed_s = self._budgets_s[stage.name] + spare_s
            try:
                output = await self._call(stage, query, candidates, min(allowed_s, end - stage_started))
            except Exception as error:  # noqa: BLE001 whatever it was, the answer goes out without this stage
                failures[stage.name] = f"{type(error).__name__}: {error}"
                ours = isinstance(error, StageError)
                outcomes[stage.name] = error.outcome if isinstance(error, StageError) else StageError.outcome
                _log.log(
                    logging.INFO if ours else logging.WARNING,
                    "request %s: skipped %s: %s",
                    query.request_id,
                    stage.name,
                    failures[stage.name],
                    exc_info=None if ours else error,
                    extra={"request_id": query.request_id, "stage": stage.name},
                )
                if position == 0:
                    candidates = self.selection.without_retrieval(query, spare, provenance)
            else:
                before, candidates = candidates, output.candidates
                provenance[stage.name] = output.bundle_id
                outcomes[stage.name] = OK
                busy_ms[stage.name] = output.busy_ms
            took_s = time.perf_counter() - stage_started
            timings_ms[stage.name] = took_s * 1e3
            spare_s = max(0.0, allowed_s - took_s)
        selected, filtered, not_selected = self.selection.finish(query, candidates, before, provenance)
        timings_ms["total"] = (time.perf_counter() - started) * 1e3
        return Slate(
            query,
            selected,
            filtered,
            not_selected,
            degraded=tuple(failures),
            failures=failures,
            outcomes=outcomes,
            provenance=provenance,
            timings_ms=timings_ms,
            busy_ms=busy_ms,
        )

    async def _call(self, stage: AsyncStage, query: Query, candidates: Candidates, timeout_s: float) -> StageOutput:
        budget_s = self._budgets_s[stage.name]
        if timeout_s <= 0:
            raise StageTimeoutError(f"{stage.name}: no time was left before the deadline", stage=stage.name)
        breaker = self.breakers[stage.name]
        if not breaker.allow():
            raise StageSkippedError(f"{stage.name}: its circuit breaker is open", stage=stage.name)
        started = time.perf_counter()
        try:
            async with asyncio.timeout(timeout_s):
                output = await stage.run(query, candidates)
            self._check(stage, query, output)
        except TimeoutError as error:
            if timeout_s < budget_s:
                breaker.undecided()  # this request's own short deadline; no verdict on the stage
            else:
                breaker.failure()
            raise StageTimeoutError(
                f"{stage.name}: no answer within {timeout_s * 1e3:.0f} ms", stage=stage.name
            ) from error
        except StageOverloadedError:
            breaker.undecided()  # busy, and refusing costs it nothing
            raise
        except Exception:
            breaker.failure()
            raise
        except BaseException:  # the request was cancelled
            breaker.undecided()
            raise
        if time.perf_counter() - started > budget_s:
            breaker.failure()  # it had time that others left, or is inline: its answer is used, its slowness counts
        else:
            breaker.success()
        return output

    def _check(self, stage: AsyncStage, query: Query, output: StageOutput) -> None:
        # Another Bundle numbers its items differently, so its candidates would be read as other items.
        if output.bundle_id != query.bundle_id:
            raise StageError(
                f"{stage.name} answered from Bundle {output.bundle_id}, not {query.bundle_id}", stage=stage.name
            )
        items, num_items = output.candidates.item_idx, len(self.selection.rules.catalogue)
        if items.dtype != np.int32:
            raise StageError(f"{stage.name} names items as {items.dtype}, not int32", stage=stage.name)
        # Read as unsigned, a negative number is beyond any catalogue.
        if len(items) and np.maximum.reduce(items.view(np.uint32)) >= num_items:
            raise StageError(f"{stage.name} names an item beyond the {num_items} of the catalogue", stage=stage.name)
        if not np.logical_and.reduce(np.isfinite(output.candidates.score)):
            raise StageError(f"{stage.name} gives a score that is no finite number", stage=stage.name)
