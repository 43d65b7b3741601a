"""A guard against learning from the future: whatever is made of a log must come out the same when its future changes.

What models, features, pairs and negatives are made of is made twice, from the log and from a copy whose interactions
after the cut are others. Where the two differ, the future was read. The cut itself is checked by
:mod:`recsys.data.splits`, evaluation queries by :func:`recsys.evaluation.protocol.check_no_leak`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys import schema
from recsys.data.dataset import Dataset, Split
from recsys.errors import LeakageError

MadeT = TypeVar("MadeT")
_SHIFT_MS = 12_345_678


def another_future(dataset: Dataset, until: Split, seed: int = 0) -> Dataset:
    """``dataset`` with other items, values and times in the splits after ``until``; users and order stay."""
    table, rng = dataset.interactions, np.random.default_rng(seed)
    later = table[schema.SPLIT].to_numpy() > until
    number = int(later.sum())
    items = table[schema.ITEM_IDX].to_numpy().copy()
    items[later] = (items[later] + rng.integers(1, max(2, dataset.num_items), number)) % dataset.num_items
    columns: dict[str, Any] = {schema.ITEM_IDX: items}
    values = table[schema.VALUE].to_numpy(zero_copy_only=False).astype(np.float64)
    columns[schema.VALUE] = np.where(later, rng.permutation(values), values)
    if dataset.info.has_time:
        times = table[schema.TIMESTAMP].cast(pa.int64()).to_numpy()
        columns[schema.TIMESTAMP] = np.where(later, times + _SHIFT_MS, times)
    for name, column in columns.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, table.schema.field(name), pa.array(column).cast(table.schema.field(name).type))
    return replace(dataset, interactions=table)


def check_blind(
    what: str,
    make: Callable[[Dataset], MadeT],
    dataset: Dataset,
    until: Split,
    read: Callable[[MadeT], Mapping[str, NDArray[Any]]] | None = None,
) -> MadeT:
    """``make(dataset)``, once it is shown not to depend on the interactions after ``until``.

    Args:
        what: names what is made, for the error.
        make: must be deterministic.
        read: the arrays to compare; None compares every array of a dataclass.

    :raises LeakageError: naming the first array that came out different.
    """
    read = read or _arrays
    made = make(dataset)
    ours, theirs = read(made), read(make(another_future(dataset, until)))
    for name, array in ours.items():
        other = theirs[name]
        if array.shape != other.shape or not np.array_equal(array, other, equal_nan=array.dtype.kind == "f"):
            raise LeakageError(f"{what}: {name} depends on interactions after {until.name.lower()}", part=name)
    return made


def _arrays(made: Any) -> dict[str, NDArray[Any]]:
    assert is_dataclass(made), f"say what to read of a {type(made).__name__}"
    found = {field.name: getattr(made, field.name) for field in fields(made)}
    return {name: value for name, value in found.items() if isinstance(value, np.ndarray)}
