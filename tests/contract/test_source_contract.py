"""What every source must do, run over all kinds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.config import parse
from recsys.data.sources import KINDS, AnySource, Source
from recsys.data.validation import clean_items, validate

FAR_FUTURE_MS = 4_000_000_000_000


def movielens_small(folder: Path) -> dict[str, object]:
    return {}


def movielens(folder: Path) -> dict[str, object]:
    (folder / "ratings.dat").write_text("1::10::5::978300760\n2::20::3::978302109\n")
    (folder / "movies.dat").write_text("10::A (1990)::Comedy\n20::B (1991)::Drama\n")
    return {"path": str(folder)}


def sequences(folder: Path) -> dict[str, object]:
    (folder / "log.txt").write_text("u1 a b\nu2 b c\n")
    (folder / "items.csv").write_text("item_id,title\na,A\n")
    return {"path": str(folder / "log.txt"), "layout": "user_items", "catalogue": {"path": str(folder / "items.csv")}}


def online_retail(folder: Path) -> dict[str, object]:
    table = pa.table(
        {
            "InvoiceNo": ["1", "2"],
            "StockCode": ["A", "B"],
            "Description": ["LAMP", "BOX"],
            "Quantity": [1, 2],
            "InvoiceDate": pa.array([0, 1], pa.timestamp("ns")),
            "UnitPrice": [1.0, 2.0],
            "CustomerID": [1, 2],
            "Country": ["X", "Y"],
        }
    )
    pq.write_table(table, folder / "log.parquet")
    return {"path": str(folder / "log.parquet")}


def parquet(folder: Path) -> dict[str, object]:
    pq.write_table(pa.table({"user_id": [1, 2], "item_id": ["a", "b"], "timestamp": [5, 6]}), folder / "log.parquet")
    return {"path": str(folder / "log.parquet")}


def csv(folder: Path) -> dict[str, object]:
    (folder / "log.csv").write_text("user_id,item_id,timestamp\nu1,a,2024-01-01\nu2,b,2024-01-02T03:04:05Z\n")
    (folder / "items.csv").write_text("item_id,title\na,A\n")
    return {"path": str(folder / "log.csv"), "catalogue": {"path": str(folder / "items.csv")}}


def synthetic(folder: Path) -> dict[str, object]:
    return {"num_users": 30, "num_items": 40}


EXAMPLES: dict[str, Callable[[Path], dict[str, object]]] = {
    f.__name__: f for f in (movielens_small, movielens, sequences, online_retail, parquet, csv, synthetic)
}


@pytest.fixture(params=[kind.model_fields["kind"].default for kind in KINDS])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    assert request.param in EXAMPLES, f"write an example of source {request.param} in this file"
    return parse(AnySource, {"kind": request.param, **EXAMPLES[request.param](tmp_path)}, where="test")


def test_reads_the_same_valid_rows_every_time(source: Source) -> None:
    accepted, count = [], 0
    for chunk in source.read():
        good, bad = validate(chunk, source, count, FAR_FUTURE_MS)
        assert len(bad) == 0
        accepted.append(good)
        count += len(chunk)
    assert count > 0
    times = pa.concat_tables(accepted)["timestamp"]
    assert times.null_count == (0 if source.has_time else count)
    again = pa.concat_tables(source.read())
    assert again.equals(pa.concat_tables(source.read()))
    expected = source.num_rows()
    assert expected is None or expected == pytest.approx(count, rel=0.5)


def test_catalogue_fits_the_contract(source: Source) -> None:
    raw = source.items()
    items, rejected, _ = clean_items(raw, "test")
    assert len(items) == (0 if raw is None else len(raw))
    assert len(rejected) == 0
    assert (items["available"].to_pylist() or [True])[0] is True


def test_fingerprint_is_stable_and_survives_a_round_trip(source: Source) -> None:
    again = parse(AnySource, source.model_dump(mode="json"), where="test")
    assert again == source
    assert again.fingerprint() == source.fingerprint()
    assert len(source.fingerprint()) == 64


def test_fingerprint_follows_the_content_not_the_place(source: Source, tmp_path: Path) -> None:
    files = sorted(path for path in tmp_path.iterdir() if path.is_file())
    if not files:
        pytest.skip("this kind reads no files")
    before = source.fingerprint()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in files:
        file.rename(moved / file.name)
    text = source.model_dump_json().replace(str(tmp_path), str(moved))
    there = type(source).model_validate_json(text)
    assert there.fingerprint() == before
    for file in files:
        content = (moved / file.name).read_bytes()
        (moved / file.name).write_bytes(content + b"\n")
        assert there.fingerprint() != before
        (moved / file.name).write_bytes(content)


def test_every_setting_is_described() -> None:
    for kind in KINDS:
        for name, field in kind.model_fields.items():
            assert name == "kind" or field.description, f"{kind.__name__}.{name} has no description"
