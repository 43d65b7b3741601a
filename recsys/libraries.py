"""Libraries that only some kinds need."""

from __future__ import annotations

import importlib
from typing import Any

from recsys.errors import NotInstalledError


def library(module: str, kind: str, *, extra: str = "classical") -> Any:
    """The module, for something of ``kind``; ``extra`` of this package brings it.

    :raises NotInstalledError: when it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotInstalledError(f"the kind {kind} needs {module}: {error}; pip install 'recsys[{extra}]'") from error


def installed(module: str) -> bool:
    """Whether this machine can import it; it is imported."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True
