"""Writing a Bundle: parts go into a temporary folder, the manifest comes last, then the folder gets its name."""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa

from recsys.bundle import manifest as layout
from recsys.bundle.histories import HISTORIES_SCHEMA
from recsys.bundle.location import sync_folder
from recsys.bundle.manifest import Manifest, list_files, refuse_pickle
from recsys.bundle.reader import Bundle
from recsys.data.dataset import DatasetInfo
from recsys.errors import BundleError
from recsys.files import link_or_copy, write_arrow, write_parquet
from recsys.types import FloatArray, Int32Array


class BundleWriter:
    """Makes ``parent/<bundle_id>``. Used as a context manager, it leaves nothing behind when it fails.

    ::

        with BundleWriter(folder) as writer:
            catalogue.save(writer.part("items"))
            writer.add("retriever", retriever_folder)
            writer.add_popular(item_idx, score)
            ...
            bundle = writer.finish(dataset.info, embedding_dim=64)
    """

    def __init__(self, parent: str | Path) -> None:
        self.parent = Path(parent).absolute()
        self.path = self.parent / f".bundle.{uuid.uuid4().hex}.tmp"
        """the temporary folder, which holds the parts so far"""

    def __enter__(self) -> BundleWriter:
        self.path.mkdir(parents=True)
        return self

    def __exit__(self, *exc_info: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def part(self, name: str) -> Path:
        """Where to write part ``name`` (see :data:`recsys.bundle.manifest.PARTS`)."""
        layout.check_part(name)
        return self.path / name

    def add(self, name: str, source: str | Path) -> None:
        """Take a file or a folder as part ``name``. Files are linked where that can be, so nobody may change them in
        place any more.
        """
        source, target = Path(source), self.part(name)
        if source.is_dir():
            shutil.copytree(source, target, copy_function=link_or_copy)
        elif source.is_file():
            link_or_copy(source, target)
        else:
            raise BundleError(f"{source}: there is nothing here to add as {name!r}", part=name, path=str(source))

    def add_popular(self, item_idx: Int32Array, score: FloatArray) -> None:
        """Fallback candidates, best first: int32 [P] and float32 [P]."""
        table = pa.table({"item_idx": pa.array(item_idx, pa.int32()), "score": pa.array(score, pa.float32())})
        write_arrow(self.part(layout.POPULAR), table)

    def add_histories(self, histories: pa.Table) -> None:
        """What users did: :data:`~recsys.bundle.histories.HISTORIES_SCHEMA`, one row per user."""
        if not histories.schema.equals(HISTORIES_SCHEMA):
            raise BundleError(f"histories need the columns\n{HISTORIES_SCHEMA}\nnot\n{histories.schema}")
        write_parquet(self.part(layout.HISTORIES), histories)

    def draft(self, info: DatasetInfo, *, embedding_dim: int) -> Bundle:
        """The parts so far as a Bundle, unpublished: what the golden query is answered with before it is added."""
        return Bundle(self.path, self._manifest(info, embedding_dim=embedding_dim))

    def finish(
        self,
        info: DatasetInfo,
        *,
        embedding_dim: int,
        parent: str | None = None,
        events_watermark: str | None = None,
    ) -> Bundle:
        """Check that the parts agree, write the manifest and give the folder its name.

        :raises BundleMismatchError: when parts disagree.
        :raises BundleError: when a file could hold a pickle.
        """
        refuse_pickle(self.path)
        manifest = self._manifest(info, embedding_dim=embedding_dim, parent=parent, events_watermark=events_watermark)
        Bundle(self.path, manifest).check()
        (self.path / layout.MANIFEST).write_bytes(manifest.to_bytes())
        target = self.parent / manifest.bundle_id
        move_into_place(self.path, target)
        return Bundle.open(target)

    def _manifest(self, info: DatasetInfo, **fields: Any) -> Manifest:
        return Manifest.create(
            self.path,
            num_items=info.num_items,
            dataset_fingerprint=info.fingerprint,
            id_map_fingerprint=info.id_map_fingerprint,
            **fields,
        )


def move_into_place(folder: Path, target: Path) -> None:
    """Flush ``folder`` to disk and rename it to ``target``; where the same content got there first, drop ``folder``."""
    for name in list_files(folder):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        sync_folder(path)
    try:
        folder.rename(target)
    except OSError:
        # Named by its content, so a folder that is complete there is the same Bundle.
        if not (target / layout.MANIFEST).exists():
            raise
        shutil.rmtree(folder)
    sync_folder(target.parent)
