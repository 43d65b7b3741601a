"""Preparation: read, validate, index, order, filter, weigh, split, check, save."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from recsys import schema
from recsys.arrow import one_chunk, pc
from recsys.config import StrictConfig
from recsys.data.config import DataConfig, FilterConfig
from recsys.data.dataset import Dataset, DatasetInfo, Split
from recsys.data.id_map import fingerprint_ids
from recsys.data.sources import Source
from recsys.data.sources.base import ROW
from recsys.data.splits import check_not_empty
from recsys.data.validation import (
    DUPLICATE,
    QUARANTINED_ITEMS,
    Quarantine,
    clean_items,
    equal_pairs,
    validate,
)
from recsys.errors import EmptyDataError, SchemaError
from recsys.files import fingerprint, write_json
from recsys.moments import milliseconds
from recsys.types import FloatArray, Int32Array, Int64Array

REPORT_FILE = "preparation.json"
logger = logging.getLogger(__name__)


class PreparationReport(StrictConfig):
    """Where every row went: ``num_read = num_accepted + the sum of quarantined + the sum of filtered``."""

    num_read: int
    num_accepted: int
    quarantined: Mapping[str, int]
    """rows in ``quarantine.parquet`` per reason"""
    filtered: Mapping[str, int]
    """rows that the configured filters left out"""
    num_catalogue_rows: int
    quarantined_items: Mapping[str, int]
    """rows of the catalogue in ``quarantine_items.parquet`` per reason"""
    num_items_untitled: int
    """catalogue items without a title: the id stands in"""
    num_items_added: int
    """items with interactions that the catalogue does not know: added with their id as the title"""
    num_items_left_out: int
    """catalogue items left out because no interaction with them is left (``catalogue: interacted``)"""


def prepare(config: DataConfig, seed: int, folder: str | Path, *, console: Console | None = None) -> Dataset:
    """Prepare ``config.source`` and save the dataset, the quarantine and ``preparation.json`` into ``folder``.

    - Order: by user, timestamp, the source's position, original row; stable. ``position`` counts a user's rows from 0.
    - Users are numbered by their first accepted row; items in the order of the catalogue, then those seen only in
      interactions by their first accepted row (title = id, available).
    - Duplicates (the same user, item, timestamp, event and value) keep the first row. Without time, rows are
      duplicates only where the source gives positions and these are equal too.
    - ``seed`` draws the users that ``filters.user_fraction`` keeps; nothing else is random.

    Raises :class:`~recsys.errors.SchemaError`, :class:`~recsys.errors.EmptyDataError`,
    :class:`~recsys.errors.NoTimeError` or :class:`~recsys.errors.LeakageError`; the quarantine is then already
    written wherever reading itself succeeded.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    source = config.source
    latest_ms = int(time.time() * 1000) if config.latest is None else milliseconds(config.latest)
    with Quarantine.create(folder / "quarantine.parquet") as quarantine:
        log, num_read = _read(source, latest_ms, quarantine, console)
        log, repeats = _without_duplicates(log)
        quarantine.add(repeats.to_table().append_column("reason", pa.repeat(DUPLICATE, len(repeats.row))))
    with Quarantine.create(folder / "quarantine_items.parquet", QUARANTINED_ITEMS) as quarantine_items:
        raw_items = source.items()
        items, refused, untitled = clean_items(raw_items, type(source).__name__)
        quarantine_items.add(refused)
    if len(log.row) == 0:
        counts = ", ".join(f"{count} x {reason}" for reason, count in quarantine.counts.most_common())
        raise EmptyDataError(
            f"{source.kind}: no usable interactions in {num_read} row(s)"
            + (f"; quarantined: {counts}" if counts else ""),
            num_read=num_read,
            quarantined=dict(quarantine.counts),
        )
    log, filtered = _filter(log, config.filters, seed)
    log, users, items, added, left_out = _index(log, items, keep_all=config.catalogue == "all")

    weight = config.positives.weights(log.event, log.value_column())
    if not (weight > 0).any():
        found = ", ".join(sorted(pc.unique(log.event).dictionary.to_pylist()))
        raise EmptyDataError(
            f"no positives: the data has the events {found}; "
            f"the rules are for {', '.join(sorted(config.positives.events))}; "
            "add a rule under data.positives.events or lower its min_value"
        )
    labels = config.split.assign(log.user, log.time, weight > 0)
    first_row = np.searchsorted(log.user, np.arange(len(users)))
    interactions = pa.table(
        [
            pa.array(log.user),
            pa.array(log.item),
            pa.nulls(len(log.row), schema.TIMESTAMP_TYPE)
            if log.time is None
            else pa.array(log.time).cast(schema.TIMESTAMP_TYPE),
            pa.array(np.arange(len(log.row)) - first_row[log.user]),
            log.event.cast(pa.string()),
            log.value_column(),
            pa.array(weight),
            pa.array(labels.split),
        ],
        schema=schema.PREPARED_INTERACTIONS,
    )
    config.split.check(interactions, labels.borders_ms)
    check_not_empty(labels.split, weight > 0)

    report = PreparationReport(
        num_read=num_read,
        num_accepted=len(log.row),
        quarantined=dict(quarantine.counts.most_common()),
        filtered=filtered,
        num_catalogue_rows=0 if raw_items is None else len(raw_items),
        quarantined_items=dict(quarantine_items.counts.most_common()),
        num_items_untitled=untitled,
        num_items_added=added,
        num_items_left_out=left_out,
    )
    counts = np.bincount(labels.split, minlength=len(Split))
    watermark = source.events_watermark()
    if watermark is not None and any(filtered.values()):
        logger.warning(
            "not all of the exported event log is left: a Bundle of it cannot stand for the log, %s", filtered
        )
        watermark = None
    info = DatasetInfo(
        name=config.name or source.kind,
        # The source's own fingerprint leaves out where its files lie.
        fingerprint=fingerprint([source.fingerprint(), config.model_dump(mode="json", exclude={"source"}), seed]),
        id_map_fingerprint=fingerprint_ids(items[schema.ITEM_ID]),
        has_time=log.time is not None,
        protocol=config.split.protocol,
        num_users=len(users),
        num_items=len(items),
        num_interactions=len(interactions),
        num_positives=int((weight > 0).sum()),
        num_quarantined=sum(quarantine.counts.values()),
        counts_by_split={part.name.lower(): int(counts[part]) for part in Split},
        borders_ms=labels.borders_ms,
        events_watermark=watermark,
    )
    dataset = Dataset(interactions, items, pa.table({schema.USER_ID: users}), info)
    write_json(folder / REPORT_FILE, report.model_dump(mode="json"))
    dataset.save(folder)
    _tell(report, info, folder)
    return dataset


