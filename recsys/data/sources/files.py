"""Reading tables from files: CSV as strings with malformed lines kept, Parquet, column mappings, fingerprints."""

from __future__ import annotations

import hashlib
from abc import ABC
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
import pyarrow.parquet as pq
from pydantic import Field

from recsys import schema
from recsys.arrow import pc
from recsys.config import StrictConfig
from recsys.data.sources.base import LINE, REJECTED, ROW, Source, TimestampEncoding
from recsys.errors import ConfigError, DataError, EmptyDataError, SchemaError
from recsys.files import file_sha256

BLOCK_BYTES = 4 << 20
BATCH_ROWS = 1 << 17
_IGNORE = 'Columns to leave out; "*" leaves out all that are not mapped. Any other column is an error.'


class _Columns(StrictConfig):
    @property
    def mapping(self) -> dict[str, str]:
        """Per field that the file has, its column."""
        return {field: column for field, column in self.model_dump().items() if column is not None}


class InteractionColumns(_Columns):
    """Which column of the file holds which field of an interaction; null where the file has no such column."""

    user_id: str = Field(default="user_id", description="Column with the user's id (text or integer).")
    item_id: str = Field(default="item_id", description="Column with the item's id (text or integer).")
    timestamp: str | None = Field(
        default="timestamp", description="Column with the time (see timestamp_unit); null for data that has order only."
    )
    position: str | None = Field(
        default=None,
        description="Column (integer) that orders a user's rows of equal or no time; null to use the file's order.",
    )
    event: str | None = Field(
        default=None, description="Column with the event's name; null if all rows are one kind of event."
    )
    value: str | None = Field(
        default=None, description="Column with the event's value, such as a rating; null if there is none."
    )


class ItemColumns(_Columns):
    """Which column of the catalogue holds which field of an item; null where it has no such column."""

    item_id: str = Field(default="item_id", description="Column with the item's id.")
    title: str | None = Field(default="title", description="Column with the title; where it is empty the id stands in.")
    description: str | None = Field(default=None, description="Column with a longer text.")
    categories: str | None = Field(
        default=None, description="Column with categories: a list, or text cut at category_separator."
    )
    creator: str | None = Field(
        default=None, description="Column with the creator (brand, author, artist), used by slate rules."
    )
    price: str | None = Field(default=None, description="Column with the price (number, any one currency).")
    created_at: str | None = Field(
        default=None, description="Column with the time of appearance (ISO 8601 text or a timestamp)."
    )
    available: str | None = Field(
        default=None, description="Column saying whether the item can be shown (true/false or 1/0)."
    )
    image: str | None = Field(default=None, description="Column with the URL of an image.")


class ItemsFile(StrictConfig):
    """A catalogue in one CSV or Parquet file (by its suffix)."""

    path: str = Field(description="Path of the catalogue: .parquet, else CSV with a header.")
    columns: ItemColumns = Field(default=ItemColumns(), description="Which column holds which field.")
    ignore: tuple[str, ...] = Field(default=(), description=_IGNORE)
    category_separator: str = Field(default="|", min_length=1, description="Text between two categories of one item.")
    delimiter: str = Field(default=",", min_length=1, max_length=1, description="Character between two CSV columns.")
    encoding: str = Field(default="utf-8", description="Text encoding of a CSV file, such as utf-8 or latin-1.")

    def read(self) -> pa.Table:
        """The raw catalogue: columns named as in the contract, ``categories`` as lists."""
        path = existing(self.path)
        mapping = self.columns.mapping
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            check_columns(file.schema_arrow.names, mapping, self.ignore, path, optional="items.columns")
            table = file.read(columns=list(mapping.values())).select(list(mapping.values()))
            table = table.rename_columns(list(mapping))
        else:
            check_columns(csv_names(path, self.delimiter, self.encoding), mapping, self.ignore, path, "items.columns")
            chunks = list(read_csv(path, mapping, delimiter=self.delimiter, encoding=self.encoding))
            table = pa.concat_tables(chunks, promote_options="default") if chunks else pa.table({schema.ITEM_ID: []})
        if "categories" in table.column_names and not pa.types.is_list(table["categories"].type):
            column = table.column_names.index("categories")
            table = table.set_column(
                column, "categories", split_categories(table["categories"], self.category_separator)
            )
        return table


