"""The item table while serving: ids, titles, and which items a request may be shown at all.

Everything that grows with the number of items is an Arrow file that is memory-mapped, so the processes of one machine
share it, or a numpy array made from one; no Python object exists per item. N items, G categories.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from recsys import schema
from recsys.arrow import Texts, one_chunk, pc
from recsys.data.id_map import IdMap
from recsys.errors import BundleMismatchError, SchemaError
from recsys.files import map_arrow, write_arrow
from recsys.types import BoolArray, Filters, FloatArray, Int32Array, Int64Array

ITEMS_FILE, IDS_FILE, CATEGORIES_FILE = "items.arrow", "ids.arrow", "categories.arrow"
_CATEGORIES = pa.schema(
    [pa.field("category", pa.string(), nullable=False), pa.field("item_idx", pa.list_(pa.int32()), nullable=False)]
)
_MASK_CACHE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Mask:
    """The items that pass availability and the filters of a request. Shared: never written to."""

    allowed: BoolArray
    """bool [N]"""
    count: int
    """how many are allowed"""


class Catalogue:
    """Items in order of ``item_idx``. Safe to use from several threads."""

    def __init__(self, items: pa.Table, id_map: IdMap, categories: pa.Table) -> None:
        """Use :meth:`build` or :meth:`load`."""
        self.items = items
        self.id_map = id_map
        self._titles = Texts(one_chunk(items["title"]))
        self._available: BoolArray = items["available"].to_numpy(zero_copy_only=False)
        self._categories = categories
        postings = one_chunk(categories["item_idx"])
        self._posting_items: Int32Array = postings.values.to_numpy()
        self._posting_offsets: Int32Array = postings.offsets.to_numpy()
        self.category_names: tuple[str, ...] = tuple(categories["category"].to_pylist())
        self._category_code = {name: code for code, name in enumerate(self.category_names)}
        self.matching = lru_cache(maxsize=mask_cache_size(len(self)))(self._matching)

    @classmethod
    def build(cls, items: pa.Table) -> Catalogue:
        """A catalogue of ``items`` (the ``ITEMS`` columns; row = ``item_idx``).

        :raises SchemaError: when columns or types are wrong, or an ``item_id`` is null or there twice.
        """
        try:
            items = items.select(schema.ITEMS.names).cast(schema.ITEMS).combine_chunks()
        except (KeyError, ValueError, pa.ArrowInvalid) as error:
            raise SchemaError(f"the item table does not have the columns of ITEMS: {error}") from error
        for field in schema.ITEMS:
            if not field.nullable and items[field.name].null_count:
                raise SchemaError(f"the item table has nulls in its column {field.name!r}", column=field.name)
        return cls(items, IdMap.build(items[schema.ITEM_ID]), _postings(items["categories"]))

    def save(self, folder: str | Path) -> None:
        """Write three Arrow IPC files: the items, the id map, and the items of each category."""
        folder = Path(folder)
        write_arrow(folder / ITEMS_FILE, self.items)
        write_arrow(folder / IDS_FILE, self.id_map.table)
        write_arrow(folder / CATEGORIES_FILE, self._categories)

    @classmethod
    def load(cls, folder: str | Path) -> Catalogue:
        """Memory-map what :meth:`save` wrote."""
        folder = Path(folder)
        items, ids, categories = (map_arrow(folder / name) for name in (ITEMS_FILE, IDS_FILE, CATEGORIES_FILE))
        if len(items) != len(ids):
            raise BundleMismatchError(
                f"{folder}: {ITEMS_FILE} has {len(items)} rows, {IDS_FILE} {len(ids)}", path=str(folder)
            )
        return cls(items, IdMap(one_chunk(items[schema.ITEM_ID]), ids), categories)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def num_items(self) -> int:
        return len(self.items)

    @cached_property
    def id_map_fingerprint(self) -> str:
        """SHA-256 (hex) over the item ids in order of ``item_idx``: models and index must agree on it."""
        return self.id_map.fingerprint()

    # Look-ups

    def table(self) -> pa.Table:
        """All items as they are now (``ITEMS``)."""
        return self.items

    def item(self, item_idx: int) -> dict[str, Any]:
        """The whole row of one item, as plain values."""
        return self.items.slice(item_idx, 1).to_pylist()[0]

    def is_removed(self, item_idx: int) -> bool:
        """Whether an item is here for the sake of histories only."""
        return False

    def titles(self, item_idx: Int32Array) -> list[str]:
        """The titles of some items."""
        return self._titles.take(item_idx)

    @cached_property
    def creator_codes(self) -> Int32Array:
        """int32 [N]: equal numbers for equal creators, -1 where there is none."""
        codes = one_chunk(self.items["creator"]).dictionary_encode().indices
        return pc.fill_null(codes, -1).to_numpy(zero_copy_only=False)

    @cached_property
    def price(self) -> FloatArray:
        """float32 [N], NaN where an item has none."""
        return self.items["price"].to_numpy(zero_copy_only=False).astype(np.float32, copy=False)

    def in_category(self, category: str) -> Int32Array:
        """int32, ascending: the items of a category; none for an unknown one."""
        code = self._category_code.get(category)
        if code is None:
            return np.zeros(0, np.int32)
        return self._posting_items[self._posting_offsets[code] : self._posting_offsets[code + 1]]

    def category_rows(self, item_idx: Int32Array) -> FloatArray:
        """float32 [n, G']: the categories of n items as rows of unit length (or zero), over those that occur."""
        offsets, codes = self._categories_by_item
        starts = offsets[item_idx]
        lengths = offsets[item_idx + 1] - starts
        ends = np.cumsum(lengths)
        flat = codes[np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)]
        occurring, columns = np.unique(flat, return_inverse=True)
        rows = np.zeros((len(item_idx), len(occurring)), np.float32)
        rows[np.repeat(np.arange(len(item_idx)), lengths), columns] = 1.0
        norms = np.sqrt(rows.sum(axis=1, keepdims=True))
        return rows / np.maximum(norms, 1.0)

    def unit_vectors(self, item_idx: Int32Array, item_embeddings: FloatArray | None) -> FloatArray:
        """float32 [n, D]: rows whose inner products say how alike items are, 1 for the same (or zero rows).

        By ``item_embeddings`` (float32 [N, D] of any length), or by their categories where there are none.
        """
        if item_embeddings is None:
            return self.category_rows(item_idx)
        vectors = item_embeddings[item_idx]
        norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))[:, None]
        return vectors / np.maximum(norms, np.float32(1e-12))

    def postings(self) -> tuple[tuple[str, ...], Int32Array, Int32Array]:
        """Names of the G categories, and for each membership the item and the number of its category, both int32."""
        codes = np.repeat(np.arange(len(self.category_names), dtype=np.int32), np.diff(self._posting_offsets))
        return self.category_names, self._posting_items, codes

    def num_categories(self, item_idx: Int32Array) -> Int64Array:
        """int64 [n]: how many categories each item has."""
        offsets = self._categories_by_item[0]
        return offsets[item_idx + 1] - offsets[item_idx]

    @cached_property
    def _categories_by_item(self) -> tuple[Int64Array, Int32Array]:
        order = np.argsort(self._posting_items, kind="stable")
        codes = self.postings()[2][order]
        offsets = np.zeros(len(self) + 1, np.int64)
        np.cumsum(np.bincount(self._posting_items, minlength=len(self)), out=offsets[1:])
        return offsets, codes

    # Hard rules

    def allowed(self, filters: Filters, excluded_item_idx: Int32Array) -> BoolArray:
        """bool [N], the caller's own: available, passing ``filters``, and not excluded."""
        mask = self.matching(filters).allowed.copy()
        mask[excluded_item_idx] = False
        return mask

    def _matching(self, filters: Filters) -> Mask:
        mask = self._available.copy()
        if filters.categories_any:
            mask &= self._in_categories(filters.categories_any)
        if filters.categories_none:
            mask &= ~self._in_categories(filters.categories_none)
        if filters.price_min is not None:
            mask &= self.price >= np.float32(filters.price_min)
        if filters.price_max is not None:
            mask &= self.price <= np.float32(filters.price_max)
        mask.flags.writeable = False
        return Mask(mask, int(np.count_nonzero(mask)))

    def _in_categories(self, categories: tuple[str, ...]) -> BoolArray:
        mask = np.zeros(len(self), np.bool_)
        for category in categories:
            mask[self.in_category(category)] = True
        return mask

    def violations(
        self, item_idx: Int32Array, filters: Filters, excluded_item_idx: Int32Array
    ) -> list[tuple[str, BoolArray]]:
        """Reasons why some of ``item_idx`` may not be shown, and for each a bool [n] of those it concerns.

        An item is listed under its first reason only; no reasons mean that all may be shown.
        """
        bad = ~self.matching(filters).allowed[item_idx]
        excluded = contains(excluded_item_idx, item_idx)
        if not bad.any() and not excluded.any():
            return []
        any_of, none_of = (
            self._in_categories(categories)[item_idx]
            for categories in (filters.categories_any, filters.categories_none)
        )
        reasons = {
            "unavailable": ~self._available[item_idx],
            "excluded": excluded,
            "category": bad & (none_of | (~any_of if filters.categories_any else False)),
            "price": bad,
        }
        left = np.ones(len(item_idx), np.bool_)
        found: list[tuple[str, BoolArray]] = []
        for reason, concerned in reasons.items():
            concerned = concerned & left
            if concerned.any():
                found.append((reason, concerned))
                left &= ~concerned
        return found


