"""The HTTP side over a real small Bundle, all stages in process, no Ray."""

import asyncio
import json
import math
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import httpx
import pytest
import yaml
from fastapi import Body as BodyOf
from fastapi import Depends, FastAPI, HTTPException, Query, Response
from pydantic import BaseModel, Field

from recsys.errors import BundleMismatchError, ConfigError, EventStoreError
from recsys.events.sqlite import SqliteEventStoreConfig
from recsys.moments import milliseconds
from recsys.testing.tiny_bundle import START_MS, make_bundle
from serve import run
from serve.access.middleware import Access
from serve.config import GatewayConfig, OpenAccess, ServeConfig
from serve.fastpath import fast_path
from serve.http import middleware as middleware_module
from serve.http import wire
from serve.http.routes import QuickBody, http_app, needs
from serve.live.service import Service
from serve.problems import PROBLEM_JSON

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def config(bundle, tmp_path):
    return ServeConfig(
        bundle_uri=str(bundle.path),
        access=OpenAccess(),
        topology="fused",
        event_store=SqliteEventStoreConfig(path=str(tmp_path / "events.sqlite")),
        gateway=GatewayConfig(max_body_bytes=4096, max_events=3, max_ongoing_requests=4),
    )


@pytest.fixture
async def service(config):
    service = Service.open(config, {})
    await service.current.prove(30)
    yield service
    service.close()


@pytest.fixture
async def client(service, config):
    app = http_app(service, config.gateway, config.access)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            yield client


def now(**ago):
    return (datetime.now(UTC) - timedelta(**ago)).isoformat()


def event(event_id, item_id="i7", user_id="u1", **rest):
    return {"event_id": event_id, "user_id": user_id, "item_id": item_id, "event": "click", "timestamp": now()} | rest


def assert_problem(response, status, *words):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == PROBLEM_JSON
    body = response.json()
    assert body["status"] == status
    assert body["title"]
    assert len(body["request_id"]) == 32
    for word in words:
        assert word in body["detail"], body
    return body


async def test_recommend_answers_in_the_documented_form(client, bundle):
    response = await client.post("/v1/recommend", json={"user_id": "u1", "top_k": 5, "explain": True})
    assert response.status_code == 200
    answer = wire.RecommendAnswer.model_validate_json(response.content, strict=True)
    assert answer.bundle_id == bundle.bundle_id
    assert answer.user_id == "u1"
    assert [item.rank for item in answer.items] == [0, 1, 2, 3, 4]
    assert answer.degraded == []
    assert set(answer.timings_ms) == {"total", "state", "retrieval", "ranking", "reranking"}
    assert set(answer.items[0].stage_scores) >= {"retrieval", "ranking"}
    assert answer.items[0].reasons
    assert len(answer.request_id) == 32


async def test_an_event_counts_in_the_very_next_request(client):
    before = (await client.post("/v1/recommend", json={"user_id": "new", "top_k": 300})).json()
    assert any(item["item_id"] == "i7" for item in before["items"])
    assert (await client.get("/v1/users/new")).status_code == 404
    posted = await client.post("/v1/events", json={"events": [event("e1", user_id="new"), event("e1", user_id="new")]})
    assert posted.json() == {"accepted": 1, "duplicates": 1}
    after = (await client.post("/v1/recommend", json={"user_id": "new", "top_k": 300})).json()
    assert not any(item["item_id"] == "i7" for item in after["items"])
    known = wire.UserAnswer.model_validate_json((await client.get("/v1/users/new")).content)
    assert [(entry.item_id, entry.title, entry.event, entry.value) for entry in known.history] == [
        ("i7", "Item 7", "click", None)
    ]


async def test_history_filters_and_exclusions_are_obeyed(client):
    body = {
        "history": [{"item_id": "i2"}, {"item_id": "no such item", "timestamp": "2024-01-01T00:00:00+02:00"}],
        "top_k": 20,
        "filters": {"categories_any": ["even"], "exclude_items": ["i4"], "price_max": 100},
        "diversity": 0.5,
        "context": {"surface": "home"},
    }
    answer = (await client.post("/v1/recommend", json=body)).json()
    rows = [int(item["item_id"][1:]) for item in answer["items"]]
    assert len(rows) == 20
    assert all(row % 2 == 0 and row <= 100 for row in rows)
    assert not {2, 4} & set(rows)
    assert answer["unknown_items"] == 1


