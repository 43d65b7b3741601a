"""A Bundle is what was written, or it does not open: hashes, parts that agree, no pickle, remote copies."""

from __future__ import annotations

import gc
import hashlib
import json
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from recsys import schema
from recsys.bundle import HISTORIES_SCHEMA, Bundle, GoldenQuery, Manifest
from recsys.bundle import reader as reader_module
from recsys.bundle.location import Location
from recsys.bundle.manifest import MANIFEST, content_id, git_revision, list_files
from recsys.bundle.writer import BundleWriter
from recsys.config import to_yaml
from recsys.data.catalogue import Catalogue
from recsys.data.dataset import DatasetInfo
from recsys.data.histories import Histories
from recsys.data.positives import PositivePolicy
from recsys.errors import BundleCorruptError, BundleError, BundleMismatchError, BundleNotFoundError
from recsys.files import read_json, write_json
from recsys.index.flat import FlatIndex
from recsys.models.base import VectorRetriever
from recsys.models.retrievers.popularity import Popularity, PopularityRetriever
from recsys.pipeline.config import PipelineConfig, pipeline_config
from recsys.types import HistoryItem

NUM_ITEMS, DIM = 6, 4


def catalogue(names: str = "abcdef") -> Catalogue:
    rows = [{"item_id": name, "title": name, "categories": [], "available": True} for name in names]
    return Catalogue.build(pa.Table.from_pylist(rows, schema=schema.ITEMS))


def info(**changes: Any) -> DatasetInfo:
    known: dict[str, Any] = {
        "name": "tiny",
        "fingerprint": "f" * 64,
        "id_map_fingerprint": catalogue().id_map_fingerprint,
        "has_time": True,
        "protocol": "rolling_next_item",
        "num_users": 1,
        "num_items": NUM_ITEMS,
        "num_interactions": 2,
        "num_positives": 2,
        "num_quarantined": 0,
        "counts_by_split": {},
    }
    return DatasetInfo(**{**known, **changes})


SETTINGS = {
    "positives": PositivePolicy().model_dump(mode="json"),
    "pipeline": PipelineConfig().model_dump(mode="json"),
}
GOLDEN = GoldenQuery(
    history=(HistoryItem(item_id="a", event="view", timestamp_ms=1),),
    now_ms=5,
    top_k=2,
    item_ids=("b", "c"),
    scores=(0.5, 0.25),
)
HISTORY = {"user_id": "u", "item_ids": ["a", "b"], "timestamps_ms": [1, 2], "events": ["v", "v"], "values": [1.0, 2.0]}


def fill(writer: BundleWriter, *, names: str = "abcdef", rows: int = NUM_ITEMS, dim: int = DIM, salt: int = 0) -> None:
    catalogue(names).save(writer.part("items"))
    vectors = np.random.default_rng(salt).normal(size=(rows, dim)).astype(np.float32)
    FlatIndex(kind="flat").build(vectors).save(writer.part("index"))
    writer.add_popular(np.array([3, 1], np.int32), np.array([0.9, 0.5], np.float32))
    writer.add_histories(pa.Table.from_pylist([HISTORY], schema=HISTORIES_SCHEMA))
    writer.part("config.yaml").write_text(to_yaml(SETTINGS))
    write_json(writer.part("metrics.json"), {"ndcg@10": 0.5})
    write_json(writer.part("golden.json"), GOLDEN.model_dump(mode="json"))


def write(
    folder: Path, *, change: Callable[[BundleWriter], object] = lambda writer: None, parts: Any = None, **finish: Any
) -> Bundle:
    """A Bundle of ``parts``, after ``change``."""
    with BundleWriter(folder) as writer:
        fill(writer, **(parts or {}))
        change(writer)
        return writer.finish(info(), embedding_dim=DIM, **finish)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write(tmp_path / "out", events_watermark="log:7")


@pytest.fixture
def memory() -> Iterator[str]:
    filesystem = fsspec.filesystem("memory")
    yield "memory://place"
    if filesystem.exists("/place"):
        filesystem.rm("/place", recursive=True)


