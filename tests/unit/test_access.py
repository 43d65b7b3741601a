"""API keys: who comes in, who does not, and what the file and the logs tell."""

import base64
import json
import logging
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from starlette.routing import Route
from typer.testing import CliRunner

from recsys.errors import ConfigError
from recsys.events.sqlite import SqliteEventStoreConfig
from recsys.testing.tiny_bundle import make_bundle
from serve.access import keys as keys_module
from serve.access.keys import SCOPES, ApiKey, KeyFile, Keys, add_key, revoke_keys, rotate_keys
from serve.access.middleware import Access, Rates
from serve.config import KeyAccess, OpenAccess, ServeConfig
from serve.graph.deployments import refuse_open_network
from serve.http.routes import Guarded, http_app
from serve.keys import app
from serve.live.service import Service
from serve.problems import PROBES, PROBLEM_JSON


@pytest.fixture(autouse=True)
def look_at_once(monkeypatch):
    monkeypatch.setattr(keys_module, "CHECK_EVERY_S", 0.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys.json"


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("access")
    bundle = make_bundle(folder)
    config = ServeConfig(
        bundle_uri=str(bundle.path),
        topology="fused",
        access=OpenAccess(),
        event_store=SqliteEventStoreConfig(path=str(folder / "events.sqlite")),
    )
    service = Service.open(config, {})
    service.current.proven = True
    yield service, config
    service.close()


def gateway(service, access):
    opened, config = service
    return http_app(opened, config.gateway, access)


def asking(app, key=None, **headers):
    if key is not None:
        headers["authorization"] = f"Bearer {key}"
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://gateway", headers=headers)


def calls(app: FastAPI):
    """A request to every route there is."""
    for route in app.routes:
        assert isinstance(route, Route | Guarded)
        for method in route.methods:
            yield method, route.path.replace("{user_id}", "u1").replace("{item_id}", "i1"), route


async def test_nobody_comes_in_without_a_valid_key(service, path):
    revoked, expired = add_key(path, "old", SCOPES), add_key(path, "late", SCOPES)
    expires = datetime.now(UTC) - timedelta(seconds=1)
    late = KeyFile.read(path).keys[1].model_copy(update={"expires_at": expires})
    path.write_text(KeyFile(keys=(late,)).model_dump_json())
    good = add_key(path, "good", SCOPES)
    app = gateway(service, KeyAccess(file=str(path)))
    wrong = good[:-1] + ("A" if good[-1] != "A" else "B")
    secret = good.split("_", 2)[2]
    swapped = f"rk_{late.key_id}_{secret}"
    for key in (None, "", "x", "rk", "rk__", revoked, expired, wrong, swapped, good + "x", good[3:]):
        async with asking(app, key) as client:
            for method, url, _ in calls(app):
                answer = await client.request(method, url)
                assert answer.status_code == 401, (key, url)
                assert answer.headers["www-authenticate"].startswith("Bearer")
                assert answer.headers["content-type"] == PROBLEM_JSON
                assert answer.json()["request_id"]
                assert secret not in answer.text
    async with asking(app, good) as client:
        assert (await client.get("/v1/bundle")).status_code == 200
        assert (await client.get("/no/such/path")).status_code == 404
    async with asking(app) as client:
        assert (await client.get("/no/such/path")).status_code == 401
    twice = [("authorization", f"Bearer {good}"), ("authorization", f"Bearer {good}")]
    no_text = {b"authorization": b"Bearer rk_\xff_\xff"}
    async with asking(app) as client:
        assert (await client.get("/v1/bundle", headers=twice)).status_code == 401
        assert (await client.get("/v1/bundle", headers=no_text)).status_code == 401


async def test_every_route_needs_a_scope_and_a_key_without_it_is_refused(service, path):
    app = gateway(service, KeyAccess(file=str(path_with_keys(path))))
    by_scope = {scope: add_key(path, scope, [scope]) for scope in SCOPES}
    needed = {route.path: route.needed for _, _, route in calls(app)}
    assert needed["/v1/events"] == "write"
    assert needed["/v1/recommend"] == "read"
    for method, url, route in calls(app):
        for scope, key in by_scope.items():
            async with asking(app, key) as client:
                status = (await client.request(method, url)).status_code
            assert (status == 403) == (scope != route.needed), (scope, url, status)


def path_with_keys(path):
    add_key(path, "somebody", ["read"])
    return path


def test_a_route_that_says_no_scope_cannot_be_made():
    app = FastAPI()
    app.router.route_class = Guarded
    with pytest.raises(ConfigError, match="/all does not say which scope"):
        app.get("/all")(lambda: None)


async def test_without_the_middleware_nobody_comes_in(service):
    app = gateway(service, OpenAccess())
    app.user_middleware = [each for each in app.user_middleware if each.cls is not Access]
    async with asking(app) as client:
        assert (await client.get("/v1/bundle")).status_code == 500


async def test_probes_answer_without_a_key_where_that_was_chosen(service, path):
    app = gateway(service, KeyAccess(file=str(path_with_keys(path)), open_probes=True))
    async with asking(app) as client:
        for probe in PROBES:
            assert (await client.get(probe)).status_code == 200
        assert (await client.get("/v1/bundle")).status_code == 401


async def test_open_access_asks_for_nothing(service):
    app = gateway(service, OpenAccess())
    async with asking(app) as client:
        assert (await client.get("/v1/bundle")).status_code == 200
        assert (await client.post("/v1/recommend", json={})).status_code == 200


def test_open_access_is_for_the_loopback_interface():
    for host in ("127.0.0.1", "localhost", "::1"):
        refuse_open_network(host)
    for host in ("0.0.0.0", "::", "10.0.0.1", "", None):
        with pytest.raises(ConfigError, match="asks for no API key"):
            refuse_open_network(host)


async def test_a_browser_may_read_the_documentation_and_send_nothing(service, path):
    key = add_key(path, "me", SCOPES)
    app = gateway(service, KeyAccess(file=str(path)))
    basic = "Basic " + base64.b64encode(f"anybody:{key}".encode()).decode()
    async with asking(app, authorization=basic) as client:
        assert (await client.get("/docs")).status_code == 200
        assert (await client.get("/openapi.json")).status_code == 200
        assert (await client.post("/v1/recommend", json={})).status_code == 401
    for broken in ("Basic !", "Basic " + base64.b64encode(b"\xff\xfe").decode(), "Digest x", "Basic"):
        async with asking(app, authorization=broken) as client:
            assert (await client.get("/docs")).status_code == 401


async def test_revoking_and_rotating_need_no_restart(service, path):
    first = add_key(path, "shop", ["read"], requests_per_s=1000.0, burst=7)
    app = gateway(service, KeyAccess(file=str(path)))

    async def status(key):
        async with asking(app, key) as client:
            return (await client.get("/v1/bundle")).status_code

    assert await status(first) == 200
    second = rotate_keys(path, "shop", timedelta(hours=1))
    assert (await status(first), await status(second)) == (200, 200)
    third = rotate_keys(path, "shop", timedelta(0))
    assert [await status(key) for key in (first, second, third)] == [401, 401, 200]
    kept = {(key.scopes, key.requests_per_s, key.burst) for key in KeyFile.read(path).keys}
    assert kept == {(("read",), 1000.0, 7)}
    path.chmod(0o640)
    assert revoke_keys(path, "shop") == 3
    assert path.stat().st_mode & 0o777 == 0o640  # whoever may read it still may
    assert await status(third) == 401


def test_a_rotated_key_lives_as_long_as_the_one_before(path):
    now = datetime.now(UTC)
    add_key(path, "shop", ["read"], expires_at=now + timedelta(days=90))
    rotate_keys(path, "shop", timedelta(hours=1))
    old, new = KeyFile.read(path).keys
    assert old.expires_at - now == pytest.approx(timedelta(hours=1), abs=timedelta(minutes=1))
    assert new.expires_at - now == pytest.approx(timedelta(days=90), abs=timedelta(minutes=1))


async def test_websockets_are_closed(service, path):
    app = gateway(service, KeyAccess(file=str(path_with_keys(path))))
    sent = []

    async def send(message):
        sent.append(message)

    await app({"type": "websocket", "path": "/v1/recommend", "headers": []}, None, send)
    assert sent == [{"type": "websocket.close", "code": 1008}]


async def test_a_file_that_breaks_locks_nobody_out(service, path, caplog):
    key = add_key(path, "me", ["read"])
    app = gateway(service, KeyAccess(file=str(path)))
    async with asking(app, key) as client:
        assert (await client.get("/v1/bundle")).status_code == 200
    for broken in ("{", '{"version": 2}', None):
        path.unlink() if broken is None else path.write_text(broken)
        caplog.clear()
        async with asking(app, key) as client:
            assert (await client.get("/v1/bundle")).status_code == 200
        assert "the API keys stay as they were" in caplog.text
    add_key(path, "other", ["read"])
    async with asking(app, key) as client:
        assert (await client.get("/v1/bundle")).status_code == 401


def test_a_gateway_without_a_file_of_keys_does_not_start(path, tmp_path):
    with pytest.raises(ConfigError, match=r"recsys keys add"):
        Keys(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match=r"keys\.json"):
        Keys(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys(tmp_path)


async def test_no_secret_in_file_or_log(service, path, caplog):
    caplog.set_level(logging.DEBUG)
    key = add_key(path, "me", ["read"])
    secret = key.split("_", 2)[2]
    app = gateway(service, KeyAccess(file=str(path)))
    async with asking(app, key) as client:
        await client.get("/v1/bundle")
        await client.post("/v1/events", json={})
    async with asking(app, key + "x") as client:
        await client.get("/v1/bundle")
    assert "refused, 401" in caplog.text
    ours = [record.getMessage() for record in caplog.records]
    assert not any(secret in message for message in ours)
    assert secret not in path.read_text()
    assert path.stat().st_mode & 0o077 == 0


async def test_a_key_keeps_to_its_rate(service, path):
    key = add_key(path, "slow", ["read"], requests_per_s=0.5, burst=3)
    app = gateway(service, KeyAccess(file=str(path)))
    async with asking(app, key) as client:
        answers = [await client.get("/healthz") for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    assert int(answers[3].headers["retry-after"]) == 2
    async with asking(gateway(service, KeyAccess(file=str(path))), key) as client:  # another gateway, the same rate
        assert (await client.get("/healthz")).status_code == 429
        other = add_key(path, "other", ["read"])
        assert (await client.get("/healthz", headers={"authorization": f"Bearer {other}"})).status_code == 200


def entry(rate, burst):
    tree = {"key_id": "0" * 16, "name": "x", "sha256": "0" * 64, "scopes": ["read"], "created_at": datetime.now(UTC)}
    return ApiKey.parse(tree | {"requests_per_s": rate, "burst": burst}, where="test")


def test_rates(tmp_path):
    now = 1000.0
    rates = Rates(tmp_path / "rates", clock=lambda: now)
    key = entry(10.0, 5)
    admitted = 0
    for _ in range(1000):  # ten seconds, ten times too fast
        admitted += rates.wait_s(key) == 0
        now += 0.01
    assert admitted == pytest.approx(10 * 10 + 4, abs=1)
    while not (wait_s := rates.wait_s(key)):
        admitted += 1
    now += wait_s / 2
    assert rates.wait_s(key) == pytest.approx(wait_s / 2)
    now += wait_s / 2
    assert rates.wait_s(key) == 0
    assert rates.wait_s(key) > 0
    now = 5.0  # the machine has been started again
    assert [rates.wait_s(key) == 0 for _ in range(6)] == [True] * 5 + [False]
    assert rates.wait_s(entry(None, 1)) == 0


def two_processes(program, *arguments):
    """What two interpreters print that run ``program`` at once."""
    command = [sys.executable, "-c", program, *arguments]
    running = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in ("a", "b")]
    printed = [each.communicate(timeout=60)[0] for each in running]
    assert [each.returncode for each in running] == [0, 0]
    return printed


def test_processes_share_a_rate(tmp_path):
    program = """
import sys
from pathlib import Path
from serve.access.middleware import Rates
from serve.access.keys import ApiKey
rates, key = Rates(Path(sys.argv[1])), ApiKey.model_validate_json(sys.argv[2])
print(sum(rates.wait_s(key) == 0 for _ in range(20_000)))
"""
    admitted = two_processes(program, str(tmp_path / "rates"), entry(0.001, 5000).model_dump_json())
    assert sum(map(int, admitted)) == 5000


def test_rates_lie_in_a_folder_of_ones_own(tmp_path, monkeypatch):
    folder = tmp_path / "rates"
    rates = Rates(folder)
    assert not folder.exists()  # nobody needs it yet
    assert rates.wait_s(entry(1.0, 1)) == 0
    assert folder.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(ConfigError, match="belongs to somebody else"):
        Rates(folder)


def test_unknown_ids_are_compared_like_known_ones(path, monkeypatch):
    key_id = add_key(path, "me", ["read"]).split("_")[1]
    keys = Keys(path)
    compared = []
    monkeypatch.setattr(keys_module.hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))))
    for presented in (f"rk_{key_id}_wrong", f"rk_{'0' * 16}_wrong", "nothing like a key"):
        assert keys.find(presented) is None
    assert compared == [(64, 64)] * 3