class FileSource(Source, ABC):
    """Interactions in files, items (optional) in another file."""

    path: str = Field(description="Path of the file with the interactions.")
    event: str = Field(
        default="interaction", min_length=1, description="Event of every row where no column says what happened."
    )
    catalogue: ItemsFile | None = Field(default=None, description="The items' file; null where there is none.")

    @property
    def default_event(self) -> str:
        return self.event

    def items(self) -> pa.Table | None:
        return None if self.catalogue is None else self.catalogue.read()

    def fingerprint(self) -> str:
        if self.catalogue is None:
            return files_fingerprint(self, self._files())
        settings = self.model_copy(update={"catalogue": self.catalogue.model_copy(update={"path": ""})})
        return files_fingerprint(settings, [*self._files(), existing(self.catalogue.path)])

    def _files(self) -> list[Path]:
        """The files with the interactions, in the order in which they are read."""
        return [existing(self.path)]


class TableSource(FileSource, ABC):
    """Interactions in files with named columns. A column that is neither mapped nor ignored is an error."""

    columns: InteractionColumns = Field(default=InteractionColumns(), description="Which column holds which field.")
    ignore: tuple[str, ...] = Field(default=(), description=_IGNORE)
    timestamp_unit: TimestampEncoding = Field(description="How the times are written.")

    @property
    def has_time(self) -> bool:
        return self.columns.timestamp is not None

    @property
    def timestamp_encoding(self) -> TimestampEncoding:
        return self.timestamp_unit


def split_categories(texts: Any, separator: str) -> Any:
    """list<string>: each text cut at ``separator``, trimmed, empty parts left out; null gives an empty list."""
    column = pc.fill_null(texts.cast(pa.string()), "")
    parts = pc.split_pattern(column, separator)
    parts = parts.combine_chunks() if isinstance(parts, pa.ChunkedArray) else parts
    flat = pc.utf8_trim_whitespace(pc.list_flatten(parts))
    keep = pc.not_equal(flat, "").to_numpy(zero_copy_only=False)
    counts = np.bincount(pc.list_parent_indices(parts).to_numpy()[keep], minlength=len(parts))
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), flat.filter(pa.array(keep)))


def existing(path: str | Path) -> Path:
    """``path``, if it exists; else a :class:`DataError` that says so."""
    found = Path(path).expanduser()
    if not found.exists():
        raise DataError(
            f"{found}: no such file or folder; correct the path in the source's configuration", path=str(path)
        )
    return found


def files_fingerprint(config: StrictConfig, files: Iterable[Path]) -> str:
    """SHA-256 (hex) of the files' content and of ``config``; where the files lie does not matter."""
    settings = config.model_copy(update={"path": ""}) if "path" in type(config).model_fields else config
    digest = hashlib.sha256(settings.content_hash().encode())
    for file in files:
        digest.update(file_sha256(file).encode())
    return digest.hexdigest()


def check_columns(
    found: Sequence[str], mapping: Mapping[str, str], ignore: Sequence[str], path: Path, optional: str = "columns"
) -> None:
    """Every mapped column must be there once, and every other one must be ignored on purpose."""
    columns = list(mapping.values())
    if len(set(columns)) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise ConfigError(f"{optional}: two fields name the column {twice!r}; one column holds one field", column=twice)
    repeated = sorted({name for name in found if found.count(name) > 1})
    if repeated:
        raise SchemaError(f"{path}: column {repeated[0]!r} is there twice; rename one of them", columns=repeated)
    missing = [name for name in mapping.values() if name not in found]
    if missing:
        fields = {column: field for field, column in mapping.items()}
        lines = "; ".join(f"{name!r} (for {fields[name]})" for name in missing)
        raise SchemaError(
            f"{path}: missing column(s) {lines}; the file has {', '.join(map(repr, found))}. Name the right "
            f"column under {optional}, or set an optional field to null (timestamp: null means data with order only)",
            path=str(path),
            columns=missing,
        )
    extra = [name for name in found if name not in mapping.values() and name not in ignore]
    if extra and "*" not in ignore:
        raise SchemaError(
            f"{path}: extra column(s) {', '.join(map(repr, extra))}; map them under {optional}, or list them under "
            '`ignore` ("*" ignores all that are not mapped)',
            path=str(path),
            columns=extra,
        )