# --- round trip -------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(bundle: Bundle) -> None:
    again = Bundle.open(str(bundle.path))
    assert again.bundle_id == bundle.bundle_id == bundle.path.name
    assert len(again.catalogue()) == NUM_ITEMS and again.catalogue() is again.catalogue()
    assert (again.index().num_items, again.index().dim) == (NUM_ITEMS, DIM)
    item_idx, score = again.popular()
    assert item_idx.tolist() == [3, 1] and score.dtype == np.float32
    assert again.histories().to_pylist() == [HISTORY]
    assert pipeline_config(again) == PipelineConfig() and again.positive_policy == PositivePolicy()
    assert again.golden == GOLDEN and again.metrics == {"ndcg@10": 0.5}
    assert again.manifest.events_watermark == "log:7" and again.manifest.embedding_dim == DIM
    assert again.manifest.library_versions["numpy"] == np.__version__
    assert again.manifest.num_bytes == sum(
        (again.path / n).stat().st_size for n in list_files(again.path) if n != MANIFEST
    )
    assert not again.has("ranker")
    for ask in (again.has, again.part):
        with pytest.raises(BundleError, match=r"'rankers' is no part of a Bundle; those are config\.yaml, items"):
            ask("rankers")
    with pytest.raises(BundleNotFoundError, match="holds no 'ranker'"):
        again.part("ranker")


def test_the_id_is_the_hash_of_the_sorted_paths_and_hashes(bundle: Bundle) -> None:
    files = [name for name in list_files(bundle.path) if name != MANIFEST]
    pairs = [[name, hashlib.sha256((bundle.path / name).read_bytes()).hexdigest()] for name in files]
    assert bundle.bundle_id == hashlib.sha256(json.dumps(sorted(pairs), separators=(",", ":")).encode()).hexdigest()


def test_equal_content_has_one_id_and_one_folder(tmp_path: Path) -> None:
    first = write(tmp_path)
    second = write(tmp_path, parent="a" * 64)
    assert first.bundle_id == second.bundle_id
    assert second.manifest.parent is None  # the folder that was there first stays as it is
    assert write(tmp_path, parts={"salt": 1}).bundle_id != first.bundle_id
    assert len(list(tmp_path.iterdir())) == 2


def test_no_pickle_is_inside(bundle: Bundle) -> None:
    for name in list_files(bundle.path):
        assert not name.endswith((".pkl", ".pickle", ".pt", ".pth", ".joblib", ".bin"))
        head = (bundle.path / name).read_bytes()[:4]
        assert head[:1] != b"\x80" and head != b"PK\x03\x04"


def test_git_revision_is_a_commit_or_nothing() -> None:
    revision = git_revision()
    assert revision is None or len(revision.removesuffix("-dirty")) == 40


# --- damage -----------------------------------------------------------------------------------------------------------


