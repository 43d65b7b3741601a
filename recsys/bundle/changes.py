"""What was changed in the catalogue since Bundles were published: a log of items beside the Bundles of a store.

::

    items/00000001.arrow       the items that one call put or removed
    items/00000064.all.arrow   every 64th: all items that were ever changed, as they are after it

A version is the number of a file. Writing the next number succeeds for one writer only, so the log has no gaps, and
whoever reads the same version sees the same items in the same order, on any machine.
"""

from __future__ import annotations

import re
import uuid
from contextlib import suppress

import numpy as np
import pyarrow as pa

from recsys import schema
from recsys.arrow import pc
from recsys.bundle.location import Location
from recsys.errors import BundleCorruptError, BundleError

ITEM_CHANGES = pa.schema(
    [
        *schema.ITEMS,
        pa.field("removed", pa.bool_(), nullable=False),
        pa.field("text_vector", pa.list_(pa.float32())),
        pa.field("encoder", pa.string()),
    ]
)
"""``ITEMS`` as they are now. ``removed`` items are shown no more; ``text_vector`` is the unit vector of the text as the
encoder with the fingerprint ``encoder`` makes it, both null where there was none."""

FOLD_EVERY = 64
KEPT_VERSIONS = 1024
"""so many versions can still be read, at least: somebody may be about to open one"""
_NAME = re.compile(r"(\d{8})(\.all)?\.arrow")


class ItemLog:
    """Changes of items in a store of Bundles. Holds no state of its own: make as many as you like."""

    def __init__(self, root: Location) -> None:
        """``root`` is the folder of the log; it need not exist."""
        self._root = root

    def version(self) -> int:
        """The last version; 0 where nothing was ever changed."""
        return max(self._files(), default=0)

    def append(self, changes: pa.Table) -> int:
        """Add ``changes`` (:data:`ITEM_CHANGES`, no item twice), durable before it returns. The version that has them.

        :raises BundleError: when it cannot be written, or other writers are quicker again and again.
        """
        for _ in range(100):
            number = self.version() + 1
            fold = number % FOLD_EVERY == 0
            table = last_word(pa.concat_tables([self.read(number - 1), changes])) if fold else changes
            name = f"{number:08d}.all.arrow" if fold else f"{number:08d}.arrow"
            if self._create(number, name, table):
                if fold:
                    self._forget(number - KEPT_VERSIONS)
                return number
        raise BundleError(f"{self._root}: other writers were quicker a hundred times")

    def read(self, version: int | None = None) -> pa.Table:
        """All changed items as they are at ``version`` (None: now): one row each, in the order of their first change.

        :raises BundleCorruptError: when a file is missing or cannot be read.
        """
        files = self._files()
        version = max(files, default=0) if version is None else version
        if version == 0:
            return ITEM_CHANGES.empty_table()
        folds = [number for number, name in files.items() if number <= version and ".all." in name]
        first = max(folds, default=1)
        missing = [number for number in range(first, version + 1) if number not in files]
        if missing:
            raise BundleCorruptError(f"{self._root}: the changes of version {missing[0]} are missing")
        return last_word(pa.concat_tables([self._table(files[number]) for number in range(first, version + 1)]))

    def _files(self) -> dict[int, str]:
        found = [match for name in self._root.names() if (match := _NAME.fullmatch(name))]
        return {int(match[1]): match[0] for match in found}

    def _table(self, name: str) -> pa.Table:
        try:
            with pa.ipc.open_file((self._root / name).read()) as file:
                return file.read_all().cast(ITEM_CHANGES)
        except (pa.ArrowInvalid, FileNotFoundError) as error:
            raise BundleCorruptError(f"{self._root / name}: not readable: {error}") from error

    def _create(self, number: int, name: str, table: pa.Table) -> bool:
        # What is written must differ from what anybody else writes, see Location.create.
        table = table.replace_schema_metadata({"token": uuid.uuid4().hex, "version": str(number)})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        try:
            return (self._root / name).create(sink.getvalue().to_pybytes())
        except OSError as error:
            raise BundleError(f"{self._root / name} cannot be written: {error}") from error

    def _forget(self, before: int) -> None:
        """Remove what a fold contains."""
        for number, name in self._files().items():
            if number < before:
                with suppress(FileNotFoundError):  # another writer does the same
                    (self._root / name).remove()


def last_word(changes: pa.Table) -> pa.Table:
    """One row per item, the last one, in the order in which the items came first."""
    if not len(changes):
        return changes
    codes = pc.dictionary_encode(changes[schema.ITEM_ID].combine_chunks()).indices.to_numpy()
    rows = np.zeros(int(codes.max()) + 1, np.int64)
    rows[codes] = np.arange(len(codes))  # the last of those with one code stays
    return changes.take(pa.array(rows)).combine_chunks()
