"""Sources of interactions and items, one file per kind."""

from __future__ import annotations

from typing import Annotated

from recsys.data.sources.base import Source
from recsys.kinds import Kinds

KINDS: Kinds[Source] = Kinds(
    "sources",
    {
        "movielens_small": "recsys.data.sources.movielens_small:MovielensSmallSource",
        "movielens": "recsys.data.sources.movielens:MovielensSource",
        "sequences": "recsys.data.sources.sequences:SequencesSource",
        "online_retail": "recsys.data.sources.online_retail:OnlineRetailSource",
        "parquet": "recsys.data.sources.parquet:ParquetSource",
        "csv": "recsys.data.sources.csv:CsvSource",
        "synthetic": "recsys.data.sources.synthetic:SyntheticSource",
    },
)
AnySource = Annotated[Source, KINDS]

__all__ = ["KINDS", "AnySource", "Source"]
