"""A library that a kind needs and that is not there."""

from __future__ import annotations

import sys

import pytest

from recsys.data.dataset import Split
from recsys.errors import ConfigError
from recsys.models.base import FitData
from recsys.models.retrievers.matrices.als import ALS
from recsys.testing.planted import planted_clusters
from recsys.training.runtime import Runtime


def test_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "implicit.cpu.als", None)
    with pytest.raises(ConfigError, match=r"the kind als needs implicit.*pip install 'recsys-ray\[classical\]'"):
        ALS().fit(FitData.of(planted_clusters(), Split.TRAIN), Runtime("cpu"))