def test_one_changed_byte_in_any_file_is_found(bundle: Bundle) -> None:
    for name in list_files(bundle.path):
        path = bundle.path / name
        good = path.read_bytes()
        for position in {0, len(good) // 2, len(good) - 2}:
            bad = bytearray(good)
            bad[position] ^= 0x01
            path.write_bytes(bytes(bad))
            with pytest.raises(BundleError, match=path.name):
                Bundle.open(bundle.path)
        path.write_bytes(good)
    Bundle.open(bundle.path)


def test_missing_extra_and_shortened_files_are_named(bundle: Bundle) -> None:
    path = bundle.path / "index" / "index.faiss"
    good = path.read_bytes()
    path.unlink()
    with pytest.raises(BundleCorruptError, match=r"index\.faiss: the file is missing") as missing:
        Bundle.open(bundle.path)
    assert missing.value.details["path"] == "index/index.faiss"
    path.write_bytes(good[:-3])
    with pytest.raises(BundleCorruptError, match=r"index\.faiss: \d+ bytes"):
        Bundle.open(bundle.path)
    path.write_bytes(good)
    (bundle.path / "notes.txt").write_text("hello")
    with pytest.raises(BundleCorruptError, match=r"notes\.txt: the file is not in the manifest"):
        Bundle.open(bundle.path)


def test_a_truncated_manifest_is_corrupt_at_every_length(bundle: Bundle) -> None:
    path = bundle.path / MANIFEST
    good = path.read_bytes()
    for length in (0, 1, len(good) // 2, len(good) - 3):
        path.write_bytes(good[:length])
        with pytest.raises(BundleCorruptError, match=r"manifest\.json"):
            Bundle.open(bundle.path)


def change_manifest(bundle: Bundle, change: Callable[[dict[str, Any]], None]) -> None:
    """A manifest that matches its own checksum, as an older or newer library would write it."""
    tree = read_json(bundle.path / MANIFEST)
    change(tree)
    tree["bundle_id"] = content_id(Manifest.model_validate({**tree, "checksum": ""}).files)
    draft = Manifest.model_validate({**tree, "checksum": ""})
    write_json(bundle.path / MANIFEST, {**tree, "checksum": draft.compute_checksum()})


def test_a_manifest_edited_by_hand_is_corrupt(bundle: Bundle) -> None:
    tree = read_json(bundle.path / MANIFEST)
    write_json(bundle.path / MANIFEST, {**tree, "num_items": 7})
    with pytest.raises(BundleCorruptError, match="checksum"):
        Bundle.open(bundle.path)


def test_a_newer_schema_version_says_upgrade(bundle: Bundle) -> None:
    tree = read_json(bundle.path / MANIFEST)
    write_json(bundle.path / MANIFEST, {**tree, "schema_version": 99, "something_new": {}})
    with pytest.raises(BundleMismatchError, match=r"99 is newer.*upgrade"):
        Bundle.open(bundle.path)


def test_an_older_schema_version_says_what_to_do(bundle: Bundle) -> None:
    def age(tree: dict[str, Any]) -> None:
        tree |= {"schema_version": 2, "library_versions": {"recsys": "0.0.9"}}

    change_manifest(bundle, age)
    with pytest.raises(
        BundleMismatchError, match=r"version 2, .* reads 3: train and publish again.*wrote it \(0\.0\.9\)"
    ):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a/../../b", "a//b", "./a", "", MANIFEST, "a\\..\\b"])
def test_a_manifest_cannot_name_files_outside_the_bundle(bundle: Bundle, path: str) -> None:
    tree = read_json(bundle.path / MANIFEST)
    tree["files"][path] = {"size_bytes": 1, "sha256": "0" * 64}
    write_json(bundle.path / MANIFEST, tree)
    with pytest.raises(BundleCorruptError, match="plain path"):
        Bundle.open(bundle.path)


def test_nothing_there(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(BundleNotFoundError):
            Bundle.open(place)


# --- parts that do not belong together --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"rows": 5}, "index: items 5.*says 6"),
        ({"dim": 3}, "index: dimensions 3.*says 4"),
        ({"names": "abcde"}, "items: items 5"),
        ({"names": "bacdef"}, "items: id map fingerprint"),
    ],
)
def test_disagreeing_parts_are_not_published(tmp_path: Path, parts: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleMismatchError, match=message):
        write(tmp_path, parts=parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_items": 7}, "items 6.*says 7"),
        ({"embedding_dim": 8}, "dimensions 4.*says 8"),
        ({"id_map_fingerprint": "0" * 64}, "id map fingerprint"),
    ],
)
def test_disagreeing_parts_do_not_open(bundle: Bundle, change: dict[str, Any], message: str) -> None:
    change_manifest(bundle, lambda tree: tree.update(change))
    with pytest.raises(BundleMismatchError, match=message):
        Bundle.open(bundle.path)


def test_an_index_of_another_bundle_does_not_open(bundle: Bundle) -> None:
    FlatIndex(kind="flat").build(np.ones((9, DIM), np.float32)).save(bundle.path / "index")

    def rehash(tree: dict[str, Any]) -> None:
        for name in ("index/index.faiss", "index/index.json"):
            content = (bundle.path / name).read_bytes()
            tree["files"][name] = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    change_manifest(bundle, rehash)
    with pytest.raises(BundleMismatchError, match="index: items 9"):
        Bundle.open(bundle.path)