def _tell(report: PreparationReport, info: DatasetInfo, folder: Path) -> None:
    """Where every row went, for the log."""
    logger.info(
        "%d of %d rows accepted: %d users, %d items, %d positives",
        report.num_accepted, report.num_read, info.num_users, info.num_items, info.num_positives,
    )  # fmt: skip
    for what, file, counts in (
        ("rows quarantined", "quarantine.parquet", report.quarantined),
        ("rows left out by the filters", None, report.filtered),
        ("catalogue rows quarantined", "quarantine_items.parquet", report.quarantined_items),
    ):
        if total := sum(counts.values()):
            reasons = ", ".join(f"{count} x {reason}" for reason, count in counts.items() if count)
            logger.info("%d %s: %s%s", total, what, reasons, f" (see {folder / file})" if file else "")


@dataclass(frozen=True)
class _Log:
    """Accepted interactions as arrays of R rows; ids are codes into dictionaries in order of first appearance."""

    row: Int64Array
    user: Int32Array
    item: Int32Array
    user_ids: Any
    item_ids: Any
    event: Any
    """dictionary<string> [R]"""
    time: Int64Array | None
    position: Int64Array | None
    """as the source gives it, None where it gives none"""
    value: FloatArray
    """NaN where there is none"""

    def take(self, rows: NDArray[Any]) -> _Log:
        """The rows given by a mask or by numbers."""
        numbers = np.flatnonzero(rows) if rows.dtype == bool else rows
        return replace(
            self,
            row=self.row[numbers],
            user=self.user[numbers],
            item=self.item[numbers],
            event=self.event.take(pa.array(numbers)),
            time=None if self.time is None else self.time[numbers],
            position=None if self.position is None else self.position[numbers],
            value=self.value[numbers],
        )

    def value_column(self) -> pa.Array:
        """float32 [R], null where there is no value."""
        return pa.array(self.value, mask=np.isnan(self.value))

    def to_table(self) -> pa.Table:
        """The rows under the contract's names, as the quarantine shows them."""
        columns: dict[str, Any] = {
            ROW: pa.array(self.row),
            schema.USER_ID: self.user_ids.take(pa.array(self.user)),
            schema.ITEM_ID: self.item_ids.take(pa.array(self.item)),
            schema.EVENT: self.event.cast(pa.string()),
            schema.VALUE: self.value_column(),
        }
        if self.time is not None:
            columns[schema.TIMESTAMP] = pa.array(self.time).cast(schema.TIMESTAMP_TYPE)
        if self.position is not None:
            columns[schema.POSITION] = pa.array(self.position)
        return pa.table(columns)


