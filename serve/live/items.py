"""Changes of the catalogue: what callers put and remove goes into the item log of the store of Bundles."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any

import pyarrow as pa

from recsys.arrow import pc
from recsys.bundle import Bundle
from recsys.bundle.changes import ITEM_CHANGES, ItemLog
from recsys.errors import RequestError
from serve.live.service import Service
from serve.live.turns import Turns


class ItemChanges:
    """Encodes and writes in ``executor``, one call after another: an encoder takes what cores there are."""

    def __init__(self, service: Service, executor: Executor) -> None:
        self._service = service
        self._turns = Turns("changes of items wait", "items", executor)

    async def put(self, items: Sequence[dict[str, Any]]) -> int:
        """Add items (rows as of :data:`~recsys.bundle.changes.ITEM_CHANGES`), or replace what is known of them; durable
        when it returns. The version that has them.

        :raises RequestError: when an item is named twice.
        :raises StageOverloadedError: when too many wait already.
        """
        first: dict[str, int] = {}
        for row, item_id in enumerate(item["item_id"] for item in items):
            if first.setdefault(item_id, row) != row:
                raise RequestError(
                    f"items {first[item_id]} and {row} have the same item_id {item_id!r}",
                    field=f"items.{row}.item_id",
                )
        bundle = self._service.current.bundle

        def write() -> int:
            return self._log().append(changes_of(items, bundle))

        return await self._turns.run(write)

    async def remove(self, item_id: str) -> int | None:
        """Take an item out of the catalogue; the version without it, None where there is no such item."""
        knowing = self._service.knowing(item_id)

        def write() -> int | None:
            row = knowing.recommender.item(item_id)
            if row is None:  # it may have been put a moment ago
                changed = self._log().read()
                rows = changed.filter(pc.equal(changed["item_id"], item_id))
                found = rows.drop_columns(["text_vector"]).to_pylist()
                row = None if not found or found[0]["removed"] else found[0]
            if row is None:
                return None
            kept = {name: row[name] for name in ITEM_CHANGES.names if name in row}
            gone = kept | {"removed": True, "available": False, "text_vector": None, "encoder": None}
            return self._log().append(pa.Table.from_pylist([gone], schema=ITEM_CHANGES))

        return await self._turns.run(write)

    def _log(self) -> ItemLog:
        assert self._service.items is not None, "routes ask first"
        return self._service.items


def changes_of(items: Sequence[dict[str, Any]], bundle: Bundle) -> pa.Table:
    """Items as they come over HTTP as :data:`~recsys.bundle.changes.ITEM_CHANGES`, their texts encoded as ``bundle``
    does it.
    """
    rows = [item | {"removed": False, "text_vector": None, "encoder": None} for item in items]
    table = pa.Table.from_pylist(rows, schema=ITEM_CHANGES)
    if not bundle.knows_words:
        return table
    from recsys.models.text.encoder import item_texts

    words = bundle.words()
    vectors = pa.array(list(words.encode(item_texts(table, words.config))), ITEM_CHANGES.field("text_vector").type)
    table = table.set_column(table.column_names.index("text_vector"), ITEM_CHANGES.field("text_vector"), vectors)
    encoder = pa.array([bundle.encoder_id] * len(table), pa.string())
    return table.set_column(table.column_names.index("encoder"), ITEM_CHANGES.field("encoder"), encoder)