class Popular(PopularityRetriever):
    def __init__(self, num_items: int) -> None:
        super().__init__(Popularity(), np.arange(num_items, dtype=np.float32))


def test_the_retriever_is_loaded_when_asked_for_and_must_fit(tmp_path: Path) -> None:
    bundle = write(tmp_path, change=lambda writer: Popular(NUM_ITEMS).save(writer.part("retriever")))
    assert bundle.retriever().num_items == NUM_ITEMS and bundle.retriever() is bundle.retriever()
    with pytest.raises(BundleMismatchError, match=r"retriever: items 5.*says 6"):
        write(tmp_path, change=lambda writer: Popular(5).save(writer.part("retriever")))


def test_a_retriever_of_another_dimension_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Vectors(VectorRetriever):
        num_items = NUM_ITEMS

        def encode_users(self, histories: Histories, now_ms: Any = None) -> np.ndarray:
            return np.zeros((len(histories), 1, 7), np.float32)

        def item_vectors(self) -> np.ndarray:
            return np.zeros((NUM_ITEMS, 7), np.float32)

        def save_weights(self, folder: Path) -> None: ...

    monkeypatch.setattr("recsys.models.retrievers.load_retriever", lambda folder: Vectors())
    with pytest.raises(BundleMismatchError, match=r"retriever: dimensions 7.*says 4"):
        write(tmp_path, change=lambda writer: writer.part("retriever").mkdir())


@pytest.mark.parametrize(
    ("shape", "message"), [((5, DIM), r"ranker: items 5.*says 6"), ((6, DIM + 1), f"ranker: dimensions {DIM + 1}")]
)
def test_a_ranker_of_other_items_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], message: str
) -> None:
    fake = SimpleNamespace(items=SimpleNamespace(unit_vectors=np.zeros(shape, np.float32)))
    monkeypatch.setattr("recsys.models.rankers.load_ranker", lambda folder: fake)
    with pytest.raises(BundleMismatchError, match=message):
        write(tmp_path, change=lambda writer: writer.part("ranker").mkdir())


def test_a_part_this_library_cannot_load_is_named(tmp_path: Path) -> None:
    with pytest.raises(BundleMismatchError, match=r"retriever: cannot be loaded.*config\.json"):
        write(tmp_path, change=lambda writer: writer.part("retriever").mkdir())


def test_popular_items_outside_the_catalogue_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleMismatchError, match="outside the 6 items"):
        write(tmp_path, change=lambda writer: writer.add_popular(np.array([6], np.int32), np.ones(1, np.float32)))


def test_a_config_without_the_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleMismatchError, match="positives is missing"):
        write(tmp_path, change=lambda writer: writer.part("config.yaml").write_text("pipeline: {}\n"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("weights.pt", b"anything"),
        ("weights.bin", pickle.dumps({"a": [1, 2]})),
        ("old.bin", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + b"more pickles"),
        ("archive.bin", b"PK\x03\x04data.pkl"),
        ("array.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False}"),
    ],
)
def test_pickles_are_not_published(tmp_path: Path, name: str, content: bytes) -> None:
    def smuggle(writer: BundleWriter) -> None:
        writer.part("ranker").mkdir()
        (writer.part("ranker") / name).write_bytes(content)

    with pytest.raises(BundleError, match=name):
        write(tmp_path, change=smuggle)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_start_like_a_pickle_are_not_one(tmp_path: Path) -> None:
    def add(writer: BundleWriter) -> None:
        writer.part("encoder").mkdir()
        (writer.part("encoder") / "weights.bin").write_bytes(b"\x80\x04" + bytes(range(256)))

    assert write(tmp_path, change=add).has("encoder")


def test_the_writer_refuses_unknown_parts_and_wrong_tables(tmp_path: Path) -> None:
    with BundleWriter(tmp_path) as writer:
        with pytest.raises(BundleError, match="no part"):
            writer.part("misc")
        with pytest.raises(BundleError, match="nothing here"):
            writer.add("ranker", tmp_path / "absent")
        with pytest.raises(BundleError, match="histories need"):
            writer.add_histories(pa.table({"user_id": ["u"]}))
    assert list(tmp_path.iterdir()) == []


