"""Sources of interactions and items, one file each; ``AnySource`` is what a configuration may name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from recsys.config import union
from recsys.data.sources.base import Source
from recsys.data.sources.csv import CsvSource
from recsys.data.sources.movielens import MovielensSource
from recsys.data.sources.movielens_small import MovielensSmallSource
from recsys.data.sources.online_retail import OnlineRetailSource
from recsys.data.sources.parquet import ParquetSource
from recsys.data.sources.sequences import SequencesSource
from recsys.data.sources.synthetic import SyntheticSource

KINDS = (
    MovielensSmallSource,
    MovielensSource,
    SequencesSource,
    OnlineRetailSource,
    ParquetSource,
    CsvSource,
    SyntheticSource,
)

if TYPE_CHECKING:
    AnySource = Source
else:
    AnySource = union("sources", KINDS)

__all__ = [
    "KINDS",
    "AnySource",
    "CsvSource",
    "MovielensSmallSource",
    "MovielensSource",
    "OnlineRetailSource",
    "ParquetSource",
    "SequencesSource",
    "Source",
    "SyntheticSource",
]
