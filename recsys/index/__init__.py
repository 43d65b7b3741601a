"""Indexes over item vectors, one file per kind. All are FAISS's; ``flat`` does without it where it is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from recsys.errors import ModelError
from recsys.files import read_json
from recsys.index.base import INDEX_FILE, INFO_FILE, IndexConfig, VectorIndex
from recsys.kinds import Kinds

KINDS: Kinds[IndexConfig] = Kinds(
    "index",
    {
        "flat": "recsys.index.flat:FlatIndex",
        "ivf": "recsys.index.ivf:IvfIndex",
        "hnsw": "recsys.index.hnsw:HnswIndex",
    },
)
AnyIndex = Annotated[IndexConfig, KINDS]

__all__ = ["KINDS", "AnyIndex", "IndexConfig", "VectorIndex", "load_index"]


def load_index(folder: str | Path) -> VectorIndex:
    """Memory-map what :meth:`VectorIndex.save` wrote: pages are shared between processes and read on demand.

    :raises NotInstalledError: when it needs FAISS, and that is not installed.
    :raises ModelError: when the folder holds no complete index or its parts disagree.
    """
    folder = Path(folder)
    for name in (INFO_FILE, INDEX_FILE):
        if not (folder / name).exists():
            raise ModelError(f"{folder}: no index here ({name} is missing)", path=str(folder))
    info = read_json(folder / INFO_FILE)
    config = KINDS.parse(info["config"], where=str(folder / INFO_FILE))
    index = config.read(folder / INDEX_FILE)
    if (index.num_items, index.dim) != (info["num_items"], info["dim"]):
        raise ModelError(
            f"{folder}: {INDEX_FILE} holds {index.num_items} x {index.dim}, "
            f"{INFO_FILE} says {info['num_items']} x {info['dim']}",
            path=str(folder),
        )
    return index
