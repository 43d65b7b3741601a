"""The Bundle: the one thing that passes from training to serving. Immutable, hashed, without pickle."""

from recsys.bundle.golden import GoldenQuery
from recsys.bundle.manifest import FileEntry, Manifest
from recsys.bundle.pointer import Pointer
from recsys.bundle.reader import HISTORIES_SCHEMA, Bundle
from recsys.bundle.store import BundleStore
from recsys.bundle.writer import BundleWriter

__all__ = [
    "HISTORIES_SCHEMA",
    "Bundle",
    "BundleStore",
    "BundleWriter",
    "FileEntry",
    "GoldenQuery",
    "Manifest",
    "Pointer",
]