async def test_a_field_is_named_as_callers_know_it(client, service):
    recommender = service.current.recommender
    recommender.config = recommender.config.model_copy(update={"max_request_items": 2})
    body = {"filters": {"exclude_items": ["i1", "i2", "i3"]}}
    problem = assert_problem(await client.post("/v1/recommend", json=body), 422, "3 entries")
    assert [each["field"] for each in problem["errors"]] == ["body.filters.exclude_items"]


async def test_strangers_and_empty_bodies_are_answered(client):
    for body in ({}, {"user_id": "nobody knows me"}, {"history": []}):
        answer = await client.post("/v1/recommend", json=body)
        assert answer.status_code == 200
        assert len(answer.json()["items"]) == 10


async def test_similar(client):
    answer = (await client.post("/v1/similar", json={"item_id": "i3", "top_k": 4})).json()
    assert len(answer["items"]) == 4
    assert "i3" not in [item["item_id"] for item in answer["items"]]
    assert_problem(await client.post("/v1/similar", json={"item_id": "none"}), 404, "none")
    assert_problem(await client.post("/v1/similar", json={"item_id": "i3", "top_k": 10**9}), 422, "top_k")


async def test_look_ups(client, bundle):
    item = wire.CatalogueItemAnswer.model_validate_json((await client.get("/v1/items/i5")).content)
    assert (item.title, item.categories, item.price, item.available) == ("Item 5", ["odd"], 5.0, True)
    assert_problem(await client.get("/v1/items/nothing"), 404, "nothing")
    assert_problem(await client.get("/v1/users/nobody"), 404, "nobody")
    assert_problem(await client.get("/v1/items/%ff%00"), 422)
    known = wire.UserAnswer.model_validate_json((await client.get("/v1/users/u1")).content)
    assert known.history[0].timestamp == datetime.fromtimestamp(START_MS / 1e3, UTC).isoformat()
    answer = wire.BundleAnswer.model_validate_json((await client.get("/v1/bundle")).content)
    assert answer.bundle_id == bundle.bundle_id
    assert answer.manifest["num_items"] == 300
    assert "files" not in answer.manifest
    assert_problem(await client.get("/v2/nothing"), 404)
    assert_problem(await client.get("/v1/recommend"), 405)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_k": 10**9}, "top_k"),
        ({"top_k": 5000}, "top_k"),
        ({"top_k": "5"}, "top_k"),
        ({"top_k": 2.5}, "top_k"),
        ({"user_id": ""}, "user_id"),
        ({"user_id": 5}, "user_id"),
        ({"filters": {"category": "a"}}, "category"),
        ({"context": {"surface": "ho\0me"}}, "surface"),
        ({"filters": {"price_min": 2, "price_max": 1}}, "price_min"),
        ({"diversity": 1.5}, "diversity"),
        ({"deadline_ms": -1}, "deadline_ms"),
        ({"history": [{"item_id": "i1", "timestamp": 1700000000}]}, "timestamp"),
        ({"history": [{"item_id": "i1", "timestamp": "2024-01-01T00:00:00"}]}, "timestamp"),
        ({"unknown": 1}, "unknown"),
        ([], "body"),
    ],
)
async def test_unusable_requests_are_422_and_name_the_field(client, body, field):
    problem = assert_problem(await client.post("/v1/recommend", json=body), 422, field)
    assert any(field in each["field"] for each in problem["errors"])


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b'{"user_id": ', 400),
        (b"", 422),
        (b"\xff\xfe", 400),
        (b'{"diversity": NaN}', 422),
        (b'{"user_id": "\\ud800"}', 422),
        (b'{"\\ud800": 1}', 422),
        (b"[" * 4000, 400),
    ],
)
async def test_malformed_bodies_are_problems_and_never_500(client, content, status):
    headers = {"content-type": "application/json"}
    assert_problem(await client.post("/v1/recommend", content=content, headers=headers), status)


async def test_other_content_types_are_refused_by_name(client):
    assert_problem(await client.post("/v1/recommend", data={"a": "b"}), 415, "application/json")
    for path, body in (("/v1/recommend", {"top_k": 1}), ("/v1/events", {"events": [event("typed")]})):
        content, headers = json.dumps(body), {"content-type": "text/plain"}
        assert_problem(await client.post(path, content=content, headers=headers), 415, "application/json")


