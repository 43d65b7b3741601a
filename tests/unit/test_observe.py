"""Metrics, traces and logs: what can be seen of a gateway from outside."""

import asyncio
import io
import json
import logging
from collections import Counter
from datetime import UTC, datetime, timedelta

import httpx
import numpy as np
import pytest

from recsys.events.sqlite import SqliteEventStoreConfig
from recsys.pipeline.cache import Cache
from recsys.testing.tiny_bundle import make_bundle
from serve.config import GatewayConfig, OpenAccess, ServeConfig
from serve.http.routes import http_app
from serve.live.service import Service
from serve.observe import observer as observe
from serve.observe.logs import JsonFormatter, log_as_json
from serve.observe.metrics import METRICS, Meters
from serve.observe.observer import Observer, Shown


class Recorded:
    """A sink that remembers, and that takes only what METRICS describes."""

    def __init__(self):
        self.values = {}

    def __call__(self, name, value, labels):
        assert set(labels) == set(METRICS[name].labels)
        self.values.setdefault((name, *labels.values()), []).append(value)

    def total(self, *key):
        return sum(self.values.get(key, []))

    def names(self):
        return {key[0] for key in self.values}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
async def gateway(bundle, tmp_path):
    """A client, the service behind it, its meters and what they report."""
    config = ServeConfig(
        bundle_uri=str(bundle.path),
        access=OpenAccess(),
        topology="fused",
        event_store=SqliteEventStoreConfig(path=str(tmp_path / "events.sqlite")),
        gateway=GatewayConfig(max_traces=3, access_log=True),
    )
    service = Service.open(config, {})
    await service.current.prove(30)
    sink = Recorded()
    meters = Meters(sink)
    app = http_app(service, config.gateway, config.access, Observer(service, config.gateway, meters))
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            yield client, service, meters, sink
    service.close()


def event(event_id, **ago):
    stamp = (datetime.now(UTC) - timedelta(**ago)).isoformat()
    return {"event_id": event_id, "user_id": "u1", "item_id": "i7", "event": "click", "timestamp": stamp}


async def test_every_metric_is_reported(gateway):
    client, _, meters, sink = gateway
    for user in ("u1", "u1", "u2", "nobody at all"):
        assert (await client.post("/v1/recommend", json={"user_id": user, "top_k": 5})).status_code == 200
    await client.post("/v1/events", json={"events": [event("a", seconds=100), event("b")]})
    await client.post("/v1/events", json={"events": [event("b")]})
    await client.get("/v1/items/none")
    await client.get("/no/such/path")
    assert sink.total("recsys_requests_total", "/v1/recommend", "200") == 0  # counters wait for the flush
    meters.flush()
    # Batches are a matter of stages in processes of their own.
    assert sink.names() == set(METRICS) - {"recsys_batch_size"}
    assert sink.total("recsys_requests_total", "/v1/recommend", "200") == 4
    assert sink.total("recsys_requests_total", "/v1/items/{item_id}", "404") == 1
    assert sink.total("recsys_requests_total", "none", "404") == 1
    assert len(sink.values["recsys_request_ms", "/v1/recommend"]) == 4
    for stage in ("retrieval", "ranking", "reranking", "state"):
        assert sink.total("recsys_stage_outcomes_total", stage, "ok") == 4
        assert len(sink.values["recsys_stage_ms", stage, "total"]) == 4
    assert len(sink.values["recsys_stage_ms", "ranking", "compute"]) == 4
    assert sink.total("recsys_events_total", "accepted") == 2
    assert sink.total("recsys_events_total", "duplicate") == 1
    assert sink.values["recsys_event_lag_s",][0] == pytest.approx(100, abs=5)
    assert sink.total("recsys_shown_total", "head") + sink.total("recsys_shown_total", "tail") == 20
    assert sink.total("recsys_removed_total", "reranking", "below_top_k") > 0
    assert 0 < sink.values["recsys_coverage_share",][-1] <= 20 / 300
    assert sink.total("recsys_in_flight") == 0
    # The empty history of somebody unknown was asked for when the service warmed up.
    assert sink.total("recsys_cache_total", "encodings", "hit") == 2
    assert sink.total("recsys_cache_total", "profiles", "hit") == 1
    meters.flush()
    assert sink.total("recsys_requests_total", "/v1/recommend", "200") == 4  # nothing counts twice
    assert sink.total("recsys_cache_total", "encodings", "hit") == 2


