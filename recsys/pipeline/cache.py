"""What was computed a moment ago: a bounded memory that forgets what was not used for longest."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


class Cache(Generic[KeyT, ValueT]):
    """Values by key, each with the version it was made from: another version is a miss. For several threads."""

    def __init__(self, max_entries: int) -> None:
        """``max_entries`` 0 remembers nothing."""
        self._max_entries = max_entries
        self._entries: OrderedDict[KeyT, tuple[object, ValueT]] = OrderedDict()
        self._lock = threading.Lock()
        self.num_hits = 0
        """look-ups that found something, since the start"""
        self.num_misses = 0
        """look-ups that found nothing, since the start"""

    def get(self, key: KeyT, version: object = None) -> ValueT | None:
        """What was put for ``key`` and ``version``, or None."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None or entry[0] != version:
                self.num_misses += 1
                return None
            self._entries.move_to_end(key)
            self.num_hits += 1
            return entry[1]

    def put(self, key: KeyT, value: ValueT, version: object = None) -> None:
        """Remember ``value`` in place of what ``key`` had."""
        with self._lock:
            self._entries[key] = version, value
            self._entries.move_to_end(key)
            while len(self._entries) > self._max_entries:
                self._entries.popitem(last=False)

    def __len__(self) -> int:
        return len(self._entries)
