"""Rules over HTTP: put, changed back, and what every stage, every Bundle and every gateway makes of it."""

import asyncio
import functools
import json
import time
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from recsys.bundle.live import live_id
from recsys.bundle.rule_log import MAX_BYTES
from recsys.bundle.store import BundleStore
from recsys.errors import BundleError
from recsys.events.sqlite import SqliteEventStoreConfig
from recsys.pipeline.build import Parts, build_stage
from recsys.pipeline.config import pipeline_config
from recsys.pipeline.requests import RecommendRequest
from recsys.pipeline.stage import StageOutput
from recsys.testing.tiny_bundle import make_bundle
from serve.access.keys import add_key
from serve.config import CanaryLimits, GatewayConfig, KeyAccess, OpenAccess, ServeConfig
from serve.http.routes import http_app
from serve.live import switch as switch_module
from serve.live.service import Service
from serve.live.shelf import Shelf
from serve.live.switch import Switch
from serve.live.turns import Turns

PIN = {"kind": "pin", "item_ids": ["i200"]}
NOON = "2026-01-01T12:00:00Z"
EVEN = {"kind": "bury", "categories": ["even"]}


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(switch_module, "_LINGER_S", 0.0)
    monkeypatch.setattr(switch_module, "_PAUSE_S", 0.0)


@pytest.fixture
def config(store, tmp_path):
    return ServeConfig(
        bundle_uri=str(store),
        access=OpenAccess(),
        topology="fused",
        event_store=SqliteEventStoreConfig(path=str(tmp_path / "events.sqlite")),
        canary=CanaryLimits(min_answers=20),
    )


@pytest.fixture
async def opened(config):
    switch = Switch(config, config.event_store.open(), {})
    service = await switch.start()
    yield switch, service
    service.close()


@pytest.fixture
async def client(opened, config):
    async for client in client_of(opened[1], config.access):
        yield client


async def client_of(service, access, **headers):
    app = http_app(service, GatewayConfig(), access)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers) as client:
            yield client


async def put(client, *rules, after=0, status=200, **fields):
    answer = await client.put("/v1/rules", json={"rules": list(rules), "after": after, **fields})
    assert answer.status_code == status, answer.text
    return answer.json()


async def shown(client, **body):
    answer = await client.post("/v1/recommend", json={"top_k": 5, "history": [{"item_id": "i0"}], **body})
    assert answer.status_code == 200
    assert answer.json()["degraded"] == []
    return answer.json()


def items(answer):
    return [item["item_id"] for item in answer["items"]]


async def test_rules_come_change_and_go(client, opened, bundles):
    switch, service = opened
    first = bundles[0].bundle_id
    usual = await shown(client)
    assert await put(client, PIN, note="Advent") == {"version": 1, "unknown_items": [], "unknown_categories": []}
    assert (await client.get("/v1/rules")).json()["answering"] == 0
    await switch.step(service)
    answer = await shown(client)
    assert answer["bundle_id"] == f"{first}+0.1" == (await client.get("/v1/bundle")).json()["bundle_id"]
    assert items(answer)[0] == "i200" != items(usual)[0]
    assert items(answer)[1:] == items(usual)[:4]

    assert (await put(client, EVEN, after=1))["version"] == 2
    await switch.step(service)
    assert all(int(item[1:]) % 2 for item in items(await shown(client)))

    told = (await client.get("/v1/rules")).json()
    assert (told["version"], told["answering"]) == (2, 2)
    assert [each["rule"] | {"kind": "bury"} for each in told["rules"]] == [EVEN | {"item_ids": []}]
    assert [(each["version"], each["by"], each["note"], each["num_rules"]) for each in told["changes"]] == [
        (2, "open access", None, 1), (1, "open access", "Advent", 1),
    ]  # fmt: skip
    assert datetime.now(UTC) - datetime.fromisoformat(told["changes"][0]["at"]) < timedelta(minutes=5)

    assert (await client.delete("/v1/rules", params={"note": "over"})).json()["version"] == 3
    await switch.step(service)
    answer = await shown(client)
    assert answer["bundle_id"] == f"{first}+0.3"
    assert items(answer) == items(usual)
    told = (await client.get("/v1/rules")).json()
    assert (told["version"], told["rules"], told["changes"][0]["note"]) == (3, [], "over")

    # What was before can be read, and put again.
    before = (await client.get("/v1/rules", params={"version": 1})).json()
    assert before["version"] == 1
    await put(client, *(each["rule"] for each in before["rules"]), after=3)
    await switch.step(service)
    assert items(await shown(client))[0] == "i200"
    assert (await client.get("/v1/rules", params={"version": 5})).status_code == 404
    await switch.tidy(service)
    await switch.tidy(service)
    assert service.retired == []


