"""Preparation as a whole: order, numbering, duplicates, filters, counts, errors, and what is on disk."""

from __future__ import annotations

import datetime as dt
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from jobs.steps.prepare import run
from recsys import schema
from recsys.data.config import DataConfig
from recsys.data.dataset import Dataset, Split
from recsys.data.id_map import fingerprint_ids
from recsys.data.prepare import PreparationReport, prepare
from recsys.errors import ConfigError, EmptyDataError, NoTimeError, SchemaError
from recsys.files import read_json

LOG = """user,item,time,stars
u2,b,50,5
u1,a,10,4
u1,c,30,5
u1,a,10,4
u1,b,10,1
u2,zz,60,4
u3,a,70,5
,a,70,5
u3,c,80,4
u3,d,90,oops
u1,d,100,5
u2,d,110,4
"""
ITEMS = "item_id,title\nd,Dee\nnever,Never seen\na,Ay\nb,\nc,See\n"


def config(folder: Path, log: str = LOG, items: str | None = ITEMS, **settings: Any) -> DataConfig:
    (folder / "log.csv").write_text(log)
    source: dict[str, Any] = {
        "kind": "csv",
        "path": str(folder / "log.csv"),
        "columns": {"user_id": "user", "item_id": "item", "timestamp": "time", "value": "stars"},
        "timestamp_unit": "s",
        "event": "rating",
    }
    if items is not None:
        (folder / "items.csv").write_text(items)
        source["catalogue"] = {"path": str(folder / "items.csv")}
    split = {"kind": "global_time", "valid_fraction": 0.3, "test_fraction": 0.2}
    return DataConfig.parse({"source": source, "split": split, **settings}, where="test")


def report(folder: Path) -> PreparationReport:
    return PreparationReport.parse(read_json(folder / "preparation.json"), where="test")


def test_prepared_dataset_row_by_row(tmp_path: Path) -> None:
    dataset = prepare(config(tmp_path), 0, tmp_path / "out")
    assert dataset.users[schema.USER_ID].to_pylist() == ["u2", "u1", "u3"], "by first accepted row"
    assert dataset.items["item_id"].to_pylist() == ["d", "never", "a", "b", "c", "zz"], "catalogue, then the unknown"
    assert dataset.items["title"].to_pylist() == ["Dee", "Never seen", "Ay", "b", "See", "zz"]
    rows = [
        tuple(row[name] if name != "timestamp" else int(row[name].timestamp()) for name in row if name != "event")
        for row in dataset.interactions.to_pylist()
    ]
    assert rows == [
        (0, 3, 50, 0, 5.0, 1.0, Split.TRAIN),
        (0, 5, 60, 1, 4.0, 1.0, Split.VALID),
        (0, 0, 110, 2, 4.0, 1.0, Split.TEST),
        (1, 2, 10, 0, 4.0, 1.0, Split.TRAIN),
        (1, 3, 10, 1, 1.0, 0.0, Split.TRAIN),
        (1, 4, 30, 2, 5.0, 1.0, Split.TRAIN),
        (1, 0, 100, 3, 5.0, 1.0, Split.TEST),
        (2, 2, 70, 0, 5.0, 1.0, Split.VALID),
        (2, 4, 80, 1, 4.0, 1.0, Split.VALID),
    ]
    assert dataset.interactions.schema.equals(schema.PREPARED_INTERACTIONS)
    assert dataset.items.schema.equals(schema.ITEMS)


def test_counts_and_quarantine_tell_where_every_row_went(tmp_path: Path) -> None:
    dataset = prepare(config(tmp_path), 0, tmp_path / "out")
    told = report(tmp_path / "out")
    assert told.num_read == 12
    assert told.num_accepted == len(dataset.interactions) == dataset.info.num_interactions == 9
    assert told.quarantined == {"duplicate row": 1, "missing user_id": 1, "value is not a number": 1}
    assert (told.num_items_added, told.num_items_untitled) == (1, 1)
    assert dataset.info.num_quarantined == 3
    assert dataset.info.num_positives == 8
    assert dataset.info.counts_by_split == {"train": 4, "valid": 3, "test": 2}
    table = pq.read_table(tmp_path / "out" / "quarantine.parquet").sort_by("row").to_pylist()
    assert [(row["row"], row["reason"]) for row in table] == [
        (3, "duplicate row"),
        (7, "missing user_id"),
        (9, "value is not a number"),
    ]
    assert table[2]["value"] == "oops"
    assert (table[0]["user_id"], table[0]["item_id"]) == ("u1", "a")


