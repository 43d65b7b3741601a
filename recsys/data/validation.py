"""Raw tables against the data contract: good rows are converted, bad ones are quarantined with the reason for each.

What is wrong with a whole table (a missing column, a column of a type that cannot hold the field) is a
:class:`~recsys.errors.SchemaError`. What is wrong with a row costs that row, and only that row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from recsys import schema
from recsys.arrow import pc
from recsys.data.sources.base import LINE, REJECTED, ROW, Source, TimestampEncoding
from recsys.errors import SchemaError
from recsys.files import atomic_path
from recsys.ids import id_problems
from recsys.moments import milliseconds
from recsys.types import FloatArray, Int64Array

MISSING_USER = "missing user_id"
MISSING_ITEM = "missing item_id"
MISSING_EVENT = "missing event"
MISSING_TIMESTAMP = "missing timestamp"
UNPARSABLE_TIMESTAMP = "unparsable timestamp"
FUTURE_TIMESTAMP = "future timestamp"
UNPARSABLE_POSITION = "position is not an integer"
UNPARSABLE_VALUE = "value is not a number"
NOT_FINITE_VALUE = "value is NaN or infinite"
DUPLICATE = "duplicate row"
DUPLICATE_ITEM = "duplicate item_id"

_MS_PER_UNIT = {"s": 1000.0, "ms": 1.0, "us": 0.001}


def _quarantine(names: Iterable[str]) -> pa.Schema:
    head = [pa.field(ROW, pa.int64(), nullable=False), pa.field("reason", pa.string(), nullable=False)]
    return pa.schema([*head, *(pa.field(name, pa.string()) for name in (*names, LINE))])


_FIELDS = (schema.USER_ID, schema.ITEM_ID, schema.TIMESTAMP, schema.POSITION, schema.EVENT, schema.VALUE)
QUARANTINE = _quarantine(_FIELDS)
"""The quarantine file: number of the row in the source from 0, the reason, the fields as text as they were found, and
the whole line where it could not be cut into fields."""
QUARANTINED_ITEMS = _quarantine(schema.ITEMS.names)
"""The quarantine file of the catalogue, in the same form."""


class Quarantine:
    """An open quarantine file; ``counts`` holds the number of rows per reason."""

    def __init__(self, writer: pq.ParquetWriter, columns: pa.Schema) -> None:
        self._writer = writer
        self._schema = columns
        self.counts: Counter[str] = Counter()

    @classmethod
    @contextmanager
    def create(cls, path: Path, columns: pa.Schema = QUARANTINE) -> Generator[Quarantine]:
        """Open ``path`` for writing; the file appears when the block ends without an error."""
        with atomic_path(path) as temporary, pq.ParquetWriter(temporary, columns) as writer:
            yield cls(writer, columns)

    def add(self, table: pa.Table) -> None:
        """Append rows: any columns of the file's schema, of any type that has a text form."""
        if len(table) == 0:
            return
        columns = [
            _text(table[field.name]).cast(field.type)
            if field.name in table.column_names
            else pa.nulls(len(table), field.type)
            for field in self._schema
        ]
        self._writer.write_table(pa.table(columns, schema=self._schema))
        for entry in pc.value_counts(table["reason"]).to_pylist():
            self.counts[entry["values"]] += entry["counts"]


def _text(column: Any) -> Any:
    if pa.types.is_list(column.type):
        return pa.array([None if row is None else "|".join(map(str, row)) for row in column.to_pylist()], pa.string())
    return column


class _Reasons:
    """The first reason that holds, per row."""

    def __init__(self, num_rows: int) -> None:
        self._codes = np.zeros(num_rows, np.int16)
        self._names: list[str | None] = [None]

    def add(self, name: str, mask: Any) -> None:
        found = mask if isinstance(mask, np.ndarray) else pc.fill_null(mask, False).to_numpy(zero_copy_only=False)
        if found.any():
            self._names.append(name)
            self._codes[(self._codes == 0) & found] = len(self._names) - 1

    def split(self, accepted: pa.Table, raw: pa.Table) -> tuple[pa.Table, pa.Table]:
        good = self._codes == 0
        if good.all():
            return accepted, raw.slice(0, 0).append_column("reason", pa.array([], pa.string()))
        reasons = pa.array(self._names, pa.string()).take(pa.array(self._codes[~good]))
        return accepted.filter(pa.array(good)), raw.filter(pa.array(~good)).append_column("reason", reasons)


