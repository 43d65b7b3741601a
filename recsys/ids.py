"""The one rule for ids and for texts, at every border: requests, events, rules, items over HTTP, rows of sources and
catalogues.
"""

from __future__ import annotations

from typing import Annotated, Any

import pyarrow as pa
from pydantic import AfterValidator, Field

from recsys.arrow import pc

MAX_ID_LENGTH = 256
"""longest id or event name (characters)"""


def id_problem(value: Any) -> str | None:
    """Why ``value`` is no id (of a user, an item, an event, a request) and no event name; None where it is one."""
    if not isinstance(value, str) or not value:
        return f"must be a non-empty string, not {value!r}"
    if len(value) > MAX_ID_LENGTH:
        return f"is {len(value)} characters long, more than {MAX_ID_LENGTH}"
    return "holds a NUL, which is no text" if "\0" in value else text_problem(value)


def text_problem(value: str) -> str | None:
    """Why ``value`` cannot be stored as UTF-8; None where it can."""
    if any("\ud800" <= character <= "\udfff" for character in value):
        return "holds an unpaired surrogate, which is no text"
    return None


def _id(value: str) -> str:
    if why := id_problem(value):
        raise ValueError(why)
    return value


def _text(value: str) -> str:
    if why := text_problem(value):
        raise ValueError(why)
    return value


Id = Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH), AfterValidator(_id)]
"""type of a field that holds an id"""
Text = Annotated[str, AfterValidator(_text)]
"""type of a field that holds any text"""


def id_problems(column: Any) -> dict[str, pa.Array]:
    """For a column of texts the reasons why some are no ids, and for each a mask of the rows; what is blank or null
    is the caller's to judge. Arrow's texts hold no surrogates.
    """
    texts = column.cast(pa.string())
    return {
        f"is longer than {MAX_ID_LENGTH} characters": pc.greater(pc.utf8_length(texts), MAX_ID_LENGTH),
        "holds a NUL": pc.match_substring(texts, "\0"),
    }
