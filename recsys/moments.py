"""Moments: as people write them, and as milliseconds since 1970 UTC."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from pydantic import AfterValidator, AwareDatetime, BeforeValidator

_EPOCH, _MS = datetime(1970, 1, 1, tzinfo=UTC), timedelta(milliseconds=1)


def milliseconds(moment: datetime) -> int:
    """Milliseconds since 1970 UTC, rounded down; a moment without a zone is in UTC."""
    return ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH) // _MS


def _only_text(value: Any) -> Any:
    # A bare number could be seconds or milliseconds: ask, never guess.
    if isinstance(value, int | float):
        raise ValueError(  # noqa: TRY004 pydantic reports it as a bad value
            'write the time as an ISO 8601 string with its zone, such as "2025-06-01T12:00:00Z"'
        )
    return value


def _as_utc(value: datetime) -> datetime:
    # Files and databases keep these; others they round or refuse.
    if not 1000 <= value.year <= 2999:
        raise ValueError(f"the year {value.year} is not in 1000 to 2999")
    return value.astimezone(UTC)


Moment = Annotated[AwareDatetime, BeforeValidator(_only_text), AfterValidator(_as_utc)]
"""type of a field that holds a time: ISO 8601 with its zone, kept in UTC"""
