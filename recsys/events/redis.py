"""The event store in Redis, for gateways on several machines.

A batch is one Lua script, which Redis runs alone and writes to its append-only file as one transaction: all of it is
kept, or nothing. Redis answers once that file is synced (``appendfsync always``); what it is set to is checked when the
store is opened. A crash may cut the last transaction. With ``aof-load-truncated yes`` Redis leaves what it has of that
transaction open in the file, and the next start loses the batch that was written behind it: the setting is refused, and
``redis-check-aof --fix`` before each start removes what was cut.

One instance, not Redis Cluster: a batch concerns many users. A replica that is promoted may lack the last of what was
acknowledged, since Redis replicates after it has answered.

Keys below ``prefix``: ``log`` is a stream with every event, ``ids`` tells which are in it, ``user:ID`` holds the newest
events of a user by time, ``last:ID`` the position of the last one, ``history:GENERATION:ID`` what a Bundle brought.
"""

from __future__ import annotations

import os
import re
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from recsys import schema
from recsys.errors import EventStoreError, NotInstalledError
from recsys.events.base import (
    RESTORED_GAP,
    AppendResult,
    Event,
    EventStore,
    EventStoreConfig,
    UserState,
    check_events,
    check_restored,
    check_seed,
    events_of,
    log_table,
    position_in,
)
from recsys.events.state import GENERATION_BITS, POSITION_MASK, SEPARATOR, history_rows, merged, remembered, seeded
from recsys.libraries import library

VARIABLE = "RECSYS_REDIS_PASSWORD"
"""environment variable with the server's password"""
SAMPLE_URL = "RECSYS_SAMPLE_REDIS_URL"
"""environment variable with the URL of a server that contract tests may fill"""
FORMAT = "1"
_ADVICE = {
    "appendfsync": " (or fsync: everysec in the event store's settings)",
    "aof-load-truncated": ", and run `redis-check-aof --fix` on its append-only file before each start",
}
_LOG_ROWS = 10_000
_RESTORED_ROWS = 1000
_SEED_USERS = 512
_LOCK_MS = 60_000
_SCRIPTS = {
    "append": """
local p, max_history, ttl_s = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local log_position = tonumber(redis.call('HGET', p .. 'seed', 'log_position') or '0')
local accepted = 0
for i = 4, #ARGV do
  local fields = {}
  for field in (ARGV[i] .. '\\0'):gmatch('(.-)%z') do fields[#fields + 1] = field end
  if redis.call('HEXISTS', p .. 'ids', fields[1]) == 0 then
    accepted = accepted + 1
    local position = tonumber(fields[11]) or redis.call('INCR', p .. 'position')
    redis.call('XADD', p .. 'log', position .. '-0', 'e', ARGV[i])
    redis.call('HSET', p .. 'ids', fields[1], position)
    if fields[10] == '1' then
      local user, last = p .. 'user:' .. fields[2], p .. 'last:' .. fields[2]
      local entry = string.format('%016.0f', position) .. '\\0' .. fields[3] .. '\\0' .. fields[4] .. '\\0' .. fields[6]
      redis.call('ZADD', user, fields[5], entry)
      if redis.call('ZCARD', user) > 2 * max_history then
        for _, old in ipairs(redis.call('ZRANGE', user, 0, -1)) do
          if tonumber(old:sub(1, 16)) <= log_position then redis.call('ZREM', user, old) end
        end
        redis.call('ZREMRANGEBYRANK', user, 0, -max_history - 1)
      end
      redis.call('SET', last, position)
      if ttl_s > 0 then
        redis.call('EXPIRE', user, ttl_s)
        redis.call('EXPIRE', last, ttl_s)
      end
    end
  end
end
return accepted
""",
    "user": """
local p, user = ARGV[1], ARGV[2]
local seed = redis.call('HMGET', p .. 'seed', 'generation', 'log_position')
local last = redis.call('GET', p .. 'last:' .. user) or '0'
local generation = seed[1] or '0'
if generation == ARGV[3] and last == ARGV[4] then return {generation, last} end
local history = redis.call('HMGET', p .. 'history:' .. generation .. ':' .. user, 'i', 't', 'e', 'v')
local entries = redis.call('ZRANGE', p .. 'user:' .. user, 0, -1, 'WITHSCORES')
return {generation, last, seed[2] or '0', history, entries}
""",
    "seed": """
local p = ARGV[1]
if redis.call('GET', p .. 'seeding') ~= ARGV[5] then return redis.error_reply('the right to seed was lost') end
redis.call('SADD', p .. 'seeded', ARGV[2])
redis.call('HSET', p .. 'seed', 'bundle_id', ARGV[2], 'generation', ARGV[3], 'log_position', ARGV[4])
return 1
""",
    "renew": """
if redis.call('GET', ARGV[1] .. 'seeding') ~= ARGV[2] then return redis.error_reply('the right to seed was lost') end
return redis.call('PEXPIRE', ARGV[1] .. 'seeding', ARGV[3])
""",
    "unlock": """
if redis.call('GET', ARGV[1] .. 'seeding') == ARGV[2] then redis.call('DEL', ARGV[1] .. 'seeding') end
""",
}


