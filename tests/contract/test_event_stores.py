"""Every kind of event store keeps the contract. A kind without a class below fails here."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from recsys.events import KINDS, RedisEventStoreConfig, SqliteEventStoreConfig
from recsys.testing.event_store_contract import EventStoreContract
from recsys.testing.redis_server import RedisServer, redis_server


class TestSqlite(EventStoreContract):
    def config(self, folder: Path) -> SqliteEventStoreConfig:
        return SqliteEventStoreConfig(path=str(folder / "events.sqlite"))


class TestRedis(EventStoreContract):
    server: RedisServer

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _server(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
        with redis_server(tmp_path_factory.mktemp("redis")) as server:
            cls.server = server
            yield

    def config(self, folder: Path) -> RedisEventStoreConfig:
        url = getattr(self, "server", RedisServer(folder)).url
        prefix = re.sub(r"\W", "-", "-".join(folder.parts[-2:])[-60:])
        # A batch that times out is sent again and then has no event that is new: wait, however busy the machine is.
        return RedisEventStoreConfig.parse({"url": url, "prefix": f"{prefix}:", "timeout_s": 60}, where="test")


def test_every_kind_is_tested() -> None:
    tested = {type(cls().config(Path("x"))) for cls in EventStoreContract.__subclasses__()}
    assert tested == set(KINDS)
