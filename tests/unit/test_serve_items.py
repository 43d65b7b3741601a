"""Items over HTTP: put, changed, removed, and what every stage and every Bundle makes of it."""

import httpx
import pytest

from recsys.bundle.live import live_id
from recsys.errors import BundleError
from recsys.events.sqlite import SqliteEventStoreConfig
from recsys.pipeline.requests import RecommendRequest
from serve.config import CanaryLimits, GatewayConfig, OpenAccess, ServeConfig
from serve.http.routes import http_app
from serve.live import switch as switch_module
from serve.live.shelf import Shelf, open_bundle
from serve.live.switch import Switch


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(switch_module, "_LINGER_S", 0.0)


@pytest.fixture
def config(store, tmp_path):
    return ServeConfig(
        bundle_uri=str(store),
        access=OpenAccess(),
        topology="fused",
        event_store=SqliteEventStoreConfig(path=str(tmp_path / "events.sqlite")),
        gateway=GatewayConfig(max_items=3),
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
    app = http_app(opened[1], config.gateway, config.access)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            yield client


def item(item_id, **values):
    return {"item_id": item_id, "title": item_id, "categories": ["odd"]} | values


async def put(client, *items):
    answer = await client.put("/v1/items", json={"items": list(items)})
    assert answer.status_code == 200, answer.text
    return answer.json()["version"]


async def shown(client, **body):
    history = [{"item_id": "i0"}]
    answer = await client.post("/v1/recommend", json={"top_k": 200, "history": history, **body})
    assert answer.status_code == 200
    return answer.json()


async def test_an_item_comes_changes_and_goes(client, opened, bundles):
    switch, service = opened
    first = bundles[0].bundle_id
    fresh = {"categories_any": ["fresh"]}
    assert await put(client, item("new", categories=["fresh"], price=3.0), item("i7", categories=["fresh"])) == 1
    assert (await shown(client, filters=fresh))["bundle_id"] == first
    await switch.step(service)
    answer = await shown(client, filters=fresh)
    assert answer["bundle_id"] == live_id(first, 1) == (await client.get("/v1/bundle")).json()["bundle_id"]
    assert {each["item_id"] for each in answer["items"]} == {"new", "i7"}
    assert answer["degraded"] == []
    assert (await client.get("/v1/items/new")).json()["price"] == 3.0
    assert (await client.post("/v1/similar", json={"item_id": "new"})).status_code == 200

    assert await put(client, item("new", categories=["other"])) == 2
    await switch.step(service)
    assert [each["item_id"] for each in (await shown(client, filters=fresh))["items"]] == ["i7"]

    assert (await client.delete("/v1/items/new")).json() == {"version": 3}
    await switch.step(service)
    assert (await client.get("/v1/items/new")).status_code == 404
    assert (await client.delete("/v1/items/new")).status_code == 404
    assert "new" not in {each["item_id"] for each in (await shown(client))["items"]}
    assert await put(client, item("new")) == 4
    await switch.step(service)
    assert (await client.get("/v1/items/new")).status_code == 200
    await switch.tidy(service)
    await switch.tidy(service)
    assert service.retired == []


async def test_what_was_put_a_moment_ago_can_be_removed(client):
    await put(client, item("new"))
    assert (await client.delete("/v1/items/new")).json() == {"version": 2}
    assert (await client.delete("/v1/items/new")).status_code == 404
    assert (await client.delete("/v1/items/never")).status_code == 404


async def test_events_of_new_items_count(client, opened):
    switch, service = opened
    await put(client, item("new"))
    event = {"event_id": "e1", "user_id": "u1", "item_id": "new", "event": "click", "timestamp": "2025-01-01T00:00:00Z"}
    assert (await client.post("/v1/events", json={"events": [event]})).status_code == 200
    assert (await shown(client, user_id="u1"))["degraded"] == []
    await switch.step(service)
    answer = await shown(client, user_id="u1")
    assert answer["degraded"] == []
    assert "new" not in {each["item_id"] for each in answer["items"]}  # it was seen


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"items": []}, "items"),
        ({"items": [{"item_id": "a"}]}, "title"),
        ({"items": [item("a", price=-1)]}, "price"),
        ({"items": [item("a", colour="red")]}, "colour"),
        ({"items": [item("a\0")]}, "NUL"),
        ({"items": [item("a"), item("b"), item("a")]}, "items 0 and 2"),
        ({"items": [item(each) for each in "abcd"]}, "at most 3"),
    ],
)
async def test_what_is_no_item_is_refused_and_nothing_is_written(client, opened, body, field):
    answer = await client.put("/v1/items", json=body)
    assert answer.status_code == 422
    assert field in answer.text
    assert opened[1].items.version() == 0


