"""Arrow's compute functions, which a type checker does not know as they are made on import, and columns as arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys.types import Int32Array


class _Compute:
    """``pyarrow.compute``, imported on first use: it makes some 300 functions, and many programs call none."""

    def __getattr__(self, name: str) -> Any:
        import pyarrow.compute

        function = getattr(pyarrow.compute, name)
        setattr(self, name, function)
        return function


pc: Any = _Compute()


def one_chunk(column: pa.ChunkedArray) -> Any:
    """The column as one array, without a copy where it is one."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


class Texts:
    """A column of strings, read a few rows at a time: a tenth of what Arrow's ``take`` costs for ten rows.

    Nothing is copied but the texts that are asked for, so a memory-mapped column stays shared.
    """

    def __init__(self, column: pa.StringArray) -> None:
        """``column`` holds no null."""
        assert not column.null_count, "a column of texts has a null"
        _, offsets, data = column.buffers()
        self._offsets: Int32Array = _NOTHING
        if offsets is not None:
            self._offsets = np.frombuffer(offsets, np.int32)[column.offset : column.offset + len(column) + 1]
        self._data = memoryview(data if data is not None else b"")

    def take(self, rows: NDArray[np.integer[Any]]) -> list[str]:
        """The texts at ``rows``.

        :raises IndexError: when a row is negative or beyond the column.
        """
        if len(rows) and np.minimum.reduce(rows) < 0:
            raise IndexError(f"row {rows.min()} of a column of texts")
        starts, stops = self._offsets[rows].tolist(), self._offsets[rows + 1].tolist()
        return [str(self._data[start:stop], "utf-8") for start, stop in zip(starts, stops, strict=True)]


_NOTHING: Int32Array = np.zeros(1, np.int32)
