"""The one rule for ids, at every border: requests, events, items over HTTP, rows of sources and of catalogues."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from recsys.arrow import pc

MAX_ID_LENGTH = 256
"""longest id or event name (characters)"""


def id_problem(value: Any) -> str | None:
    """Why ``value`` is no id (of a user, an item, an event, a request) and no event name; None where it is one."""
    if not isinstance(value, str) or not value:
        return f"must be a non-empty string, not {value!r}"
    if len(value) > MAX_ID_LENGTH:
        return f"is {len(value)} characters long, more than {MAX_ID_LENGTH}"
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        return "holds a NUL or an unpaired surrogate, which is no text"
    return None


def id_problems(column: Any) -> dict[str, pa.Array]:
    """For a column of texts the reasons why some are no ids, and for each a mask of the rows; what is blank or null
    is the caller's to judge. Arrow's texts hold no surrogates.
    """
    texts = column.cast(pa.string())
    return {
        f"is longer than {MAX_ID_LENGTH} characters": pc.greater(pc.utf8_length(texts), MAX_ID_LENGTH),
        "holds a NUL": pc.match_substring(texts, "\0"),
    }
