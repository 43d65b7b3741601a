"""A person's own interactions in Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from recsys import schema
from recsys.arrow import pc
from recsys.data.sources.base import TimestampEncoding
from recsys.data.sources.files import BATCH_ROWS, TableSource, check_columns, existing
from recsys.errors import EmptyDataError, SchemaError
from recsys.events.exported import LOG_ONLY, WATERMARK
from recsys.files import write_parquet


class ParquetSource(TableSource):
    """Interactions in one Parquet file or a folder of them (read in order of their names), items in another file.

    Rows are streamed, so a file may be larger than memory. A column that is neither mapped nor ignored is an error. Of
    an exported event log, what was only recorded (impressions) is no interaction and is not read.
    """

    kind: Literal["parquet"] = "parquet"
    path: str = Field(description="Path of a .parquet file, or of a folder with such files (subfolders included).")
    timestamp_unit: TimestampEncoding = Field(
        default="ms",
        description="s, ms or us since 1970 UTC, or iso for text; timestamp and date columns need no unit.",
    )

    @classmethod
    def sample(cls, folder: Path) -> Self:
        path = folder / "log.parquet"
        write_parquet(path, pa.table({"user_id": [1, 2], "item_id": ["a", "b"], "timestamp": [5, 6]}))
        return cls(path=str(path))

    def _files(self) -> list[Path]:
        path = existing(self.path)
        files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
        if not files:
            raise EmptyDataError(f"{path}: the folder holds no .parquet file", path=str(path))
        return files

    def read(self) -> Iterator[pa.Table]:
        mapping = self.columns.mapping
        for path in self._files():
            with _open(path) as file:
                check_columns(file.schema_arrow.names, mapping, self.ignore, path)
                log_only = json.loads((file.schema_arrow.metadata or {}).get(LOG_ONLY, b"[]"))
                wanted = {*mapping.values(), *([schema.EVENT] if log_only else [])}
                for batch in file.iter_batches(BATCH_ROWS, columns=sorted(wanted)):
                    table = pa.Table.from_batches([batch])
                    if log_only:
                        recorded = pc.is_in(table[schema.EVENT], pa.array(log_only, pa.string()))
                        table = table.filter(pc.invert(recorded))
                    yield table.select(list(mapping.values())).rename_columns(list(mapping))

    def events_watermark(self) -> str | None:
        """That of the export of a whole log, if one of the files is such.

        :raises SchemaError: when two of them are.
        """
        found: dict[Path, str] = {}
        for path in self._files():
            with _open(path) as file:
                metadata = file.schema_arrow.metadata or {}
            if WATERMARK in metadata:
                found[path] = metadata[WATERMARK].decode()
        if len(found) > 1:
            names = " and ".join(map(str, found))
            raise SchemaError(f"{names} are exports of whole event logs: leave one, their events would count twice")
        return next(iter(found.values()), None)

    def num_rows(self) -> int:
        total = 0
        for path in self._files():
            with _open(path) as file:
                total += file.metadata.num_rows
        return total


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise SchemaError(f"{path}: not a readable Parquet file: {error}", path=str(path)) from error
