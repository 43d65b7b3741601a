"""A person's own interactions in CSV."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

import pyarrow as pa
from pydantic import Field

from recsys.data.sources.base import Source, TimestampEncoding
from recsys.data.sources.files import (
    InteractionColumns,
    ItemsFile,
    check_columns,
    csv_names,
    estimate_lines,
    existing,
    fingerprint,
    read_csv,
)


class CsvSource(Source):
    """Interactions in one CSV file with a header, items (optional) in another file.

    Malformed lines go to the quarantine with their text. A column that is neither mapped nor ignored is an error.
    """

    kind: Literal["csv"] = "csv"
    path: str = Field(description="Path of the CSV file with the interactions, header in the first line.")
    columns: InteractionColumns = Field(default=InteractionColumns(), description="Which column holds which field.")
    ignore: tuple[str, ...] = Field(
        default=(),
        description='Columns to leave out; "*" leaves out all that are not mapped. Any other column is an error.',
    )
    timestamp_unit: TimestampEncoding = Field(
        default="iso", description="s, ms or us since 1970 UTC, or iso for ISO 8601 text (UTC where it has no zone)."
    )
    event: str = Field(
        default="interaction", min_length=1, description="Event of every row where columns.event is null."
    )
    delimiter: str = Field(default=",", min_length=1, max_length=1, description="Character between two columns.")
    encoding: str = Field(default="utf-8", description="Text encoding, such as utf-8 or latin-1.")
    catalogue: ItemsFile | None = Field(default=None, description="The items' file; null where there is none.")

    @classmethod
    def sample(cls, folder: Path) -> Self:
        path, items = folder / "log.csv", folder / "items.csv"
        path.write_text("user_id,item_id,timestamp\nu1,a,2024-01-01\nu2,b,2024-01-02T03:04:05Z\n")
        items.write_text("item_id,title\na,A\n")
        return cls(path=str(path), catalogue=ItemsFile(path=str(items)))

    @property
    def has_time(self) -> bool:
        return self.columns.timestamp is not None

    @property
    def timestamp_encoding(self) -> TimestampEncoding:
        return self.timestamp_unit

    @property
    def default_event(self) -> str:
        return self.event

    @property
    def _mapping(self) -> dict[str, str]:
        return {field: column for field, column in self.columns.model_dump().items() if column is not None}

    def read(self) -> Iterator[pa.Table]:
        path = existing(self.path)
        check_columns(csv_names(path, self.delimiter, self.encoding), self._mapping, self.ignore, path)
        yield from read_csv(path, self._mapping, delimiter=self.delimiter, encoding=self.encoding)

    def items(self) -> pa.Table | None:
        return None if self.catalogue is None else self.catalogue.read()

    def fingerprint(self) -> str:
        files = [existing(self.path)] + ([] if self.catalogue is None else [existing(self.catalogue.path)])
        return fingerprint(self._without_paths(), files)

    def _without_paths(self) -> CsvSource:
        catalogue = None if self.catalogue is None else self.catalogue.model_copy(update={"path": ""})
        return self.model_copy(update={"catalogue": catalogue})

    def num_rows(self) -> int:
        return estimate_lines(Path(existing(self.path)))
