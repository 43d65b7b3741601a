"""The Bundle: the one thing that passes from training to serving. Immutable, hashed, without pickle.

It is made by :func:`recsys.bundle.assemble.assemble`, which needs the models.
"""

from recsys.bundle.golden import GoldenQuery, GoldenQuestion
from recsys.bundle.histories import HISTORIES_SCHEMA
from recsys.bundle.manifest import FileEntry, Manifest
from recsys.bundle.pointer import Pointer
from recsys.bundle.reader import Bundle
from recsys.bundle.store import BundleStore

__all__ = [
    "HISTORIES_SCHEMA",
    "Bundle",
    "BundleStore",
    "FileEntry",
    "GoldenQuery",
    "GoldenQuestion",
    "Manifest",
    "Pointer",
]
