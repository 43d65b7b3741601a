"""The store: one pointer, moved by one writer at a time; roll back; collect. Local and remote alike."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from recsys.bundle import Bundle, BundleStore
from recsys.bundle import manifest as manifest_module
from recsys.bundle.location import Location
from recsys.bundle.manifest import MANIFEST, list_files
from recsys.bundle.writer import BundleWriter
from recsys.data.dataset import DatasetInfo
from recsys.errors import (
    BundleCorruptError,
    BundleError,
    BundleMismatchError,
    BundleNotFoundError,
    PointerConflictError,
)
from recsys.files import write_json

INFO = DatasetInfo(
    name="tiny",
    fingerprint="f" * 64,
    id_map_fingerprint="m" * 64,
    has_time=True,
    protocol="rolling_next_item",
    num_users=1,
    num_items=3,
    num_interactions=1,
    num_positives=1,
    num_quarantined=0,
    counts_by_split={},
)


def make(folder: Path, number: int) -> Bundle:
    with BundleWriter(folder) as writer:
        writer.add_popular(np.array([0], np.int32), np.array([number], np.float32))
        write_json(writer.part("metrics.json"), {"number": number})
        return writer.finish(INFO, embedding_dim=1)


@pytest.fixture
def bundles(tmp_path: Path) -> list[Bundle]:
    return [make(tmp_path / "made", number) for number in range(5)]


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[BundleStore]:
    monkeypatch.setenv("RECSYS_CACHE", str(tmp_path / "cache"))
    if request.param == "local":
        yield BundleStore(tmp_path / "store")
        return
    yield BundleStore("memory://store")
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists("/store"):
        filesystem.rm("/store", recursive=True)


def publish_all(store: BundleStore, bundles: list[Bundle]) -> list[str]:
    before = None
    for bundle in bundles:
        before = store.publish(bundle.path, before).bundle_id
    return [bundle.bundle_id for bundle in bundles]


def current(store: BundleStore) -> str | None:
    pointer = store.current()
    return None if pointer is None else pointer.bundle_id


def test_publish_and_open_by_store_or_folder(store: BundleStore, bundles: list[Bundle]) -> None:
    assert store.current() is None and store.list() == []
    with pytest.raises(BundleNotFoundError, match="neither"):
        Bundle.open(str(store))
    ids = publish_all(store, bundles[:2])
    assert current(store) == ids[1]
    assert Bundle.open(str(store)).metrics == {"number": 1}
    assert Bundle.open(f"{store}/bundles/{ids[0]}").metrics == {"number": 0}
    assert store.open().bundle_id == ids[1] and store.open(ids[0]).bundle_id == ids[0]
    assert {manifest.bundle_id for manifest in store.list()} == set(ids)


def test_publishing_what_is_current_changes_nothing(store: BundleStore, bundles: list[Bundle]) -> None:
    first = store.publish(bundles[0].path, None)
    assert store.publish(bundles[0].path, None) == first == store.publish(bundles[0].path, first.bundle_id)


def test_a_store_with_bundles_of_an_older_schema(
    store: BundleStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are listed and collected, and a new one takes over; nothing points to them again."""
    with monkeypatch.context() as before:
        before.setattr(manifest_module, "SCHEMA_VERSION", 2)
        (old,) = publish_all(store, [make(tmp_path, 0)])
    with pytest.raises(BundleMismatchError, match="train and publish again"):
        store.open()
    new = store.publish(make(tmp_path, 1).path, old).bundle_id
    assert [manifest.bundle_id for manifest in store.list()] == [new, old]
    for move in (store.rollback, lambda: store.activate(old, new), lambda: store.start_canary(old, 0.5)):
        with pytest.raises(BundleMismatchError, match="train and publish again"):
            move()
    newest = store.publish(make(tmp_path, 2).path, new).bundle_id
    assert store.collect(1) == (old,)
    assert current(store) == newest


def test_a_stale_parent_loses(store: BundleStore, bundles: list[Bundle]) -> None:
    ids = publish_all(store, bundles[:2])
    with pytest.raises(PointerConflictError) as lost:
        store.publish(bundles[2].path, ids[0])
    assert lost.value.details == {"found": ids[1], "expected": ids[0]}
    with pytest.raises(PointerConflictError):
        store.publish(bundles[2].path, None)
    assert current(store) == ids[1] and len(store.list()) == 2


