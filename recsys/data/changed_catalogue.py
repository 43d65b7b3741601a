"""A catalogue with changes on top: new items after its own, other values for some, and some that are gone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys import schema
from recsys.arrow import pc
from recsys.data.catalogue import Catalogue, mask_cache_size
from recsys.data.id_map import IdMap, fingerprint_ids
from recsys.types import FloatArray, Int32Array


class ChangedIds(IdMap):
    """The ids of a map, and more after them."""

    def __init__(self, base: IdMap, more: Sequence[str]) -> None:
        """None of ``more`` is in ``base``."""
        self._base = base
        self._more = list(more)
        self._row_of = {item_id: len(base) + row for row, item_id in enumerate(more)}

    def __len__(self) -> int:
        return len(self._base) + len(self._more)

    @property
    def ids(self) -> pa.StringArray:  # type: ignore[override]
        """All of them, copied."""
        return pa.concat_arrays([self._base.ids, pa.array(self._more, pa.string())])

    def rows(self, ids: Sequence[str]) -> Int32Array:
        """See :meth:`IdMap.rows`."""
        rows = self._base.rows(ids)
        for place in np.flatnonzero(rows < 0).tolist():
            rows[place] = self._row_of.get(ids[place], -1)
        return rows

    def take(self, rows: Int32Array) -> list[str]:
        """See :meth:`IdMap.take`."""
        return _taken(rows, len(self._base), self._base.take, self._more)

    def fingerprint(self) -> str:
        """See :meth:`IdMap.fingerprint`."""
        return fingerprint_ids(self.ids)


class ChangedCatalogue(Catalogue):
    """What a catalogue has, by the same rows, and the changes. Costs a copy of what is one number per item."""

    def __init__(self, base: Catalogue, changes: pa.Table) -> None:
        """``changes``: one row per item (:data:`~recsys.bundle.changes.ITEM_CHANGES`)."""
        self.base = base
        self._changes = changes
        rows = base.id_map.rows(changes[schema.ITEM_ID].to_pylist())
        fresh = np.flatnonzero(rows < 0)
        rows[fresh] = len(base) + np.arange(len(fresh))
        self.changed_item_idx: Int32Array = rows
        """int32 [C]: the item of each row of the changes; those of new items follow on the base, in their order"""
        self._change_of = {int(row): place for place, row in enumerate(rows.tolist())}
        new_items = changes.select(schema.ITEMS.names).take(pa.array(fresh))
        self.items = pa.concat_tables([base.items, new_items])
        self.id_map = ChangedIds(base.id_map, new_items[schema.ITEM_ID].to_pylist())
        self._new_titles: list[str] = new_items["title"].to_pylist()
        removed = changes["removed"].to_numpy(zero_copy_only=False)
        shown = changes["available"].to_numpy(zero_copy_only=False) & ~removed
        self._available = self._patched(base._available, shown)
        self.removed_item_idx: Int32Array = rows[removed]
        self._merge_postings(base, changes["categories"])
        self.matching = lru_cache(maxsize=mask_cache_size(len(self)))(self._matching)

    def _patched(self, values: NDArray[Any], changed: NDArray[Any]) -> NDArray[Any]:
        """``values`` of the base with those of the changes in their places."""
        patched = np.empty(len(self.items), values.dtype)
        patched[: len(values)] = values
        patched[self.changed_item_idx] = changed
        return patched

    def _merge_postings(self, base: Catalogue, categories: pa.ChunkedArray) -> None:
        names, items, codes = base.postings()
        stays = ~np.isin(items, self.changed_item_idx)
        lists: list[list[str]] = categories.to_pylist()
        code_of = {name: code for code, name in enumerate(names)}
        added = [
            (row, code_of.setdefault(name, len(code_of)))
            for row, own in zip(self.changed_item_idx.tolist(), lists, strict=True)
            for name in dict.fromkeys(own)
        ]
        more = np.array(added, np.int32).reshape(-1, 2)
        items, codes = np.concatenate([items[stays], more[:, 0]]), np.concatenate([codes[stays], more[:, 1]])
        order = np.lexsort((items, codes))
        self._posting_items = items[order]
        self._posting_offsets = np.searchsorted(codes[order], np.arange(len(code_of) + 1)).astype(np.int32)
        self.category_names = tuple(code_of)
        self._category_code = code_of

    def table(self) -> pa.Table:
        """See :meth:`Catalogue.table`; what was removed is there, and not available."""
        names = schema.ITEMS.names
        whole = pa.concat_tables([self.items, self._changes.select(names)]).combine_chunks()
        rows = np.arange(len(self))
        rows[self.changed_item_idx] = len(self) + np.arange(len(self._changes))
        table = whole.take(pa.array(rows))
        available = pa.array(self._available)
        return table.set_column(names.index("available"), schema.ITEMS.field("available"), available)

    def item(self, item_idx: int) -> dict[str, Any]:
        """See :meth:`Catalogue.item`."""
        place = self._change_of.get(item_idx)
        if place is None:
            return super().item(item_idx)
        return self._changes.select(schema.ITEMS.names).slice(place, 1).to_pylist()[0]

    def is_removed(self, item_idx: int) -> bool:
        """Whether it was taken out of the catalogue."""
        return item_idx in self.removed_item_idx

    def titles(self, item_idx: Int32Array) -> list[str]:
        """See :meth:`Catalogue.titles`."""
        titles = _taken(item_idx, len(self.base), self.base.titles, self._new_titles)
        for place, row in enumerate(item_idx.tolist()):
            if row in self._change_of:
                titles[place] = self._changed_titles[self._change_of[row]]
        return titles

    @cached_property
    def _changed_titles(self) -> list[str]:
        return self._changes["title"].to_pylist()

    @cached_property
    def creator_codes(self) -> Int32Array:
        """See :meth:`Catalogue.creator_codes`."""
        old = pc.unique(self.base.items["creator"]).drop_null()
        names: dict[str, int] = {}
        codes = [
            -1 if name is None else names.setdefault(name, len(names)) for name in self._changes["creator"].to_pylist()
        ]
        known = pc.index_in(pa.array(list(names), pa.string()), old).fill_null(-1).to_numpy(zero_copy_only=False)
        code_of = np.append(np.where(known >= 0, known, len(old) + np.arange(len(names))), -1).astype(np.int32)
        return self._patched(self.base.creator_codes, code_of[np.array(codes, np.int64)])

    @cached_property
    def price(self) -> FloatArray:
        """See :meth:`Catalogue.price`."""
        return self._patched(self.base.price, self._changes["price"].to_numpy(zero_copy_only=False))


def _taken(rows: Int32Array, num_base: int, take: Any, more: list[str]) -> list[str]:
    """Texts of ``rows``: from ``take`` those below ``num_base``, from ``more`` the others."""
    if not len(rows) or rows.max() < num_base:
        return take(rows)
    own = rows < num_base
    texts: list[str] = [""] * len(rows)
    for place, text in zip(np.flatnonzero(own).tolist(), take(rows[own]), strict=True):
        texts[place] = text
    for place in np.flatnonzero(~own).tolist():
        texts[place] = more[int(rows[place]) - num_base]
    return texts
