"""Plain text sequences, the form in which many sequential benchmarks are published: order, but no time."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field

from recsys import schema
from recsys.arrow import pc
from recsys.data.sources.base import LINE, REJECTED
from recsys.data.sources.files import BATCH_ROWS, FileSource, ItemsFile, estimate_lines, existing
from recsys.errors import SchemaError


class SequencesSource(FileSource):
    """A text file of ids between white space, each user's items oldest first.

    ``user_items``: ``user item item ...``, all of a user's items on a line (a second line of the user goes on from
    the first). ``pairs``: ``user item``, one interaction a line. Lines of another shape are quarantined; blank lines
    are no rows. The same item twice for one user is two interactions, as nothing but order tells them apart.
    """

    kind: Literal["sequences"] = "sequences"
    path: str = Field(description="Path of the text file (UTF-8).")
    layout: Literal["user_items", "pairs"] = Field(
        description="user_items: a user and all their items on a line; pairs: one user and one item on a line."
    )

    @classmethod
    def sample(cls, folder: Path) -> Self:
        path, items = folder / "log.txt", folder / "items.csv"
        path.write_text("u1 a b\nu2 b c\n")
        items.write_text("item_id,title\na,A\n")
        return cls(path=str(path), layout="user_items", catalogue=ItemsFile(path=str(items)))

    @property
    def has_time(self) -> bool:
        return False

    def read(self) -> Iterator[pa.Table]:
        path = existing(self.path)
        # A line of user_items holds many rows: shorter runs of lines keep the chunks about as large.
        size = BATCH_ROWS if self.layout == "pairs" else BATCH_ROWS // 32
        try:
            with path.open(encoding="utf-8") as file:
                while lines := list(islice(file, size)):
                    yield self._chunk(pa.array(lines, pa.string()))
        except UnicodeDecodeError as error:
            raise SchemaError(f"{path}: not UTF-8 text: {error}; convert it to UTF-8", path=str(path)) from error

    def _chunk(self, lines: pa.Array) -> pa.Table:
        lines = pc.utf8_trim_whitespace(lines)
        lines = lines.filter(pc.not_equal(lines, ""))
        words = pc.utf8_split_whitespace(lines)
        counts = pc.list_value_length(words).to_numpy()
        good = counts >= 2 if self.layout == "user_items" else counts == 2
        # A bad line keeps one row in its place, so that row numbers follow the file.
        rows = np.where(good, counts - 1, 1)
        line_of_row = np.repeat(np.arange(len(lines)), rows)
        starts = np.cumsum(counts) - counts
        within = np.arange(len(line_of_row)) - np.repeat(np.cumsum(rows) - rows, rows)
        bad_row = pa.array(~good[line_of_row])
        flat = pc.list_flatten(words)
        null = pa.scalar(None, pa.string())
        users = flat.take(pa.array(starts[line_of_row]))
        # A bad line may be too short to have an item; it then points at its own user and is masked out below.
        items = flat.take(pa.array(starts[line_of_row] + np.where(good[line_of_row], within + 1, 0)))
        wanted = "a user and at least one item" if self.layout == "user_items" else "a user and an item"
        return pa.table(
            {
                schema.USER_ID: pc.if_else(bad_row, null, users),
                schema.ITEM_ID: pc.if_else(bad_row, null, items),
                REJECTED: pc.if_else(bad_row, pa.scalar(f"malformed line: not {wanted}"), null),
                LINE: pc.if_else(bad_row, lines.take(pa.array(line_of_row)), null),
            }
        )

    def num_rows(self) -> int | None:
        return estimate_lines(existing(self.path)) if self.layout == "pairs" else None