async def test_a_rule_comes_and_goes_by_the_clock_without_a_change(client, opened):
    """Each answer goes by its own time: none waits for a look at the store."""
    switch, service = opened
    now = datetime.now(UTC)
    soon, later = now + timedelta(seconds=3), now + timedelta(hours=1)
    timed = [
        PIN | {"starts_at": soon.isoformat()},
        EVEN | {"ends_at": soon.isoformat()},
        {"kind": "diversity", "strength": 0.5, "starts_at": later.isoformat()},
        {"kind": "creator_cap", "num_items": 1, "ends_at": (now - timedelta(hours=1)).isoformat()},
    ]
    await put(client, *timed)
    await switch.step(service)
    soon_ms = int(soon.timestamp() * 1000)
    request = RecommendRequest(top_k=3, deadline_ms=9000)
    before, after = [
        (await service.current.recommender.arecommend(request, now_ms=now_ms)).item_ids
        for now_ms in (soon_ms - 1, soon_ms + 1)
    ]
    assert all(int(item[1:]) % 2 for item in before)
    assert after[0] == "i200"
    told = (await client.get("/v1/rules")).json()["rules"]
    if datetime.now(UTC) < soon:
        assert [each["state"] for each in told] == ["comes", "holds", "comes", "over"]
    await asyncio.sleep(max(0.0, (soon - datetime.now(UTC)).total_seconds()) + 0.01)
    told = (await client.get("/v1/rules")).json()["rules"]
    assert [each["state"] for each in told] == ["holds", "over", "comes", "over"]
    assert items(await shown(client))[0] == "i200"


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"rules": []}, "after"),
        ({"rules": [PIN]}, "after"),
        ({"after": 0}, "rules"),
        ({"rules": [{"kind": "pinn"}], "after": 0}, "pinn"),
        ({"rules": [{"kind": "pin"}], "after": 0}, "name at least one"),
        ({"rules": [PIN | {"colour": "red"}], "after": 0}, "colour"),
        ({"rules": [PIN | {"position": -1}], "after": 0}, "position"),
        ({"rules": [PIN | {"starts_at": "2026-01-01T00:00:00"}], "after": 0}, "timezone"),
        ({"rules": [PIN | {"starts_at": NOON, "ends_at": NOON}], "after": 0}, "ends_at must be after"),
        ({"rules": [PIN | {"item_ids": ["a\ud800"]}], "after": 0}, "item_ids"),
        ({"rules": [PIN | {"item_ids": [""]}], "after": 0}, "item_ids"),
        ({"rules": [], "after": 0, "note": "a\ud800"}, "surrogate"),
        ({"rules": [PIN] * 201, "after": 0}, "200"),
        ({"rules": [PIN], "after": 0, "note": "x" * 1001}, "note"),
        ({"rules": [PIN | {"item_ids": [f"{row:0256}" for row in range(MAX_BYTES // 256)]}], "after": 0}, "bytes long"),
    ],
)  # fmt: skip
async def test_what_are_no_rules_is_refused_and_nothing_is_written(client, opened, body, problem):
    # Escaped, as no UTF-8 holds what is no text.
    sent = {"content": json.dumps(body), "headers": {"content-type": "application/json"}}
    answer = await client.put("/v1/rules", **sent)
    assert answer.status_code == 422
    assert problem in answer.text
    assert opened[1].rules.version() == 0


async def test_a_body_that_is_too_large_is_refused(client, opened):
    answer = await client.put("/v1/rules", json={"rules": [PIN], "after": 0, "note": "x" * (1 << 20)})
    assert answer.status_code == 413
    assert opened[1].rules.version() == 0


async def test_what_the_catalogue_lacks_is_told(client, opened):
    switch, service = opened
    rules = [PIN | {"item_ids": ["i1", "gone"]}, EVEN | {"categories": ["prime", "even"]}]
    told = await put(client, *rules)
    assert told == {"version": 1, "unknown_items": ["gone"], "unknown_categories": ["prime"]}
    await switch.step(service)
    assert items(await shown(client))[0] == "i1"


async def test_of_two_who_saw_the_same_the_second_is_refused(client, opened):
    answers = await asyncio.gather(
        *(client.put("/v1/rules", json={"rules": [rule], "after": 0}) for rule in (PIN, EVEN))
    )
    assert sorted(answer.status_code for answer in answers) == [200, 409]
    assert "somebody" not in str(answers)
    assert opened[1].rules.version() == 1
    assert "version 1, not 0" in (await put(client, PIN, status=409))["detail"]
    assert (await client.delete("/v1/rules", params={"after": 0})).status_code == 409
    assert (await client.delete("/v1/rules", params={"after": 1})).status_code == 200


async def test_hard_rules_hold_whatever_is_put(client, opened):
    switch, service = opened
    await put(client, {"kind": "pin", "item_ids": ["i13", "i2", "i4"]})  # i13 is not available
    await switch.step(service)
    answer = await shown(client, filters={"exclude_items": ["i2"]}, explain=True)
    assert items(answer)[0] == "i4"
    assert not {"i13", "i2"} & set(items(answer))
    reasons = {each["reason"]: each["num_items"] for each in answer["removed"]}
    assert reasons["pinned_but_unavailable"] == reasons["pinned_but_excluded"] == 1


async def test_only_admins_see_and_change_rules_and_the_log_has_their_names(opened, config, tmp_path):
    service = opened[1]
    file = tmp_path / "keys.json"
    keys = {scope: add_key(file, f"{scope}er", [scope]) for scope in ("read", "write", "admin")}
    async for client in client_of(service, KeyAccess(file=str(file))):
        for scope, key in keys.items():
            headers = {"authorization": f"Bearer {key}"}
            answers = [
                await client.get("/v1/rules", headers=headers),
                await client.put("/v1/rules", headers=headers, json={"rules": [PIN], "after": 0}),
                await client.delete("/v1/rules", headers=headers),
            ]
            assert {answer.status_code for answer in answers} == {200 if scope == "admin" else 403}
    assert [service.rules.read(version).by for version in service.rules.versions()] == ["adminer", "adminer"]


async def test_one_bundle_alone_shows_its_rules_and_takes_no_others(tmp_path):
    from recsys.pipeline.config import PipelineConfig

    own = {"kind": "creator_cap", "num_items": 2}
    bundle = make_bundle(tmp_path, PipelineConfig.parse({"rules": [own]}, where="test"))
    config = ServeConfig(
        bundle_uri=str(bundle.path),
        access=OpenAccess(),
        topology="fused",
        event_store=SqliteEventStoreConfig(path=str(tmp_path / "events.sqlite")),
    )
    service = Service.open(config, {})
    async for client in client_of(service, config.access):
        told = (await client.get("/v1/rules")).json()
        assert told == {"version": 0, "answering": 0, "rules": [{"rule": own, "state": "holds"}], "changes": []}
        assert (await client.get("/v1/rules", params={"version": 1})).status_code == 404
        assert (await client.put("/v1/rules", json={"rules": [], "after": 0})).status_code == 409
        assert (await client.delete("/v1/rules")).status_code == 409
    service.close()


async def test_a_store_that_cannot_be_reached_says_503(client, monkeypatch):
    def broken(*_, **__):
        raise BundleError("no route to host")

    for name in ("append", "versions"):
        monkeypatch.setattr(f"recsys.bundle.rule_log.RuleLog.{name}", broken)
    answers = [
        await client.put("/v1/rules", json={"rules": [], "after": 0}),
        await client.get("/v1/rules"),
        await client.delete("/v1/rules"),
    ]
    assert [answer.status_code for answer in answers] == [503, 503, 503]
    assert all(answer.headers["retry-after"] for answer in answers)


async def test_too_many_calls_at_once_are_refused(opened, config, monkeypatch):
    def slow(*_, **__):
        time.sleep(0.2)
        return []

    monkeypatch.setattr("recsys.bundle.rule_log.RuleLog.versions", slow)
    monkeypatch.setattr("serve.live.rules.Turns", functools.partial(Turns, max_waiting=2))
    async for client in client_of(opened[1], config.access):
        answers = await asyncio.gather(*(client.get("/v1/rules") for _ in range(4)))
        assert sorted(answer.status_code for answer in answers) == [200, 200, 503, 503]
        assert (await client.get("/v1/rules")).status_code == 200


# --- through the switch -----------------------------------------------------------------------------------------------


async def test_items_and_rules_change_side_by_side(client, opened, bundles, store):
    switch, service = opened
    first, second = bundles[0].bundle_id, bundles[1].bundle_id
    item = {"item_id": "new", "title": "new", "categories": ["even"]}
    assert (await client.put("/v1/items", json={"items": [item]})).status_code == 200
    await switch.step(service)
    await put(client, PIN | {"item_ids": ["new"]})
    await switch.step(service)
    answer = await shown(client)
    assert (answer["bundle_id"], items(answer)[0]) == (f"{first}+1.1", "new")
    assert (await client.delete("/v1/items/new")).status_code == 200
    await switch.step(service)
    answer = await shown(client)
    assert answer["bundle_id"] == f"{first}+2.1"
    assert "new" not in items(answer)
    store.activate(second, first)
    await switch.step(service)
    assert service.current.bundle_id == f"{second}+2.1"
    assert service.current.own_rules == ()


async def test_a_request_keeps_the_rules_it_came_under(client, opened, monkeypatch):
    switch, service = opened
    before = service.current
    release = asyncio.Event()
    arecommend = before.recommender.arecommend

    async def held(request, **fields):
        await release.wait()
        return await arecommend(request, **fields)

    monkeypatch.setattr(before.recommender, "arecommend", held)
    waiting = asyncio.create_task(shown(client))
    await asyncio.sleep(0.01)
    await put(client, PIN)
    for _ in range(3):
        await switch.step(service)
        await switch.tidy(service)
    assert service.retired == [before]
    assert items(await shown(client))[0] == "i200"
    release.set()
    answer = await waiting
    assert answer["bundle_id"] == before.bundle_id
    assert items(answer)[0] != "i200"


async def test_a_trial_goes_on_and_both_answer_by_the_same_rules(client, opened, store, bundles):
    switch, service = opened
    first, second = bundles[0].bundle_id, bundles[1].bundle_id
    store.start_canary(second, 0.5)
    await switch.step(service)
    tallies = service.canary.generation.tally, service.current.tally
    await put(client, PIN)
    await switch.step(service)
    assert service.current.bundle_id == f"{first}+0.1"
    assert service.canary.generation.bundle_id == f"{second}+0.1"
    assert (service.canary.generation.tally, service.current.tally) == tallies
    for user in range(20):
        assert items(await shown(client, user_id=f"u{user}"))[0] == "i200"


async def test_rules_that_cannot_be_served_are_refused_and_the_rest_goes_on(client, opened, store, bundles, caplog):
    """As from a gateway with kinds that this one has not."""
    switch, service = opened
    first, second = bundles[0].bundle_id, bundles[1].bundle_id
    await put(client, PIN)
    await switch.step(service)
    store.rules.append([{"kind": "from the future"}], after=1, by="another")
    for _ in range(3):
        await switch.step(service)
    assert service.current.bundle_id == f"{first}+0.1"
    assert set(service.refused) == {f"{first}+0.2"}
    assert caplog.text.count(f"Bundle {first}+0.2 is refused") == 1
    told = (await client.get("/v1/rules")).json()
    assert (told["version"], told["answering"]) == (2, 1)
    assert [each["state"] for each in told["rules"]] == ["unusable"]
    # Items and Bundles are not held up by it.
    item = {"item_id": "new", "title": "new", "categories": ["fresh"]}
    assert (await client.put("/v1/items", json={"items": [item]})).status_code == 200
    await switch.step(service)
    assert service.current.bundle_id == f"{first}+1.1"
    store.activate(second, first)
    await switch.step(service)
    assert service.current.bundle_id == f"{second}+1.1"
    store.start_canary(first, 0.5)
    await switch.step(service)
    assert service.canary.generation.bundle_id == f"{first}+1.1"
    store.withdraw()
    await put(client, PIN, after=2)
    await switch.step(service)
    assert service.current.bundle_id == f"{second}+1.3"
    assert service.refused == {}


async def test_a_gateway_that_starts_has_the_rules_or_goes_without(config, store, bundles):
    first = bundles[0].bundle_id
    store.rules.append([PIN], after=0, by="a")
    service = await Switch(config, config.event_store.open(), {}).start()
    assert service.current.bundle_id == f"{first}+0.1"
    service.close()
    store.rules.append([{"kind": "from the future"}], after=1, by="a")
    service = await Switch(config, config.event_store.open(), {}).start()
    assert service.current.bundle_id == first
    assert "from the future" in service.refused[f"{first}+0.2"]
    service.close()


class Elsewhere:
    """Reranking as a deployment of its own: two replicas, each with a shelf."""

    name = "reranking"

    def __init__(self, uri):

        def build(bundle):
            return build_stage(self.name, Parts.of_bundle(bundle), pipeline_config(bundle))

        self.shelves = [Shelf(self.name, uri, build) for _ in range(2)]
        self.calls = 0

    async def hold(self, bundle_ids):
        return [shelf.hold(bundle_ids) for shelf in self.shelves]

    async def run(self, query, candidates):
        self.calls += 1
        stage = self.shelves[self.calls % 2].get(query.bundle_id)
        return StageOutput(stage.run_batch([query], [candidates])[0], query.bundle_id, 0.0)


async def test_reranking_elsewhere_turns_with_the_gateway(config, store, bundles):
    """No gateway answers by rules that a replica does not have yet; each call names what it goes by."""
    elsewhere = Elsewhere(str(store))
    graph = config.model_copy(update={"topology": "graph"})
    switches = [Switch(graph, graph.event_store.open(), {"reranking": elsewhere}) for _ in range(2)]
    services = [await switch.start() for switch in switches]
    first = bundles[0].bundle_id
    store.rules.append([PIN], after=0, by="a")
    await switches[0].step(services[0])
    request = RecommendRequest(top_k=3, deadline_ms=9000)
    for _ in range(2):
        (new, _), (old, _) = [await service.recommend(request) for service in services]
        assert (new.bundle_id, old.bundle_id) == (f"{first}+0.1", first)
        assert new.slate.provenance["reranking"] == new.bundle_id
        assert new.item_ids[0] == "i200" != old.item_ids[0]
        assert new.degraded == old.degraded == ()
    await switches[1].step(services[1])
    assert (await services[1].recommend(request))[0].item_ids[0] == "i200"
    for service in services:
        service.close()


def test_the_log_is_where_the_store_is(store):
    assert BundleStore(store.root.local).rules.append([PIN], after=0, by="a").version == 1
    assert live_id("x", *store.version()) == "x+0.1"


async def test_a_misspelled_query_changes_nothing(client):
    """``after`` guards a reset: taken for left out, it would let the reset pass."""
    await put(client, PIN)
    answer = await client.delete("/v1/rules", params={"afer": 0})
    assert answer.status_code == 422
    assert "afer" in answer.text
    assert (await client.get("/v1/rules", params={"versoin": 1})).status_code == 422
    assert (await client.get("/v1/rules")).json()["version"] == 1