@pytest.mark.parametrize(
    ("content_type", "accepted"),
    [
        ("application/json", True),
        ("Application/JSON; charset=utf-8", True),
        ("application/vnd.shop+json", True),
        (None, True),
        ("text/plain; x=json", False),
        ("multipart/form-data; boundary=json", False),
        ("text/json", False),
        ("application/jsonlines", False),
        ("application/json, text/plain", False),
    ],
)
async def test_only_json_is_json(client, content_type, accepted):
    """What a web page may send without asking first is refused, whatever word is hidden in it."""
    headers = {} if content_type is None else {"content-type": content_type}
    for body in ({"top_k": 1}, {"top_k": 0}):
        response = await client.post("/v1/recommend", content=json.dumps(body).encode(), headers=headers)
        usable = 200 if body["top_k"] else 422
        assert response.status_code == (usable if accepted else 415), response.text


async def test_a_client_that_goes_away_in_mid_body_is_no_error_of_ours(client, service, config, caplog):
    sent = []
    messages = [{"type": "http.request", "body": b'{"top_k', "more_body": True}, {"type": "http.disconnect"}]

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/recommend",
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
        "server": ("gateway", 80),
        "client": ("127.0.0.1", 1),
    }
    await http_app(service, config.gateway, config.access)(scope, receive, send)
    assert [message["status"] for message in sent if "status" in message] == [400]
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_quick_body_takes_the_usual_way_where_an_endpoint_wants_more():
    class Body(BaseModel):
        number: int

    def deny():
        raise HTTPException(401)

    def app_with(*dependencies):
        app = FastAPI(dependencies=list(dependencies))
        app.router.route_class = QuickBody
        app.add_middleware(Access, config=OpenAccess())
        return app

    guarded, plain = app_with(Depends(deny)), app_with()

    async def echo(body: Body):
        return Response(str(body.number))

    for app in (guarded, plain):
        app.post("/", **needs("read"))(echo)

    @plain.post("/more/{name}", **needs("read"))
    async def more(name: str, body: Body, response: Response, size: Annotated[int, Query()] = 3):
        response.headers["x-name"] = name
        return {"number": body.number, "size": size}

    @plain.post("/list", **needs("read"))
    async def several(body: Annotated[list[Body], Field(max_length=1)]):
        return len(body)

    @plain.post("/embedded", **needs("read"))
    async def embedded(body: Annotated[Body, BodyOf(embed=True)]):
        return body.number

    async def ask(app, path, body):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://x") as client:
            return await client.post(path, json=body)

    assert (await ask(guarded, "/", {"number": 1})).status_code == 401
    assert (await ask(plain, "/", {"number": 1})).text == "1"
    assert (await ask(plain, "/", {"number": "x"})).status_code == 422
    answer = await ask(plain, "/more/anna?size=7", {"number": 1})
    assert (answer.json(), answer.headers["x-name"]) == ({"number": 1, "size": 7}, "anna")
    assert (await ask(plain, "/list", [{"number": 1}])).json() == 1
    assert (await ask(plain, "/list", [{"number": 1}] * 2)).status_code == 422
    assert (await ask(plain, "/embedded", {"body": {"number": 4}})).json() == 4
    assert (await ask(plain, "/embedded", {"number": 4})).status_code == 422


async def test_a_body_that_is_too_large_is_413_announced_or_not(client):
    large = json.dumps({"user_id": "x" * 5000}).encode()
    headers = {"content-type": "application/json"}
    assert_problem(await client.post("/v1/recommend", content=large, headers=headers), 413, "4096")

    async def chunks():
        for start in range(0, len(large), 1000):
            yield large[start : start + 1000]

    assert_problem(await client.post("/v1/recommend", content=chunks(), headers=headers), 413, "4096")


async def test_bad_events_are_refused_whole(client):
    batch = [event("fine", user_id="whole"), event("late", user_id="whole", timestamp=now(days=-3))]
    problem = assert_problem(await client.post("/v1/events", json={"events": batch}), 422, "event 1", "timestamp_ms")
    assert problem["errors"][0]["field"] == "body.events.1.timestamp"
    assert (await client.get("/v1/users/whole")).status_code == 404
    assert_problem(await client.post("/v1/events", json={"events": []}), 422, "events")
    assert_problem(
        await client.post("/v1/events", json={"events": [event(str(i)) for i in range(4)]}), 422, "at most 3"
    )


async def test_too_much_load_is_refused_early_with_retry_after(client, service, monkeypatch):
    release = asyncio.Event()
    arecommend = service.current.recommender.arecommend

    async def held(request, **fields):
        await release.wait()
        return await arecommend(request, **fields)

    monkeypatch.setattr(service.current.recommender, "arecommend", held)
    accepted = [asyncio.create_task(client.post("/v1/recommend", json={})) for _ in range(4)]
    await asyncio.sleep(0.05)
    refused = await client.post("/v1/recommend", json={})
    assert_problem(refused, 503, "try again")
    assert refused.headers["retry-after"] == "1"
    assert (await client.get("/healthz")).status_code == 200
    release.set()
    assert [response.status_code for response in await asyncio.gather(*accepted)] == [200] * 4
    assert (await client.post("/v1/recommend", json={})).status_code == 200


