"""Who a user is to the models: the event store's state, or the Bundle's histories, as item numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import pyarrow as pa

from recsys.data.catalogue import Catalogue
from recsys.data.dataset import Targets
from recsys.data.id_map import IdMap
from recsys.data.positives import PositivePolicy
from recsys.events import UserState
from recsys.pipeline.cache import Cache
from recsys.pipeline.config import PipelineConfig
from recsys.schema import DAY_MS
from recsys.types import NO_FILTERS, NO_HISTORY, BoolArray, Filters, History, Int32Array, Int64Array, Query


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

    history: History
    """the newest ``max_history`` positives"""
    seen_item_idx: Int32Array
    """int32 [S], ascending: every known item of the state, positive or not"""
    seen_ms: Int64Array
    """int64 [S], when each was met last"""
    hidden_item_idx: Int32Array
    """int32, ascending: items the user wants no more of"""

    @classmethod
    def resolve(
        cls,
        item_idx: Int32Array,
        timestamp_ms: Int64Array,
        is_positive: BoolArray,
        is_negative: BoolArray,
        max_history: int,
    ) -> Self:
        """Of interactions in order of time (aligned); those with ``item_idx`` -1 are left out."""
        known = item_idx >= 0
        newest = np.flatnonzero(known & is_positive)[-max_history:]
        seen, last = np.unique(item_idx[known][::-1], return_index=True)
        judged = known & (is_positive | is_negative)
        verdicts, latest = np.unique(item_idx[judged][::-1], return_index=True)
        return cls(
            History(item_idx[newest], timestamp_ms[newest]),
            seen,
            timestamp_ms[known][::-1][last],
            verdicts[is_negative[judged][::-1][latest]],
        )

    def excluded(self, now_ms: int, repeat_after_days: float | None) -> Int32Array:
        """int32: hidden items, and those met less than so many days ago (None: ever)."""
        if repeat_after_days is None:
            return self.seen_item_idx  # hidden ones were met, too
        if repeat_after_days == 0:
            return self.hidden_item_idx
        # An order without times does not say how long ago something was.
        recent = (now_ms - self.seen_ms < repeat_after_days * DAY_MS) | (self.seen_ms == 0)
        return np.union1d(self.seen_item_idx[recent], self.hidden_item_idx)

    @classmethod
    def of_target(cls, targets: Targets, row: int, max_history: int, hides: BoolArray | None) -> Self:
        """Of query ``row``, as it was just before its target; ``hides`` (bool [R]) marks the rows of the log that say
        that their user wants no more of an item, None for none.
        """
        seen = targets.seen.history(row)
        latest, last = np.unique(seen.item_idx[::-1], return_index=True)
        hidden = NO_HISTORY.item_idx
        if hides is not None:
            rows = slice(int(targets.seen.starts[row]), int(targets.seen.stops[row]))
            hidden = latest[hides[rows][::-1][last]]
        history = targets.histories.history(row).last(max_history)
        return cls(history, latest, seen.timestamp_ms[::-1][last], hidden)


_NONE = np.zeros(0, bool)
NOBODY = Profile.resolve(np.zeros(0, np.int32), np.zeros(0, np.int64), _NONE, _NONE, 1)


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
        weights, negative = self._policy.judge(
            pa.array(state.events, pa.string()), pa.array(state.values, pa.float32())
        )
        return Profile.resolve(rows, state.timestamps_ms, weights > 0, negative, self._max_history)


def query_of(
    profile: Profile,
    told: Profile = NOBODY,
    *,
    config: PipelineConfig,
    request_id: str,
    bundle_id: str,
    now_ms: int,
    top_k: int,
    exclude_seen: bool = True,
    left_out: Int32Array | None = None,
    filters: Filters = NO_FILTERS,
    diversity: float | None = None,
) -> Query:
    """The query of a user with ``profile``, after which ``told`` happened: the same for a request and for a question of
    an evaluation.

    Without ``exclude_seen`` what the user met may come again, but for what is hidden; ``left_out`` (int32) may not.
    """
    repeat_after_days = config.repeat_after_days if exclude_seen else 0
    excluded = profile.excluded(now_ms, repeat_after_days)
    history = profile.history
    if told is not NOBODY:
        history = history.then(told.history).last(config.max_history)
        if repeat_after_days == 0:  # what they take now, they do not hide any more
            excluded = np.setdiff1d(excluded, told.history.item_idx)
        excluded = np.concatenate([excluded, told.excluded(now_ms, repeat_after_days)])
    if left_out is not None:
        excluded = np.concatenate([excluded, left_out])
    return Query(
        request_id=request_id,
        bundle_id=bundle_id,
        now_ms=now_ms,
        history=history,
        excluded_item_idx=excluded,
        top_k=top_k,
        num_candidates=max(config.num_candidates, top_k),
        filters=filters,
        diversity=diversity,
    )
