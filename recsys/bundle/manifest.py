"""What a Bundle is made of, and the one file that says so.

Layout of a Bundle's folder::

    manifest.json        this module
    config.yaml          what serving and updating need (recsys.pipeline.bundle_config)
    items/               the catalogue and the id map (recsys.data.catalogue)
    histories.parquet    what users did, to seed an event store
    slates.arrow         the best items of every user, made offline (recsys.bundle.slates)
    popular.arrow        fallback candidates: item_idx int32, score float32, best first
    retriever/           recsys.models.load_retriever
    index/               recsys.index.load_index
    ranker/              recsys.models.load_ranker
    encoder/             a Hugging Face folder
    text_index/          an index over the vectors of the items' texts, for search by words
    metrics.json         offline metrics
    golden.json          one query with its answer
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import Field, field_validator

from recsys.config import StrictConfig, parse
from recsys.errors import BundleCorruptError, BundleError, BundleMismatchError, ConfigError
from recsys.files import file_sha256, fingerprint
from recsys.libraries import installed_version

SCHEMA_VERSION = 3
"""Raised when the layout or its meaning changes; a reader refuses all versions but its own."""

MANIFEST = "manifest.json"
CONFIG = "config.yaml"
ITEMS = "items"
HISTORIES = "histories.parquet"
SLATES = "slates.arrow"
POPULAR = "popular.arrow"
RETRIEVER = "retriever"
INDEX = "index"
RANKER = "ranker"
ENCODER = "encoder"
TEXT_INDEX = "text_index"
METRICS = "metrics.json"
GOLDEN = "golden.json"
PARTS = (CONFIG, ITEMS, HISTORIES, SLATES, POPULAR, RETRIEVER, INDEX, RANKER, ENCODER, TEXT_INDEX, METRICS, GOLDEN)

_LIBRARIES = ("torch", "transformers", "numpy", "pyarrow", "faiss-cpu", "faiss-gpu", "openvino")
_PICKLE_SUFFIXES = {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".joblib", ".npz"}


class FileEntry(StrictConfig):
    """One file of a Bundle."""

    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Manifest(StrictConfig):
    """The content of ``manifest.json``."""

    schema_version: int
    bundle_id: str = Field(pattern="^[0-9a-f]{64}$")
    """SHA-256 over the sorted paths and hashes of :attr:`files`: equal content has equal ids"""
    files: Mapping[str, FileEntry]
    """every file but the manifest, by its path within the Bundle"""
    num_items: int = Field(ge=1)
    embedding_dim: int = Field(ge=0)
    """of the user and item vectors; 0 for a retriever without vectors, which has no index"""
    metric: Literal["inner_product"] = "inner_product"
    dataset_fingerprint: str
    id_map_fingerprint: str
    created_at: datetime
    library_versions: Mapping[str, str]
    git_revision: str | None = None
    """commit of the checkout the library ran from, ``-dirty`` with local changes; None outside a checkout"""
    parent: str | None = None
    """``bundle_id`` this one was derived from"""
    events_watermark: str | None = None
    """up to where the event log is contained in the histories; None for none of it"""
    checksum: str
    """SHA-256 of the other fields, so that the manifest itself cannot change unnoticed"""

    @field_validator("files")
    @classmethod
    def _check_paths(cls, files: Mapping[str, FileEntry]) -> Mapping[str, FileEntry]:
        for path in files:
            parts = PurePosixPath(path).parts
            if not parts or path != "/".join(parts) or ".." in parts or "\\" in path or path == MANIFEST:
                raise ValueError(f"{path!r} is no plain path within the Bundle")
        return files

    @classmethod
    def create(cls, folder: Path, **fields: Any) -> Manifest:
        """The manifest of the files in ``folder``; ``fields`` are those that cannot be found out here."""
        files = {path: FileEntry(size_bytes=(folder / path).stat().st_size, sha256=file_sha256(folder / path))
                 for path in list_files(folder)}  # fmt: skip
        tree = {
            "schema_version": SCHEMA_VERSION,
            "bundle_id": content_id(files),
            "files": files,
            "created_at": datetime.now(UTC),
            "library_versions": library_versions(),
            "git_revision": git_revision(),
            "checksum": "",
            **fields,
        }
        draft = cls.parse(tree, where=str(folder))
        return draft.model_copy(update={"checksum": draft.compute_checksum()})

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(entry.size_bytes for entry in self.files.values())

    def compute_checksum(self) -> str:
        """What :attr:`checksum` must be."""
        return fingerprint(self.model_dump(mode="json", exclude={"checksum"}))

    @classmethod
    def from_bytes(cls, content: bytes, *, where: str) -> Manifest:
        """Read and check ``manifest.json``. One of an older schema can still be listed and collected, but see
        :meth:`check_version`.

        :raises BundleCorruptError: when it is not whole or does not match its own checksum.
        :raises BundleMismatchError: when a newer library wrote it.
        """
        try:
            tree = json.loads(content)
            found = int(tree["schema_version"])
        except (ValueError, KeyError, TypeError) as error:
            raise BundleCorruptError(f"{where}: not a readable manifest: {error}", path=where) from error
        if found > SCHEMA_VERSION:
            raise BundleMismatchError(
                f"{where}: schema version {found} is newer than this library reads ({SCHEMA_VERSION}): upgrade recsys",
                path=where,
                schema_version=found,
            )
        try:
            manifest: Manifest = parse(cls, tree, where=where)
        except ConfigError as error:
            raise BundleCorruptError(error.message, path=where) from error
        if manifest.checksum != manifest.compute_checksum() or manifest.bundle_id != content_id(manifest.files):
            raise BundleCorruptError(f"{where}: the manifest does not match its own checksum", path=where)
        return manifest

    def to_bytes(self) -> bytes:
        """The form :meth:`from_bytes` reads."""
        return (self.model_dump_json(indent=2) + "\n").encode()

    def check_version(self, where: str) -> None:
        """Raise :class:`BundleMismatchError` unless the Bundle at ``where`` has the schema of this library."""
        if self.schema_version != SCHEMA_VERSION:
            wrote = self.library_versions.get("recsys", "another version")
            raise BundleMismatchError(
                f"{where}: schema version {self.schema_version}, but this library reads {SCHEMA_VERSION}: train and "
                f"publish again with it, or serve this Bundle with the recsys that wrote it ({wrote})",
                path=where,
                schema_version=self.schema_version,
            )

    def check_files(self, folder: Path) -> None:
        """Raise :class:`BundleCorruptError`, naming the file, unless ``folder`` holds these files and no other."""
        present = set(list_files(folder)) - {MANIFEST}
        if missing := sorted(set(self.files) - present):
            raise BundleCorruptError(f"{folder / missing[0]}: the file is missing", path=missing[0])
        if extra := sorted(present - set(self.files)):
            raise BundleCorruptError(f"{folder / extra[0]}: the file is not in the manifest", path=extra[0])
        for path, entry in self.files.items():
            size = (folder / path).stat().st_size
            if size != entry.size_bytes:
                raise BundleCorruptError(
                    f"{folder / path}: {size} bytes, the manifest says {entry.size_bytes}", path=path
                )
            if file_sha256(folder / path) != entry.sha256:
                raise BundleCorruptError(f"{folder / path}: the content differs from the manifest", path=path)


def check_part(name: str) -> None:
    """Raise :class:`BundleError` unless ``name`` is one of :data:`PARTS`."""
    if name not in PARTS:
        raise BundleError(f"{name!r} is no part of a Bundle; those are {', '.join(PARTS)}", part=name)


def content_id(files: Mapping[str, FileEntry]) -> str:
    """SHA-256 (hex) over the sorted (path, hash) pairs, as compact JSON."""
    return fingerprint(sorted((path, entry.sha256) for path, entry in files.items()))


def list_files(folder: Path) -> list[str]:
    """Paths of all files below ``folder``, with forward slashes, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def refuse_pickle(folder: Path) -> None:
    """Raise :class:`BundleError` naming the first file that could run code when it is loaded."""
    for name in list_files(folder):
        if reason := _pickle_reason(folder / name):
            raise BundleError(f"{name}: {reason}; a Bundle holds safetensors, Arrow, Parquet and JSON", path=name)


