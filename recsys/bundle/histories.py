"""What users did, as a Bundle carries it to seed an event store."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from recsys import schema
from recsys.arrow import pc
from recsys.data.dataset import Dataset, Split

HISTORIES_SCHEMA = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_ids", pa.list_(pa.string()), nullable=False),
        pa.field("timestamps_ms", pa.list_(pa.int64()), nullable=False),
        pa.field("events", pa.list_(pa.string()), nullable=False),
        pa.field("values", pa.list_(pa.float32()), nullable=False),
    ]
)
"""``histories.parquet``: one row per user, lists aligned and oldest first; time 0 and value NaN where there is none."""


def histories_table(dataset: Dataset, max_history: int) -> pa.Table:
    """Per user of ``dataset`` the newest ``max_history`` interactions: :data:`HISTORIES_SCHEMA`."""
    view = dataset.log.histories(Split.TEST).last(max_history)
    rows = np.repeat(view.stops - np.cumsum(view.lengths), view.lengths) + np.arange(view.lengths.sum())
    table = dataset.interactions.take(pa.array(rows))
    offsets = pa.array(np.concatenate([[0], np.cumsum(view.lengths)]).astype(np.int32))

    def lists(values: pa.ChunkedArray | pa.Array) -> pa.ListArray:
        values = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
        return pa.ListArray.from_arrays(offsets, values)

    columns = [
        dataset.users[schema.USER_ID].combine_chunks(),
        lists(dataset.items[schema.ITEM_ID].take(table[schema.ITEM_IDX])),
        lists(pc.fill_null(table[schema.TIMESTAMP].cast(pa.int64()), 0)),
        lists(table[schema.EVENT].cast(pa.string())),
        lists(pc.fill_null(table[schema.VALUE], float("nan"))),
    ]
    return pa.table(
        [column.cast(field.type) for column, field in zip(columns, HISTORIES_SCHEMA, strict=True)],
        schema=HISTORIES_SCHEMA,
    )
