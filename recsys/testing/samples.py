"""Samples of kinds, over which contract tests run."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import pytest

from recsys.errors import NotInstalledError
from recsys.kinds import Kind

KindT = TypeVar("KindT", bound=Kind)


def sample_of(kind: type[KindT], folder: Path) -> KindT:
    """The sample of ``kind``, with its files in ``folder``; the test is skipped where it needs what is not here."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return kind.sample(folder)
    except NotInstalledError as error:
        pytest.skip(str(error))