def test_a_draft_answers_before_it_is_finished(tmp_path: Path) -> None:
    with BundleWriter(tmp_path) as writer:
        fill(writer)
        assert len(writer.draft(info(), embedding_dim=DIM).catalogue()) == NUM_ITEMS


# --- remote -----------------------------------------------------------------------------------------------------------


def upload(bundle: Bundle, uri: str) -> None:
    for name in list_files(bundle.path):
        (Location.of(uri) / name).upload(bundle.path / name)


def test_a_remote_bundle_is_copied_once_and_checked(bundle: Bundle, memory: str, tmp_path: Path) -> None:
    upload(bundle, memory)
    cache = tmp_path / "cache"
    remote = Bundle.open(memory, cache=cache)
    assert remote.bundle_id == bundle.bundle_id and remote.path.parent == cache
    assert remote.index().num_items == NUM_ITEMS
    # Only the manifest is read again.
    (Location.of(memory) / "index" / "index.faiss").remove()
    assert Bundle.open(memory, cache=cache).path == remote.path
    # A damaged copy is made anew, which now fails.
    (remote.path / "config.yaml").write_text("x")
    with pytest.raises(BundleCorruptError, match=r"index\.faiss: the file is missing"):
        Bundle.open(memory, cache=cache)
    upload(bundle, memory)
    Bundle.open(memory, cache=cache)
    assert [path.name for path in cache.iterdir()] == [bundle.manifest.checksum]


def test_copies_that_were_opened_longest_ago_are_removed(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "CACHED_BUNDLES", 2)
    cache, uris = tmp_path / "cache", []
    for salt in range(3):
        uris.append(f"{memory}/{salt}")
        upload(write(tmp_path / "out", parts={"salt": salt}), uris[-1])
    first, second = (Bundle.open(uri, cache=cache) for uri in uris[:2])
    (cache / "something else").mkdir()
    third = Bundle.open(uris[2], cache=cache)
    names = {each.path.name for each in (first, second, third)}
    assert {path.name for path in cache.iterdir()} == {*names, "something else"}  # all of them are open
    assert len(first.histories()) == 1  # also what is read late
    gone = first.path.name
    del first
    gc.collect()
    Bundle.open(uris[1], cache=cache)
    shutil.rmtree(third.path)
    del third
    gc.collect()
    Bundle.open(uris[2], cache=cache)
    assert {path.name for path in cache.iterdir()} == {*names, "something else"} - {gone}


def test_a_remote_bundle_that_was_changed_is_not_cached(bundle: Bundle, memory: str, tmp_path: Path) -> None:
    upload(bundle, memory)
    fsspec.filesystem("memory").pipe_file("/place/golden.json", b"{}")
    with pytest.raises(BundleCorruptError, match=r"golden\.json"):
        Bundle.open(memory, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_many_readers_share_one_copy(
    bundle: Bundle, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(bundle, memory)
    # fsspec's memory files have one read position for all threads, unlike any real file system.
    lock, read_bytes, download = threading.Lock(), Location.read, Location.download

    def locked_read(self: Location) -> bytes:
        with lock:
            return read_bytes(self)

    def locked_download(self: Location, target: Path) -> None:
        with lock:
            download(self, target)

    monkeypatch.setattr(Location, "read", locked_read)
    monkeypatch.setattr(Location, "download", locked_download)
    opened: list[Path] = []
    start = threading.Barrier(6)

    def read() -> None:
        start.wait()
        opened.append(Bundle.open(memory, cache=tmp_path / "cache").path)

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 6 and len(set(opened)) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_cache_folder_comes_from_the_environment(
    bundle: Bundle, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(bundle, memory)
    monkeypatch.setenv("RECSYS_CACHE", str(tmp_path / "mine"))
    assert Bundle.open(memory).path.parent == tmp_path / "mine" / "bundles"


def test_a_bundle_opens_wherever_it_is_moved(bundle: Bundle, tmp_path: Path) -> None:
    shutil.copytree(bundle.path, tmp_path / "else where")
    assert Bundle.open((tmp_path / "else where").as_uri().replace("%20", " ")).bundle_id == bundle.bundle_id
