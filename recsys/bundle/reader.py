"""Reading a Bundle: every hash is checked, parts are loaded when they are asked for and must agree with each other."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import uuid
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from recsys.bundle import manifest as layout
from recsys.bundle.golden import GoldenQuery
from recsys.bundle.histories import HISTORIES_SCHEMA
from recsys.bundle.location import Location
from recsys.bundle.manifest import MANIFEST, Manifest, refuse_pickle
from recsys.bundle.pointer import locate
from recsys.config import StrictConfig
from recsys.data.histories import Histories
from recsys.data.positives import PositivePolicy
from recsys.errors import BundleCorruptError, BundleMismatchError, BundleNotFoundError, ConfigError, ModelError
from recsys.files import fingerprint, map_arrow, read_json
from recsys.types import FloatArray, Int32Array

if TYPE_CHECKING:
    from recsys.bundle.slates import Slates
    from recsys.data.catalogue import Catalogue
    from recsys.index import VectorIndex
    from recsys.models.base import Retriever
    from recsys.models.rankers.base import Ranker
    from recsys.models.text.words import Words

CACHE_VARIABLE = "RECSYS_CACHE"
"""Environment variable that names the folder for copies of remote Bundles; ``~/.cache/recsys`` without it."""
CACHED_BUNDLES = 8
"""so many copies stay in the cache, those that were opened last, and those that are open"""
_COPY = re.compile("[0-9a-f]{64}")

PartT = TypeVar("PartT")
ConfigT = TypeVar("ConfigT", bound=StrictConfig)


class Bundle:
    """An immutable, verified set of parts on local disk. Accessors load once and are cached."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Without any check of files: use :meth:`open`."""
        self.path = path
        self.manifest = manifest
        self._parts: dict[str, Any] = {}
        self.remembered: dict[Any, Any] = {}
        """what versions of the catalogue found out about these items"""

    @classmethod
    def open(cls, uri: str | Path, *, cache: str | Path | None = None) -> Bundle:
        """Open a Bundle's folder, or the current Bundle of a store, at a local path or any fsspec URI.

        A remote Bundle is copied below ``cache`` first, once per content, whatever number of processes ask for it.

        :raises BundleNotFoundError: when there is neither a Bundle nor a store with a current one.
        :raises BundleCorruptError: when a file is missing, changed or not in the manifest; it names the file.
        :raises BundleMismatchError: when parts disagree, or a library with another schema wrote it.
        """
        location = locate(uri)
        manifest = read_manifest(location)
        manifest.check_version(str(location))
        held: int | None = None
        if location.local is not None:
            path = location.local
            manifest.check_files(path)
        else:
            path = Path()
            while held is None:  # until no other process has removed it before it was held
                path = _cached(location, manifest, Path(cache) if cache is not None else default_cache())
                held = _hold(path)
        bundle = cls(path, manifest)
        if held is not None:
            weakref.finalize(bundle, os.close, held)
        refuse_pickle(path)
        bundle.check_tables()
        return bundle

    @property
    def bundle_id(self) -> str:
        """SHA-256 (hex) over the files; ``+N.R`` follows where changes of items and rules lie on it."""
        return self.manifest.bundle_id

    def has(self, part: str) -> bool:
        """Whether the Bundle holds ``part``, one of :data:`recsys.bundle.manifest.PARTS`.

        :raises BundleError: for any other name.
        """
        layout.check_part(part)
        return (self.path / part).exists()

    def part(self, name: str) -> Path:
        """The local path of a part.

        :raises BundleNotFoundError: when the Bundle does not hold it.
        :raises BundleError: when there is no such part.
        """
        if not self.has(name):
            raise BundleNotFoundError(f"{self.path}: this Bundle holds no {name!r}", part=name, path=str(self.path))
        return self.path / name

    def catalogue(self) -> Catalogue:
        """Items and id map; as many and the same as the manifest says."""
        from recsys.data.catalogue import Catalogue

        def load(folder: Path) -> Catalogue:
            catalogue = Catalogue.load(folder)
            self._same(layout.ITEMS, "items", catalogue.num_items, self.manifest.num_items)
            found = catalogue.id_map_fingerprint
            self._same(layout.ITEMS, "id map fingerprint", found, self.manifest.id_map_fingerprint)
            return catalogue

        return self._load(layout.ITEMS, load)

    def retriever(self) -> Retriever:
        """The fitted retriever; for as many items, and of the same dimension, as the manifest says."""
        from recsys.models.base import VectorRetriever
        from recsys.models.retrievers import load_retriever

        def load(folder: Path) -> Retriever:
            retriever = load_retriever(folder)
            self._same(layout.RETRIEVER, "items", retriever.num_items, self.manifest.num_items)
            if isinstance(retriever, VectorRetriever):
                nobody = retriever.encode_users(Histories.from_lists([[]], [[]]), np.zeros(1, np.int64))
                self._same(layout.RETRIEVER, "dimensions", nobody.shape[-1], self.manifest.embedding_dim)
            return retriever

        return self._load(layout.RETRIEVER, load)

    def index(self) -> VectorIndex:
        """The vector index, memory-mapped; with as many rows and dimensions as the manifest says."""
        from recsys.index import load_index

        def load(folder: Path) -> VectorIndex:
            index = load_index(folder)
            self._same(layout.INDEX, "items", index.num_items, self.manifest.num_items)
            self._same(layout.INDEX, "dimensions", index.dim, self.manifest.embedding_dim)
            return index

        return self._load(layout.INDEX, load)

    def text_index(self) -> VectorIndex:
        """The index over the vectors of the items' texts, memory-mapped."""
        from recsys.index import load_index

        def load(folder: Path) -> VectorIndex:
            index = load_index(folder)
            self._same(layout.TEXT_INDEX, "items", index.num_items, self.manifest.num_items)
            return index

        return self._load(layout.TEXT_INDEX, load)

    @property
    def knows_words(self) -> bool:
        """Whether items can be found, and compared, by their texts."""
        return self.has(layout.TEXT_INDEX) and self.has(layout.ENCODER)

    def words(self) -> Words:
        """The text encoder, loaded when it is used first."""
        from recsys.models.text.encoder import EncodingConfig
        from recsys.models.text.words import Words

        config = self.section(EncodingConfig, "encoder")
        return self._load(layout.ENCODER, lambda path: Words(path, config))

    @cached_property
    def encoder_id(self) -> str:
        """SHA-256 (hex) of the encoder and how it is used: the same for two Bundles whose text vectors compare."""
        files = {
            name: each.sha256 for name, each in self.manifest.files.items() if name.startswith(f"{layout.ENCODER}/")
        }
        return fingerprint([files, self.config["encoder"]])

    def ranker(self) -> Ranker:
        """The fitted ranker, its item side as large as the manifest says."""
        from recsys.models.rankers import load_ranker

        def load(folder: Path) -> Ranker:
            ranker = load_ranker(folder)
            num_items, dim = ranker.items.unit_vectors.shape
            self._same(layout.RANKER, "items", num_items, self.manifest.num_items)
            # It reads what items are compared by: the first dimensions of the retriever's vectors, or all of them.
            if 0 < self.manifest.embedding_dim < dim:
                self._same(layout.RANKER, "dimensions", dim, self.manifest.embedding_dim)
            return ranker

        return self._load(layout.RANKER, load)

    def popular(self) -> tuple[Int32Array, FloatArray]:
        """Fallback candidates, best first: item_idx int32 [P], score float32 [P]."""

        def load(path: Path) -> tuple[Int32Array, FloatArray]:
            table = map_arrow(path)
            item_idx: Int32Array = table["item_idx"].to_numpy()
            if len(item_idx) and not 0 <= item_idx.min() <= item_idx.max() < self.manifest.num_items:
                raise BundleMismatchError(
                    f"{path}: names an item_idx outside the {self.manifest.num_items} items", part=layout.POPULAR
                )
            return item_idx, table["score"].to_numpy()

        return self._load(layout.POPULAR, load)

    def slates(self) -> Slates:
        """What users are shown while retrieval fails."""
        from recsys.bundle.slates import Slates

        return self._load(layout.SLATES, lambda path: Slates(map_arrow(path), self.manifest.num_items))

    def histories(self) -> pa.Table:
        """What users did up to publication: :data:`HISTORIES_SCHEMA`. Read anew on every call, as it is large."""
        table = pq.read_table(self.part(layout.HISTORIES))
        if table.column_names != HISTORIES_SCHEMA.names:
            raise BundleMismatchError(f"{layout.HISTORIES} has the columns {table.column_names}", part=layout.HISTORIES)
        return table

    @cached_property
    def config(self) -> dict[str, Any]:
        """What the Bundle says of how it is served and updated, as plain values."""
        return yaml.safe_load(self.part(layout.CONFIG).read_text())

    def section(self, config_type: type[ConfigT], *keys: str) -> ConfigT:
        """What :attr:`config` holds below ``keys``, all of it without any, as a ``config_type``.

        :raises BundleMismatchError: when it is not there, or is no such thing.
        """
        where = ".".join(keys)

        def load(path: Path) -> ConfigT:
            tree: Any = self.config
            for key in keys:
                if not isinstance(tree, dict) or key not in tree:
                    raise ConfigError(f"{where} is missing", path=str(path))
                tree = tree[key]
            return config_type.parse(tree, where=where or layout.CONFIG)

        return self._load(layout.CONFIG, load, f"{config_type.__qualname__} {where}")

    @property
    def positive_policy(self) -> PositivePolicy:
        """What counts as a positive, for turning events into a history."""
        return self.section(PositivePolicy, "positives")

    @property
    def golden(self) -> GoldenQuery | None:
        """The query a replica proves itself with, if the Bundle has one."""
        if not self.has(layout.GOLDEN):
            return None
        return self._load(layout.GOLDEN, lambda path: GoldenQuery.parse(read_json(path), where=str(path)))

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Offline metrics; empty where there are none."""
        return read_json(self.part(layout.METRICS)) if self.has(layout.METRICS) else {}

    def check_tables(self) -> None:
        """Check the parts that are only mapped, not loaded: catalogue, index and popular items."""
        for name, accessor in (
            (layout.ITEMS, self.catalogue),
            (layout.INDEX, self.index),
            (layout.POPULAR, self.popular),
        ):
            if self.has(name):
                accessor()

    def check(self) -> None:
        """Load every part there is and check that they agree.

        :raises BundleMismatchError: when they do not.
        """
        self.check_tables()
        for name, accessor in (
            (layout.RETRIEVER, self.retriever),
            (layout.RANKER, self.ranker),
            (layout.SLATES, self.slates),
            (layout.TEXT_INDEX, self.text_index),
        ):
            if self.has(name):
                accessor()
        if self.has(layout.HISTORIES):
            self.histories()
        if self.has(layout.CONFIG):
            _ = self.positive_policy
        _ = self.golden, self.metrics

    def _load(self, name: str, load: Callable[[Path], PartT], key: str = "") -> PartT:
        """What ``load`` makes of part ``name``; ``key`` tells several things made of one part from each other."""
        if name + key not in self._parts:
            try:
                self._parts[name + key] = load(self.part(name))
            except (ModelError, ConfigError, pa.ArrowInvalid) as error:
                # The hashes are right, so whoever wrote the part and this library do not understand each other.
                raise BundleMismatchError(f"{self.path / name}: cannot be loaded: {error}", part=name) from error
        return self._parts[name + key]

    def _same(self, part: str, what: str, found: object, expected: object) -> None:
        if found != expected:
            raise BundleMismatchError(
                f"{self.path / part}: {what} {found}, but the manifest says {expected}: parts do not belong together",
                part=part,
                found=found,
                expected=expected,
            )


def read_manifest(location: Location) -> Manifest:
    """The checked manifest of the Bundle at ``location``.

    :raises BundleNotFoundError: when there is none.
    """
    try:
        content = (location / MANIFEST).read()
    except FileNotFoundError:
        raise BundleNotFoundError(f"{location}: no Bundle here ({MANIFEST} is missing)", path=str(location)) from None
    return Manifest.from_bytes(content, where=str(location / MANIFEST))


def default_cache() -> Path:
    """Where copies of remote Bundles are kept."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "recsys") / "bundles"


