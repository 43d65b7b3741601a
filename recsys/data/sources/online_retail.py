"""UCI "Online Retail": the invoices of a gift shop, baskets with prices and quantities (doi 10.24432/C5BW33)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from recsys import schema
from recsys.arrow import pc
from recsys.data.sources.base import REJECTED, Source
from recsys.data.sources.files import check_columns, existing, files_fingerprint
from recsys.files import write_parquet

_MAPPING = {
    "invoice": "InvoiceNo",
    schema.ITEM_ID: "StockCode",
    "title": "Description",
    schema.VALUE: "Quantity",
    schema.TIMESTAMP: "InvoiceDate",
    "price": "UnitPrice",
    schema.USER_ID: "CustomerID",
}


class OnlineRetailSource(Source):
    """Lines of invoices as purchases; an invoice is a basket.

    All lines of an invoice get its first time, so that a basket is one user at one time; ``value`` is the quantity.
    The usual cleaning is done by quarantine, with a reason for each line: no customer, a cancelled invoice (its
    number starts with C), a quantity or a price that is not above zero. Of 541,909 lines 397,884 stay.

    An item's title is its first description and its price its first price among the clean lines, so that
    nothing known of an item comes from later than its first sale. Items are in order of first appearance.
    """

    kind: Literal["online_retail"] = "online_retail"
    path: str = Field(description="Path of the Parquet file with the columns of the UCI original.")

    @classmethod
    def sample(cls, folder: Path) -> Self:
        table = pa.table(
            {
                "InvoiceNo": ["1", "2"],
                "StockCode": ["A", "B"],
                "Description": ["LAMP", "BOX"],
                "Quantity": [1, 2],
                "InvoiceDate": pa.array([0, 1], pa.timestamp("ns")),
                "UnitPrice": [1.0, 2.0],
                "CustomerID": [1, 2],
                "Country": ["X", "Y"],
            }
        )
        write_parquet(folder / "log.parquet", table)
        return cls(path=str(folder / "log.parquet"))

    @property
    def default_event(self) -> str:
        return "purchase"

    def read(self) -> Iterator[pa.Table]:
        lines = self._lines()
        numbered = lines.append_column("line_number", pa.array(np.arange(len(lines))))
        first = lines.group_by("invoice").aggregate([(schema.TIMESTAMP, "min")])
        joined = numbered.select(["invoice", "line_number"]).join(first, "invoice").sort_by("line_number")
        yield pa.table(
            {
                schema.USER_ID: lines[schema.USER_ID],
                schema.ITEM_ID: lines[schema.ITEM_ID],
                schema.TIMESTAMP: joined[f"{schema.TIMESTAMP}_min"],
                schema.VALUE: lines[schema.VALUE],
                REJECTED: _reasons(lines),
            }
        )

    def items(self) -> pa.Table:
        lines = self._lines()
        clean = lines.filter(pc.is_null(_reasons(lines)))
        skip = pc.ScalarAggregateOptions(skip_nulls=True)
        items = clean.group_by(schema.ITEM_ID, use_threads=False).aggregate(
            [("title", "first", skip), ("price", "first")]
        )
        return pa.table(
            {
                schema.ITEM_ID: items[schema.ITEM_ID],
                "title": pc.utf8_trim_whitespace(items["title_first"]),
                "price": items["price_first"],
            }
        )

    def fingerprint(self) -> str:
        return files_fingerprint(self, [existing(self.path)])

    def num_rows(self) -> int:
        return pq.read_metadata(existing(self.path)).num_rows

    def _lines(self) -> pa.Table:
        path = existing(self.path)
        check_columns(pq.read_schema(path).names, _MAPPING, ["Country"], path)
        table = pq.read_table(path, columns=list(_MAPPING.values())).select(list(_MAPPING.values()))
        return table.rename_columns(list(_MAPPING))


def _reasons(lines: pa.Table) -> Any:
    """string: why a line is no sale to a known customer, the first reason that holds; null where it is one."""
    reasons = {
        "missing user_id": pc.is_null(lines[schema.USER_ID]),
        "cancelled invoice": pc.starts_with(lines["invoice"], "C"),
        "quantity is not above zero": pc.less_equal(lines[schema.VALUE], 0),
        "price is not above zero": pc.less_equal(lines["price"], 0),
    }
    return reduce(
        lambda rest, pair: pc.if_else(pc.fill_null(pair[1], False), pair[0], rest),
        reversed(reasons.items()),
        pa.chunked_array([pa.nulls(len(lines), pa.string())]),
    )
