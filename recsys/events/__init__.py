"""Events and what follows from them: the log, idempotent and durable, and each user's state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recsys.config import union
from recsys.events.base import AppendResult, Event, EventStore, EventStoreConfig, UserState
from recsys.events.redis import RedisEventStoreConfig
from recsys.events.sqlite import SqliteEventStoreConfig

KINDS = (SqliteEventStoreConfig, RedisEventStoreConfig)

if TYPE_CHECKING:
    AnyEventStore = EventStoreConfig
else:
    AnyEventStore = union("events", KINDS)

__all__ = [
    "KINDS",
    "AnyEventStore",
    "AppendResult",
    "Event",
    "EventStore",
    "EventStoreConfig",
    "RedisEventStoreConfig",
    "SqliteEventStoreConfig",
    "UserState",
]