def test_the_log_tells_where_every_row_went(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="recsys")
    prepare(config(tmp_path, filters={"min_user_interactions": 3}), 0, tmp_path / "out")
    told, counts = caplog.text, report(tmp_path / "out")
    assert f"{counts.num_accepted} of {counts.num_read} rows accepted" in told
    for counted in (counts.quarantined, counts.filtered, counts.quarantined_items):
        for reason, count in counted.items():
            assert not count or f"{count} x {reason}" in told
    assert str(tmp_path / "out" / "quarantine.parquet") in told


def test_saved_dataset_loads_equal_and_is_deterministic(tmp_path: Path) -> None:
    settings = config(tmp_path)
    dataset = prepare(settings, 0, tmp_path / "one")
    loaded = Dataset.load(tmp_path / "one")
    assert loaded.info == dataset.info
    again = prepare(settings, 0, tmp_path / "two")
    for table in ("interactions", "items", "users"):
        assert getattr(loaded, table).equals(getattr(dataset, table))
        assert getattr(again, table).equals(getattr(dataset, table))
    assert again.info == dataset.info


def test_where_the_files_lie_makes_no_difference(tmp_path: Path) -> None:
    fingerprints = set()
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        fingerprints.add(prepare(config(tmp_path / name), 0, tmp_path / name / "out").info.fingerprint)
    assert len(fingerprints) == 1


def test_fingerprints_follow_content_configuration_and_items(tmp_path: Path) -> None:
    first = prepare(config(tmp_path), 0, tmp_path / "out").info
    changed = prepare(config(tmp_path, LOG + "u3,a,120,5\n"), 0, tmp_path / "out").info
    assert changed.fingerprint != first.fingerprint
    assert changed.id_map_fingerprint == first.id_map_fingerprint
    renamed = prepare(config(tmp_path, items=ITEMS.replace("never", "rarely")), 0, tmp_path / "out").info
    assert renamed.id_map_fingerprint != first.id_map_fingerprint
    assert fingerprint_ids(renamed_ids := Dataset.load(tmp_path / "out").items["item_id"]) != ""
    assert fingerprint_ids(renamed_ids) == renamed.id_map_fingerprint


def test_only_items_with_interactions_on_demand(tmp_path: Path) -> None:
    dataset = prepare(config(tmp_path, catalogue="interacted"), 0, tmp_path / "out")
    assert dataset.items["item_id"].to_pylist() == ["d", "a", "b", "c", "zz"]
    assert report(tmp_path / "out").num_items_left_out == 1
    assert dataset.items["item_id"].take(dataset.interactions["item_idx"]).to_pylist()[:2] == ["b", "zz"]


def test_without_catalogue_items_come_from_the_interactions(tmp_path: Path) -> None:
    dataset = prepare(config(tmp_path, items=None), 0, tmp_path / "out")
    assert dataset.items["item_id"].to_pylist() == ["b", "a", "c", "zz", "d"]
    assert dataset.items["title"].to_pylist() == dataset.items["item_id"].to_pylist()


def test_core_filter_repeats_until_both_bounds_hold(tmp_path: Path) -> None:
    log = "user,item,time,stars\n" + "".join(
        f"{user},{item},{time},5\n"
        for time, (user, item) in enumerate(
            [("u1", "a"), ("u2", "a"), ("u1", "b"), ("u2", "b"), ("u3", "c"), ("u3", "a"), ("u1", "c"), ("u3", "d")]
        )
    )
    settings = config(tmp_path, log, None, filters={"min_user_interactions": 3, "min_item_interactions": 2})
    with pytest.raises(EmptyDataError, match="filters leave no interactions"):
        prepare(settings, 0, tmp_path / "out")
    settings = config(
        tmp_path,
        log,
        None,
        filters={"min_user_interactions": 2, "min_item_interactions": 2},
        split={"kind": "global_time", "valid_fraction": 0.3, "test_fraction": 0.3},
    )
    dataset = prepare(settings, 0, tmp_path / "out")
    told = report(tmp_path / "out")
    assert told.filtered == {"min_user_interactions": 0, "min_item_interactions": 1}
    assert dataset.info.num_interactions == 7
    assert "d" not in dataset.items["item_id"].to_pylist()