async def test_events_that_wait_for_the_disk_leave_room_for_recommendations(client, service, monkeypatch):
    release = threading.Event()
    append = service.store.append

    def held(events):
        release.wait(30)
        return append(events)

    monkeypatch.setattr(service.store, "append", held)
    sent = [client.post("/v1/events", json={"events": [event(str(number))]}) for number in range(4)]
    writing = [asyncio.create_task(each) for each in sent]
    answers = []
    while len(answers) < 2:  # half of the places
        done, _ = await asyncio.wait(writing, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        answers += [task.result() for task in done]
        writing = [task for task in writing if task not in done]
    for refused in answers:
        assert refused.headers["retry-after"] == "1"
        assert_problem(refused, 503, "wait for the event store already")
    assert (await client.post("/v1/recommend", json={})).status_code == 200
    release.set()
    assert [response.status_code for response in await asyncio.gather(*writing)] == [200, 200]
    assert (await client.post("/v1/events", json={"events": [event("9")]})).status_code == 200


async def test_a_gateway_that_is_behind_refuses_until_it_has_caught_up(client, monkeypatch):
    make = middleware_module.Limits.__init__

    def strict(self, app, config, observer):
        make(self, app, config.model_copy(update={"max_lag_ms": 100.0}), observer)

    monkeypatch.setattr(middleware_module.Limits, "__init__", strict)  # it is made at the first request
    monkeypatch.setattr(middleware_module, "_WATCH_S", 0.3)  # what was found stands so long
    assert (await client.post("/v1/recommend", json={})).status_code == 200
    time.sleep(0.6)  # noqa: ASYNC251 something keeps the loop from what is due
    await asyncio.sleep(0.005)
    assert (await client.post("/v1/recommend", json={})).status_code == 200, "a pause is no overload"
    time.sleep(0.6)  # noqa: ASYNC251
    await asyncio.sleep(0.005)
    refused = await client.post("/v1/recommend", json={})
    assert_problem(refused, 503, "more to do than time")
    assert refused.headers["retry-after"] == "1"
    assert (await client.get("/healthz")).status_code == 200
    await asyncio.sleep(0.4)
    assert (await client.post("/v1/recommend", json={})).status_code == 200


async def test_a_store_that_fails_is_503_for_events_and_degraded_for_recommendations(client, service, monkeypatch):
    def broken(*_):
        raise EventStoreError("the disk is full")

    monkeypatch.setattr(service.store, "append", broken)
    monkeypatch.setattr(service.store, "user", broken)
    monkeypatch.setattr(service.store, "watermark", broken)
    assert_problem(await client.post("/v1/events", json={"events": [event("1")]}), 503, "disk is full")
    assert_problem(await client.get("/readyz"), 503, "disk is full")
    answer = (await client.post("/v1/recommend", json={"user_id": "u1"})).json()
    assert answer["degraded"] == ["state"]
    assert len(answer["items"]) == 10


async def test_what_nobody_expected_is_a_problem_without_internals(client, service, monkeypatch):
    async def bug(*_, **__):
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(service.current.recommender, "arecommend", bug)
    response = await client.post("/v1/recommend", json={})
    assert_problem(response, 500)
    assert "secret" not in response.text


async def test_not_ready_before_the_golden_query_was_answered(config):
    service = Service.open(config, {})
    try:
        transport = httpx.ASGITransport(app=http_app(service, config.gateway, config.access))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            assert_problem(await client.get("/readyz"), 503, "golden")
            assert (await client.get("/healthz")).status_code == 200
            await service.current.prove(30)
            assert (await client.get("/readyz")).json() == {"status": "ready"}
    finally:
        service.close()


async def test_a_wrong_answer_to_the_golden_query_keeps_the_replica_out(service):
    golden = service.current.bundle.golden
    wrong = golden.model_copy(update={"scores": tuple(score + 1 for score in golden.scores)})
    service.current.bundle._parts["golden.json"] = wrong
    service.current.proven = False
    with pytest.raises(BundleMismatchError, match="golden"):
        await service.current.prove(30)
    assert not service.current.proven
    service.current.bundle._parts["golden.json"] = golden


async def test_a_bundle_of_ids_alone_cannot_be_searched(client):
    assert_problem(await client.post("/v1/search", json={"query": "a western"}), 422, "knows no words")
    assert_problem(await client.post("/v1/search", json={"query": ""}), 422, "query")


async def test_a_visitor_who_signs_in_keeps_what_they_did(client):
    await client.post("/v1/events", json={"events": [event("m1", user_id="visitor")]})
    merged = {"from_user_id": "visitor"}
    assert (await client.post("/v1/users/signed-in/merge", json=merged)).json() == {"accepted": 1, "duplicates": 0}
    assert (await client.post("/v1/users/signed-in/merge", json=merged)).json() == {"accepted": 0, "duplicates": 1}
    answer = (await client.post("/v1/recommend", json={"user_id": "signed-in", "top_k": 300})).json()
    assert not any(item["item_id"] == "i7" for item in answer["items"])
    assert_problem(await client.post("/v1/users/visitor/merge", json=merged), 422, "into themselves")
    assert_problem(await client.post("/v1/users/x/merge", json={}), 422, "from_user_id")


async def test_openapi_describes_every_call(client):
    api = (await client.get("/openapi.json")).json()
    assert set(api["paths"]) == {
        "/v1/recommend",
        "/v1/similar",
        "/v1/search",
        "/v1/events",
        "/v1/users/{user_id}",
        "/v1/users/{user_id}/merge",
        "/v1/items",
        "/v1/items/{item_id}",
        "/v1/rules",
        "/v1/bundle",
        "/v1/traces/{request_id}",
        "/healthz",
        "/readyz",
    }
    for path, calls in api["paths"].items():
        for call in calls.values():
            assert call["summary"], path
            assert call["responses"]["200"]["content"]["application/json"]["schema"], path
            assert call["security"] == [{"key": []}], path
            for status in ("401", "403", "422", "429"):
                assert PROBLEM_JSON in call["responses"][status]["content"], path
    assert api["components"]["schemas"]["RecommendBody"]["examples"]
    assert api["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert (await client.get("/docs")).status_code == 200


def test_milliseconds_are_exact():
    assert milliseconds(datetime(2024, 1, 1, 0, 0, 0, 123999, tzinfo=UTC)) == 1704067200123
    assert math.isclose(milliseconds(datetime.now(UTC)), time.time() * 1e3, abs_tol=1000)


def test_events_lie_beside_the_store_of_their_run(bundle, tmp_path):
    assert run._beside("runs/shop/bundles") == Path("runs/shop/events.sqlite").absolute()
    assert run._beside(str(bundle.path)) == bundle.path.parent.parent / "events.sqlite"
    with pytest.raises(ConfigError, match="--events"):
        run._beside("s3://bucket/bundles")


SMALLEST = {"bundle_uri": "x", "access": {"kind": "open"}}


def test_serve_config_refuses_what_makes_no_sense():
    with pytest.raises(ConfigError, match="access"):
        ServeConfig.parse({"bundle_uri": "x"}, where="test")
    with pytest.raises(ConfigError, match="min_replicas"):
        ServeConfig.parse(SMALLEST | {"ranking": {"min_replicas": 3, "max_replicas": 2}}, where="test")
    with pytest.raises(ConfigError, match="topology"):
        ServeConfig.parse(SMALLEST | {"topology": "star"}, where="test")
    with pytest.raises(ConfigError, match="max_batch_size"):
        ServeConfig.parse(SMALLEST | {"ranking": {"max_batch_size": 0}}, where="test")


@pytest.mark.parametrize("name", ["graph", "fused"])
def test_serve_files_are_valid_and_stay_on_loopback(name):
    from ray.serve.schema import ServeDeploySchema

    tree = yaml.safe_load((ROOT / "configs" / "serve" / f"{name}.yaml").read_text())
    schema = ServeDeploySchema.model_validate(tree)
    assert schema.http_options.host == "127.0.0.1"
    (application,) = schema.applications
    assert application.import_path == "serve.app:build"
    config = ServeConfig.parse(application.args, where=name)
    assert config.topology == name
    assert config.access.kind == "keys"


def test_the_fast_path_can_be_set_in_a_shell(tmp_path):
    program = f'eval "$({sys.executable} -m serve.fastpath --folder {tmp_path})" && env'
    printed = subprocess.run(["sh", "-c", program], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found = dict(line.split("=", 1) for line in printed.splitlines() if "=" in line)
    wanted = fast_path(tmp_path)
    assert {name for name in wanted if name in found} == set(wanted)
    ports = {"RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT"}  # free ones, others each time
    assert {name: found[name] for name in wanted.keys() - ports} == {
        name: wanted[name] for name in wanted.keys() - ports
    }