def validate(raw: pa.Table, source: Source, first_row: int, latest_ms: int) -> tuple[pa.Table, pa.Table]:
    """Split a raw chunk into ``(accepted, rejected)``; together they hold every row once, in order.

    ``accepted``: ``row`` int64, ``user_id``, ``item_id``, ``event`` string, ``timestamp`` int64 in ms (null without
    time), ``position`` int64 (null where the source gives none), ``value`` float32 or null. ``rejected``: the raw
    columns, ``row`` and ``reason``. ``first_row`` numbers the chunk's rows where the source does not; times after
    ``latest_ms`` are future.
    """
    name = type(source).__name__
    known = {*_FIELDS, ROW, REJECTED, LINE}
    required = [schema.USER_ID, schema.ITEM_ID, *([schema.TIMESTAMP] if source.has_time else [])]
    if missing := [column for column in required if column not in raw.column_names]:
        raise SchemaError(f"{name}: missing column(s) {', '.join(missing)}; map them in the source", columns=missing)
    if extra := [column for column in raw.column_names if column not in known]:
        raise SchemaError(f"{name}: extra column(s) {', '.join(extra)}; map or ignore them", columns=extra)
    size = len(raw)
    raw = raw.combine_chunks()
    if ROW not in raw.column_names:
        raw = raw.append_column(ROW, pa.array(np.arange(first_row, first_row + size, dtype=np.int64)))
    reasons = _Reasons(size)
    if REJECTED in raw.column_names:
        refused = raw[REJECTED]
        for reason in pc.unique(refused.drop_null()).to_pylist():
            reasons.add(reason, pc.equal(refused, reason))
    out: dict[str, Any] = {ROW: raw[ROW]}
    for column, reason in ((schema.USER_ID, MISSING_USER), (schema.ITEM_ID, MISSING_ITEM)):
        out[column] = _ids(raw[column], column)
        reasons.add(reason, _blank(out[column]))
        for why, mask in id_problems(out[column]).items():
            reasons.add(f"{column} {why}", mask)
    if schema.EVENT in raw.column_names:
        out[schema.EVENT] = _strings(raw[schema.EVENT], schema.EVENT)
        reasons.add(MISSING_EVENT, _blank(out[schema.EVENT]))
    else:
        out[schema.EVENT] = pa.repeat(source.default_event, size)
    if source.has_time:
        column = raw[schema.TIMESTAMP]
        times = timestamps_ms(column, source.timestamp_encoding)
        reasons.add(MISSING_TIMESTAMP, pc.is_null(column) if not _is_text(column.type) else _blank(column))
        reasons.add(UNPARSABLE_TIMESTAMP, pc.is_null(times))
        reasons.add(FUTURE_TIMESTAMP, pc.greater(times, latest_ms))
        out[schema.TIMESTAMP] = times
    else:
        out[schema.TIMESTAMP] = pa.nulls(size, pa.int64())
    out[schema.POSITION] = pa.nulls(size, pa.int64())
    if schema.POSITION in raw.column_names:
        out[schema.POSITION] = _integers(raw[schema.POSITION], schema.POSITION)
        reasons.add(UNPARSABLE_POSITION, pc.is_null(out[schema.POSITION]))
    out[schema.VALUE] = pa.nulls(size, pa.float32())
    if schema.VALUE in raw.column_names:
        given = raw[schema.VALUE]
        value = _numbers(given, schema.VALUE).cast(pa.float32(), safe=False)
        absent = _blank(given) if _is_text(given.type) else pc.is_null(given)
        reasons.add(UNPARSABLE_VALUE, pc.and_(pc.is_null(value), pc.invert(absent)))
        reasons.add(NOT_FINITE_VALUE, pc.invert(pc.is_finite(value)))
        out[schema.VALUE] = value
    return reasons.split(pa.table(out), raw)


