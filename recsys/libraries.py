"""Libraries that only some parts need, and how to install them."""

from __future__ import annotations

import importlib
import importlib.util
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from recsys.errors import NotInstalledError

DISTRIBUTION = "recsys-ray"
"""this package's name on PyPI, where the name ``recsys`` is another project's; imports say ``recsys``"""


def installed_version(distribution: str = DISTRIBUTION) -> str | None:
    """Of a package on this machine, by its name on PyPI; None where it is not installed, as in a bare checkout."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def install(extra: str) -> str:
    """The command that brings what ``extra`` of this package needs."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"


def library(module: str, what: str, *, extra: str) -> Any:
    """The module, which ``what`` needs and ``extra`` of this package brings.

    :raises NotInstalledError: when it cannot be imported; it says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise NotInstalledError(f"{what} needs {module}: {error}; {install(extra)}", package=module) from error


def need(module: str, what: str, *, extra: str) -> None:
    """As :func:`library`, but without an import: for modules that read their settings when they are imported.

    :raises NotInstalledError: when it is not installed; it says what to install.
    """
    if importlib.util.find_spec(module) is None:
        raise NotInstalledError(f"{what} needs {module}; {install(extra)}", package=module)


def installed(module: str) -> bool:
    """Whether this machine can import it; it is imported."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True