def test_share_of_users_is_seeded(tmp_path: Path) -> None:
    settings = DataConfig.parse(
        {"source": {"kind": "synthetic", "num_users": 300, "num_items": 60}, "filters": {"user_fraction": 0.5}},
        where="test",
    )
    one = prepare(settings, 1, tmp_path / "a")
    assert 120 < one.num_users < 180
    assert one.users.equals(prepare(settings, 1, tmp_path / "b").users)
    assert not one.users.equals(prepare(settings, 2, tmp_path / "c").users)
    told = report(tmp_path / "a")
    assert told.num_read == told.num_accepted + told.filtered["user_fraction"]


def test_position_orders_equal_times(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,n\nu,c,2\nu,a,0\nu,b,1\nu,b,1\nv,a,5\n")
    settings = DataConfig.parse(
        {
            "source": {
                "kind": "csv",
                "path": str(tmp_path / "log.csv"),
                "columns": {"timestamp": None, "position": "n"},
            },
            "split": {"kind": "leave_one_out"},
        },
        where="test",
    )
    dataset = prepare(settings, 0, tmp_path / "out")
    items = dataset.items["item_id"].take(dataset.interactions["item_idx"]).to_pylist()
    assert items == ["a", "b", "c", "a"]
    assert dataset.interactions["position"].to_pylist() == [0, 1, 2, 0]
    assert dataset.interactions["timestamp"].null_count == 4
    assert not dataset.info.has_time
    assert report(tmp_path / "out").quarantined == {"duplicate row": 1}


def test_order_alone_keeps_repeats(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("u a a a b\n")
    settings = DataConfig.parse(
        {
            "source": {"kind": "sequences", "path": str(tmp_path / "s.txt"), "layout": "user_items"},
            "split": {"kind": "leave_one_out"},
        },
        where="test",
    )
    dataset = prepare(settings, 0, tmp_path / "out")
    assert dataset.interactions["item_idx"].to_pylist() == [0, 0, 0, 1]
    assert dataset.interactions["split"].to_pylist() == [0, 0, 1, 2]
    assert dataset.targets(Split.TEST).now_ms is None
    with pytest.raises(NoTimeError):
        prepare(settings.model_copy(update={"split": config(tmp_path).split}), 0, tmp_path / "out")


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("user,item,time,stars\n", "no usable interactions in 0 row"),
        ("user,item,time,stars\nu,a,1e10,5\nu,b,1e10,5\n", "quarantined: 2 x future timestamp"),
        ("user,item,time,stars\nu,a,1,1\nu,b,2,2\n", "no positives: the data has the events rating"),
        ("user,item,time,stars\nu,a,1,5\nu,b,1,5\n", "the train part has no positives"),
    ],
)
def test_nothing_to_work_on(tmp_path: Path, log: str, message: str) -> None:
    with pytest.raises(EmptyDataError, match=message):
        prepare(config(tmp_path, log), 0, tmp_path / "out")
    assert (tmp_path / "out" / "quarantine.parquet").exists()
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_a_wrong_column_stops_the_run_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match="'stars'"):
        prepare(config(tmp_path, LOG.replace("stars", "rating")), 0, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_latest_is_configurable(tmp_path: Path) -> None:
    moment = dt.datetime(1970, 1, 1, 0, 1, 30, tzinfo=dt.UTC)
    prepare(config(tmp_path, latest=moment.isoformat()), 0, tmp_path / "out")
    assert report(tmp_path / "out").quarantined["future timestamp"] == 2


def test_unknown_keys_and_kinds_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fitlers"):
        config(tmp_path, fitlers={})
    with pytest.raises(ConfigError, match="source"):
        DataConfig.parse({"source": {"kind": "excel"}}, where="test")


def test_default_is_the_demo_and_survives_a_round_trip() -> None:
    default = DataConfig()
    assert default.source.kind == "movielens_small"
    assert default.split.protocol == "rolling_next_item"
    assert default.has_time
    assert DataConfig.parse(default.model_dump(mode="json"), where="test") == default


def test_step_is_done_once_per_content(tmp_path: Path) -> None:
    job: Any = SimpleNamespace(data=config(tmp_path), seed=0, workdir=str(tmp_path / "runs"))
    first = run(job)
    assert not first.reused
    assert first.metrics["num_read"] == 12
    assert Dataset.load(first.path).num_users == 3
    assert run(job).reused
    job.data = config(tmp_path, LOG + "u3,a,120,5\n")
    assert not run(job).reused