def csv_names(path: Path, delimiter: str, encoding: str) -> list[str]:
    """The column names in the header of a CSV file."""
    parse = csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=lambda _: "skip")
    try:
        with _open(path, encoding, parse, csv.ConvertOptions(check_utf8=False)) as reader:
            return list(reader.schema.names)
    except UnicodeDecodeError as error:
        raise SchemaError(f"{path}: the header is not {encoding} text; set the right `encoding`") from error


def read_csv(
    path: Path,
    mapping: Mapping[str, str],
    *,
    delimiter: str = ",",
    encoding: str = "utf-8",
    names: Sequence[str] | None = None,
    quotes: bool = True,
) -> Iterator[pa.Table]:
    """Chunks with the fields of ``mapping`` (field → column), all strings, empty text as null.

    Every field stays text, so that one wrong cell costs one row and not the whole file. A line with too few or too
    many columns comes in a chunk of its own with ``row``, ``rejected`` and ``line``. ``names`` are the columns of
    a file without a header.
    """
    bad: list[tuple[int, str, str]] = []
    header_lines = 1 if names is None else 0

    def keep_bad(line: Any) -> str:
        reason = f"malformed line: {line.actual_columns} columns instead of {line.expected_columns}"
        bad.append((line.number - 1 - header_lines, reason, line.text))
        return "skip"

    columns = list(mapping.values())
    parse = csv.ParseOptions(
        delimiter=delimiter,
        newlines_in_values=quotes,
        quote_char='"' if quotes else False,
        invalid_row_handler=keep_bad,
    )
    convert = csv.ConvertOptions(
        include_columns=columns,
        column_types=dict.fromkeys(columns, pa.string()),
        null_values=[""],
        strings_can_be_null=True,
    )
    done = 0
    with _open(path, encoding, parse, convert, names) as reader:
        while True:
            try:
                batch = reader.read_next_batch()
            except StopIteration:
                break
            except pa.ArrowInvalid as error:
                raise SchemaError(
                    f"{path}: not readable as CSV in {encoding}: {error}; set the right `encoding` and `delimiter`",
                    path=str(path),
                ) from error
            table = pa.Table.from_batches([batch]).rename_columns(list(mapping))
            yield table.append_column(ROW, pa.array(_row_numbers(done, len(table), [number for number, _, _ in bad])))
            done += len(table)
    if bad:
        rows, reasons, lines = zip(*bad, strict=True)
        yield pa.table(
            {
                **{field: pa.nulls(len(bad), pa.string()) for field in mapping},
                ROW: pa.array(rows, pa.int64()),
                REJECTED: pa.array(reasons, pa.string()),
                LINE: pa.array(lines, pa.string()),
            }
        )


def _row_numbers(start: int, count: int, bad: Sequence[int]) -> Any:
    """int64 [count]: the numbers in the file of the good rows ``start`` and on, when those in ``bad`` are not good."""
    good = np.arange(start, start + count, dtype=np.int64)
    shift = np.asarray(bad, np.int64) - np.arange(len(bad))
    return good + np.searchsorted(shift, good, side="right")


def _open(path: Path, encoding: str, parse: Any, convert: Any, names: Sequence[str] | None = None) -> Any:
    options = csv.ReadOptions(encoding=encoding, block_size=BLOCK_BYTES, use_threads=False, column_names=names)
    try:
        return csv.open_csv(path, options, parse, convert)
    except pa.ArrowInvalid as error:
        if path.stat().st_size == 0 or "Empty CSV" in str(error):
            raise EmptyDataError(f"{path}: the file is empty", path=str(path)) from error
        raise SchemaError(f"{path}: not readable as CSV in {encoding}: {error}", path=str(path)) from error
    except LookupError as error:
        raise SchemaError(f"{path}: unknown text encoding {encoding!r}", path=str(path)) from error


def estimate_lines(path: Path) -> int:
    """About how many lines a text file has, judged by its first mebibyte."""
    with path.open("rb") as file:
        head = file.read(1 << 20)
    lines = head.count(b"\n")
    return round(lines * path.stat().st_size / len(head)) if head else 0
