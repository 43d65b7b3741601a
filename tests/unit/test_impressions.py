"""What was shown is in the log of events, with the probability of showing it."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import pytest

from recsys.errors import EventStoreError
from recsys.events import Event
from recsys.events.base import events_of
from recsys.events.sqlite import SqliteEventStoreConfig
from recsys.pipeline.config import PipelineConfig
from recsys.testing.tiny_bundle import make_bundle
from serve.config import GatewayConfig, OpenAccess, ServeConfig
from serve.http.routes import http_app
from serve.live.service import Service
from serve.observe import impressions as impressions_module
from serve.observe.impressions import IMPRESSION, Impressions
from serve.observe.metrics import Meters
from serve.observe.observer import Observer

SHARE = 0.3


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    pipeline = PipelineConfig.parse({"rules": [{"kind": "exploration", "share": SHARE}]}, where="test")
    return make_bundle(tmp_path_factory.mktemp("bundles"), pipeline)


async def test_every_item_that_was_shown_is_logged_with_its_place_and_propensity(bundle, tmp_path):
    config = ServeConfig(
        bundle_uri=str(bundle.path),
        access=OpenAccess(),
        topology="fused",
        event_store=SqliteEventStoreConfig(path=str(tmp_path / "events.sqlite")),
        gateway=GatewayConfig(log_impressions=True),
    )
    counts = {}

    def sink(name, value, labels):
        if name == "recsys_events_total":
            counts[labels["outcome"]] = counts.get(labels["outcome"], 0) + value

    service = Service.open(config, {})
    await service.current.prove(30)
    meters = Meters(sink)
    app = http_app(service, config.gateway, config.access, Observer(service, config.gateway, meters))
    answers = []
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://gateway") as client:
        before = service.store.user("u1")
        for user in ("u1", "u2", "u1"):
            body = {"user_id": user, "top_k": 5, "context": {"surface": "home"}}
            answers.append((await client.post("/v1/recommend", json=body)).json())
        assert (await client.post("/v1/recommend", json={"top_k": 5})).status_code == 200  # a stranger
        for _ in range(500):
            meters.flush()
            if counts.get("impression") == 15:
                break
            await asyncio.sleep(0.02)
    logged = [event for table in service.store.log() for event in events_of(table)]
    expected = {
        (answer["user_id"], item["item_id"], answer["request_id"], item["rank"])
        for answer in answers
        for item in answer["items"]
    }
    assert {(e.user_id, e.item_id, e.request_id, e.slate_position) for e in logged} == expected
    assert {(e.event, e.surface) for e in logged} == {(IMPRESSION, "home")}
    propensity = {(a["request_id"], i["rank"]): i["stage_scores"]["propensity"] for a in answers for i in a["items"]}
    for event in logged:
        assert event.value == pytest.approx(propensity[event.request_id, event.slate_position])
        assert 0 < event.value < 1
    assert service.store.user("u1").item_ids == before.item_ids  # to see something is not to do something
    assert counts == {"impression": 15}
    service.close()


async def test_what_cannot_be_written_is_counted_and_harms_nobody(monkeypatch):
    class Full:
        def append(self, events):
            raise EventStoreError("disk full")

    counts = {}

    def sink(name, value, labels):
        counts[labels["outcome"]] = counts.get(labels["outcome"], 0) + value

    meters = Meters(sink)
    monkeypatch.setattr(impressions_module, "_MAX_WAITING", 3)
    with ThreadPoolExecutor(1) as executor:
        impressions = Impressions(Full(), executor, meters)
        impressions._waiting = [Event("1", "u", "i", IMPRESSION, 1)] * 2
        impressions.shown(SimpleNamespace(user_id="u", request_id="r", items=()), 1, None)
        await impressions.written()
        meters.flush()
        assert counts == {"impression_lost": 2}
        item = SimpleNamespace(item_id="i", rank=0, stage_scores={})
        answer = SimpleNamespace(user_id="u", request_id="r", items=(item, item))
        impressions._waiting = [Event("1", "u", "i", IMPRESSION, 1)] * 2
        impressions.shown(answer, 1, None)  # there is no room left
        assert len(impressions._waiting) == 2
        impressions._waiting.clear()
        impressions.shown(SimpleNamespace(**{**vars(answer), "user_id": "nul\0"}), 1, "home")
        assert impressions._waiting == []
    meters.flush()
    assert counts == {"impression_lost": 6}
