"""Let the served models go on learning from the event log, once or as a loop.

Reads the log from the Bundle's watermark; teaches retriever and ranker what is new; judges the result, beside the
parent, on the newest events before it learns them too; and where it passes the gate, publishes a child Bundle, which
takes over as a canary. Where it does not, the parent stays, and it is said why. Killed at any moment, it leaves the
Bundle that answers as it is; what it may leave besides (scratch files, a canary that nobody ends) the next run removes.
"""

from __future__ import annotations

import fcntl
import functools
import shutil
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import typer
from pydantic import Field
from rich.console import Console

from jobs._ray import ComputeConfig, discard, fit_distributed
from jobs.cli import show_progress
from jobs.events import log_config
from recsys import schema
from recsys.arrow import pc
from recsys.bundle import manifest as layout
from recsys.bundle.assemble import BundleParts, assemble, popular_items
from recsys.bundle.golden import golden_question
from recsys.bundle.histories import histories_table
from recsys.bundle.live import LiveBundle
from recsys.bundle.reader import Bundle
from recsys.bundle.store import BundleStore
from recsys.cli import command, readable_errors, show_error
from recsys.config import StrictConfig, apply_override
from recsys.data.dataset import Dataset, Split
from recsys.errors import BundleError, PointerConflictError, RecsysError
from recsys.events import AnyEventLog, EventLog
from recsys.files import write_json
from recsys.models.base import FitData, Retriever, RetrieverConfig
from recsys.models.rankers.base import Ranker
from recsys.models.rankers.examples import RankingExamples
from recsys.models.retrievers import load_retriever
from recsys.models.text.encoder import item_texts
from recsys.online.config import OnlineConfig
from recsys.online.gate import Contestant, Verdict, judge, unsettled
from recsys.online.learn import (
    category_names,
    compressed_like,
    embeddings_of,
    lesson_data,
    ranking_catalogue,
    ranking_lesson,
    teach_ranker,
    teach_retriever,
)
from recsys.online.log import GrownLog, grow, with_unknown
from recsys.pipeline.build import NO_POPULAR, Parts, Popular
from recsys.pipeline.bundle_config import BundleConfig
from recsys.pipeline.golden import golden_answer
from recsys.pipeline.offline import OfflinePipeline
from recsys.pipeline.stage import RANKING, RETRIEVAL
from recsys.training.runtime import Runtime
from recsys.types import FloatArray

console = Console(stderr=True, markup=False)
_SCRATCH = "updating"
_REASON = "updated from the event log"
_PATIENCE_S = 60.0
"""beyond the time of a canary, before it is taken for one that nobody ends"""


class CanaryConfig(StrictConfig):
    """How a child takes over."""

    share: float = Field(default=0.1, ge=0, le=1, description="of the users who get it first; 0: all at once")
    seconds: float = Field(
        default=60.0, ge=0, le=86_400, description="how long gateways may take it back before all get it (seconds)"
    )


class UpdateJobConfig(StrictConfig):
    """Arguments of this job."""

    store: str = Field(min_length=1, description="folder or fsspec URI of the store of Bundles")
    events: AnyEventLog = Field(description="the event store of the gateways, or an export of its log")
    online: OnlineConfig = Field(default=OnlineConfig(), description="what is learned, and the gate")
    canary: CanaryConfig = Field(default=CanaryConfig(), description="how a child takes over")
    compute: ComputeConfig = Field(
        default=ComputeConfig(num_workers=0), description="where the training runs; by default in this process"
    )
    keep: int = Field(default=3, ge=1, description="Bundles kept in the store besides those still pointed to")
    workdir: str = Field(default="runs/updates", description="folder for scratch files and a record of every update")


@dataclass(frozen=True)
class Outcome:
    """What became of an update."""

    state: str
    """``published``, ``kept`` (the parent) or ``waiting`` (for more events)"""
    parent: str
    child: str | None
    verdict: Verdict | None
    record: dict[str, Any]
    """figures, for the file"""


@dataclass(frozen=True)
class _Payload:
    config: RetrieverConfig
    fitted: Retriever
    data: FitData
    online: OnlineConfig


def fit(payload: _Payload, runtime: Runtime) -> Callable[[Path], None]:
    """Teach the retriever; for one worker or many."""
    taught = teach_retriever(payload.config, payload.fitted, payload.data, runtime, payload.online)
    return taught.save


def run(config: UpdateJobConfig, events: EventLog) -> Outcome:
    """One update.

    :raises BundleError: when there is no Bundle to go on from, or another update is at work.
    """
    with _alone(config.workdir):
        return _run(config, events)