def _cached(location: Location, manifest: Manifest, cache: Path) -> Path:
    """A verified local copy; its name is a hash of all that is in it, the manifest included."""
    target = cache / manifest.checksum
    if target.exists():
        try:
            manifest.check_files(target)
        except (BundleCorruptError, FileNotFoundError):
            # Set aside in one step: another process may be about to do the same.
            aside = cache / f".{manifest.checksum}.{uuid.uuid4().hex}.corrupt"
            with suppress(FileNotFoundError):
                target.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            with suppress(OSError):  # it is gone meanwhile, or the disk is read-only
                os.utime(target)
            return target
    temporary = cache / f".{manifest.checksum}.{uuid.uuid4().hex}.tmp"
    try:
        temporary.mkdir(parents=True)
        for name in manifest.files:
            try:
                (location / name).download(temporary / name)
            except FileNotFoundError:
                raise BundleCorruptError(f"{location / name}: the file is missing", path=name) from None
        (temporary / MANIFEST).write_bytes(manifest.to_bytes())
        manifest.check_files(temporary)
        try:
            temporary.rename(target)
        except OSError:
            if not (target / MANIFEST).exists():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _trim(cache, keep=target)
    return target


def _hold(copy: Path) -> int | None:
    """A descriptor that keeps every process from removing ``copy`` while it is open; None where it is gone already."""
    try:
        descriptor = os.open(copy, os.O_RDONLY)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if not copy.exists():
        os.close(descriptor)
        return None
    return descriptor


def _trim(cache: Path, *, keep: Path) -> None:
    """Remove the copies that were opened longest ago and that nobody has open."""
    opened: list[tuple[float, Path]] = []
    for path in cache.iterdir():
        with suppress(FileNotFoundError):  # another process trims as well
            if _COPY.fullmatch(path.name) and (path / MANIFEST).exists():
                opened.append((path.stat().st_mtime, path))
    for _, path in sorted(opened, reverse=True)[CACHED_BUNDLES:]:
        if path == keep:
            continue
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                aside = cache / f".{path.name}.{uuid.uuid4().hex}.old"  # in one step it is no copy any more
                path.rename(aside)
                shutil.rmtree(aside, ignore_errors=True)
            except BlockingIOError:
                continue
            finally:
                os.close(descriptor)
