"""String ids to rows and back, without a Python object per id: two arrays that can be memory-mapped and shared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys.arrow import Texts, one_chunk, pc
from recsys.errors import SchemaError
from recsys.types import Int32Array

_HASH_ROWS = 1 << 18
"""rows hashed at once when the map is built, which bounds the memory it takes"""

TABLE = pa.schema([pa.field("hash", pa.uint64(), nullable=False), pa.field("row", pa.int32(), nullable=False)])


class IdMap:
    """N distinct ids. A 64-bit hash finds the row and the string confirms it, so a collision costs time, not truth."""

    def __init__(self, ids: pa.StringArray, table: pa.Table) -> None:
        """``ids`` in order of their rows; ``table`` as :meth:`build` made it (hashes ascending, and their rows)."""
        self.ids = ids
        self.table = table
        self._bytes = ids.cast(pa.binary())
        self._texts = Texts(ids)
        self._hash: NDArray[np.uint64] = table["hash"].to_numpy()
        self._row: Int32Array = table["row"].to_numpy()

    @classmethod
    def build(cls, ids: pa.StringArray | pa.ChunkedArray) -> IdMap:
        """Hash and sort ``ids``.

        :raises SchemaError: when an id is null or there twice; it names the rows.
        """
        flat = _flat(ids)
        if flat.null_count:
            row = int(np.argmax(flat.is_null().to_numpy(zero_copy_only=False)))
            raise SchemaError(f"row {row}: the id is null", row=row)
        raw = flat.cast(pa.binary())
        parts = [_hashes(raw.slice(start, _HASH_ROWS).to_pylist()) for start in range(0, len(raw), _HASH_ROWS)]
        hashes = np.concatenate(parts) if parts else np.zeros(0, np.uint64)
        order = np.argsort(hashes, kind="stable").astype(np.int32)
        table = pa.table({"hash": hashes[order], "row": order}, schema=TABLE)
        id_map = cls(flat, table)
        id_map._refuse_duplicates()
        return id_map

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, ids: Sequence[str]) -> Int32Array:
        """int32 [n]: the row of each id, -1 where it is unknown."""
        found = np.full(len(ids), -1, np.int32)
        if not len(ids) or not len(self):
            return found
        encoded = _encode(ids)
        hashes = _hashes(encoded)
        wanted = pa.array(encoded, pa.binary())
        at = np.searchsorted(self._hash, hashes)
        pending = np.arange(len(ids))
        while len(pending):
            place = at[pending]
            there = place < len(self._hash)
            there[there] = self._hash[place[there]] == hashes[pending[there]]
            pending = pending[there]
            if not len(pending):
                break
            rows = self._row[at[pending]]
            asked = wanted if len(pending) == len(wanted) else wanted.take(pa.array(pending))
            same = pc.equal(self._bytes.take(pa.array(rows)), asked).to_numpy(zero_copy_only=False)
            found[pending[same]] = rows[same]
            pending = pending[~same]
            at[pending] += 1
        return found

    def take(self, rows: Int32Array) -> list[str]:
        """The ids at ``rows``."""
        return self._texts.take(rows)

    def fingerprint(self) -> str:
        """See :func:`fingerprint_ids`."""
        return fingerprint_ids(self.ids)

    def _refuse_duplicates(self) -> None:
        equal = np.flatnonzero(self._hash[1:] == self._hash[:-1])
        if not len(equal):
            return
        suspects = np.unique(np.concatenate([self._row[equal], self._row[equal + 1]]))
        seen: dict[str, int] = {}
        for row, text in zip(suspects.tolist(), self.take(suspects), strict=True):
            if text in seen:
                raise SchemaError(f"rows {seen[text]} and {row} have the same id {text!r}", rows=[seen[text], row])
            seen[text] = row


def fingerprint_ids(ids: pa.StringArray | pa.ChunkedArray) -> str:
    """SHA-256 (hex) over the ids in order of their rows: the lengths of all in bytes (int64, little-endian), then all
    their bytes. Two maps have the same fingerprint only where every id has the same row.
    """
    raw = _flat(ids)
    digest = hashlib.sha256(pc.binary_length(raw).to_numpy().astype("<i8").tobytes())
    for start in range(0, len(raw), _HASH_ROWS):
        digest.update("".join(raw.slice(start, _HASH_ROWS).to_pylist()).encode())
    return digest.hexdigest()


def _flat(ids: pa.Array | pa.ChunkedArray) -> pa.StringArray:
    return (one_chunk(ids) if isinstance(ids, pa.ChunkedArray) else ids).cast(pa.string())


def _encode(ids: Sequence[str]) -> list[bytes]:
    # An unpaired surrogate cannot be stored as text; encoded like this it is simply not found.
    return [text.encode("utf-8", "surrogatepass") for text in ids]


def _hashes(ids: Iterable[bytes]) -> NDArray[np.uint64]:
    """uint64 [n], the same on every machine."""
    return np.frombuffer(b"".join([blake2b(raw, digest_size=8).digest() for raw in ids]), "<u8")
