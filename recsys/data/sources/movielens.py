"""The MovieLens folders that GroupLens publishes: 100K, 1M, 10M, 20M and later, each recognised by its files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

import pyarrow as pa
from pydantic import Field

from recsys import schema
from recsys.data.sources.base import Source
from recsys.data.sources.files import estimate_lines, existing, files_fingerprint, read_csv, split_categories
from recsys.errors import DataError, SchemaError

_FIELDS = (schema.USER_ID, schema.ITEM_ID, schema.VALUE, schema.TIMESTAMP)
_FILES = {"u.data": "u.item", "ratings.dat": "movies.dat", "ratings.csv": "movies.csv"}
_GENRES_100K = [
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
]


class MovielensSource(Source):
    """Ratings (stars) with times in seconds, and movies with titles and genres.

    ========================  =============================  =====================================
    release                   files                          form
    ========================  =============================  =====================================
    100K                      ``u.data``, ``u.item``         tabs and ``|``, latin-1, genre flags
    1M, 10M                   ``ratings.dat, movies.dat``    ``::``, latin-1 (10M: UTF-8)
    20M, 25M, 32M, latest     ``ratings.csv, movies.csv``    CSV with a header, UTF-8
    ========================  =============================  =====================================
    """

    kind: Literal["movielens"] = "movielens"
    path: str = Field(description="Path of the unpacked folder.")

    @classmethod
    def sample(cls, folder: Path) -> Self:
        (folder / "ratings.dat").write_text("1::10::5::978300760\n2::20::3::978302109\n")
        (folder / "movies.dat").write_text("10::A (1990)::Comedy\n20::B (1991)::Drama\n")
        return cls(path=str(folder))

    @property
    def default_event(self) -> str:
        return "rating"

    def _files(self) -> tuple[Path, Path]:
        folder = existing(self.path)
        for ratings, movies in _FILES.items():
            if (folder / ratings).exists():
                return folder / ratings, existing(folder / movies)
        raise DataError(
            f"{folder}: no MovieLens release here; expected one of {', '.join(_FILES)} in it", path=str(folder)
        )

    def read(self) -> Iterator[pa.Table]:
        path, _ = self._files()
        if path.name == "ratings.csv":
            yield from read_csv(path, dict(zip(_FIELDS, ("userId", "movieId", "rating", "timestamp"), strict=True)))
        elif path.name == "u.data":
            yield from read_csv(path, dict(zip(_FIELDS, _FIELDS, strict=True)), delimiter="\t", names=_FIELDS)
        else:
            # "::" is read as ":" with an empty column between two fields; none of the four fields can hold a colon.
            names = [name for field in _FIELDS for name in (field, f"after {field}")][:-1]
            yield from read_csv(
                path, dict(zip(_FIELDS, _FIELDS, strict=True)), delimiter=":", names=names, quotes=False
            )

    def items(self) -> pa.Table:
        _, path = self._files()
        if path.name == "movies.csv":
            chunks = read_csv(path, {schema.ITEM_ID: "movieId", "title": "title", "genres": "genres"})
            table = pa.concat_tables(list(chunks), promote_options="default")
            rows = list(zip(*(table[name].to_pylist() for name in (schema.ITEM_ID, "title", "genres")), strict=True))
        else:
            separator, width = ("|", 24) if path.name == "u.item" else ("::", 3)
            rows = [_movie(line, separator, width, path, number) for number, line in enumerate(_lines(path), start=1)]
        ids, titles, genres = zip(*rows, strict=True) if rows else ((), (), ())
        texts = pa.array(["" if text == "(no genres listed)" else text for text in genres], pa.string())
        return pa.table(
            {
                schema.ITEM_ID: pa.array(ids, pa.string()),
                "title": pa.array(titles, pa.string()),
                "categories": split_categories(texts, "|"),
            }
        )

    def fingerprint(self) -> str:
        return files_fingerprint(self, self._files())

    def num_rows(self) -> int:
        return estimate_lines(self._files()[0])


def _lines(path: Path) -> Iterator[str]:
    """Lines that hold something. Older releases are latin-1, 10M is UTF-8, and latin-1 is rarely valid UTF-8."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    return (line for line in text.split("\n") if line.strip())


def _movie(line: str, separator: str, width: int, path: Path, number: int) -> tuple[str, str, str]:
    """Id, title and genres joined by ``|``."""
    cells = line.rstrip("\r").split(separator)
    if len(cells) < width:
        raise SchemaError(
            f"{path}, line {number}: {len(cells)} field(s) instead of {width}; is this an original GroupLens file?",
            path=str(path),
            line=number,
        )
    if width == 3:
        return cells[0], separator.join(cells[1:-1]), cells[-1]
    flags = zip(_GENRES_100K, cells[-len(_GENRES_100K) :], strict=True)
    return cells[0], cells[1], "|".join(genre for genre, flag in flags if flag == "1" and genre != "unknown")
