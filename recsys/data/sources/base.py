"""What every source of interactions is.

A new source is one file with one subclass of :class:`Source` and one line in ``recsys/data/sources/__init__.py``.

**Raw interactions.** :meth:`Source.read` yields Arrow tables with the columns of the contract and the values as
they were found; validation converts, and quarantines the rows it cannot convert:

=============  =========  =====================================================================================
column         needed     type
=============  =========  =====================================================================================
``user_id``    yes        string or integer
``item_id``    yes        string or integer
``timestamp``  with time  string, number or timestamp, read as :attr:`Source.timestamp_encoding` says
``position``   no         integer or numeric string: orders the rows of a user that have the same time (or no time)
``event``      no         string; where the column is absent every row has the event :attr:`Source.default_event`
``value``      no         number, boolean or numeric string
``row``        no         int64: number of the row in the source, from 0; counted where absent
``rejected``   no         string or null: why the source itself refuses the row, null where it does not
``line``       no         string or null: the text of a line that could not be cut into columns
=============  =========  =====================================================================================

Of accepted rows ``position`` orders the user's own log; ``timestamp`` is null in data with order only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal

import pyarrow as pa

from recsys.kinds import Kind

TimestampEncoding = Literal["s", "ms", "us", "iso"]
"""Numbers since 1970 UTC in seconds, milliseconds or microseconds, or ISO 8601 text (without a zone: UTC).

Columns that have an Arrow timestamp or date type need no encoding and ignore this.
"""

ROW = "row"
REJECTED = "rejected"
LINE = "line"


class Source(Kind, ABC):
    """Where interactions and items come from. Subclasses add ``kind: Literal["..."]``."""

    kind: str

    @property
    def has_time(self) -> bool:
        """False where the data has order only; its timestamps are then null, never invented."""
        return True

    @property
    def timestamp_encoding(self) -> TimestampEncoding:
        """How timestamps that come as numbers or text are to be read."""
        return "s"

    @property
    def default_event(self) -> str:
        """The event of rows that do not name one."""
        return "interaction"

    @abstractmethod
    def read(self) -> Iterator[pa.Table]:
        """Raw interactions in chunks, in a stable order. Raises :class:`~recsys.errors.DataError` on unusable files."""

    @abstractmethod
    def items(self) -> pa.Table | None:
        """The catalogue: ``item_id`` and any other columns of the contract's items; None where there is none."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the content that :meth:`read` and :meth:`items` deliver: it changes when they do."""

    def events_watermark(self) -> str | None:
        """The place in an event log up to which :meth:`read` delivers it; None where that is not known."""
        return None

    def num_rows(self) -> int | None:
        """About how many raw interactions there are, for progress and time left; None where that is not known."""
        return None
