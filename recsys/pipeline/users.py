"""Who a user is to the models: the event store's state, or the Bundle's histories, as item numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pyarrow as pa

from recsys.data.positives import PositivePolicy
from recsys.events import UserState
from recsys.pipeline.cache import Cache
from recsys.pipeline.catalogue import Catalogue
from recsys.pipeline.id_map import IdMap
from recsys.pipeline.types import Int32Array, Int64Array


class UserStates(Protocol):
    """Where states come from. Every :class:`~recsys.events.EventStore` is one."""

    is_remote: bool
    """whether a read waits for another machine, and so must not be made in an event loop"""

    def user(self, user_id: str) -> UserState | None:
        """The user's state, or None for a user nobody knows."""
        ...


class HistoriesTable:
    """The histories a Bundle was published with, read-only, without a Python object per user."""

    is_remote = False

    def __init__(self, histories: pa.Table) -> None:
        """``histories``: see :data:`recsys.bundle.HISTORIES_SCHEMA`."""
        self._table = histories.combine_chunks()
        self._id_map = IdMap.build(self._table["user_id"])

    def user(self, user_id: str) -> UserState | None:
        row = int(self._id_map.rows([user_id])[0])
        if row < 0:
            return None
        items, times, events, values = (
            self._table[name][row].values for name in ("item_ids", "timestamps_ms", "events", "values")
        )
        return UserState(
            user_id,
            0,
            tuple(items.to_pylist()),
            times.to_numpy(zero_copy_only=False),
            tuple(events.to_pylist()),
            values.to_numpy(zero_copy_only=False),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """A user as the models see one. Shared: never written to."""

    item_idx: Int32Array
    """int32 [L], positives, oldest first, the newest ``max_history``"""
    timestamp_ms: Int64Array
    """int64 [L]"""
    seen_item_idx: Int32Array
    """int32, ascending: every known item of the state, positive or not"""


NOBODY = Profile(np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int32))


class Profiles:
    """Profiles of states, remembered until the state has another version. Safe to use from several threads."""

    def __init__(self, catalogue: Catalogue, policy: PositivePolicy, *, max_history: int, cache_size: int) -> None:
        self._catalogue = catalogue
        self._policy = policy
        self._max_history = max_history
        self.cache: Cache[str, Profile] = Cache(cache_size)

    def of(self, state: UserState | None) -> Profile:
        """The profile of ``state``; items that the catalogue does not know are left out."""
        if state is None:
            return NOBODY
        profile = self.cache.get(state.user_id, state.version)
        if profile is None:
            profile = self._make(state)
            self.cache.put(state.user_id, profile, state.version)
        return profile

    def _make(self, state: UserState) -> Profile:
        rows = self._catalogue.id_map.rows(state.item_ids)
        weights = self._policy.weights(pa.array(state.events, pa.string()), pa.array(state.values, pa.float32()))
        known = rows >= 0
        newest = np.flatnonzero(known & (weights > 0))[-self._max_history :]
        return Profile(rows[newest], state.timestamps_ms[newest], np.unique(rows[known]))