async def test_one_bundle_alone_takes_no_changes(client, opened):
    opened[1].items = None
    assert (await client.put("/v1/items", json={"items": [item("a")]})).status_code == 409
    assert (await client.delete("/v1/items/i1")).status_code == 409


async def test_a_store_that_cannot_be_written_to_says_503(client, opened, monkeypatch):
    def broken(self, changes):
        raise BundleError("other writers were quicker")

    monkeypatch.setattr("recsys.bundle.changes.ItemLog.append", broken)
    answer = await client.put("/v1/items", json={"items": [item("a")]})
    assert answer.status_code == 503
    assert answer.headers["retry-after"]


async def test_another_bundle_has_the_changes_too(client, opened, store, bundles):
    switch, service = opened
    await put(client, item("new"))
    await switch.step(service)
    first, second = bundles[0].bundle_id, bundles[1].bundle_id
    store.activate(second, first)
    await switch.step(service)
    assert service.current.bundle_id == live_id(second, 1)
    assert (await client.get("/v1/items/new")).status_code == 200


async def test_a_canary_goes_on_through_a_change(client, opened, store, bundles):
    switch, service = opened
    first, second = bundles[0].bundle_id, bundles[1].bundle_id
    store.start_canary(second, 0.5)
    await switch.step(service)
    canary, current = service.canary, service.current
    concerned = [f"u{n}" for n in range(50) if canary.concerns(f"u{n}")]
    await put(client, item("new"))
    await switch.step(service)
    assert service.canary.generation.bundle_id == live_id(second, 1)
    told = (await client.get("/v1/bundle")).json()
    assert told["canary"] == {"bundle_id": live_id(second, 1), "share": 0.5}
    assert service.current.bundle_id == live_id(first, 1)
    assert service.canary.generation.tally is canary.generation.tally
    assert service.current.tally is current.tally
    assert [f"u{n}" for n in range(50) if service.canary.concerns(f"u{n}")] == concerned
    answer, generation = await service.recommend(RecommendRequest(user_id=concerned[0]))
    assert answer.bundle_id == generation.bundle_id == live_id(second, 1)
    store.promote()
    await switch.step(service)
    assert service.canary is None
    assert service.current.bundle_id == live_id(second, 1)
    await switch.tidy(service)
    await switch.tidy(service)
    assert service.retired == []


async def test_a_bundle_is_proven_before_its_changes(config, store, bundles, monkeypatch):
    """A server that starts when there are changes already does not take the Bundle's own word for it."""
    from serve.live.items import changes_of

    store.items.append(changes_of([item("new") | NOTHING], bundles[0]))
    real = switch_module.open_bundle

    def opened(uri, bundle_id):
        found = real(uri, bundle_id)
        if bundle_id == bundles[0].bundle_id:
            golden = found.golden
            found._parts["golden.json"] = golden.model_copy(update={"scores": tuple(s + 1 for s in golden.scores)})
        return found

    monkeypatch.setattr(switch_module, "open_bundle", opened)
    switch = Switch(config, config.event_store.open(), {})
    with pytest.raises(BundleError, match="answered wrongly"):
        await switch.start()
    monkeypatch.setattr(switch_module, "open_bundle", real)
    service = await Switch(config, switch._store, {}).start()
    assert service.current.bundle_id == live_id(bundles[0].bundle_id, 1)
    service.close()


NOTHING = {"description": None, "creator": None, "price": None, "created_at": None, "available": True, "image": None}


def test_a_stage_loads_versions_over_one_bundle(store, bundles):
    from serve.live.items import changes_of

    store.items.append(changes_of([item("new") | NOTHING], bundles[0]))
    shelf = Shelf("retrieval", str(store), lambda bundle: bundle)
    first = bundles[0].bundle_id
    assert shelf.get(live_id(first, 1)).version == 1
    store.items.append(changes_of([item("newer") | NOTHING], bundles[0]))
    while shelf.hold([live_id(first, 2)])[live_id(first, 2)].state == "loading":
        pass
    assert shelf.get(live_id(first, 2)).base is shelf.get(live_id(first, 1)).base
    assert open_bundle(str(store), first).bundle_id == first
