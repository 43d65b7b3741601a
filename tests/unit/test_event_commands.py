"""Events in and out of files."""

import datetime as dt

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from jobs.events import app
from recsys.events import Event
from recsys.events.sqlite import SqliteEventStoreConfig
from recsys.testing.event_store_contract import seed_table


@pytest.fixture
def path(tmp_path):
    """A store with three events."""
    path = tmp_path / "events.sqlite"
    with SqliteEventStoreConfig(path=str(path)).open() as store:
        store.append([Event(str(i), "u", f"item {i}", "rating", 1000 + i, 4.0) for i in range(3)])
    return path


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_an_export_of_everything_is_a_backup(path, tmp_path):
    said = run("export", tmp_path / "all.parquet", "--events", path)
    watermark = said.split()[-1]
    assert said.startswith("3 events in ")
    other = tmp_path / "other.sqlite"
    assert run("restore", tmp_path / "all.parquet", "--events", other) == "3 events restored\n"
    with SqliteEventStoreConfig(path=str(other)).open() as store:
        assert store.watermark() > watermark
        assert store.user("u").item_ids == ("item 0", "item 1", "item 2")
    assert "not empty" in run("restore", tmp_path / "all.parquet", "--events", other, code=2)
    with SqliteEventStoreConfig(path=str(path)).open() as store:
        store.append([Event("late", "u", "x", "click", 1)])
    assert run("export", tmp_path / "new.parquet", "--events", path, "--after", watermark).startswith("1 events in ")
    assert pq.read_table(tmp_path / "new.parquet")["event_id"].to_pylist() == ["late"]
    assert "cannot read" in run("restore", tmp_path / "none.parquet", "--events", tmp_path / "x", code=2)
    assert "no export of a whole log" in run("restore", tmp_path / "new.parquet", "--events", tmp_path / "x", code=2)


def test_a_bulk_import_may_be_repeated_and_names_the_bad_row(path, tmp_path, monkeypatch):
    monkeypatch.setattr("recsys.events.exported.BATCH_ROWS", 2)
    when = [dt.datetime(2026, 1, 1 + day, tzinfo=dt.UTC) for day in range(5)]
    columns = {
        "event_id": ["2", "a", "b", "c", "d"],
        "user_id": ["u", "u", "v", "v", "v"],
        "item_id": ["x"] * 5,
        "event": ["view"] * 5,
        "timestamp": when,
        "price": [1.0] * 5,  # more than is asked for
    }
    source = tmp_path / "history.parquet"
    pq.write_table(pa.table(columns), source)
    assert run("import", source, "--events", path).endswith("4 events added, 1 were there already\n")
    assert run("import", source, "--events", path).endswith("0 events added, 5 were there already\n")
    pq.write_table(pa.table(columns | {"event_id": ["e", "f", "g", "", "h"]}), source)
    said = run("import", source, "--events", path, code=2)
    assert "row 3: event 1: event_id must be a non-empty string" in said
    assert "the 2 rows before row 2 are in the store" in said
    pq.write_table(pa.table({"event_id": ["1"]}), source)
    assert "events need the column 'user_id'" in run("import", source, "--events", path, code=2)
    source.write_text("this is no Parquet")
    assert "cannot read" in run("import", source, "--events", path, code=2)


def test_compaction_removes_what_the_bundle_has(path):
    with SqliteEventStoreConfig(path=str(path)).open() as store:
        store.seed("b", seed_table("u", ("item 0", 1000), ("item 1", 1001), ("item 2", 1002)), store.watermark())
    assert run("compact", "--events", path, "--days", "30") == "3 events removed\n"
    with SqliteEventStoreConfig(path=str(path)).open() as store:
        assert store.user("u").item_ids == ("item 0", "item 1", "item 2")


def test_a_place_that_cannot_be_is_named(tmp_path):
    assert "there is no event store here" in run("export", tmp_path / "a", "--events", tmp_path / "typo", code=2)
    assert not (tmp_path / "typo").exists()
    assert "there is no folder" in run("import", tmp_path / "a", "--events", tmp_path / "no" / "x", code=2)
    assert "max_histroy" in run("compact", "--events", __file__, "--set", "max_histroy=3", code=2)
    assert "cannot be opened" in run("compact", "--events", "redis://127.0.0.1:1/0", code=2)
