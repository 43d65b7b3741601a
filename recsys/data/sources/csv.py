"""A person's own interactions in CSV."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

import pyarrow as pa
from pydantic import Field

from recsys.data.sources.base import TimestampEncoding
from recsys.data.sources.files import (
    ItemsFile,
    TableSource,
    check_columns,
    csv_names,
    estimate_lines,
    existing,
    read_csv,
)


class CsvSource(TableSource):
    """Interactions in one CSV file with a header, items (optional) in another file.

    Malformed lines go to the quarantine with their text. A column that is neither mapped nor ignored is an error.
    """

    kind: Literal["csv"] = "csv"
    path: str = Field(description="Path of the CSV file with the interactions, header in the first line.")
    timestamp_unit: TimestampEncoding = Field(
        default="iso", description="s, ms or us since 1970 UTC, or iso for ISO 8601 text (UTC where it has no zone)."
    )
    delimiter: str = Field(default=",", min_length=1, max_length=1, description="Character between two columns.")
    encoding: str = Field(default="utf-8", description="Text encoding, such as utf-8 or latin-1.")

    @classmethod
    def sample(cls, folder: Path) -> Self:
        path, items = folder / "log.csv", folder / "items.csv"
        path.write_text("user_id,item_id,timestamp\nu1,a,2024-01-01\nu2,b,2024-01-02T03:04:05Z\n")
        items.write_text("item_id,title\na,A\n")
        return cls(path=str(path), catalogue=ItemsFile(path=str(items)))

    def read(self) -> Iterator[pa.Table]:
        path = existing(self.path)
        mapping = self.columns.mapping
        check_columns(csv_names(path, self.delimiter, self.encoding), mapping, self.ignore, path)
        yield from read_csv(path, mapping, delimiter=self.delimiter, encoding=self.encoding)

    def num_rows(self) -> int:
        return estimate_lines(existing(self.path))
