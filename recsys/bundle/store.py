"""A store of Bundles and the pointer to the current one, on a local path or any fsspec URI.

::

    bundles/<bundle_id>/       immutable, complete once manifest.json is in it
    current/00000001.json      the pointer is a log: the entry with the highest number holds
    items/00000001.arrow       what was changed in the catalogue since, see recsys.bundle.changes
    rules/00000001.json        by which rules they answer since, see recsys.bundle.rule_log

Moving the pointer is creating the next number, which only one writer can do: compare-and-swap without a lock service.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field

from recsys.bundle.changes import ItemLog
from recsys.bundle.live import LiveBundle, RuledBundle, Version, beneath, split_id
from recsys.bundle.location import Location
from recsys.bundle.manifest import MANIFEST, Manifest
from recsys.bundle.reader import Bundle, read_manifest
from recsys.bundle.rule_log import RuleLog
from recsys.bundle.writer import move_into_place
from recsys.config import StrictConfig
from recsys.errors import BundleCorruptError, BundleError, BundleNotFoundError, ConfigError, PointerConflictError

_ENTRY = re.compile(r"(\d{8})\.json")


class Canary(StrictConfig):
    """A Bundle on trial."""

    bundle_id: str
    share: float = Field(gt=0, le=1, description="of the users who get it")
    token: str
    """unique to the trial"""


class Pointer(StrictConfig):
    """One entry of the pointer log."""

    number: int
    bundle_id: str
    previous: str | None
    """what a rollback returns to"""
    moved_at: datetime
    token: str
    """unique to the move, so that a writer recognises its own entry"""
    canary: Canary | None = None
    """what some of the users get instead of ``bundle_id``"""
    reason: str | None = None
    """why it was moved, where somebody said so"""

    @property
    def wanted(self) -> tuple[str, ...]:
        """Bundles that may be asked for: the current one, the one on trial, and the one before."""
        trial = None if self.canary is None else self.canary.bundle_id
        return tuple(each for each in (self.bundle_id, trial, self.previous) if each is not None)


class BundleStore:
    """Reads and moves the pointer, adds and collects Bundles. Holds no state of its own: make as many as you like."""

    def __init__(self, uri: str | Path) -> None:
        self.root = Location.of(uri)

    def __str__(self) -> str:
        return str(self.root)

    def current(self) -> Pointer | None:
        """Where the pointer is now; None in a store where it was never set."""
        return next(self._log(), None)

    def current_location(self) -> Location:
        """The folder of the current Bundle.

        :raises BundleNotFoundError: when the pointer was never set.
        """
        pointer = self.current()
        if pointer is None:
            raise BundleNotFoundError(
                f"{self.root}: neither a Bundle nor a store with a current one", path=str(self.root)
            )
        return self._folder(pointer.bundle_id)

    def open(self, bundle_id: str | None = None, *, cache: str | Path | None = None) -> Bundle:
        """The Bundle with this id, or the current one."""
        location = self.current_location() if bundle_id is None else self._folder(bundle_id)
        return Bundle.open(str(location), cache=cache)

    @property
    def items(self) -> ItemLog:
        """What was changed in the catalogue since the Bundles were published."""
        return ItemLog(self.root / "items")

    @property
    def rules(self) -> RuleLog:
        """The rules by which Bundles answer, where they were changed since."""
        return RuleLog(self.root / "rules")

    def version(self) -> Version:
        """Of what was changed up to now."""
        return Version(self.items.version(), self.rules.version())

    def open_live(self, bundle_id: str, base: Bundle | None = None, *, cache: str | Path | None = None) -> Bundle:
        """The Bundle and the changes that an id names, see :mod:`recsys.bundle.live`.

        ``base`` is what it lies on (:func:`~recsys.bundle.live.beneath`), where that is open already.
        """
        under = beneath(bundle_id)
        if under is None:
            return self.open(bundle_id, cache=cache)
        base = base or self.open_live(under, cache=cache)
        _, version = split_id(bundle_id)
        if version.rules:
            return RuledBundle(base, self.rules.read(version.rules))
        return LiveBundle(base, self.items.read(version.items), version.items)

    def publish(self, folder: str | Path, expected_parent: str | None) -> Pointer:
        """Add the Bundle in the local ``folder`` and make it the current one.

        ``expected_parent`` is the ``bundle_id`` that must be current, None for an empty store. Publishing what is
        current already does nothing. The Bundle is checked before it is copied.

        :raises PointerConflictError: when something else is current; the Bundle may then be in the store all the same,
            and :meth:`activate` can still choose it.
        """
        bundle = Bundle.open(folder)
        pointer = self.current()
        if pointer is not None and pointer.bundle_id == bundle.bundle_id:
            return pointer
        self._expect(pointer, expected_parent)
        self.add(bundle)
        return self.activate(bundle.bundle_id, expected_parent)

    def add(self, bundle: Bundle) -> None:
        """Copy ``bundle`` into the store, where it is not there yet, without moving the pointer."""
        target = self._folder(bundle.bundle_id)
        if (target / MANIFEST).exists():
            return
        if target.local is not None:
            if target.local.exists() and not (target / MANIFEST).exists():
                shutil.rmtree(target.local)  # what a removal left that came to no end
            temporary = target.local.with_name(f".{bundle.bundle_id}.{uuid.uuid4().hex}.tmp")
            try:
                shutil.copytree(bundle.path, temporary)
                bundle.manifest.check_files(temporary)
                move_into_place(temporary, target.local)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
            return
        for name in bundle.manifest.files:
            (target / name).upload(bundle.path / name)
        # Whoever else uploads the same content may be first here, which is as good.
        (target / MANIFEST).create(bundle.manifest.to_bytes())

    def activate(self, bundle_id: str, expected: str | None) -> Pointer:
        """Make ``bundle_id``, which is in the store, the current one; ``expected`` must be current until then. A trial
        ends with it.

        :raises BundleNotFoundError: when the store does not hold it.
        :raises PointerConflictError: when something else is current.
        """
        read_manifest(self._folder(bundle_id))
        pointer = self.current()
        self._expect(pointer, expected)
        reason = None
        if pointer is not None and pointer.canary is not None and pointer.canary.bundle_id != bundle_id:
            reason = f"the trial of {pointer.canary.bundle_id} ended when {bundle_id} was activated"
        # What is current already is asked for once more; a rollback still returns to what was before it.
        if pointer is not None and pointer.bundle_id == bundle_id:
            expected = pointer.previous
        return self._move(pointer, bundle_id, previous=expected, reason=reason)

    def rollback(self) -> Pointer:
        """Return to the Bundle that was current before; once more returns to the one before that.

        :raises BundleNotFoundError: when there is none, or it was collected.
        :raises PointerConflictError: when somebody moves the pointer at the same time.
        """
        log = self._log()
        pointer = next(log, None)
        if pointer is None or pointer.previous is None:
            raise BundleNotFoundError(f"{self.root}: there is no previous Bundle to return to", path=str(self.root))
        target = pointer.previous
        read_manifest(self._folder(target))
        # The entry that first brought the target in knows what came before it.
        before = next((entry.previous for entry in log if entry.bundle_id == target), None)
        return self._move(pointer, target, previous=before)

    def try_out(
        self, bundle_id: str, share: float, *, expected: str | None = None, reason: str | None = None
    ) -> Pointer:
        """Give ``bundle_id``, which is in the store, to ``share`` (above 0, up to 1) of the users.

        Where ``expected`` is given, it must be current and no other trial may be going on; else one ends with it.

        :raises BundleNotFoundError: when the store does not hold it, or nothing is current.
        :raises BundleError: when it is current already.
        :raises PointerConflictError: when somebody moves the pointer at the same time, or did before.
        """
        read_manifest(self._folder(bundle_id))
        pointer = self._pointer()
        if expected is not None:
            self._expect(pointer, expected)
            if pointer.canary is not None:
                raise PointerConflictError(f"{self.root}: Bundle {pointer.canary.bundle_id} is on trial already")
        if pointer.bundle_id == bundle_id:
            raise BundleError(f"{self.root}: Bundle {bundle_id} is current already, there is nothing to try out")
        canary = Canary.parse({"bundle_id": bundle_id, "share": share, "token": uuid.uuid4().hex}, where="canary")
        return self._move(pointer, pointer.bundle_id, previous=pointer.previous, canary=canary, reason=reason)

    def promote(self, *, token: str | None = None, reason: str | None = None) -> Pointer:
        """Make the Bundle on trial the current one; with a ``token`` only if it is that trial.

        :raises BundleError: when none is.
        :raises PointerConflictError: when it is another trial, or somebody moves the pointer at the same time.
        """
        pointer, canary = self._on_trial()
        if token is not None and canary.token != token:
            raise PointerConflictError(f"{self.root}: another trial is going on, of Bundle {canary.bundle_id}")
        return self._move(pointer, canary.bundle_id, previous=pointer.bundle_id, reason=reason)

    def withdraw(self, bundle_id: str | None = None, *, reason: str | None = None) -> Pointer:
        """End the trial; all users get the current Bundle again. ``bundle_id`` says which one must be on trial.

        :raises BundleError: when none, or another one, is on trial.
        :raises PointerConflictError: when somebody moves the pointer at the same time.
        """
        pointer, canary = self._on_trial()
        if bundle_id not in {None, canary.bundle_id}:
            raise BundleError(f"{self.root}: Bundle {canary.bundle_id} is on trial, not {bundle_id}")
        return self._move(pointer, pointer.bundle_id, previous=pointer.previous, reason=reason)

    def past(self) -> list[str]:
        """Ids of all Bundles that are or were current, the latest first; some may have been collected."""
        return list(dict.fromkeys(pointer.bundle_id for pointer in self._log()))

    def list(self) -> list[Manifest]:
        """Manifests of the complete Bundles in the store, newest first."""
        names = [name for name in (self.root / "bundles").names() if not name.startswith(".")]
        found = [read_manifest(self._folder(name)) for name in names if (self._folder(name) / MANIFEST).exists()]
        return sorted(found, key=lambda manifest: (manifest.created_at, manifest.bundle_id), reverse=True)

    def collect(self, keep: int) -> tuple[str, ...]:
        """Remove all but the ``keep`` newest Bundles, the one on trial, the one a rollback returns to, and the ``keep``
        that were current last: where the newest of them are no good, gateways still answer from one before.

        Returns the ids of those removed. Readers that have a remote Bundle open are not disturbed (they hold a copy),
        nor are local ones (their files are mapped).
        """
        if keep < 1:
            raise BundleError(f"keep must be at least 1, not {keep}")
        pointer = self.current()
        manifests = self.list()
        kept = {manifest.bundle_id for manifest in manifests[:keep]}
        if pointer is not None:
            kept |= {*pointer.wanted, *self.past()[:keep]}
        removed = tuple(manifest.bundle_id for manifest in manifests if manifest.bundle_id not in kept)
        for bundle_id in removed:
            (self._folder(bundle_id) / MANIFEST).remove()  # from here on it is no Bundle, even if what follows fails
            self._folder(bundle_id).remove()
        return removed

    def _folder(self, bundle_id: str) -> Location:
        return self.root / "bundles" / bundle_id

    def _log(self) -> Iterator[Pointer]:
        """Entries, newest first."""
        folder = self.root / "current"
        for name in reversed([name for name in folder.names() if _ENTRY.fullmatch(name)]):
            where = str(folder / name)
            try:
                pointer = Pointer.parse(json.loads((folder / name).read()), where=where)
            except (ValueError, ConfigError) as error:
                raise BundleCorruptError(f"{where}: not a readable pointer: {error}", path=where) from error
            if f"{pointer.number:08d}.json" != name:
                raise BundleCorruptError(f"{where}: says it is number {pointer.number}", path=where)
            yield pointer

    def _expect(self, pointer: Pointer | None, expected: str | None) -> None:
        found = None if pointer is None else pointer.bundle_id
        if found != expected:
            raise PointerConflictError(
                f"{self.root}: current is {found or 'nothing'}, expected {expected or 'nothing'}: "
                "look at what was published meanwhile and try again",
                found=found,
                expected=expected,
            )

    def _pointer(self) -> Pointer:
        pointer = self.current()
        if pointer is None:
            raise BundleNotFoundError(f"{self.root}: no Bundle is current yet", path=str(self.root))
        return pointer

    def _on_trial(self) -> tuple[Pointer, Canary]:
        pointer = self._pointer()
        if pointer.canary is None:
            raise BundleError(f"{self.root}: no Bundle is on trial")
        return pointer, pointer.canary

    def _move(
        self,
        pointer: Pointer | None,
        bundle_id: str,
        *,
        previous: str | None,
        canary: Canary | None = None,
        reason: str | None = None,
    ) -> Pointer:
        number = 1 if pointer is None else pointer.number + 1
        entry = Pointer(
            number=number,
            bundle_id=bundle_id,
            previous=previous,
            moved_at=datetime.now(UTC),
            token=uuid.uuid4().hex,
            canary=canary,
            reason=reason,
        )
        content = (entry.model_dump_json(indent=2) + "\n").encode()
        if not (self.root / "current" / f"{number:08d}.json").create(content):
            raise PointerConflictError(
                f"{self.root}: somebody else moved the pointer to number {number} first", number=number
            )
        return entry
