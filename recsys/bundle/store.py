"""A store of Bundles and the pointer to the current one, on a local path or any fsspec URI.

::

    bundles/<bundle_id>/       immutable, complete once manifest.json is in it
    current/00000001.json      the pointer is a log: the entry with the highest number holds
    items/00000001.arrow       what was changed in the catalogue since, see recsys.bundle.changes
    rules/00000001.json        by which rules they answer since, see recsys.bundle.rule_log

Moving the pointer is creating the next number, which only one writer can do: compare-and-swap without a lock service.
"""

from __future__ import annotations

import shutil
import uuid
from datetime import UTC, datetime
from pathlib import Path

from recsys.bundle.changes import ItemLog
from recsys.bundle.live import LiveBundle, RuledBundle, Version, beneath, live_id, split_id
from recsys.bundle.location import Location
from recsys.bundle.manifest import MANIFEST, Manifest
from recsys.bundle.pointer import Canary, Pointer, entry, folder_of, read_pointers
from recsys.bundle.reader import Bundle, read_manifest
from recsys.bundle.rule_log import RuleLog
from recsys.bundle.writer import move_into_place
from recsys.errors import BundleError, BundleNotFoundError, PointerConflictError
from recsys.files import link_or_copy


class BundleStore:
    """Reads and moves the pointer, adds and collects Bundles. Holds no state of its own: make as many as you like."""

    def __init__(self, uri: str | Path) -> None:
        self.root = Location.of(uri)

    def __str__(self) -> str:
        return str(self.root)

    def current(self) -> Pointer | None:
        """Where the pointer is now; None in a store where it was never set."""
        return next(read_pointers(self.root), None)

    def open(self, bundle_id: str | None = None, *, cache: str | Path | None = None) -> Bundle:
        """The Bundle with this id, or the current one."""
        return Bundle.open(str(self.root if bundle_id is None else self._folder(bundle_id)), cache=cache)

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
        """Put ``bundle`` into the store, where it is not there yet, without moving the pointer. On one file system its
        files get a second name and are not copied.
        """
        target = self._folder(bundle.bundle_id)
        if (target / MANIFEST).exists():
            return
        if target.local is not None:
            if target.local.exists() and not (target / MANIFEST).exists():
                shutil.rmtree(target.local)  # what a removal left that came to no end
            temporary = target.local.with_name(f".{bundle.bundle_id}.{uuid.uuid4().hex}.tmp")
            try:
                shutil.copytree(bundle.path, temporary, copy_function=link_or_copy)
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
        """Make ``bundle_id``, which is in the store, the current one; ``expected`` must be current until then. It
        ends a canary.

        :raises BundleNotFoundError: when the store does not hold it.
        :raises BundleMismatchError: when this library cannot read it.
        :raises PointerConflictError: when something else is current.
        """
        self._check_held(bundle_id)
        pointer = self.current()
        self._expect(pointer, expected)
        reason = None
        if pointer is not None and pointer.canary is not None and pointer.canary.bundle_id != bundle_id:
            reason = f"the canary {pointer.canary.bundle_id} ended when {bundle_id} was activated"
        # What is current already is asked for once more; a rollback still returns to what was before it.
        if pointer is not None and pointer.bundle_id == bundle_id:
            expected = pointer.previous
        return self._move(pointer, bundle_id, previous=expected, reason=reason)

    def rollback(self) -> Pointer:
        """Return to the Bundle that was current before; once more returns to the one before that.

        :raises BundleNotFoundError: when there is none, or it was collected.
        :raises BundleMismatchError: when this library cannot read it.
        :raises PointerConflictError: when somebody moves the pointer at the same time.
        """
        log = read_pointers(self.root)
        pointer = next(log, None)
        if pointer is None or pointer.previous is None:
            raise BundleNotFoundError(f"{self.root}: there is no previous Bundle to return to", path=str(self.root))
        target = pointer.previous
        self._check_held(target)
        # The entry that first brought the target in knows what came before it.
        before = next((move.previous for move in log if move.bundle_id == target), None)
        return self._move(pointer, target, previous=before)

    def start_canary(
        self, bundle_id: str, share: float, *, expected: str | None = None, reason: str | None = None
    ) -> Pointer:
        """Give ``bundle_id``, which is in the store, to ``share`` (above 0, up to 1) of the users.

        Where ``expected`` is given, it must be current and there must be no other canary; else that one ends.

        :raises BundleNotFoundError: when the store does not hold it, or nothing is current.
        :raises BundleMismatchError: when this library cannot read it.
        :raises BundleError: when it is current already.
        :raises PointerConflictError: when somebody moves the pointer at the same time, or did before.
        """
        self._check_held(bundle_id)
        pointer = self._pointer()
        if expected is not None:
            self._expect(pointer, expected)
            if pointer.canary is not None:
                raise PointerConflictError(f"{self.root}: Bundle {pointer.canary.bundle_id} is the canary already")
        if pointer.bundle_id == bundle_id:
            raise BundleError(f"{self.root}: Bundle {bundle_id} is current already, it cannot be its own canary")
        canary = Canary.parse({"bundle_id": bundle_id, "share": share, "token": uuid.uuid4().hex}, where="canary")
        return self._move(pointer, pointer.bundle_id, previous=pointer.previous, canary=canary, reason=reason)

    def promote(self, *, token: str | None = None, reason: str | None = None) -> Pointer:
        """Make the canary the current Bundle; with a ``token`` only if it is the one that was started with it.

        :raises BundleError: when there is none.
        :raises PointerConflictError: when it is another one, or somebody moves the pointer at the same time.
        """
        pointer, canary = self._canary()
        if token is not None and canary.token != token:
            raise PointerConflictError(f"{self.root}: another canary was started, Bundle {canary.bundle_id}")
        return self._move(pointer, canary.bundle_id, previous=pointer.bundle_id, reason=reason)

    def withdraw(self, bundle_id: str | None = None, *, reason: str | None = None) -> Pointer:
        """End the canary; all users get the current Bundle again. ``bundle_id`` says which one it must be.

        :raises BundleError: when there is none, or another one.
        :raises PointerConflictError: when somebody moves the pointer at the same time.
        """
        pointer, canary = self._canary()
        if bundle_id not in {None, canary.bundle_id}:
            raise BundleError(f"{self.root}: Bundle {canary.bundle_id} is the canary, not {bundle_id}")
        return self._move(pointer, pointer.bundle_id, previous=pointer.previous, reason=reason)

    def past(self) -> list[str]:
        """Ids of all Bundles that are or were current, the latest first; some may have been collected."""
        return list(dict.fromkeys(pointer.bundle_id for pointer in read_pointers(self.root)))

    def list(self) -> list[Manifest]:
        """Manifests of the complete Bundles in the store, newest first."""
        names = [name for name in (self.root / "bundles").names() if not name.startswith(".")]
        found = [read_manifest(self._folder(name)) for name in names if (self._folder(name) / MANIFEST).exists()]
        return sorted(found, key=lambda manifest: (manifest.created_at, manifest.bundle_id), reverse=True)

    def collect(self, keep: int) -> tuple[str, ...]:
        """Remove all but the ``keep`` newest Bundles, the canary, the one a rollback returns to, and the ``keep``
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
        return folder_of(self.root, bundle_id)

    def _check_held(self, bundle_id: str) -> None:
        """Whether the store holds the Bundle, and it can be served."""
        folder = self._folder(bundle_id)
        read_manifest(folder).check_version(str(folder))

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

    def _canary(self) -> tuple[Pointer, Canary]:
        pointer = self._pointer()
        if pointer.canary is None:
            raise BundleError(f"{self.root}: there is no canary")
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
        move = Pointer(
            number=number,
            bundle_id=bundle_id,
            previous=previous,
            moved_at=datetime.now(UTC),
            token=uuid.uuid4().hex,
            canary=canary,
            reason=reason,
        )
        content = (move.model_dump_json(indent=2) + "\n").encode()
        if not entry(self.root, number).create(content):
            raise PointerConflictError(
                f"{self.root}: somebody else moved the pointer to number {number} first", number=number
            )
        return move


def open_newest(uri: str | Path) -> Bundle:
    """The Bundle at ``uri``, or the current one of the store there with all changes up to now, as servers have it.

    :raises BundleNotFoundError: when there is neither.
    """
    store = BundleStore(uri)
    pointer = store.current()
    if pointer is None:
        return Bundle.open(uri)
    return store.open_live(live_id(pointer.bundle_id, *store.version()))
