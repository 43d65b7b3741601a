"""A Bundle's histories and the events that came after them, as one dataset.

``TRAIN`` is what the Bundle has learned, ``VALID`` the older of the new events, ``TEST`` the newest slice of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from recsys import schema
from recsys.arrow import pc
from recsys.bundle.reader import Bundle
from recsys.data.dataset import Dataset, DatasetInfo, Split
from recsys.data.id_map import IdMap
from recsys.files import fingerprint
from recsys.types import BoolArray, Int32Array, Int64Array


@dataclass(frozen=True)
class GrownLog:
    """What :func:`grow` found."""

    dataset: Dataset
    late: BoolArray
    """bool [R], of the rows of ``dataset.interactions``: new, and yet ``TRAIN``, as they lie among what was there"""
    unknown: pa.Table
    """interactions with items that no catalogue knows: user_id, item_id, timestamp_ms, event, value"""
    num_new: int
    """new events that are in the dataset"""
    num_unknown_items: int
    """new events whose item no catalogue knows: nothing can be learned of them, and histories keep them"""
    num_new_users: int


def grow(bundle: Bundle, events: pa.Table, *, log_only: tuple[str, ...], judge_share: float, protocol: str) -> GrownLog:
    """The dataset of ``bundle`` (with the changes of its catalogue) and ``events`` (:data:`recsys.schema.EVENT_LOG`).

    ``judge_share`` of the new positives, by time, are ``TEST``. A late event that lies among what the Bundle has is
    ``TRAIN``: it is learned like the others, and judges nothing. Data whose histories have no times is ordered by the
    times of the events and has none itself. Impressions and the like (``log_only``) are no interactions.
    """
    events = events.filter(pc.invert(pc.is_in(events[schema.EVENT], pa.array(log_only, pa.string()))))
    histories = bundle.histories()
    lengths = pc.list_value_length(histories["item_ids"]).to_numpy(zero_copy_only=False)
    old = {name: pc.list_flatten(histories[name]) for name in ("item_ids", "timestamps_ms", "events", "values")}
    known = histories["user_id"].to_pylist()
    row_of = {user_id: row for row, user_id in enumerate(known)}
    for user_id in events[schema.USER_ID].to_pylist():
        row_of.setdefault(user_id, len(row_of))
    new_users = np.array([row_of[user_id] for user_id in events[schema.USER_ID].to_pylist()], np.int64)
    user = np.concatenate([np.repeat(np.arange(len(known)), lengths), new_users])
    item = _rows(bundle.catalogue().id_map, pa.chunked_array([*_chunks(old["item_ids"]), *_chunks(events["item_id"])]))
    new_times = events[schema.TIMESTAMP].cast(pa.int64()).to_numpy()
    old_times = old["timestamps_ms"].to_numpy(zero_copy_only=False)
    time_ms = np.concatenate([old_times, new_times])
    event = pa.chunked_array([*_chunks(old["events"]), *_chunks(events[schema.EVENT])], pa.string())
    values = [*_chunks(old["values"].cast(pa.float32())), *_chunks(events[schema.VALUE].cast(pa.float32()))]
    value = pc.if_else(pc.is_nan(column := pa.chunked_array(values, pa.float32())), None, column)
    is_new = np.arange(len(user)) >= len(old_times)

    unknown = item < 0
    ids = pa.chunked_array([*_chunks(old["item_ids"]), *_chunks(events["item_id"])], pa.string())
    user_ids = np.array(list(row_of), object)
    left_out = np.flatnonzero(unknown)
    nobody_knows = pa.table(
        {
            "user_id": pa.array(user_ids[user[left_out]], pa.string()),
            "item_id": ids.take(pa.array(left_out)),
            "timestamp_ms": time_ms[left_out],
            "event": event.take(pa.array(left_out)),
            "value": value.take(pa.array(left_out)),
        }
    )
    order = np.lexsort((np.arange(len(user)), time_ms, user))
    order = order[~unknown[order]]
    user, item, time_ms, is_new = user[order], item[order], time_ms[order], is_new[order]
    event, value = event.take(pa.array(order)), value.take(pa.array(order))
    weight = bundle.positive_policy.weights(event, value)
    split = _splits(user, time_ms, is_new, weight > 0, judge_share)
    first = np.searchsorted(user, user)
    has_time = bool(old_times.any()) or not len(old_times)
    columns: dict[str, Any] = {
        schema.USER_IDX: user.astype(np.int32),
        schema.ITEM_IDX: item,
        schema.TIMESTAMP: pa.array(time_ms, pa.int64(), mask=np.full(len(user), not has_time)),
        schema.POSITION: np.arange(len(user)) - first,
        schema.EVENT: event,
        schema.VALUE: value,
        schema.WEIGHT: weight,
        schema.SPLIT: split,
    }
    names = schema.PREPARED_INTERACTIONS.names
    interactions = pa.table([columns[name] for name in names], names=names).cast(schema.PREPARED_INTERACTIONS)
    users = pa.table({schema.USER_ID: pa.array(list(row_of), pa.string())})
    items = bundle.catalogue().table()
    last = events["position"][-1].as_py() if len(events) else 0
    counts = np.bincount(split, minlength=len(Split))
    info = DatasetInfo(
        name="online",
        fingerprint=fingerprint([bundle.manifest.dataset_fingerprint, bundle.bundle_id, last, len(events)]),
        id_map_fingerprint=bundle.catalogue().id_map_fingerprint,
        has_time=has_time,
        protocol="next_basket" if protocol == "next_basket" and has_time else "rolling_next_item",
        num_users=len(users),
        num_items=len(items),
        num_interactions=len(interactions),
        num_positives=int((weight > 0).sum()),
        num_quarantined=int(unknown.sum()),
        counts_by_split={each.name.lower(): int(counts[each]) for each in Split},
    )
    num_unknown = int(unknown[len(old_times) :].sum())
    late = is_new & (split == Split.TRAIN)
    num_new, num_new_users = int(is_new.sum()), len(users) - len(known)
    return GrownLog(Dataset(interactions, items, users, info), late, nobody_knows, num_new, num_unknown, num_new_users)


def with_unknown(histories: pa.Table, unknown: pa.Table, max_history: int) -> pa.Table:
    """``histories`` (``HISTORIES_SCHEMA``) with the interactions of ``unknown`` in their places: who comes to know an
    item later, knows what was done with it.
    """
    if not len(unknown):
        return histories
    rows = {user_id: row for row, user_id in enumerate(histories["user_id"].to_pylist())}
    of_user: dict[str, list[tuple[int, str, str, float]]] = {}
    for each in unknown.to_pylist():
        value = float("nan") if each["value"] is None else each["value"]
        told = (each["timestamp_ms"], each["item_id"], each["event"], value)
        of_user.setdefault(each["user_id"], []).append(told)
    touched = sorted((rows[user_id], user_id) for user_id in of_user if user_id in rows)
    changed: list[dict[str, Any]] = []
    for row, user_id in touched:
        (one,) = histories.slice(row, 1).to_pylist()
        columns = (one["timestamps_ms"], one["item_ids"], one["events"], one["values"])
        whole = sorted([*zip(*columns, strict=True), *of_user[user_id]], key=lambda entry: entry[0])[-max_history:]
        times, items, events, values = (list(column) for column in zip(*whole, strict=True))
        changed.append(
            {"user_id": user_id, "item_ids": items, "timestamps_ms": times, "events": events, "values": values}
        )
    kept = np.ones(len(histories), np.bool_)
    kept[[row for row, _ in touched]] = False
    return pa.concat_tables([histories.filter(pa.array(kept)), pa.Table.from_pylist(changed, schema=histories.schema)])


def _splits(
    user: Int64Array,
    time_ms: Int64Array,
    is_new: BoolArray,
    positive: BoolArray,
    judge_share: float,
) -> NDArray[np.int8]:
    split = np.zeros(len(user), np.int8)
    times = np.sort(time_ms[is_new & positive])
    if not len(times):
        return split
    border = times[min(len(times) - 1, int(len(times) * (1 - judge_share)))]
    last_old = np.full(int(user.max()) + 1, -1)
    old_rows = np.flatnonzero(~is_new)
    last_old[user[old_rows]] = old_rows  # ascending, so the last one stays
    in_place = is_new & (np.arange(len(user)) > last_old[user])
    split[in_place] = np.where(time_ms[in_place] < border, Split.VALID, Split.TEST)
    return split


def _rows(id_map: IdMap, ids: pa.ChunkedArray) -> Int32Array:
    """The row of each id, -1 for unknown ones; every different id is looked up once."""
    encoded = ids.combine_chunks().dictionary_encode()
    rows = id_map.rows(encoded.dictionary.to_pylist())
    return np.append(rows, np.int32(-1))[encoded.indices.to_numpy(zero_copy_only=False)]


def _chunks(column: pa.Array | pa.ChunkedArray) -> list[pa.Array]:
    return column.chunks if isinstance(column, pa.ChunkedArray) else [column]