def test_a_move_between_look_and_create_loses(
    store: BundleStore, bundles: list[Bundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = publish_all(store, bundles[:1])
    for bundle in bundles[1:3]:
        store.add(bundle)
    rival = BundleStore(str(store))
    create = Location.create

    def late(self: Location, content: bytes) -> bool:
        monkeypatch.setattr(Location, "create", create)
        rival.activate(bundles[1].bundle_id, ids[0])
        return create(self, content)

    monkeypatch.setattr(Location, "create", late)
    with pytest.raises(PointerConflictError, match="number 2 first"):
        store.activate(bundles[2].bundle_id, ids[0])
    assert current(store) == bundles[1].bundle_id


def test_activate_needs_a_complete_bundle(store: BundleStore, bundles: list[Bundle]) -> None:
    with pytest.raises(BundleNotFoundError):
        store.activate("0" * 64, None)
    # An upload that was cut off before its manifest is no Bundle, and publishing again completes it.
    partial = store.root / "bundles" / bundles[0].bundle_id
    (partial / "metrics.json").upload(bundles[0].path / "metrics.json")
    with pytest.raises(BundleNotFoundError):
        store.activate(bundles[0].bundle_id, None)
    assert store.list() == []


def test_an_upload_cut_off_is_completed_by_the_next(bundles: list[Bundle], tmp_path: Path) -> None:
    store = BundleStore("memory://cutoff")
    (store.root / "bundles" / bundles[0].bundle_id / "metrics.json").upload(bundles[0].path / "popular.arrow")
    store.publish(bundles[0].path, None)
    assert Bundle.open("memory://cutoff", cache=tmp_path / "cache").metrics == {"number": 0}
    fsspec.filesystem("memory").rm("/cutoff", recursive=True)


def test_a_local_store_takes_the_files_without_copying_them(bundles: list[Bundle], tmp_path: Path) -> None:
    store = BundleStore(tmp_path / "store")
    store.publish(bundles[0].path, None)
    held = store.open().path
    for name in list_files(held):
        assert (held / name).samefile(bundles[0].path / name)
        assert (held / name).stat().st_nlink == 2
    shutil.rmtree(bundles[0].path)
    assert Bundle.open(store.root.local or "").bundle_id == bundles[0].bundle_id
    store.open().check()


def test_where_files_cannot_be_linked_they_are_copied(
    bundles: list[Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", elsewhere)
    folder = tmp_path / "store" / "bundles"
    BundleStore(tmp_path / "store").add(bundles[0])
    assert Bundle.open(folder / bundles[0].bundle_id).bundle_id == bundles[0].bundle_id
    assert all((folder / bundles[0].bundle_id / name).stat().st_nlink == 1 for name in list_files(bundles[0].path))


def test_a_damaged_bundle_is_not_published(store: BundleStore, bundles: list[Bundle]) -> None:
    (bundles[0].path / "metrics.json").write_text("{}")
    with pytest.raises(BundleCorruptError, match=r"metrics\.json"):
        store.publish(bundles[0].path, None)
    assert store.current() is None and store.list() == []


def test_rollback_goes_back_step_by_step(store: BundleStore, bundles: list[Bundle]) -> None:
    ids = publish_all(store, bundles[:3])
    assert store.rollback().bundle_id == ids[1] == current(store)
    assert store.rollback().bundle_id == ids[0] == current(store)
    with pytest.raises(BundleNotFoundError, match="no previous"):
        store.rollback()
    pointer = store.publish(bundles[3].path, ids[0])
    assert (pointer.number, pointer.previous) == (6, ids[0])
    assert store.rollback().bundle_id == ids[0]


def test_what_a_removal_left_behind_does_not_keep_a_bundle_out(store: BundleStore, bundles: list[Bundle]) -> None:
    ids = [bundle.bundle_id for bundle in bundles]
    store.add(bundles[1])
    (store.root / "bundles" / ids[1] / MANIFEST).remove()  # killed after the first of its two deeds
    assert ids[1] not in {manifest.bundle_id for manifest in store.list()}
    store.add(bundles[1])
    store.open(ids[1]).check()


def test_collect_keeps_the_newest_the_current_and_the_previous(store: BundleStore, bundles: list[Bundle]) -> None:
    ids = publish_all(store, bundles)
    with pytest.raises(BundleError, match="at least 1"):
        store.collect(0)
    assert set(store.collect(3)) == set(ids[:2])
    assert store.collect(3) == ()
    store.rollback()  # current 3, and 2 before it
    assert store.collect(1) == ()
    assert {manifest.bundle_id for manifest in store.list()} == set(ids[2:])
    assert store.rollback().bundle_id == ids[2]
    with pytest.raises(BundleNotFoundError):
        store.rollback()  # 1 was collected
    assert set(store.collect(1)) == {ids[3]}
    assert Bundle.open(str(store)).bundle_id == ids[2]


def test_an_unreadable_pointer_is_an_error_not_an_older_bundle(store: BundleStore, bundles: list[Bundle]) -> None:
    publish_all(store, bundles[:1])
    (store.root / "current" / "00000002.json").create(b"{")
    with pytest.raises(BundleCorruptError, match=r"00000002\.json"):
        store.current()


def race(run: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_of_many_threads_one_wins(store: BundleStore, bundles: list[Bundle]) -> None:
    for bundle in bundles:
        store.add(bundle)
    start, won, lost = threading.Barrier(5), [], []

    def run(number: int) -> None:
        start.wait()
        try:
            won.append(BundleStore(str(store)).activate(bundles[number].bundle_id, None).bundle_id)
        except PointerConflictError:
            lost.append(number)

    race(run, 5)
    assert len(won) == 1 and len(lost) == 4
    assert current(store) == won[0]


PUBLISH = """
import pathlib, sys, time
from recsys.bundle import BundleStore
from recsys.errors import PointerConflictError
folder, store, ready, go = sys.argv[1:]
pathlib.Path(ready).touch()
while not pathlib.Path(go).exists():
    time.sleep(0.001)
try:
    print(BundleStore(store).publish(folder, None).bundle_id)
except PointerConflictError:
    print("lost")
"""


def test_of_many_processes_one_wins(bundles: list[Bundle], tmp_path: Path) -> None:
    store, go = tmp_path / "store", tmp_path / "go"
    ready = [tmp_path / f"ready{number}" for number in range(3)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PUBLISH, str(bundle.path), str(store), str(here), str(go)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )
        for bundle, here in zip(bundles, ready, strict=False)
    ]
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in ready) and time.monotonic() < deadline:
        time.sleep(0.01)
    go.touch()
    answers = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert answers.count("lost") == 2
    assert current(BundleStore(store)) == next(answer for answer in answers if answer != "lost")
    assert not list(store.rglob("*.tmp"))


def test_the_same_bundle_from_many_threads_is_one_bundle(bundles: list[Bundle], tmp_path: Path) -> None:
    store = BundleStore(tmp_path / "store")
    errors: list[Exception] = []

    def run(number: int) -> None:
        try:
            store.add(bundles[0])
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    race(run, 4)
    assert errors == [] and [path.name for path in (tmp_path / "store" / "bundles").iterdir()] == [bundles[0].bundle_id]


@pytest.mark.parametrize("error", [OSError(22, "PreconditionFailed"), None])
def test_a_lost_race_is_known_by_reading_back(error: OSError | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some object stores report it as a plain OSError, and some file systems not at all."""
    place = Location.of("memory://odd/current/00000001.json")
    filesystem = fsspec.filesystem("memory")
    create = type(filesystem).pipe_file

    def pipe_file(self: object, path: str, value: bytes, mode: str = "overwrite") -> None:
        create(self, path, b"theirs")
        if error is not None:
            raise error

    monkeypatch.setattr(type(filesystem), "pipe_file", pipe_file)
    assert place.create(b"ours") is False
    filesystem.rm("/odd", recursive=True)


def test_an_error_that_is_no_lost_race_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def pipe_file(*arguments: object, **options: object) -> None:
        raise PermissionError("read only")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "pipe_file", pipe_file)
    with pytest.raises(PermissionError):
        Location.of("memory://odd2/current/1.json").create(b"ours")


def test_the_manifest_is_uploaded_last(bundles: list[Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    store, seen = BundleStore("memory://order"), []
    upload, create = Location.upload, Location.create
    monkeypatch.setattr(Location, "upload", lambda self, source: (seen.append(str(self)), upload(self, source)))
    monkeypatch.setattr(Location, "create", lambda self, content: (seen.append(str(self)), create(self, content))[1])
    store.publish(bundles[0].path, None)
    assert [name.rsplit("/", 1)[-1] for name in seen] == [*bundles[0].manifest.files, MANIFEST, "00000001.json"]
    fsspec.filesystem("memory").rm("/order", recursive=True)
