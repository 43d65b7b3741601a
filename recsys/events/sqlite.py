"""The embedded event store: one SQLite file, any number of processes of one machine, nothing to install.

Write-ahead logging lets readers go on while somebody writes. All appends of a process pass through one writer thread
that commits whatever has queued up meanwhile in one transaction, so that concurrent callers share one ``fsync``.
The log keeps every event until it is compacted; the current seed and the watermark decide which of them a user's state
adds.
"""

from __future__ import annotations

import platform
import queue
import sqlite3
import threading
import time
import uuid
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow as pa
from pydantic import Field

from recsys.errors import EventStoreError
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
from recsys.events.state import GENERATION_BITS, POSITION_MASK, history_rows, merged, remembered, seeded

FORMAT = 2
_COMMIT_EVENTS = 10_000
_LOG_ROWS = 10_000
_SEED_ROWS = 512
_SEED_PAUSE_S = 0.005
"""between the transactions of a seed, so that events are written meanwhile"""
_SEED_TIMEOUT_S = 3600.0

_TABLES = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE seeds (
    generation INTEGER PRIMARY KEY,
    bundle_id TEXT NOT NULL UNIQUE,
    log_position INTEGER NOT NULL
);
CREATE TABLE histories (
    generation INTEGER NOT NULL, user_id TEXT NOT NULL, item_ids TEXT NOT NULL, timestamps_ms BLOB NOT NULL,
    events TEXT NOT NULL, vals BLOB NOT NULL,
    PRIMARY KEY (generation, user_id)
);
CREATE TABLE events (
    position INTEGER PRIMARY KEY AUTOINCREMENT,
    event_id TEXT NOT NULL UNIQUE, user_id TEXT NOT NULL, item_id TEXT NOT NULL, event TEXT NOT NULL,
    timestamp_ms INTEGER NOT NULL, value REAL, request_id TEXT, slate_position INTEGER, surface TEXT,
    in_state INTEGER NOT NULL
);
CREATE INDEX events_by_time ON events (user_id, timestamp_ms, position) WHERE in_state = 1;
CREATE INDEX events_by_arrival ON events (user_id, position) WHERE in_state = 1;
"""
_INSERT_EVENT = """
INSERT INTO events
    (position, event_id, user_id, item_id, event, timestamp_ms, value, request_id, slate_position, surface, in_state)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (event_id) DO NOTHING