class RedisEventStoreConfig(EventStoreConfig):
    """A Redis server, for any number of machines."""

    kind: Literal["redis"] = "redis"
    url: str = Field(
        default="redis://127.0.0.1:6379/0",
        description=f"redis:// or rediss:// (TLS), with a user where there is one; the password is in {VARIABLE}",
    )
    prefix: str = Field(
        default="recsys:", min_length=1, max_length=64, pattern=r"^[\w.:-]+$", description="begins every key"
    )
    fsync: Literal["always", "everysec"] = Field(
        default="always",
        description="least that the server must do before an event is acknowledged: always, on disk; everysec, a crash "
        "of the machine loses the last second",
    )
    timeout_s: float = Field(
        default=5.0, gt=0, le=600, description="longest wait for an answer (seconds); it is asked for twice"
    )

    @field_validator("url")
    @classmethod
    def _no_password(cls, url: str) -> str:
        parts = urlsplit(url)
        _ = parts.port  # refuses one that is no number
        if parts.scheme not in {"redis", "rediss", "unix"}:
            raise ValueError("begin it with redis://, rediss:// or unix://")
        if parts.password is not None or "password" in parse_qs(parts.query):
            raise ValueError(f"a configuration is no place for a password: put it into {VARIABLE}")
        return url

    @classmethod
    def sample(cls, folder: Path) -> Self:
        if SAMPLE_URL not in os.environ:
            raise NotInstalledError(f"no Redis for tests: {SAMPLE_URL} names none, and redis-server is not installed")
        prefix = re.sub(r"\W", "-", "-".join(folder.parts[-2:])[-60:])
        # A batch that times out is sent again and then has no event that is new: wait, however busy the machine is.
        return cls(url=os.environ[SAMPLE_URL], prefix=f"{prefix}:", timeout_s=60)

    def open(self) -> RedisEventStore:
        return RedisEventStore(self)


