"""A log of events in a Parquet file, for machines that cannot reach the store.

The file's metadata says what it is. A *whole* log carries its watermark and the last position that was compacted away:
a Bundle trained on it contains the log up to there. One that begins after some watermark carries that and its end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from recsys import schema
from recsys.arrow import pc
from recsys.errors import EventStoreError
from recsys.events.base import EventLog, EventLogConfig, log_table, position_in
from recsys.files import atomic_path, write_parquet

WATERMARK = b"recsys.watermark"
COMPACTED = b"recsys.compacted"
AFTER = b"recsys.after"
UNTIL = b"recsys.until"
LOG_ONLY = b"recsys.log_only"
BATCH_ROWS = 1000
"""rows read at once: Redis does nothing else while it takes one batch"""


class ExportedLogConfig(EventLogConfig):
    """A file that ``jobs.events export`` wrote."""

    kind: Literal["parquet"] = "parquet"
    path: str = Field(min_length=1, description="Parquet file; it may be replaced by a newer export at any time")

    @classmethod
    def sample(cls, folder: Path) -> Self:
        path = folder / "events.parquet"
        table = log_table([(3, "1", "user", "item", "click", 1000, None, None, None, None)])
        write_parquet(path, table.replace_schema_metadata({WATERMARK: b"sample:3", COMPACTED: b"0", LOG_ONLY: b"[]"}))
        return cls(path=str(path))

    def open(self) -> ExportedLog:
        """The log in the file.

        :raises EventStoreError: when there is none.
        """
        return ExportedLog(Path(self.path))


class ExportedLog(EventLog):
    """Reads the file anew at each call."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place()

    def close(self) -> None:
        """Nothing is held between calls."""

    def watermark(self) -> str:
        return self._place()[0]

    def compacted(self) -> int:
        """The position that the file begins after: nothing before it can be had from here."""
        return self._place()[1]

    def log(self, after: str | None = None) -> Iterator[pa.Table]:
        with opened(self.path) as file:  # one file to the end, whatever takes its place meanwhile
            metadata = file.schema_arrow.metadata or {}
            watermark, compacted = self._place(metadata)
            log_id, _, end = watermark.rpartition(":")
            if after is None and AFTER in metadata:
                raise EventStoreError(
                    f"{self.path} begins after {log_id}:{compacted}, and all of the log is asked for: export it "
                    "without --after",
                    path=str(self.path),
                )
            position = position_in(after, log_id, compacted, int(end))
            for batch in file.iter_batches(BATCH_ROWS):
                table = pa.Table.from_batches([batch])
                kept = table.filter(pc.greater(table["position"], position))
                if len(kept):
                    yield kept.cast(schema.EVENT_LOG)

    def _place(self, metadata: Mapping[bytes, bytes] | None = None) -> tuple[str, int]:
        """Where it ends, as a watermark, and the position it begins after."""
        if metadata is None:
            with opened(self.path) as file:
                metadata = file.schema_arrow.metadata or {}
        if WATERMARK in metadata:
            return metadata[WATERMARK].decode(), int(metadata[COMPACTED])
        if UNTIL in metadata:
            return metadata[UNTIL].decode(), int(metadata[AFTER].decode().rpartition(":")[2])
        raise EventStoreError(
            f"{self.path} is no log that `jobs.events export` wrote: it does not say where it ends", path=str(self.path)
        )


def write_log(log: EventLog, path: Path, after: str | None, watermark: str) -> int:
    """Write the events after ``after`` (None: all) up to ``watermark`` to ``path``; returns how many."""
    if after is None:
        metadata = {WATERMARK: watermark.encode(), COMPACTED: str(log.compacted()).encode()}
    else:
        metadata = {AFTER: after.encode(), UNTIL: watermark.encode()}
    metadata[LOG_ONLY] = json.dumps(log.log_only).encode()
    last = int(watermark.rpartition(":")[2])
    number = 0
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, schema.EVENT_LOG.with_metadata(metadata)) as writer,
    ):
        for table in log.log(after):
            kept = table.filter(pc.less_equal(table["position"], last))
            writer.write_table(kept.replace_schema_metadata(metadata))
            number += len(kept)
            if len(kept) < len(table):
                break
    return number


def opened(path: Path) -> pq.ParquetFile:
    """The Parquet file ``path``.

    :raises EventStoreError: when it cannot be read.
    """
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowInvalid) as error:
        raise EventStoreError(f"cannot read {path}: {error}", path=str(path)) from error


def tables(path: Path) -> Iterator[pa.Table]:
    """Its rows, in batches."""
    with opened(path) as file:
        for batch in file.iter_batches(BATCH_ROWS):
            yield pa.Table.from_batches([batch])
