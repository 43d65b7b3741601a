"""The API keeps to its own OpenAPI description, whatever it is sent: schemathesis, all checks."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from recsys.bundle import BundleStore
from recsys.events.sqlite import SqliteEventStoreConfig
from recsys.testing.tiny_bundle import make_bundle
from serve.access.keys import SCOPES, add_key
from serve.config import GatewayConfig, KeyAccess, ServeConfig
from serve.http.routes import http_app
from serve.live.service import Service


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The application and a key that may do everything."""
    folder = tmp_path_factory.mktemp("schema")
    key = add_key(folder / "keys.json", "caller", SCOPES)
    config = ServeConfig(
        bundle_uri=str(make_bundle(folder).path),
        access=KeyAccess(file=str(folder / "keys.json")),
        topology="fused",
        event_store=SqliteEventStoreConfig(path=str(folder / "events.sqlite")),
        gateway=GatewayConfig(max_ongoing_requests=1000),
    )
    service = Service.open(config, {})
    service.current.proven = True
    service.items, service.rules = BundleStore(folder / "store").items, BundleStore(folder / "store").rules
    yield http_app(service, config.gateway, config.access), {"Authorization": f"Bearer {key}"}
    service.close()


OPERATIONS = (
    "POST /v1/recommend",
    "POST /v1/similar",
    "POST /v1/search",
    "POST /v1/events",
    "POST /v1/users/{user_id}/merge",
    "GET /v1/users/{user_id}",
    "GET /v1/items/{item_id}",
    "PUT /v1/items",
    "DELETE /v1/items/{item_id}",
    "GET /v1/rules",
    "PUT /v1/rules",
    "DELETE /v1/rules",
    "GET /v1/bundle",
    "GET /v1/traces/{request_id}",
    "GET /healthz",
    "GET /readyz",
)


@pytest.fixture(scope="module")
def operations(served):
    app, headers = served
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=headers)
    found = [result.ok() for result in schema.get_all_operations()]
    return {f"{each.method.upper()} {each.path}": each for each in found}


def test_every_operation_is_tried(operations):
    assert set(operations) == set(OPERATIONS)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["fits", "does not fit"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_answer_is_as_described(name, mode, operations, served):
    operation = operations[name]
    if mode is GenerationMode.NEGATIVE and not (operation.body or operation.path_parameters or operation.query):
        pytest.skip("there is nothing to send that does not fit")

    @settings(max_examples=30, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def answers(case):
        # What fits the description may still be refused: limits of the Bundle and the clock are no part of it.
        case.call_and_validate(headers=served[1], excluded_checks=[positive_data_acceptance])

    answers()