async def test_the_head_is_the_popular_hundredth(gateway):
    client, service, meters, sink = gateway
    popular = service.current.recommender.runner.selection.popular.item_idx[:3]
    answer = await client.post("/v1/recommend", json={"history": [], "top_k": 300, "exclude_seen": False})
    shown = {item["item_id"] for item in answer.json()["items"]}
    meters.flush()
    num_head = len(shown & set(service.current.catalogue.id_map.take(popular)))
    assert num_head > 0
    assert sink.total("recsys_shown_total", "head") == num_head
    assert sink.total("recsys_shown_total", "tail") == len(shown) - num_head


async def test_a_stage_that_fails_is_seen(gateway):
    client, service, meters, sink = gateway
    ranking = service.current.recommender.runner.stages[1].stage
    ranking.run_batch = lambda queries, candidates: 1 / 0
    for _ in range(6):
        answer = (await client.post("/v1/recommend", json={"user_id": "u1"})).json()
        assert answer["degraded"] == ["ranking"]
    meters.flush()
    assert sink.total("recsys_stage_outcomes_total", "ranking", "failed") == 5
    assert sink.total("recsys_stage_outcomes_total", "ranking", "skipped") == 1
    assert sink.values["recsys_breaker_open", "ranking"][-1] == 1
    assert sink.values["recsys_breaker_open", "retrieval"][-1] == 0
    trace = (await client.get(f"/v1/traces/{answer['request_id']}")).json()
    (stage,) = [each for each in trace["stages"] if each["stage"] == "ranking"]
    assert stage["outcome"] == "skipped"
    assert "circuit breaker is open" in stage["failure"]
    assert stage["compute_ms"] is None


async def test_a_trace_accounts_for_every_candidate_once(gateway):
    client, service, _, _ = gateway
    body = {"history": [{"item_id": "i1"}, {"item_id": "i2"}], "top_k": 4, "explain": True}
    answer = (await client.post("/v1/recommend", json=body)).json()
    trace = (await client.get(f"/v1/traces/{answer['request_id']}")).json()
    assert trace["bundle_id"] == service.current.bundle_id
    assert trace["history"] == ["i1", "i2"]
    assert [stage["stage"] for stage in trace["stages"]] == ["retrieval", "ranking", "reranking"]
    for stage in trace["stages"]:
        assert (stage["outcome"], stage["bundle_id"], stage["failure"]) == ("ok", service.current.bundle_id, None)
        assert 0 <= stage["compute_ms"] <= stage["total_ms"]
    for ours, theirs in zip(trace["items"], answer["items"], strict=True):
        assert {name: theirs[name] for name in ours} == ours
        assert {"retrieval", "ranking"} <= set(ours["stage_scores"])
    shown = [item["item_id"] for item in trace["items"]]
    removed = [item_id for each in trace["removed"] for item_id in each["item_ids"]]
    assert max(Counter(shown + removed).values()) == 1
    assert len(shown + removed) == service.current.recommender.config.num_candidates
    told = {(each["stage"], each["reason"]): each["num_items"] for each in answer["removed"]}
    assert told == {(each["stage"], each["reason"]): len(each["item_ids"]) for each in trace["removed"]}


async def test_only_the_newest_traces_are_kept(gateway):
    client, *_ = gateway
    ids = [(await client.post("/v1/recommend", json={})).json()["request_id"] for _ in range(5)]
    found = [(await client.get(f"/v1/traces/{request_id}")).status_code for request_id in ids]
    assert found == [404, 404, 200, 200, 200]
    assert "removed" not in (await client.post("/v1/recommend", json={})).json()