"""
_SELECT_SEED = "SELECT generation, log_position FROM seeds ORDER BY generation DESC LIMIT 1"
_SELECT_HISTORY = "SELECT item_ids, timestamps_ms, events, vals FROM histories WHERE generation = ? AND user_id = ?"
_DELETE_HISTORIES = """
DELETE FROM histories WHERE rowid IN (SELECT rowid FROM histories WHERE generation <> ? LIMIT ?)
"""
_SELECT_LOG = """
SELECT position, event_id, user_id, item_id, event, timestamp_ms, value, request_id, slate_position, surface
FROM events WHERE position > ? ORDER BY position LIMIT ?
"""
_SELECT_OLD = "SELECT position FROM events WHERE timestamp_ms < ? AND position <= ? ORDER BY position LIMIT ?"
_SELECT_END = "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'events'"
_SELECT_COMPACTED = "SELECT coalesce(max(CAST(value AS INTEGER)), 0) FROM meta WHERE key = 'compacted'"
_SELECT_LAST = """
SELECT max(position) FROM events INDEXED BY events_by_arrival WHERE in_state = 1 AND user_id = ?
"""
_SELECT_NEWEST = """
SELECT position, item_id, timestamp_ms, event, value FROM events INDEXED BY events_by_time
WHERE in_state = 1 AND user_id = ? AND position > ? ORDER BY timestamp_ms DESC, position DESC LIMIT ?
"""
_SELECT_ARRIVED = """
SELECT position, item_id, timestamp_ms, event, value FROM events INDEXED BY events_by_arrival
WHERE in_state = 1 AND user_id = ? AND position > ? ORDER BY position
"""


class SqliteEventStoreConfig(EventStoreConfig):
    """One file on a local disk, for all processes of one machine."""

    kind: Literal["sqlite"] = "sqlite"
    path: str = Field(
        default="runs/events.sqlite", min_length=1, description="file on a local disk; made if there is none"
    )
    busy_timeout_s: float = Field(
        default=30.0, gt=0, le=600, description="longest wait for another process that is writing (seconds, up to 600)"
    )
    take_over: bool = Field(
        default=False, description="claim a file that another machine made; only when no process there uses it any more"
    )

    @classmethod
    def sample(cls, folder: Path) -> Self:
        return cls(path=str(folder / "events.sqlite"))

    def open(self) -> SqliteEventStore:
        return SqliteEventStore(self)


@dataclass(frozen=True, slots=True)
class _Append:
    rows: list[tuple[Any, ...]]
    done: Future[AppendResult]


class SqliteEventStore(EventStore):
    """See the module; made by :meth:`SqliteEventStoreConfig.open`."""

    def __init__(self, config: SqliteEventStoreConfig) -> None:
        self.config = config
        self.path = Path(config.path).absolute()
        self.log_only = config.log_only
        self._states: dict[str, UserState] = {}
        self._readers: deque[sqlite3.Connection] = deque()
        self._lock = threading.Lock()
        self._queue: queue.SimpleQueue[_Append | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._closed = False
        with self._errors("cannot be opened"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = self._connect(create=True)
            try:
                self._log_id = self._prepare(connection)
                self._file = self._file_id()
            finally:
                connection.close()

    def append(self, events: Sequence[Event]) -> AppendResult:
        check_events(events)
        rows = [self._row(None, event) for event in events]
        request = _Append(rows, Future())
        with self._lock:
            self._refuse_closed()
            if self._writer is None:
                self._writer = threading.Thread(target=self._write, name="event-writer", daemon=True)
                self._writer.start()
            self._queue.put(request)
        return request.done.result()

    def user(self, user_id: str) -> UserState | None:
        """See :meth:`EventStore.user`; none of somebody whose newest interaction is older than ``ttl_days``."""
        return remembered(self._user(user_id), self.config.ttl_days)

    def _user(self, user_id: str) -> UserState | None:
        cached = self._states.get(user_id)
        with self._errors("cannot be read"), self._reader() as connection:
            connection.execute("BEGIN")  # all reads see the same state of the file
            try:
                generation, log_position = connection.execute(_SELECT_SEED).fetchone() or (0, 0)
                if cached is not None and cached.version >> GENERATION_BITS == generation:
                    last = cached.version & POSITION_MASK
                    rows = connection.execute(_SELECT_ARRIVED, (user_id, last)).fetchall()
                    if not rows:
                        return cached
                    state, last = cached, rows[-1][0]
                    rows.sort(key=itemgetter(2))
                else:
                    (last,) = connection.execute(_SELECT_LAST, (user_id,)).fetchone()
                    history = connection.execute(_SELECT_HISTORY, (generation, user_id)).fetchone()
                    if history is None and (last or 0) <= log_position:
                        return None
                    state = seeded(user_id, history)
                    limit = self.config.max_history
                    rows = connection.execute(_SELECT_NEWEST, (user_id, log_position, limit)).fetchall()[::-1]
            finally:
                connection.execute("COMMIT")
        state = merged(state, rows, generation << GENERATION_BITS | (last or 0), self.config.max_history)
        with self._lock:
            self._states.pop(user_id, None)
            self._states[user_id] = state
            if len(self._states) > self.config.cached_users:
                del self._states[next(iter(self._states))]
        return state

    def seed(self, bundle_id: str, histories: pa.Table, watermark: str | None = None) -> bool:
        log_id, _, position = (watermark or "").rpartition(":")
        log_position = int(position) if log_id == self._log_id else 0
        self._refuse_closed()
        with self._errors("cannot be seeded"), self._seeding() as connection:
            if connection.execute("SELECT 1 FROM seeds WHERE bundle_id = ?", (bundle_id,)).fetchone():
                return False
            (compacted,) = connection.execute(_SELECT_COMPACTED).fetchone()
            check_seed(bundle_id, watermark, log_position, compacted, self._end())
            (current,) = connection.execute("SELECT coalesce(max(generation), 0) FROM seeds").fetchone()
            self._drop_histories(connection, current)  # of a seed that came to no end
            generation = current + 1
            insert = "INSERT INTO histories VALUES (?, ?, ?, ?, ?, ?)"
            try:
                for batch in histories.to_batches(_SEED_ROWS):
                    rows = [(generation, *row) for row in history_rows(batch, self.config.max_history)]
                    with _transaction(connection):
                        connection.executemany(insert, rows)
                    time.sleep(_SEED_PAUSE_S)
                with _transaction(connection):
                    seed = (generation, bundle_id, log_position)
                    connection.execute("INSERT INTO seeds (generation, bundle_id, log_position) VALUES (?, ?, ?)", seed)
            except sqlite3.IntegrityError as error:
                raise EventStoreError(
                    f"the histories of Bundle {bundle_id} name a user twice or not at all: {error}", bundle_id=bundle_id
                ) from error
            self._drop_histories(connection, generation)
        return True

    @contextmanager
    def _seeding(self) -> Generator[sqlite3.Connection, None, None]:
        """One at a time, whichever process it is in: the lock is one on a file of its own, so that it keeps no event
        waiting.
        """
        path = self.path.with_name(f"{self.path.name}-seeding")
        with closing(sqlite3.connect(path, timeout=_SEED_TIMEOUT_S, isolation_level=None)) as lock:
            lock.execute("BEGIN EXCLUSIVE")
            with closing(self._connect()) as connection:
                yield connection

    @staticmethod
    def _drop_histories(connection: sqlite3.Connection, kept: int) -> None:
        """Remove all histories but those of the generation ``kept``."""
        while connection.execute(_DELETE_HISTORIES, (kept, _SEED_ROWS)).rowcount:
            time.sleep(_SEED_PAUSE_S)

    def watermark(self) -> str:
        return f"{self._log_id}:{self._end()}"

    def log(self, after: str | None = None) -> Iterator[pa.Table]:
        with self._errors("cannot be read"):
            position = position_in(after, self._log_id, self.compacted(), self._end())
            while True:
                with self._reader() as connection:
                    rows = connection.execute(_SELECT_LOG, (position, _LOG_ROWS)).fetchall()
                if not rows:
                    return
                if after is not None:  # somebody may be compacting
                    position_in(f"{self._log_id}:{position}", self._log_id, self.compacted(), rows[-1][0])
                position = rows[-1][0]
                yield log_table(rows)

    def compacted(self) -> int:
        with self._errors("cannot be read"), self._reader() as connection:
            return connection.execute(_SELECT_COMPACTED).fetchone()[0]

    def _end(self) -> int:
        with self._errors("cannot be read"), self._reader() as connection:
            return connection.execute(_SELECT_END).fetchone()[0]

    def compact(self, before_ms: int) -> int:
        self._refuse_closed()
        removed = 0
        with self._errors("cannot be compacted"), closing(self._connect()) as connection:
            (_, log_position) = connection.execute(_SELECT_SEED).fetchone() or (0, 0)
            while old := connection.execute(_SELECT_OLD, (before_ms, log_position, _SEED_ROWS)).fetchall():
                last = max(old[-1][0], self.compacted())
                with _transaction(connection):
                    connection.executemany("DELETE FROM events WHERE position = ?", old)
                    connection.execute("INSERT OR REPLACE INTO meta VALUES ('compacted', ?)", (str(last),))
                removed += len(old)
                time.sleep(_SEED_PAUSE_S)
            # Pages that are free now are used again; the log of writes is folded into the file and cut.
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return removed

    def restore(self, watermark: str, tables: Iterable[pa.Table], compacted: int = 0) -> int:
        self._refuse_closed()
        log_id, _, last = watermark.rpartition(":")
        number = 0
        with self._errors("cannot be restored"), closing(self._connect()) as connection, _transaction(connection):
            for table in ("events", "seeds", "histories"):
                if connection.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone():  # noqa: S608 no input
                    raise EventStoreError(f"{self.path} is not empty: restore into a new file", path=str(self.path))
            for table in tables:
                positions = table["position"].to_pylist()
                check_restored(positions, int(last), watermark)
                rows = [self._row(*pair) for pair in zip(positions, events_of(table), strict=True)]
                number += connection.executemany(_INSERT_EVENT, rows).rowcount if rows else 0
            connection.execute("DELETE FROM sqlite_sequence WHERE name = 'events'")
            end = int(last) + RESTORED_GAP
            connection.execute("INSERT INTO sqlite_sequence (name, seq) VALUES ('events', ?)", (end,))
            connection.execute("INSERT OR REPLACE INTO meta VALUES ('compacted', ?)", (str(compacted),))
            connection.execute("UPDATE meta SET value = ? WHERE key = 'log_id'", (log_id,))
        self._log_id = log_id
        return number

    def _row(self, position: int | None, e: Event) -> tuple[Any, ...]:
        """What :data:`_INSERT_EVENT` takes; without a position it gets the next one."""
        told = (e.event_id, e.user_id, e.item_id, e.event, e.timestamp_ms, e.value, e.request_id, e.slate_position)
        return (position, *told, e.surface, e.event not in self.log_only)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._queue.put(None)
        if self._writer is not None:
            self._writer.join()
        while self._readers:
            self._readers.pop().close()

    def _write(self) -> None:
        connection: sqlite3.Connection | None = None
        running = True
        while running:
            requests: list[_Append] = []
            request = self._queue.get()
            while request is not None:
                requests.append(request)
                if sum(len(r.rows) for r in requests) >= _COMMIT_EVENTS or self._queue.empty():
                    break
                request = self._queue.get()
            running = request is not None
            if not requests:
                continue
            try:
                with self._errors("did not keep the events"):
                    connection = connection or self._connect()
                    results = self._commit(connection, requests)
            except Exception as error:  # noqa: BLE001 whatever it is, the waiting callers must hear of it
                for request in requests:
                    request.done.set_exception(error)
            else:
                for request, result in zip(requests, results, strict=True):
                    request.done.set_result(result)
        if connection is not None:
            connection.close()

    def _commit(self, connection: sqlite3.Connection, requests: list[_Append]) -> list[AppendResult]:
        results: list[AppendResult] = []
        with _transaction(connection):
            for request in requests:
                accepted = max(0, connection.executemany(_INSERT_EVENT, request.rows).rowcount)
                results.append(AppendResult(accepted, len(request.rows) - accepted))
            self._refuse_lost()
        return results

    def _connect(self, *, create: bool = False) -> sqlite3.Connection:
        # A file that is gone for a moment must not be followed by an empty one.
        uri = f"{self.path.as_uri()}?mode={'rwc' if create else 'rw'}"
        connection = sqlite3.connect(
            uri, timeout=self.config.busy_timeout_s, isolation_level=None, check_same_thread=False, uri=True
        )
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    @contextmanager
    def _reader(self) -> Generator[sqlite3.Connection, None, None]:
        self._refuse_closed()
        try:
            connection = self._readers.pop()
        except IndexError:
            connection = self._connect()
            connection.execute("PRAGMA query_only = ON")
            connection.execute("PRAGMA mmap_size = 268435456")
        try:
            yield connection
        except BaseException:
            connection.close()  # whatever it was in the middle of
            raise
        if self._closed:
            connection.close()
        else:
            self._readers.append(connection)

    def _prepare(self, connection: sqlite3.Connection) -> str:
        """Create the tables in a fresh file, refuse a foreign one; the log's id."""
        self._use_wal(connection)
        connection.execute("BEGIN IMMEDIATE")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        machine, boot = _machine(), _boot()
        if version == 0:
            if connection.execute("SELECT count(*) FROM sqlite_master").fetchone() != (0,):
                raise EventStoreError(f"{self.path} is a SQLite file of something else", path=str(self.path))
            for statement in _TABLES.split(";\n"):
                connection.execute(statement)
            known = {"log_id": uuid.uuid4().hex, "machine": machine, "boot": boot}
        elif version == FORMAT:
            known = dict(connection.execute("SELECT key, value FROM meta").fetchall())
            if known["machine"] != machine and known["boot"] != boot and not self.config.take_over:
                raise EventStoreError(
                    f"{self.path} belongs to the machine {known['machine']}, this is {machine}: the embedded event "
                    "store serves the processes of one machine only, several machines need a shared store. If the file "
                    "was moved here for good and nothing uses it elsewhere, open it once with take_over: true",
                    path=str(self.path),
                    machine=machine,
                )
            known |= {"machine": machine, "boot": boot}
        else:
            raise EventStoreError(f"{self.path} has format {version}, this version reads {FORMAT}", path=str(self.path))
        connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", known.items())
        connection.execute(f"PRAGMA user_version = {FORMAT}")
        connection.execute("COMMIT")
        return known["log_id"]

    def _use_wal(self, connection: sqlite3.Connection) -> None:
        deadline = time.monotonic() + self.config.busy_timeout_s
        while True:
            try:
                (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
                break
            except sqlite3.OperationalError as error:
                # Another process is switching the same fresh file; SQLite does not wait for that by itself.
                if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        if mode != "wal":
            raise EventStoreError(
                f"{self.path}: this file system cannot share memory between processes, so the embedded event store "
                "cannot be kept there; use a local disk",
                path=str(self.path),
            )

    def _file_id(self) -> tuple[int, int]:
        found = self.path.stat()
        return found.st_dev, found.st_ino

    def _refuse_lost(self) -> None:
        """SQLite goes on writing to a file that was removed, where nobody would find the events again."""
        if self._file_id() != self._file:
            raise EventStoreError(
                f"the file {self.path} was replaced by another since it was opened: restart what uses it",
                path=str(self.path),
            )

    def _refuse_closed(self) -> None:
        if self._closed:
            raise EventStoreError(f"the event store {self.path} is closed", path=str(self.path))

    @contextmanager
    def _errors(self, what: str) -> Generator[None, None, None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise EventStoreError(f"the event store {self.path} {what}: {error}", path=str(self.path)) from error


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Generator[None, None, None]:
    """All of it is kept, or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _machine() -> str:
    """A name of this machine that survives a restart: images share machine ids, so the host name is part of it."""
    try:
        machine_id = Path("/etc/machine-id").read_text().strip()
    except OSError:
        machine_id = ""
    return f"{platform.node()}/{machine_id or uuid.getnode()}"


def _boot() -> str:
    """The id of the running kernel, the same in all containers of a machine; unique where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return uuid.uuid4().hex