class RedisEventStore(EventStore):
    """See the module; made by :meth:`RedisEventStoreConfig.open`."""

    is_remote = True

    def __init__(self, config: RedisEventStoreConfig) -> None:
        redis = library("redis", f"the kind {config.kind}", extra="redis")
        self.config = config
        self._p = config.prefix
        self.log_only = config.log_only
        self._states: OrderedDict[str, UserState] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False
        self._failure = redis.RedisError
        with self._errors("cannot be opened"):
            self._redis: Any = redis.Redis.from_url(
                config.url,
                password=os.environ.get(VARIABLE),
                socket_timeout=config.timeout_s,
                socket_connect_timeout=config.timeout_s,
                # A command that was sent and not answered may have been carried out. Sending it again is harmless.
                retry=redis.retry.Retry(redis.backoff.NoBackoff(), 1),
            )
        self._scripts = {name: self._redis.register_script(text) for name, text in _SCRIPTS.items()}
        with self._errors("cannot be opened"):
            self._check_server()
            self._redis.setnx(self._p + "log_id", uuid.uuid4().hex)
            self._redis.setnx(self._p + "format", FORMAT)
            self._log_id = self._redis.get(self._p + "log_id").decode()
            found = self._redis.get(self._p + "format").decode()
        if found != FORMAT:
            raise EventStoreError(f"{self._where} has format {found}, this version reads {FORMAT}")

    def append(self, events: Sequence[Event]) -> AppendResult:
        check_events(events)
        if not events:
            return AppendResult(0, 0)
        rows = [_packed(event, in_state=event.event not in self.log_only) for event in events]
        with self._errors("did not keep the events"):
            accepted = self._scripts["append"](args=[self._p, self.config.max_history, self._ttl_s, *rows])
        return AppendResult(int(accepted), len(events) - int(accepted))

    def user(self, user_id: str) -> UserState | None:
        """See :meth:`EventStore.user`; none of somebody whose newest interaction is older than ``ttl_days``."""
        return remembered(self._user(user_id), self.config.ttl_days)

    def _user(self, user_id: str) -> UserState | None:
        cached = self._states.get(user_id)
        generation, last = (-1, -1) if cached is None else divmod(cached.version, 1 << GENERATION_BITS)
        with self._errors("cannot be read"):
            answer = self._scripts["user"](args=[self._p, user_id, generation, last])
        if len(answer) == 2:
            return cached
        generation, last, log_position = map(int, answer[:3])
        items, times, names, values = answer[3]
        entries: list[tuple[Any, ...]] = []
        for member, score in zip(answer[4][::2], answer[4][1::2], strict=True):
            position, item_id, event, value = member.decode().split(SEPARATOR)
            if int(position) > log_position:
                entries.append((int(position), item_id, int(float(score)), event, float(value) if value else None))
        if items is None and not entries:
            return None
        history = None if items is None else (items.decode(), times, names.decode(), values)
        version = generation << GENERATION_BITS | (last & POSITION_MASK)
        state = merged(seeded(user_id, history), entries, version, self.config.max_history)
        with self._lock:
            self._states[user_id] = state
            self._states.move_to_end(user_id)
            if len(self._states) > self.config.cached_users:
                self._states.popitem(last=False)
        return state

    def seed(self, bundle_id: str, histories: pa.Table, watermark: str | None = None) -> bool:
        log_id, _, position = (watermark or "").rpartition(":")
        log_position = int(position) if log_id == self._log_id else 0
        with self._errors("cannot be seeded"), self._seeding() as token:
            if self._redis.sismember(self._p + "seeded", bundle_id):
                return False
            compacted = int(self._redis.get(self._p + "compacted") or 0)
            check_seed(bundle_id, watermark, log_position, compacted, self._end())
            generation = int(self._redis.incr(self._p + "generation"))
            for batch in histories.to_batches(_SEED_USERS):
                pipeline = self._redis.pipeline(transaction=False)
                for user_id, items, times, names, values in history_rows(batch, self.config.max_history):
                    key = f"{self._p}history:{generation}:{user_id}"
                    if not user_id:
                        raise self._not_once(bundle_id)
                    pipeline.hsetnx(key, "i", items)
                    pipeline.hset(key, mapping={"t": times, "e": names, "v": values})
                if not all(pipeline.execute()[::2]):
                    raise self._not_once(bundle_id)
                self._scripts["renew"](args=[self._p, token, _LOCK_MS])
            self._scripts["seed"](args=[self._p, bundle_id, generation, log_position, token])
            self._drop_histories(generation)
        return True

    def watermark(self) -> str:
        with self._errors("cannot be read"):
            return f"{self._log_id}:{self._end()}"

    def log(self, after: str | None = None) -> Iterator[pa.Table]:
        with self._errors("cannot be read"):
            position = position_in(after, self._log_id, self.compacted(), self._end())
            while rows := self._entries(position):
                if after is not None:  # somebody may be compacting
                    position_in(f"{self._log_id}:{position}", self._log_id, self.compacted(), rows[-1][0])
                position = rows[-1][0]
                yield log_table([row[:-1] for row in rows])

    def compacted(self) -> int:
        with self._errors("cannot be read"):
            return int(self._redis.get(self._p + "compacted") or 0)

    def _end(self) -> int:
        return int(self._redis.get(self._p + "position") or 0)

    def compact(self, before_ms: int) -> int:
        removed, position = 0, 0
        with self._errors("cannot be compacted"):
            until = int(self._redis.hget(self._p + "seed", "log_position") or 0)
            while rows := self._entries(position, until):
                position = rows[-1][0]
                old = [row for row in rows if row[5] < before_ms]
                if not old:
                    continue
                pipeline = self._redis.pipeline()
                pipeline.set(self._p + "compacted", max(old[-1][0], self.compacted()))
                pipeline.xdel(self._p + "log", *(f"{row[0]}-0" for row in old))
                pipeline.hdel(self._p + "ids", *(row[1] for row in old))
                pipeline.execute()
                removed += len(old)
        return removed

    def restore(self, watermark: str, tables: Iterable[pa.Table], compacted: int = 0) -> int:
        log_id, _, last = watermark.rpartition(":")
        number = 0
        with self._errors("cannot be restored"):
            if self._redis.exists(self._p + "position", self._p + "seed", self._p + "log"):
                raise EventStoreError(f"{self._where} is not empty: restore under another prefix")
            # Set first: what a restore leaves that fails is no empty store any more.
            self._redis.set(self._p + "position", int(last) + RESTORED_GAP)
            for table in tables:
                positions = table["position"].to_pylist()
                check_restored(positions, int(last), watermark)
                for start in range(0, len(table), _RESTORED_ROWS):
                    rows = [
                        f"{_packed(event, in_state=event.event not in self.log_only)}{SEPARATOR}{position}"
                        for position, event in zip(
                            positions[start : start + _RESTORED_ROWS],
                            events_of(table.slice(start, _RESTORED_ROWS)),
                            strict=True,
                        )
                    ]
                    number += self._scripts["append"](args=[self._p, self.config.max_history, self._ttl_s, *rows])
            self._redis.mset({self._p + "compacted": compacted, self._p + "log_id": log_id})
        self._log_id = log_id
        return number

    def _entries(self, after: int, until: int | None = None) -> list[tuple[Any, ...]]:
        """(position, event_id, user_id, item_id, event, timestamp_ms, value, request_id, slate_position, surface,
        whether it is part of a state) of up to ten thousand events.
        """
        end = "+" if until is None else f"{until}-0"
        return [_unpacked(*row) for row in self._redis.xrange(self._p + "log", f"({after}-0", end, count=_LOG_ROWS)]

    @property
    def _ttl_s(self) -> int:
        return round(self.config.ttl_days * schema.DAY_MS / 1000)

    def close(self) -> None:
        self._closed = True
        self._redis.close()

    def _check_server(self) -> None:
        """Refuse a server that may lose or forget what it acknowledged."""
        wanted = {"appendonly": {"yes"}, "no-appendfsync-on-rewrite": {"no"}, "maxmemory-policy": {"noeviction"}}
        wanted["aof-load-truncated"] = {"no"}
        wanted["appendfsync"] = {"always"} if self.config.fsync == "always" else {"always", "everysec"}
        found = self._redis.config_get(*wanted)
        for name, values in wanted.items():
            if found.get(name) not in values:
                advice = _ADVICE.get(name, "")
                raise EventStoreError(
                    f"{self._where} has {name} {found.get(name)}, which may lose events: set it to "
                    f"{' or '.join(sorted(values))}{advice}"
                )

    @contextmanager
    def _seeding(self) -> Generator[str, None, None]:
        """One at a time, whichever machine it is on."""
        token = uuid.uuid4().hex
        while not self._redis.set(self._p + "seeding", token, nx=True, px=_LOCK_MS):
            time.sleep(0.05)
        try:
            yield token
        finally:
            self._scripts["unlock"](args=[self._p, token])

    def _drop_histories(self, kept: int) -> None:
        """Remove histories of generations before ``kept``; whoever seeds after us writes a later one."""
        begin = len(f"{self._p}history:")
        doomed: list[bytes] = []
        for key in self._redis.scan_iter(match=f"{self._p}history:*", count=1000):
            if int(key[begin:].split(b":", 1)[0]) < kept:
                doomed.append(key)
            if len(doomed) >= _SEED_USERS:
                self._redis.unlink(*doomed)
                doomed.clear()
        if doomed:
            self._redis.unlink(*doomed)

    @staticmethod
    def _not_once(bundle_id: str) -> EventStoreError:
        return EventStoreError(
            f"the histories of Bundle {bundle_id} name a user twice or not at all", bundle_id=bundle_id
        )

    @property
    def _where(self) -> str:
        address = self._redis.connection_pool.connection_kwargs
        return f"the event store in Redis at {address.get('host', 'a socket')}:{address.get('port', '')}"

    @contextmanager
    def _errors(self, what: str) -> Generator[None, None, None]:
        if self._closed:
            raise EventStoreError(f"{self._where} is closed")
        try:
            yield
        except (self._failure, OSError) as error:
            raise EventStoreError(f"{self._where} {what}: {error}") from error


def _packed(event: Event, *, in_state: bool) -> str:
    """Its fields with NUL between them; no text holds one."""
    value = "" if event.value is None else repr(float(np.float32(event.value)))
    place = "" if event.slate_position is None else str(event.slate_position)
    fields = (event.event_id, event.user_id, event.item_id, event.event, str(event.timestamp_ms), value)
    rest = (event.request_id or "", place, event.surface or "", "1" if in_state else "0")
    return SEPARATOR.join((*fields, *rest))


def _unpacked(entry_id: bytes, fields: dict[bytes, bytes]) -> tuple[Any, ...]:
    """An entry of the stream, see :meth:`RedisEventStore._entries`."""
    parts = fields[b"e"].decode().split(SEPARATOR)
    event_id, user_id, item_id, event, time_ms, value, request_id, place, surface, in_state = parts[:10]
    about = float(value) if value else None, request_id or None, int(place) if place else None, surface or None
    return (int(entry_id.split(b"-")[0]), event_id, user_id, item_id, event, int(time_ms), *about, in_state == "1")