def _run(config: UpdateJobConfig, events: EventLog) -> Outcome:
    started = time.perf_counter()
    store = BundleStore(config.store)
    _end_orphan(store, config.canary)
    parent = store.open()
    settings = parent.section(BundleConfig)
    # In this order: what is done with an item comes after the item.
    watermark = events.watermark()
    version = store.items.version()
    live = LiveBundle(parent, store.items.read(version), version) if version else parent
    new = _read(events, parent.manifest.events_watermark, watermark, config.events.log_only)
    record: dict[str, Any] = {"parent": parent.bundle_id, "watermark": watermark, "num_events": len(new)}

    def done(state: str, child: str | None = None, verdict: Verdict | None = None) -> Outcome:
        record["seconds"] = round(time.perf_counter() - started, 3)
        told = {"state": state, "child": child, "verdict": None if verdict is None else verdict.to_json(), **record}
        write_json(Path(config.workdir) / f"{time.time_ns() // 1_000_000}.json", told)
        return Outcome(state, parent.bundle_id, child, verdict, record)

    if len(new) < config.online.min_events:
        return done("waiting")
    log = grow(
        live,
        new,
        log_only=config.events.log_only,
        judge_share=config.online.gate.judge_share,
        protocol=settings.protocol,
    )
    record |= {"num_new": log.num_new, "num_unknown_items": log.num_unknown_items, "num_new_users": log.num_new_users}
    if (verdict := unsettled(log.dataset, config.online.gate)) is not None:
        return done("kept", verdict=verdict)
    scratch = Path(config.workdir).absolute() / _SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        models = _learned(settings, live, log, config, scratch)
        verdict = judge(
            *models.contestants(settings, log.dataset), log.dataset, settings.evaluation, config.online.gate
        )
        figures = record | verdict.figures
        record["event_to_weights_s"] = round(time.perf_counter() - started, 3)
        if not verdict.passed:
            return done("kept", verdict=verdict)
        final = models.finished(settings, log.dataset, config, scratch)
        child = _published(settings, live, log, final, watermark, scratch, figures)
        store.add(child)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    why = _take_over(store, parent.bundle_id, child.bundle_id, config.canary)
    store.collect(config.keep)
    record["taken_back"] = why
    return done("kept" if why else "published", child.bundle_id, verdict)


def _read(events: EventLog, after: str | None, until: str, log_only: tuple[str, ...]) -> pa.Table:
    """The log after ``after``, up to ``until``, without what is no interaction."""
    last = int(until.rpartition(":")[2])
    told = pa.array(log_only, pa.string())
    tables = [schema.EVENT_LOG.empty_table()]
    for table in events.log(after):
        of_these = pc.less_equal(table["position"], last)
        tables.append(table.filter(pc.and_(of_these, pc.invert(pc.is_in(table["event"], told)))))
        if not of_these[-1].as_py():
            break  # what comes meanwhile is for the next time
    return pa.concat_tables(tables)


@dataclass(frozen=True)
class _Models:
    """Those of the parent as it is served, and those of the child."""

    live: Bundle
    text: FloatArray | None
    retriever: Retriever
    ranker: Ranker | None
    names: tuple[str, ...]

    def parts(self, settings: BundleConfig, popular: Popular = NO_POPULAR) -> Parts:
        """What the child will be served from."""
        return Parts.of_models(self.live.catalogue(), self.retriever, settings.index, self.ranker, popular)

    def contestants(self, settings: BundleConfig, dataset: Dataset) -> tuple[Contestant, Contestant]:
        """The parent with what stands in for new items, and the child."""
        found = popular_items(  # the same for both
            dataset, settings.popular, settings.num_popular, until=Split.VALID, seed=settings.seed
        )
        before = replace(Parts.of_bundle(self.live), popular=lambda: found)
        hides = dataset.hides(settings.positives)

        def contestant(parts: Parts) -> Contestant:
            ranked = OfflinePipeline(parts, settings.pipeline, stages=(RETRIEVAL, RANKING), hides=hides)
            return Contestant(functools.partial(ranked.rank, depth=settings.evaluation.depth), parts.retriever())

        return contestant(before), contestant(self.parts(settings, found))

    def finished(self, settings: BundleConfig, dataset: Dataset, config: UpdateJobConfig, scratch: Path) -> _Models:
        """What passed the gate, once it has learned what judged it, too."""
        data = lesson_data(self.retriever.config, dataset, Split.TEST, self.text, config.online)
        retriever = _taught(self.retriever, data, config, scratch / "last")
        if self.ranker is None:
            return _Models(self.live, self.text, retriever, None, self.names)
        lesson = (self.parts(settings), Split.TEST, self.ranker, self.text, self.names)
        taught, examples = _taught_ranker(settings, dataset, *lesson, config)
        now = ranking_catalogue(dataset, Split.TEST, embeddings_of(retriever), self.text, self.names)
        ranker = compressed_like(self.ranker, taught.with_items(now), settings.export, examples)
        return _Models(self.live, self.text, retriever, ranker, self.names)


