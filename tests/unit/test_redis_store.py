"""What only the event store in Redis has: a server that is set wrongly, is gone, dies, and forgets on purpose."""

import os
import threading
import time

import pytest
import redis

from recsys.errors import ConfigError, EventStoreError
from recsys.events import Event
from recsys.events.redis import VARIABLE, RedisEventStoreConfig
from recsys.testing.redis_server import redis_server


def config(server, **fields):
    return RedisEventStoreConfig.parse({"url": server.url, **fields}, where="test")


def event(event_id, item_id="a", *, user_id="u", at=1000, name="click", **rest):
    return Event(event_id, user_id, item_id, name, at, **rest)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("appendonly", "no"),
        ("appendfsync", "everysec"),
        ("maxmemory-policy", "allkeys-lru"),
        ("aof-load-truncated", "yes"),
    ],
)
def test_a_server_that_may_lose_events_is_refused(tmp_path, setting, value):
    with redis_server(tmp_path, **{setting: value}) as server:
        with pytest.raises(EventStoreError, match=f"{setting} {value}, which may lose events: set it to"):
            config(server).open()
        if setting == "appendfsync":
            with config(server, fsync="everysec").open() as store:
                assert store.append([event("1")]).accepted == 1


def test_a_password_comes_from_the_environment_and_is_in_no_message(tmp_path, monkeypatch):
    with redis_server(tmp_path) as server:
        with redis.Redis(port=server.port) as admin:
            admin.acl_setuser("me", enabled=True, passwords=["+right-one"], commands=["+@all"], keys=["*"])
        mine = config(server, url=f"redis://me@127.0.0.1:{server.port}/0")
        monkeypatch.setenv(VARIABLE, "wrong-one")
        with pytest.raises(EventStoreError, match="cannot be opened") as raised:
            mine.open()
        assert "wrong-one" not in f"{raised.value} {raised.value.details}"
        monkeypatch.setenv(VARIABLE, "right-one")
        mine.open().close()
    with pytest.raises(ConfigError, match=f"no place for a password: put it into {VARIABLE}") as raised:
        config(server, url="redis://:secret-one@127.0.0.1:1/0")
    assert "secret-one" not in f"{raised.value} {raised.value.details}"


def test_what_was_acknowledged_survives_the_death_of_the_server_exactly_once(tmp_path):
    with redis_server(tmp_path) as server, config(server, max_history=100_000, timeout_s=2).open() as store:
        acknowledged, failed = [], threading.Event()

        def write(writer):
            number = 0
            while True:
                batch = [event(f"{writer}-{number}-{j}", user_id=f"u{writer}") for j in range(3)]
                try:
                    store.append(batch)
                except EventStoreError:
                    failed.set()
                    return
                acknowledged.extend(one.event_id for one in batch)
                number += 1

        for round_ in range(3):
            failed.clear()
            writers = [threading.Thread(target=write, args=(f"{round_}{w}",)) for w in range(4)]
            for writer in writers:
                writer.start()
            time.sleep(0.3)
            server.kill()
            assert failed.wait(10)
            for writer in writers:
                writer.join()
            with pytest.raises(EventStoreError, match="did not keep the events"):
                store.append([event("x")])
            server.start()
        assert len(acknowledged) > 100
        with redis.Redis(port=server.port) as client:
            kept = [entry[1][b"e"].split(b"\0")[0].decode() for entry in client.xrange("recsys:log")]
        assert len(kept) == len(set(kept)) and set(acknowledged) <= set(kept)
        assert store.append([event(event_id) for event_id in acknowledged]).accepted == 0
        batches = {}
        for event_id in kept:  # a batch is kept whole or not at all
            batches.setdefault(event_id.rsplit("-", 1)[0], []).append(event_id)
        assert {len(batch) for batch in batches.values()} == {3}
        for round_ in range(3):
            state = store.user(f"u{round_}0")
            assert len(state) == sum(event_id.startswith(f"{round_}0-") for event_id in kept)


@pytest.mark.parametrize("share_lost", [0.2, 0.5, 0.8])
def test_a_batch_that_a_crash_cut_takes_no_other_with_it(tmp_path, share_lost):
    def size():
        return sum(path.stat().st_size for path in server.manifest.parent.glob("*.incr.aof"))

    with redis_server(tmp_path) as server, config(server).open() as store:
        store.append([event("before")])
        whole = size()
        store.append([event(f"cut-{n}") for n in range(3)])
        server.kill()
        (log,) = server.manifest.parent.glob("*.incr.aof")
        os.truncate(log, size() - round(share_lost * (size() - whole)))
        server.start()
        assert store.append([event(f"after-{n}") for n in range(3)]).accepted == 3
        server.kill()
        server.start()
        found = [event_id for table in store.log() for event_id in table["event_id"].to_pylist()]
        assert found == ["before", "after-0", "after-1", "after-2"]


def test_a_user_without_events_is_forgotten_after_the_days_that_are_set(tmp_path):
    with redis_server(tmp_path) as server, config(server, ttl_days=1 / 86_400, cached_users=1).open() as store:
        store.append([event("1", at=time.time_ns() // 1_000_000)])
        assert store.user("u").item_ids == ("a",)
        time.sleep(1.5)
        assert store.user("u") is None
        with redis.Redis(port=server.port) as admin:
            assert not admin.keys("recsys:user:*")
        assert store.append([event("1")]).duplicates == 1  # the log forgets nothing


def test_a_late_event_is_not_pushed_out_by_what_the_bundle_has(tmp_path):
    """The newest events are kept per user; those that came in with a Bundle make room first."""
    with redis_server(tmp_path) as server, config(server, max_history=3).open() as store:
        from recsys.testing.event_store_contract import seed_table

        store.append([event(str(i), f"old{i}", at=5000 + i) for i in range(3)])
        store.seed("child", seed_table("u", ("old2", 5002)), store.watermark())
        store.append([event("late", "late", at=4000)])
        assert store.user("u").item_ids == ("late", "old2")
