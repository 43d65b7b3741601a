"""Events: the log of an event store, in and out of files.

``--events`` is the file of the embedded store or the URL of a Redis server (``redis://HOST:6379/0``, the password in
``RECSYS_REDIS_PASSWORD``). Where the gateways' ``event_store`` has settings of its own (``max_history``, ``log_only``,
``prefix``, ...), give the same with ``--set``: they decide what a user's state is. All of it may be done while gateways
use the store, but ``restore``, which fills an empty one.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from recsys.cli import group, readable_errors
from recsys.errors import DataError, EventStoreError, RequestError
from recsys.events import AnyEventLog, AnyEventStore, EventStore
from recsys.events.base import events_of
from recsys.events.exported import COMPACTED, WATERMARK, ExportedLogConfig, opened, tables, write_log
from recsys.events.redis import RedisEventStoreConfig
from recsys.events.sqlite import SqliteEventStoreConfig
from recsys.schema import DAY_MS

app = group(__doc__)
Where = Annotated[str, typer.Option("--events", help="file of the embedded event store, or redis://HOST:PORT/DB")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", help="a setting of the gateways' event_store, where it is not the default", metavar="K=V"),
]
Target = Annotated[Path, typer.Argument(help="Parquet file")]


@app.command()
def export(
    to: Target,
    events: Where,
    settings: Settings = None,
    after: Annotated[str, typer.Option(help="only what came after this watermark")] = "",
) -> None:
    """Write events to a Parquet file, in the order they arrived, and say up to which watermark.

    ``recsys update`` reads it in place of the store. An export of everything is a backup (see ``restore``), and
    a ``parquet`` source for training: the Bundle then says up to where it contains the log.
    """
    with _store(events, settings) as store:
        watermark = store.watermark()
        number = write_log(store, to, after or None, watermark)
        typer.echo(f"{number:,} events in {to}, up to the watermark {watermark}")


@app.command("import")
def import_(source: Target, events: Where, settings: Settings = None) -> None:
    """Add the events of a Parquet file. Doing it again adds nothing: ``event_id`` tells what is there.

    Columns: event_id, user_id, item_id, event, timestamp; if there are any, value, request_id, slate_position, surface.
    """
    with _store(events, settings, create=True) as store:
        accepted = duplicates = row = 0
        for table in tables(source):
            try:
                result = store.append(events_of(table))
            except RequestError as error:
                bad = row + int(error.details["row"])
                raise DataError(
                    f"{source}, row {bad}: {error.message}; the {row:,} rows before row {row} are in the store", row=bad
                ) from error
            accepted, duplicates, row = accepted + result.accepted, duplicates + result.duplicates, row + len(table)
            typer.echo(f"{row:,} rows read", err=True)
        typer.echo(f"{accepted:,} events added, {duplicates:,} were there already")


@app.command()
def restore(source: Target, events: Where, settings: Settings = None) -> None:
    """Fill an empty event store from an export of everything. It goes on where that log ended."""
    with _store(events, settings, create=True) as store:
        with opened(source) as file:
            metadata = file.schema_arrow.metadata or {}
        if WATERMARK not in metadata:
            raise DataError(f"{source} is no export of a whole log; `import` adds events of any Parquet file")
        number = store.restore(metadata[WATERMARK].decode(), tables(source), int(metadata[COMPACTED]))
        typer.echo(f"{number:,} events restored")


@app.command()
def compact(
    events: Where,
    settings: Settings = None,
    days: Annotated[float, typer.Option(help="events older than this are removed", min=0)] = 90,
) -> None:
    """Remove old events that the Bundle being served was published with. No user's state changes.

    Those are the events up to the watermark of the Bundle; one that was trained on other data has none of them.
    """
    with _store(events, settings) as store:
        number = store.compact(time.time_ns() // 1_000_000 - round(days * DAY_MS))
        typer.echo(f"{number:,} events removed")


@contextmanager
def _store(where: str, settings: list[str] | None, *, create: bool = False) -> Generator[EventStore, None, None]:
    with readable_errors(), open_config(where, settings or [], create=create).open() as store:
        yield store


def open_config(where: str, settings: list[str], *, create: bool = False) -> AnyEventStore:
    """The configuration of the store at ``where``, with ``settings`` (``key=value``) of its own.

    :raises EventStoreError: when there is none, or with ``create`` no folder for one.
    """
    tree = _tree(settings)
    if "://" in where:
        return RedisEventStoreConfig.parse(tree | {"url": where}, where="--events and --set")
    path = Path(where)
    if create and not path.parent.is_dir():
        raise EventStoreError(f"{where}: there is no folder {path.parent}", path=where)
    if not create and not path.exists():
        raise EventStoreError(f"{where}: there is no event store here", path=where)
    return SqliteEventStoreConfig.parse(tree | {"path": where}, where="--events and --set")


def log_config(where: str, settings: list[str]) -> AnyEventLog:
    """The configuration of the log at ``where``: that of a store, or of what was exported from one."""
    if "://" in where or not where.endswith(".parquet"):
        return open_config(where, settings)
    return ExportedLogConfig.parse(_tree(settings) | {"path": where}, where="--events and --events-set")


def _tree(settings: list[str]) -> dict[str, Any]:
    pairs = [setting.partition("=") for setting in settings]
    return {key: yaml.safe_load(value) for key, _, value in pairs}


if __name__ == "__main__":
    app()