def _without_changes(live: Bundle) -> Bundle:
    """The Bundle itself, without what was changed in its catalogue."""
    return live.base if isinstance(live, LiveBundle) else live


def _learned(settings: BundleConfig, live: Bundle, log: GrownLog, config: UpdateJobConfig, scratch: Path) -> _Models:
    """The child before it learns what judges it."""
    dataset = log.dataset
    base = _without_changes(live)
    text = _texts(live, dataset) if base.has(layout.ENCODER) else None
    stand_ins = live.stand_ins() if isinstance(live, LiveBundle) else None
    fitted = base.retriever()
    data = lesson_data(fitted.config, dataset, Split.VALID, text, config.online, stand_ins, log.late)
    retriever = _taught(fitted, data, config, scratch / "first")
    if not base.has(layout.RANKER):
        return _Models(live, text, retriever, None, ())
    served = base.ranker()
    names = category_names(served, base.catalogue().table())
    taught, examples = _taught_ranker(
        settings, dataset, Parts.of_bundle(live), Split.VALID, served, text, names, config
    )
    now = ranking_catalogue(dataset, Split.VALID, embeddings_of(retriever), text, names)
    ranker = compressed_like(served, taught.with_items(now), settings.export, examples)
    return _Models(live, text, retriever, ranker, names)


def _taught_ranker(
    settings: BundleConfig,
    dataset: Dataset,
    parts: Parts,
    split: Split,
    fitted: Ranker,
    text: FloatArray | None,
    names: tuple[str, ...],
    config: UpdateJobConfig,
) -> tuple[Ranker, RankingExamples]:
    """``fitted`` once it has learned ``split`` among the candidates of ``parts`` that have not, and its examples."""
    known = ranking_catalogue(dataset, Split(split - 1), embeddings_of(parts.retriever()), text, names)
    examples = ranking_lesson(parts, dataset, split, known, settings.pipeline, fitted.max_history, config.online)
    return teach_ranker(fitted, examples, known, config.compute.runtime(), config.online), examples


def _texts(live: Bundle, dataset: Dataset) -> FloatArray:
    """float32 [N, X]: of all items; those that the Bundle holds as they are need not be encoded again."""
    base = _without_changes(live)
    words = base.words()
    held = base.text_index().vectors() if base.has(layout.TEXT_INDEX) else None
    if held is None:
        console.print(f"encoding the texts of {dataset.num_items} items", highlight=False)
        return words.encode(item_texts(dataset.items, words.config))
    vectors = np.zeros((dataset.num_items, held.shape[1]), np.float32)
    vectors[: len(held)] = held
    if isinstance(live, LiveBundle):
        changed = live.changed_item_idx
        vectors[changed] = words.encode(item_texts(dataset.items.take(pa.array(changed)), words.config))
    return vectors


def _taught(fitted: Retriever, data: FitData, config: UpdateJobConfig, folder: Path) -> Retriever:
    # Its own configuration: it says for how many epochs it was fitted, which a kind that is fitted anew needs.
    payload = _Payload(fitted.config, fitted, data, config.online)
    result = fit_distributed(fit, payload, compute=config.compute, name="update", storage=folder)
    retriever = load_retriever(result.path)
    discard(result)
    return retriever


def _published(
    settings: BundleConfig,
    live: Bundle,
    log: GrownLog,
    models: _Models,
    watermark: str,
    scratch: Path,
    figures: dict[str, Any],
) -> Bundle:
    """The child, complete, in ``scratch``."""
    base = _without_changes(live)
    dataset = log.dataset

    def kept(part: str) -> Path | None:
        return base.part(part) if base.has(part) else None

    parts = BundleParts(
        info=dataset.info,
        items=dataset.items,
        config=settings,
        retriever=models.retriever,
        ranker=models.ranker,
        index=settings.index,
        encoder=kept(layout.ENCODER),
        text_vectors=models.text if base.has(layout.TEXT_INDEX) else None,
        slates=kept(layout.SLATES),
        popular=popular_items(dataset, settings.popular, settings.num_popular, seed=settings.seed),
        histories=with_unknown(histories_table(dataset, settings.max_history), log.unknown, settings.max_history),
        question=golden_question(dataset),
        metrics={
            "note": "updated from the event log; figures are those of the gate, on events that neither model had "
            "learned; beside them those of the Bundle that was trained anew",
            "update": figures,
            "trained": base.metrics.get("trained", base.metrics),
        },
        parent=base.bundle_id,
        events_watermark=watermark,
    )
    return assemble(scratch / "bundle", parts, answer=golden_answer)


