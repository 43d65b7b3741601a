"""Every kind of event store keeps the contract, and every kind of log can be read from wherever one has come to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from recsys import schema
from recsys.errors import EventStoreError
from recsys.events import KINDS, LOG_KINDS, EventLog, EventLogConfig, EventStore
from recsys.testing.event_store_contract import EventStoreContract, click
from recsys.testing.redis_server import sample_server
from recsys.testing.samples import sample_of


@pytest.fixture(autouse=True, scope="module")
def _servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with sample_server(tmp_path_factory.mktemp("redis")):
        yield


class TestEveryKind(EventStoreContract):
    @pytest.fixture(autouse=True, scope="class", params=KINDS.names)
    @classmethod
    def _sample(cls, request: pytest.FixtureRequest) -> None:
        cls.kind = KINDS.get(request.param)


@pytest.fixture(params=LOG_KINDS.names)
def config(request: pytest.FixtureRequest, tmp_path: Path) -> EventLogConfig:
    return sample_of(LOG_KINDS.get(request.param), tmp_path)


@pytest.fixture
def log(config: EventLogConfig) -> Iterator[EventLog]:
    with config.open() as log:
        if isinstance(log, EventStore):
            log.append([click("1"), click("2", "other")])
        yield log


def test_a_log_is_read_up_to_its_watermark_and_no_other(log: EventLog) -> None:
    whole = pa.concat_tables(log.log())
    assert len(whole) > 0
    assert whole.schema == schema.EVENT_LOG
    positions = whole["position"].to_pylist()
    assert positions == sorted(set(positions))
    log_id, _, end = log.watermark().rpartition(":")
    assert int(end) == positions[-1]
    assert log.compacted() < positions[0]
    assert list(log.log(log.watermark())) == []
    before = f"{log_id}:{positions[-1] - 1}"
    assert [position for table in log.log(before) for position in table["position"].to_pylist()] == positions[-1:]
    with pytest.raises(EventStoreError, match="one of another log"):
        list(log.log("elsewhere:0"))
    with pytest.raises(EventStoreError, match="behind the end"):
        list(log.log(f"{log_id}:{positions[-1] + 1}"))


def test_a_log_may_be_closed_twice(log: EventLog) -> None:
    log.close()
    log.close()


def test_a_configuration_survives_a_round_trip(config: EventLogConfig) -> None:
    assert LOG_KINDS.parse(config.model_dump(mode="json"), where="test") == config


def test_every_setting_is_described() -> None:
    for kind in LOG_KINDS.classes:
        for name, field in kind.model_fields.items():
            assert name == "kind" or field.description, f"{kind.__name__}.{name} has no description"