def clean_items(given: pa.Table | None, where: str) -> tuple[pa.Table, pa.Table, int]:
    """``(items, rejected, untitled)`` of a raw catalogue: an ``ITEMS`` table in the given order, the rows refused, and
    how many items have their id for a title because they came without one.

    The first row of an ``item_id`` stays and later ones are refused, and so is a row whose id is missing or whose
    ``price``, ``created_at`` or ``available`` cannot be read. Absent columns are filled: no categories, available.
    """
    raw: Any = pa.table({schema.ITEM_ID: pa.array([], pa.string())}) if given is None else given
    if schema.ITEM_ID not in raw.column_names:
        raise SchemaError(
            f"{where}: the catalogue has no column item_id; map it in the source", columns=[schema.ITEM_ID]
        )
    if extra := [c for c in raw.column_names if c not in {*schema.ITEMS.names, ROW, REJECTED, LINE}]:
        raise SchemaError(
            f"{where}: extra column(s) {', '.join(extra)} in the catalogue; map or ignore them", columns=extra
        )
    size = len(raw)
    raw = raw.combine_chunks()
    if ROW not in raw.column_names:
        raw = raw.append_column(ROW, pa.array(np.arange(size, dtype=np.int64)))
    reasons = _Reasons(size)
    if REJECTED in raw.column_names:
        for reason in pc.unique(raw[REJECTED].drop_null()).to_pylist():
            reasons.add(reason, pc.equal(raw[REJECTED], reason))
    ids = _ids(raw[schema.ITEM_ID], schema.ITEM_ID)
    reasons.add(MISSING_ITEM, _blank(ids))
    for why, mask in id_problems(ids).items():
        reasons.add(f"{schema.ITEM_ID} {why}", mask)
    first = np.zeros(size, bool)
    first[
        np.unique(pc.fill_null(ids, "").combine_chunks().dictionary_encode().indices.to_numpy(), return_index=True)[1]
    ] = True
    reasons.add(DUPLICATE_ITEM, ~first)
    out: dict[str, Any] = {schema.ITEM_ID: ids}
    for field in schema.ITEMS:
        if field.name == schema.ITEM_ID:
            continue
        if field.name not in raw.column_names:
            out[field.name] = None
            continue
        column = raw[field.name]
        converted = _ITEM_COLUMNS[field.name](column, field.name)
        if field.name in ("price", "created_at", "available"):
            absent = _blank(column) if _is_text(column.type) else pc.is_null(column)
            reasons.add(f"{field.name} is unreadable", pc.and_(pc.is_null(converted), pc.invert(absent)))
        if field.name == "price":
            converted = converted.cast(pa.float32(), safe=False)
            reasons.add("price is NaN or infinite", pc.invert(pc.is_finite(converted)))
        out[field.name] = converted
    blank = pa.array(np.ones(size, bool)) if out["title"] is None else pc.fill_null(_blank(out["title"]), True)
    out["title"] = ids if out["title"] is None else pc.if_else(blank, ids, out["title"])
    empty = pa.ListArray.from_arrays(pa.array(np.zeros(size + 1, np.int32)), pa.array([], pa.string()))
    out["categories"] = (
        empty if out["categories"] is None else pc.coalesce(out["categories"], pa.scalar([], pa.list_(pa.string())))
    )
    out["available"] = pa.repeat(True, size) if out["available"] is None else pc.fill_null(out["available"], True)
    columns = [pa.nulls(size, f.type) if out[f.name] is None else out[f.name].cast(f.type) for f in schema.ITEMS]
    with_blank = pa.table([*columns, blank], names=[*schema.ITEMS.names, "untitled"])
    accepted, rejected = reasons.split(with_blank, raw)
    untitled = pc.sum(accepted["untitled"]).as_py() or 0
    return accepted.drop_columns("untitled").cast(schema.ITEMS), rejected, untitled


def equal_pairs(
    user: NDArray[Any], item: NDArray[Any], time: Int64Array, event: NDArray[Any], value: FloatArray
) -> tuple[Int64Array, Int64Array]:
    """``(earlier, later)`` int64 row numbers of equal rows that follow each other, among rows sorted by user and time.

    Equal means: the same in all five columns; NaN in ``value`` stands for null and equals itself.
    """
    same = (user[1:] == user[:-1]) & (time[1:] == time[:-1])
    run = np.zeros(len(user), np.int64)
    np.cumsum(~same, out=run[1:])
    tied = np.zeros(len(user), bool)
    tied[1:] |= same
    tied[:-1] |= same
    rows = np.flatnonzero(tied)
    bits = np.where(np.isnan(value[rows]), np.float32(np.nan), value[rows] + np.float32(0)).view(np.int32)
    keys = (bits, event[rows], item[rows], run[rows])
    order = np.lexsort(keys)
    equal = np.ones(max(len(order) - 1, 0), bool)
    for key in keys:
        equal &= key[order[1:]] == key[order[:-1]]
    return rows[order[:-1][equal]], rows[order[1:][equal]]


def timestamps_ms(column: Any, encoding: TimestampEncoding) -> Any:
    """int64 milliseconds since 1970 UTC, rounded down; null where a value cannot be read.

    Arrow timestamps and dates are taken as they are (without a zone: UTC); numbers and text as ``encoding`` says.
    """
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        whole = column.cast(pa.timestamp("ms", getattr(kind, "tz", None)), safe=False).cast(pa.int64())
        if pa.types.is_timestamp(kind) and kind.unit in ("us", "ns"):
            # The cast cuts towards zero; before 1970 that would be one millisecond late.
            per_ms = 1000 if kind.unit == "us" else 1_000_000
            late = pc.greater(pc.multiply(whole, per_ms), column.cast(pa.int64()))
            whole = pc.subtract(whole, late.cast(pa.int64()))
        return whole
    if encoding == "iso":
        if not (_is_text(kind) or pa.types.is_null(kind)):
            raise SchemaError(
                f"timestamp: the column holds {kind}, not ISO 8601 text; set timestamp_unit to s, ms or us",
                column=schema.TIMESTAMP,
            )
        return _each(_strings(column, schema.TIMESTAMP), _iso_fast, _iso_ms, pa.int64())
    number = pc.multiply(_numbers(column, schema.TIMESTAMP), _MS_PER_UNIT[encoding])
    # Beyond 2**53 ms float64 is no longer exact, and no such time is real.
    readable = pc.and_(pc.is_finite(number), pc.less(pc.abs(number), 2.0**53))
    return pc.floor(pc.if_else(readable, number, pa.scalar(None, pa.float64()))).cast(pa.int64())