def _take_over(store: BundleStore, parent: str, child: str, how: CanaryConfig) -> str | None:
    """First as a canary, then to all users; None, or why the parent stays: gateways took the child back, or somebody
    else has moved the pointer meanwhile.
    """
    if child == parent:
        return None
    try:
        if not how.share:
            store.activate(child, parent)
            return None
        canary = store.start_canary(child, how.share, expected=parent, reason=_REASON).canary
    except PointerConflictError as error:
        return str(error)
    assert canary is not None
    console.print(f"{how.share:.0%} of the users get the canary for {how.seconds:g} s", highlight=False)
    end = time.monotonic() + how.seconds
    try:
        while (pointer := store.current()) and pointer.canary is not None and pointer.canary.token == canary.token:
            if time.monotonic() >= end:
                store.promote(token=canary.token, reason="the canary did well")
                return None
            time.sleep(min(1.0, how.seconds))
    except PointerConflictError as error:
        return str(error)
    except BaseException:
        with suppress(BundleError):
            store.withdraw(child, reason="the update was interrupted")
        raise
    if pointer and pointer.bundle_id == child:
        return None  # somebody was content with it before the time was over
    return (pointer and pointer.reason) or "the canary was ended"


def _end_orphan(store: BundleStore, how: CanaryConfig) -> None:
    """A canary that an update has started and did not live to end."""
    pointer = store.current()
    if pointer is None or pointer.canary is None or pointer.reason != _REASON:
        return
    if (datetime.now(UTC) - pointer.moved_at).total_seconds() > how.seconds + _PATIENCE_S:
        store.withdraw(pointer.canary.bundle_id, reason="the update that started this canary is gone")


@contextmanager
def _alone(workdir: str) -> Generator[None]:
    """One update at a time in one folder.

    :raises BundleError: when another one is at work.
    """
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BundleError(f"{folder}: another update is at work here") from error
        yield


def tell(outcome: Outcome) -> str:
    """One line about it."""
    if outcome.state == "waiting":
        return f"{outcome.record['num_events']} new events are too few: Bundle {outcome.parent[:12]} stays"
    verdict = outcome.verdict
    assert verdict is not None
    if not verdict.passed:
        return f"Bundle {outcome.parent[:12]} stays: {'; '.join(verdict.reasons)}"
    figures = verdict.figures
    found = f"{figures['metric']} {figures['child']:.4f} after {figures['parent']:.4f}"
    if outcome.state == "kept":
        return f"Bundle {outcome.child} passed the gate ({found}) and was taken back: {outcome.record['taken_back']}"
    return f"Bundle {outcome.child} answers: {found} on {figures['num_queries']} queries"


def main(
    store: Annotated[str, typer.Option(help="folder or fsspec URI of the store of Bundles, such as runs/NAME/bundles")],
    events: Annotated[
        str,
        typer.Option(
            help="file of the embedded event store, redis://HOST:PORT/DB, or a .parquet file of `jobs.events export`"
        ),
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="override one key, such as online.min_events=1000", metavar="K=V")
    ] = None,
    every: Annotated[float, typer.Option(help="again and again, so many seconds apart; 0: once", min=0)] = 0,
    events_set: Annotated[
        list[str] | None,
        typer.Option(help="a setting of the gateways' event_store, where it is not the default", metavar="K=V"),
    ] = None,
) -> None:
    """Let the served models learn from what users did since."""
    show_progress()
    with readable_errors():
        event_config = log_config(events, events_set or [])
        tree = {"store": store, "events": event_config.model_dump(mode="json")}
        for override in set_ or ():
            apply_override(tree, override)
        config = UpdateJobConfig.parse(tree, where="--set")
        with config.events.open() as log:
            while True:
                try:
                    console.print(tell(run(config, log)), highlight=False, soft_wrap=True)
                except Exception as error:
                    if not every:
                        raise
                    # Whatever it was (a full disk, a store that is away), the next time it may be over.
                    if not isinstance(error, RecsysError):
                        console.print_exception()
                    show_error(error)
                if not every:
                    return
                time.sleep(every)


app = command(main)

if __name__ == "__main__":
    app()
