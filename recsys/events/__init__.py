"""Events and what follows from them: the log, idempotent and durable, and each user's state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recsys.config import union
from recsys.events.base import AppendResult, Event, EventLog, EventStore, EventStoreConfig, UserState
from recsys.events.exported import ExportedLogConfig
from recsys.events.redis import RedisEventStoreConfig
from recsys.events.sqlite import SqliteEventStoreConfig

KINDS = (SqliteEventStoreConfig, RedisEventStoreConfig)

if TYPE_CHECKING:
    AnyEventStore = EventStoreConfig
    AnyEventLog = EventStoreConfig | ExportedLogConfig
else:
    AnyEventStore = union("events", KINDS)
    AnyEventLog = union("events", (*KINDS, ExportedLogConfig))

__all__ = [
    "KINDS",
    "AnyEventLog",
    "AnyEventStore",
    "AppendResult",
    "Event",
    "EventLog",
    "EventStore",
    "EventStoreConfig",
    "ExportedLogConfig",
    "RedisEventStoreConfig",
    "SqliteEventStoreConfig",
    "UserState",
]