def mask_cache_size(num_items: int) -> int:
    """How many masks of so many items are remembered."""
    return min(1024, max(4, _MASK_CACHE_BYTES // max(1, num_items)))


def contains(items: Int32Array, item_idx: Int32Array) -> BoolArray:
    """bool [n]: which of ``item_idx`` are among ``items`` (any order); much faster than ``np.isin`` on short arrays."""
    if not len(items):
        return np.zeros(len(item_idx), np.bool_)
    ascending = np.sort(items)
    at = np.searchsorted(ascending, item_idx)
    at[at == len(ascending)] = 0
    return ascending[at] == item_idx


def _postings(column: pa.ChunkedArray) -> pa.Table:
    """One row per category: the items that have it, ascending."""
    lists = one_chunk(column)
    items = np.repeat(np.arange(len(lists), dtype=np.int32), pc.list_value_length(lists).to_numpy(zero_copy_only=False))
    encoded = lists.flatten().drop_null().dictionary_encode()
    if len(encoded) != len(items):
        raise SchemaError("the item table has an item with a null among its categories")
    codes = encoded.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    offsets = np.searchsorted(codes[order], np.arange(len(encoded.dictionary) + 1)).astype(np.int32)
    lists_by_category = pa.ListArray.from_arrays(pa.array(offsets), pa.array(items[order]))
    return pa.table([encoded.dictionary, lists_by_category], schema=_CATEGORIES)
