"""Files are written under a temporary name and renamed, so that a reader never sees half of one."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS}
"""another file system, one without hard links, one that keeps them to the owner, or too many of them"""


@contextmanager
def atomic_path(path: str | Path) -> Generator[Path]:
    """Yield a temporary path beside ``path``: flushed to disk and renamed onto it on success, else removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file."""
    return json.loads(Path(path).read_text())


def write_parquet(path: str | Path, table: pa.Table) -> None:
    """Write ``table`` as Parquet, atomically."""
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def write_arrow(path: str | Path, table: pa.Table) -> None:
    """Write ``table`` as an uncompressed Arrow IPC file, atomically: it can be mapped and shared by processes."""
    with (
        atomic_path(path) as temporary,
        pa.OSFile(str(temporary), "wb") as sink,
        pa.ipc.new_file(sink, table.schema) as writer,
    ):
        writer.write_table(table.combine_chunks())


def map_arrow(path: str | Path) -> pa.Table:
    """Memory-map an Arrow IPC file: no copy, pages shared between processes."""
    return pa.ipc.open_file(pa.memory_map(str(path), "rb")).read_all()


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A second name for the file ``source``, or each file of the folder ``source``, in place of what ``target`` was.

    It costs no space, and each name can be removed without the other: for files that are never changed in place. File
    systems that do not share files get copies.
    """
    source, target = Path(source).resolve(), Path(target)
    if source.is_dir():
        shutil.copytree(source, target, copy_function=link_or_copy, dirs_exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)


def fingerprint(tree: Any) -> str:
    """SHA-256 (hex) of plain values in their canonical JSON form: equal values have equal ones in every process."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_sha256(path: str | Path) -> str:
    """SHA-256 (hex) of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