def test_wrong_settings_are_named(path):
    for wrong, word in (
        ({"name": "a b"}, "name"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["all"]}, "scopes"),
        ({"burst": 0}, "burst"),
        ({"requests_per_s": -1}, "requests_per_s"),
        ({"colour": "red"}, "colour"),
    ):
        with pytest.raises(ConfigError, match=word):
            add_key(path, **{"name": "me", "scopes": ["read"], **wrong})
    assert not path.exists()
    with pytest.raises(ConfigError, match="nobody"):
        revoke_keys(path_with_keys(path), "nobody")
    with pytest.raises(ConfigError, match="nobody"):
        rotate_keys(path, "nobody", timedelta(0))
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(tree | {"keys": tree["keys"] * 2}))
    with pytest.raises(ConfigError, match="same key_id"):
        Keys(path)


def test_editors_at_once_lose_nothing(path):
    program = """
import sys
from serve.access.keys import add_key
for _ in range(20):
    add_key(sys.argv[1], sys.argv[2], ["read"])
"""
    two_processes(program, str(path))
    assert sorted(key.name for key in KeyFile.read(path).keys) == ["a"] * 20 + ["b"] * 20


def test_command_line(path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run = CliRunner().invoke
    file = ["--file", str(path)]
    limits = ["--days", "30", "--requests-per-s", "5"]
    made = run(app, ["add", "me", "--scope", "read", "--scope", "write", *limits, *file])
    key = made.stdout.strip()
    found = Keys(Path(path)).find(key)
    assert found is not None
    assert found.scopes == ("read", "write")
    assert found.requests_per_s == 5
    assert found.expires_at - found.created_at == pytest.approx(timedelta(days=30), abs=timedelta(minutes=1))
    rotated = run(app, ["rotate", "me", "--grace-hours", "0", *file]).stdout.strip()
    assert Keys(path).find(key) is None
    assert Keys(path).find(rotated) is not None
    listed = run(app, ["list", *file]).stdout
    assert listed.count("read write") == 2
    assert rotated.split("_", 2)[2] not in listed
    assert "2 removed" in run(app, ["revoke", "me", *file]).stdout
    gone = run(app, ["revoke", "me", *file])
    assert gone.exit_code == 2
    assert "no key has the name or id 'me'" in gone.stderr
