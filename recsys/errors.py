"""Every error this library raises on purpose, in one tree.

::

    RecsysError
    ├── ConfigError             a configuration file, key or value is wrong
    │   └── NotInstalledError   what it names needs a package or a server that is not here
    ├── DataError
    │   ├── SchemaError         columns or types break the data contract
    │   ├── EmptyDataError      nothing is left to work on
    │   ├── NoTimeError         time was asked of data that has only order
    │   └── LeakageError        a split lets the future into the past
    ├── ModelError              a model cannot be fitted, saved, loaded or used as asked
    ├── BundleError
    │   ├── BundleNotFoundError
    │   ├── BundleCorruptError  a file is missing or its hash differs
    │   ├── BundleMismatchError parts that must agree do not
    │   ├── PointerConflictError somebody else moved the pointer first
    │   └── ChangeConflictError somebody else changed it first
    ├── EventStoreError         the event store refuses or cannot answer
    ├── RequestError            the caller of the pipeline sent something unusable
    └── StageError              a stage of the pipeline failed
        ├── StageTimeoutError   ... by being too slow
        └── StageOverloadedError ... by refusing more work than it can queue

Errors cross process borders (Ray workers, Serve replicas), so each one pickles with its message and its
``details`` intact and is still catchable by class on the other side.
"""

from __future__ import annotations

from typing import Any, ClassVar


class RecsysError(Exception):
    """Base class. ``details`` names the file, row, field or part at fault, for programs; the message is for people."""

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.details = details

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.details)


def _rebuild(cls: type[RecsysError], message: str, details: dict[str, Any]) -> RecsysError:
    return cls(message, **details)


class ConfigError(RecsysError):
    """A configuration file, key or value is wrong."""


class NotInstalledError(ConfigError):
    """What the configuration names needs a package or a server that is not here."""


class DataError(RecsysError):
    """Input data cannot be used."""


class SchemaError(DataError):
    """Columns or types break the data contract."""


class EmptyDataError(DataError):
    """Nothing is left to work on."""


class NoTimeError(DataError):
    """Time was asked of data that has only order."""


class LeakageError(DataError):
    """A split lets the future into the past."""


class ModelError(RecsysError):
    """A model cannot be fitted, saved, loaded or used as asked."""


class BundleError(RecsysError):
    """Something is wrong with a Bundle."""


class BundleNotFoundError(BundleError):
    """No Bundle is where one was expected."""


class BundleCorruptError(BundleError):
    """A file of the Bundle is missing or its content differs from the manifest."""


class BundleMismatchError(BundleError):
    """Parts of the Bundle that must agree do not."""


class PointerConflictError(BundleError):
    """The pointer to the current Bundle was moved by somebody else first."""


class ChangeConflictError(BundleError):
    """What beside the Bundles was to be changed was changed by somebody else first."""


class EventStoreError(RecsysError):
    """The event store refuses or cannot answer."""


class RequestError(RecsysError):
    """The caller of the pipeline sent something unusable."""


class StageError(RecsysError):
    """A stage of the pipeline failed."""

    outcome: ClassVar[str] = "failed"
    """what metrics and traces call it"""


class StageTimeoutError(StageError):
    """A stage of the pipeline was too slow for the deadline."""

    outcome: ClassVar[str] = "timeout"


class StageOverloadedError(StageError):
    """A stage of the pipeline has more work queued than it accepts. It is busy, not broken."""

    outcome: ClassVar[str] = "overloaded"


class StageSkippedError(StageError):
    """A stage of the pipeline was not called: its circuit breaker is open, or what it needs is missing."""

    outcome: ClassVar[str] = "skipped"
