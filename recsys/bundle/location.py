"""A place for files: a local path or any fsspec URI, behind the few operations that Bundles need."""

from __future__ import annotations

import os
import threading
import uuid
from pathlib import Path
from typing import Any

_create_lock = threading.Lock()


class Location:
    """A file or folder. Credentials come from the environment, as each fsspec file system documents."""

    def __init__(self, filesystem: Any, path: str) -> None:
        self._fs = filesystem
        self._path = path.rstrip("/") or "/"

    @classmethod
    def of(cls, uri: str | Path) -> Location:
        """``uri`` is a path or a URI such as ``s3://bucket/prefix``."""
        from fsspec.core import url_to_fs

        filesystem, path = url_to_fs(str(uri))
        return cls(filesystem, path)

    def __truediv__(self, name: str) -> Location:
        return Location(self._fs, f"{self._path.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self._path if self.local is not None else str(self._fs.unstrip_protocol(self._path))

    @property
    def local(self) -> Path | None:
        """The local path, or None where the files are elsewhere."""
        from fsspec.implementations.local import LocalFileSystem

        return Path(self._path) if isinstance(self._fs, LocalFileSystem) else None

    def exists(self) -> bool:
        """Whether something is there now."""
        self._fs.invalidate_cache()
        return bool(self._fs.exists(self._path))

    def names(self) -> list[str]:
        """Names of what is directly inside, sorted; empty where there is no such folder."""
        self._fs.invalidate_cache()
        try:
            entries: list[str] = self._fs.ls(self._path, detail=False)
        except FileNotFoundError:
            return []
        return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)

    def read(self) -> bytes:
        """The file's content; FileNotFoundError where there is none."""
        return bytes(self._fs.cat_file(self._path))

    def download(self, target: Path) -> None:
        """Copy the file to a local path."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self._fs.get_file(self._path, str(target))

    def upload(self, source: Path) -> None:
        """Copy a local file here, over what is there."""
        self._fs.makedirs(self._fs._parent(self._path), exist_ok=True)
        self._fs.put_file(str(source), self._path)

    def create(self, content: bytes) -> bool:
        """Write a file that must not exist yet; False where somebody else was first.

        Exclusive on local disks (hard link) and on object stores with conditional writes (S3, GCS, Azure). ``content``
        must be unique to this call: what is read back afterwards decides who was first, also where the file system
        reports a lost race as some other error, or not at all.
        """
        folder = self._fs._parent(self._path)
        self._fs.makedirs(folder, exist_ok=True)
        if self.local is not None:
            return _create_local(self.local, content)
        try:
            with _create_lock:
                self._fs.pipe_file(self._path, content, mode="create")
        except FileExistsError:
            return False
        except OSError:
            if not self.exists():
                raise
        return self.read() == content

    def remove(self) -> None:
        """Remove the file or the folder with all that is in it."""
        self._fs.rm(self._path, recursive=True)


def _create_local(path: Path, content: bytes) -> bool:
    """A reader sees the whole file or none, which an exclusive open followed by a write does not give."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def sync_folder(folder: Path) -> None:
    """Flush the names in ``folder`` to disk, so that a rename survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