def _read(source: Source, latest_ms: int, quarantine: Quarantine, console: Console | None) -> tuple[_Log, int]:
    """Every accepted interaction in the order of the source, and the number of raw rows."""
    chunks: list[pa.Table] = []
    num_read = 0
    columns = (
        TextColumn("reading {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows, {task.fields[rate]} rows/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    started = time.perf_counter()
    with Progress(*columns, console=console or Console(stderr=True, markup=False)) as progress:
        task = progress.add_task(source.kind, total=source.num_rows(), rate="")
        for raw in source.read():
            accepted, rejected = validate(raw, source, num_read, latest_ms)
            quarantine.add(rejected)
            chunks.append(_encoded(accepted))
            num_read += len(raw)
            rate = num_read / (time.perf_counter() - started)
            progress.update(task, completed=num_read, rate=f"{rate:,.0f}")
        progress.update(task, total=num_read)
    if not chunks:
        nothing = pa.table(
            {name: pa.array([], pa.string()) for name in (schema.USER_ID, schema.ITEM_ID, schema.TIMESTAMP)}
        )
        chunks.append(_encoded(validate(nothing, source, 0, latest_ms)[0]))
    table = pa.concat_tables(chunks).unify_dictionaries().combine_chunks()
    coded = {name: one_chunk(table[name]) for name in (schema.USER_ID, schema.ITEM_ID, schema.EVENT)}
    position = table[schema.POSITION]
    if 0 < position.null_count < len(position):
        raise SchemaError(
            f"{source.kind}: some chunks have a position and some have none; give it for all", column="position"
        )
    log = _Log(
        row=table[ROW].to_numpy(),
        user=coded[schema.USER_ID].indices.to_numpy(),
        item=coded[schema.ITEM_ID].indices.to_numpy(),
        user_ids=coded[schema.USER_ID].dictionary,
        item_ids=coded[schema.ITEM_ID].dictionary,
        event=coded[schema.EVENT],
        time=table[schema.TIMESTAMP].to_numpy() if source.has_time else None,
        position=None if position.null_count else position.to_numpy(),
        value=table[schema.VALUE].to_numpy(),
    )
    # Least significant key first; the sort is stable, but a source may give its rows out of their numbered order.
    keys = [log.row, log.position, log.time, log.user]
    return log.take(np.lexsort([key for key in keys if key is not None])), num_read


def _encoded(accepted: pa.Table) -> pa.Table:
    """The same rows with users, items and events as dictionaries: each name is held once."""
    for name in (schema.USER_ID, schema.ITEM_ID, schema.EVENT):
        accepted = accepted.set_column(accepted.column_names.index(name), name, accepted[name].dictionary_encode())
    return accepted


def _without_duplicates(log: _Log) -> tuple[_Log, _Log]:
    """``(kept, repeats)`` of a sorted log: the first of equal rows stays."""
    moment = log.time if log.time is not None else log.position
    repeated = np.zeros(len(log.row), bool)
    if moment is not None:
        _, later = equal_pairs(log.user, log.item, moment, log.event.indices.to_numpy(), log.value)
        repeated[later] = True
    return log.take(~repeated), log.take(repeated)


def _filter(log: _Log, config: FilterConfig, seed: int) -> tuple[_Log, dict[str, int]]:
    """What the filters keep, and how many rows each left out."""
    counts: Counter[str] = Counter()
    if config.user_fraction < 1:
        kept = np.random.default_rng(seed).random(len(log.user_ids)) < config.user_fraction
        counts["user_fraction"] = int((~kept[log.user]).sum())
        log = log.take(kept[log.user])
    minimum = config.min_user_interactions, config.min_item_interactions
    while max(minimum) > 1:
        enough_user = np.bincount(log.user, minlength=len(log.user_ids)) >= minimum[0]
        few_user = ~enough_user[log.user]
        enough_item = np.bincount(log.item, minlength=len(log.item_ids)) >= minimum[1]
        few_item = ~few_user & ~enough_item[log.item]
        if not (few_user | few_item).any():
            break
        counts["min_user_interactions"] += int(few_user.sum())
        counts["min_item_interactions"] += int(few_item.sum())
        log = log.take(~(few_user | few_item))
    if len(log.row) == 0:
        raise EmptyDataError(f"the filters leave no interactions ({dict(counts)}); lower them", filtered=dict(counts))
    return log, dict(counts)


def _index(log: _Log, items: pa.Table, *, keep_all: bool) -> tuple[_Log, Any, pa.Table, int, int]:
    """Dense numbers for users and items: ``(log, user ids, items, items added, items left out)``."""
    user_of_code, used_users = _ranks(log.user, len(log.user_ids), log.row)
    used_items = _ranks(log.item, len(log.item_ids), log.row)[1]
    known = pc.index_in(log.item_ids, items[schema.ITEM_ID])
    known = pc.fill_null(known, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    left_out = 0
    if not keep_all:
        keep = np.zeros(len(items), bool)
        keep[known[used_items][known[used_items] >= 0]] = True
        left_out = int((~keep).sum())
        known = np.where(known >= 0, (np.cumsum(keep) - 1)[known], -1) if len(keep) else known
        items = items.filter(pa.array(keep))
    new = used_items[known[used_items] < 0]
    known[new] = len(items) + np.arange(len(new))
    new_ids = log.item_ids.take(pa.array(new))
    fresh = {
        schema.ITEM_ID: new_ids,
        "title": new_ids,
        "categories": pa.array([[]] * len(new), pa.list_(pa.string())),
        "available": pa.repeat(True, len(new)),
    }
    added = pa.table([fresh.get(f.name, pa.nulls(len(new), f.type)) for f in schema.ITEMS], schema=schema.ITEMS)
    items = pa.concat_tables([items, added]).combine_chunks()
    # Numbering users by first appearance may differ from the codes once filters have taken rows away: sort again.
    indexed = replace(
        log,
        user=user_of_code[log.user].astype(np.int32),
        item=known[log.item].astype(np.int32),
        item_ids=items[schema.ITEM_ID],
    )
    return (
        indexed.take(np.argsort(indexed.user, kind="stable")),
        log.user_ids.take(pa.array(used_users)),
        items,
        len(new),
        left_out,
    )


def _ranks(codes: Int32Array, num_codes: int, row: Int64Array) -> tuple[Int64Array, Int64Array]:
    """``(rank of each code, codes by rank)`` for the codes in use, ranked by the lowest row they appear in."""
    first = np.full(num_codes, np.iinfo(np.int64).max)
    np.minimum.at(first, codes, row)
    used = np.flatnonzero(first < np.iinfo(np.int64).max)
    used = used[np.argsort(first[used], kind="stable")]
    ranks = np.full(num_codes, -1, np.int64)
    ranks[used] = np.arange(len(used))
    return ranks, used