def _pickle_reason(path: Path) -> str | None:
    if path.suffix.lower() in _PICKLE_SUFFIXES:
        return f"{path.suffix} files are read with pickle"
    with path.open("rb") as file:
        head = file.read(256)
        if head[:4] == b"PK\x03\x04":
            return "a zip archive may hold pickles"
        if head[:6] == b"\x93NUMPY" and b"|O" in head:
            return "the array holds pickled objects"
        if head[:1] == b"\x80" and head[1:2] in {b"\x02", b"\x03", b"\x04", b"\x05"}:
            import pickletools

            file.seek(0)
            try:
                # Reads opcodes up to STOP without executing any; weights that start with 0x80 by chance fail here.
                for _ in pickletools.genops(file):
                    pass
            except ValueError:
                return None
            return "the content is a pickle"
    return None


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that a Bundle's answers depend on."""
    found = {"recsys": installed_version(), **{name: installed_version(name) for name in _LIBRARIES}}
    return {name: version for name, version in found.items() if version is not None}


def git_revision() -> str | None:
    """The commit this library's source is at, with ``-dirty`` after local changes; None where git does not track it."""
    git = shutil.which("git")
    if git is None:
        return None
    here = Path(__file__)

    def ask(*arguments: str) -> str | None:
        command = [git, "-C", str(here.parent), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    if ask("ls-files", "--error-unmatch", here.name) is None:
        return None
    return ask("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