def _iso_fast(texts: Any) -> Any:
    zoned = pc.match_substring_regex(texts, r"(Z|[+-]\d\d:?\d\d)$")
    utc = pc.if_else(zoned, texts, pc.binary_join_element_wise(texts, "Z", ""))
    return timestamps_ms(utc.cast(pa.timestamp("us", "UTC")), "us")


def _iso_ms(text: str) -> int:
    return milliseconds(datetime.fromisoformat(text))


def _each(texts: Any, fast: Callable[[Any], Any], slow: Callable[[str], Any], kind: pa.DataType) -> Any:
    """Convert a column of trimmed text at once, or, where one row fails, row by row with null for those that fail."""
    texts = pc.utf8_trim_whitespace(texts)
    texts = pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)
    try:
        return fast(texts)
    except pa.ArrowInvalid:
        return pa.chunked_array([pa.array([_or_none(slow, text) for text in texts.to_pylist()], kind)])


def _or_none(convert: Callable[[str], Any], text: str | None) -> Any:
    if text is None:
        return None
    try:
        return convert(text)
    except (ValueError, OverflowError):
        return None


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _strings(column: Any, name: str) -> Any:
    if not (_is_text(column.type) or pa.types.is_null(column.type)):
        raise SchemaError(f"{name}: the column holds {column.type}; it must hold text", column=name)
    return column.cast(pa.string())


def _ids(column: Any, name: str) -> Any:
    if not (_is_text(column.type) or pa.types.is_integer(column.type) or pa.types.is_null(column.type)):
        raise SchemaError(
            f"{name}: the column holds {column.type}; ids must be text or integers, convert the column", column=name
        )
    return column.cast(pa.string())


def _numbers(column: Any, name: str) -> Any:
    kind = column.type
    if _is_text(kind):
        return _each(column.cast(pa.string()), lambda texts: texts.cast(pa.float64()), float, pa.float64())
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    if not (numeric or pa.types.is_boolean(kind) or pa.types.is_null(kind)):
        raise SchemaError(f"{name}: the column holds {kind}; it must hold numbers", column=name)
    return column.cast(pa.float64(), safe=False)


def _integers(column: Any, name: str) -> Any:
    numbers = _numbers(column, name)
    whole = pc.and_(pc.is_finite(numbers), pc.equal(numbers, pc.floor(numbers)))
    whole = pc.and_(whole, pc.less(pc.abs(numbers), 2.0**53))
    return pc.if_else(whole, numbers, pa.scalar(None, pa.float64())).cast(pa.int64())


def _booleans(column: Any, _: str) -> Any:
    if pa.types.is_boolean(column.type) or pa.types.is_null(column.type):
        return column.cast(pa.bool_())
    text = pc.utf8_lower(pc.utf8_trim_whitespace(column.cast(pa.string())))
    yes = pc.is_in(text, pa.array(["true", "1", "yes"]))
    no = pc.is_in(text, pa.array(["false", "0", "no"]))
    return pc.if_else(pc.or_(yes, no), yes, pa.scalar(None, pa.bool_()))


def _lists(column: Any, name: str) -> Any:
    if pa.types.is_null(column.type):
        return column.cast(pa.list_(pa.string()))
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)) or not _is_text(
        column.type.value_type
    ):
        raise SchemaError(f"{name}: the column holds {column.type}; it must hold lists of text", column=name)
    lists = column.cast(pa.list_(pa.string()))
    if any(pc.list_flatten(chunk).null_count for chunk in lists.chunks):
        return pa.chunked_array(
            [pa.array([r and [c for c in r if c is not None] for r in lists.to_pylist()], lists.type)]
        )
    return lists


def _created_at(column: Any, _: str) -> Any:
    return timestamps_ms(column, "iso").cast(schema.TIMESTAMP_TYPE)


def _blank(texts: Any) -> Any:
    return pc.or_kleene(pc.is_null(texts), pc.equal(pc.utf8_trim_whitespace(texts.cast(pa.string())), ""))


_ITEM_COLUMNS: dict[str, Callable[[Any, str], Any]] = {
    "title": _strings,
    "description": _strings,
    "categories": _lists,
    "creator": _strings,
    "price": _numbers,
    "created_at": _created_at,
    "available": _booleans,
    "image": _strings,
}
