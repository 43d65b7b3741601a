"""Reading texts out of a column by hand gives what Arrow gives."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys.arrow import Texts


@given(st.lists(st.text(max_size=6), max_size=12), st.data())
def test_any_rows_of_any_slice(values: list[str], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(values)))
    column = pa.array(values, pa.string()).slice(start, data.draw(st.integers(0, len(values) - start)))
    rows = data.draw(st.lists(st.integers(0, len(column) - 1), max_size=20)) if len(column) else []
    assert Texts(column).take(np.array(rows, np.int32)) == [column[row].as_py() for row in rows]


@pytest.mark.parametrize("row", [-3, -1, 2])
def test_a_row_outside_the_column_is_an_error(row: int) -> None:
    with pytest.raises(IndexError):
        Texts(pa.array(["z", "a", "b", "c"]).slice(1, 2)).take(np.array([0, row], np.int32))
