"""What every source must do, run over all kinds."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from recsys.config import parse
from recsys.data.sources import KINDS, AnySource, Source
from recsys.data.validation import clean_items, validate
from recsys.testing.samples import sample_of

FAR_FUTURE_MS = 4_000_000_000_000


@pytest.fixture(params=KINDS.names)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    return sample_of(KINDS.get(request.param), tmp_path)


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
    for kind in KINDS.classes:
        for name, field in kind.model_fields.items():
            assert name == "kind" or field.description, f"{kind.__name__}.{name} has no description"
