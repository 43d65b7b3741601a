"""Every kind of event store keeps the contract. A kind without a class below fails here."""

from __future__ import annotations

from pathlib import Path

from recsys.events import KINDS, SqliteEventStoreConfig
from recsys.testing.event_store_contract import EventStoreContract


class TestSqlite(EventStoreContract):
    def config(self, folder: Path) -> SqliteEventStoreConfig:
        return SqliteEventStoreConfig(path=str(folder / "events.sqlite"))


def test_every_kind_is_tested() -> None:
    tested = {type(cls().config(Path("x"))) for cls in EventStoreContract.__subclasses__()}
    assert tested == set(KINDS)