async def test_a_trace_of_another_gateway_is_found(gateway):
    _, service, _, _ = gateway

    async def elsewhere(request_id):
        return {"request_id": request_id} if request_id == "there" else None

    app = http_app(service, GatewayConfig(), OpenAccess(), find_trace=elsewhere)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://gateway") as client:
        assert (await client.get("/v1/traces/there")).json() == {"request_id": "there"}
        assert (await client.get("/v1/traces/nowhere")).status_code == 404


async def test_a_line_per_request_if_wished(gateway, caplog):
    client, *_ = gateway
    caplog.set_level(logging.INFO, "serve.observe.observer")
    request_id = (await client.post("/v1/recommend", json={})).json()["request_id"]
    (line,) = [json.loads(JsonFormatter(deployment="gateway").format(record)) for record in caplog.records]
    assert line["request_id"] == request_id
    assert (line["route"], line["status"], line["deployment"]) == ("/v1/recommend", 200, "gateway")
    assert line["total_ms"] > 0


def test_logs_are_json():
    stream = io.StringIO()
    loggers = [logging.getLogger(name) for name in ("recsys", "serve")]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    try:
        log_as_json("INFO", deployment="ranking")
        loggers[0].handlers[0].setStream(stream)
        log = logging.getLogger("recsys.pipeline.runner")
        log.debug("not this")
        log.info("skipped %s", "ränking", extra={"request_id": "r1", "at": datetime(2026, 1, 1, tzinfo=UTC)})
        try:
            1 / 0  # noqa: B018
        except ZeroDivisionError:
            log.exception("two\nlines")
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.level, logger.propagate = handlers, level, propagate
            logger.setLevel(level)
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first["message"] == "skipped ränking"
    assert (first["level"], first["logger"], first["request_id"]) == ("INFO", "recsys.pipeline.runner", "r1")
    assert first["at"].startswith("2026-01-01")
    assert datetime.fromisoformat(first["time"]).tzinfo is not None
    assert second["message"] == "two\nlines"
    assert "ZeroDivisionError" in second["exception"]


def test_coverage_forgets(monkeypatch):
    clock = 1000.0
    monkeypatch.setattr(observe.time, "monotonic", lambda: clock)
    shown = Shown(np.arange(10, dtype=np.int32))
    shown.show(np.array([1, 2], np.int32))
    shown.show(np.array([2, 3], np.int32))
    assert shown.coverage == pytest.approx(0.3)
    clock += 301
    shown.show(np.array([4], np.int32))
    assert shown.coverage == pytest.approx(0.4)
    clock += 301
    shown.show(np.array([4], np.int32))
    assert shown.coverage == pytest.approx(0.1)


def test_a_cache_forgets_what_was_not_used_for_longest():
    cache = Cache(2)
    cache.put("a", 1, version=1)
    cache.put("b", 2)
    assert cache.get("a", version=1) == 1
    cache.put("c", 3)
    assert [cache.get("b"), cache.get("a", version=1), cache.get("c"), cache.get("a", version=2)] == [None, 1, 3, None]
    assert (cache.num_hits, cache.num_misses, len(cache)) == (3, 2, 2)
    nothing = Cache(0)
    nothing.put("a", 1)
    assert nothing.get("a") is None


async def test_a_caller_that_goes_is_counted(gateway):
    client, service, meters, sink = gateway
    release = asyncio.Event()

    async def slowly(request):
        await release.wait()

    service.current.recommender.arecommend = slowly
    asking = asyncio.create_task(client.post("/v1/recommend", json={}))
    await asyncio.sleep(0.05)
    meters.flush()
    assert sink.values["recsys_in_flight",][-1] == 1
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    meters.flush()
    assert sink.total("recsys_requests_total", "/v1/recommend", "499") == 1
    assert sink.values["recsys_in_flight",][-1] == 0
