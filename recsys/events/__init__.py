"""Events and what follows from them: the log, idempotent and durable, and each user's state. A kind is a file."""

from __future__ import annotations

from typing import Annotated

from recsys.events.base import (
    AppendResult,
    Event,
    EventLog,
    EventLogConfig,
    EventStore,
    EventStoreConfig,
    UserState,
)
from recsys.kinds import Kinds

KINDS: Kinds[EventStoreConfig] = Kinds(
    "events",
    {
        "sqlite": "recsys.events.sqlite:SqliteEventStoreConfig",
        "redis": "recsys.events.redis:RedisEventStoreConfig",
    },
)
LOG_KINDS: Kinds[EventLogConfig] = Kinds(
    "event_logs", {"parquet": "recsys.events.exported:ExportedLogConfig"}, beside=KINDS
)
"""whatever has a log: the stores, and what was exported of one"""
AnyEventStore = Annotated[EventStoreConfig, KINDS]
AnyEventLog = Annotated[EventLogConfig, LOG_KINDS]

__all__ = [
    "KINDS",
    "LOG_KINDS",
    "AnyEventLog",
    "AnyEventStore",
    "AppendResult",
    "Event",
    "EventLog",
    "EventLogConfig",
    "EventStore",
    "EventStoreConfig",
    "UserState",
]
