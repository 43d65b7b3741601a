"""API keys: a file of hashes, which ``recsys keys`` edits.

A key reads ``rk_ID_SECRET``. The id names its entry; of the secret, 32 random bytes, the file holds the SHA-256 alone.
A slow hash would protect passwords that can be guessed, and nobody guesses 256 bits. Gateways read the file again when
it changes, so a key that is revoked is refused :data:`CHECK_EVERY_S` seconds after they see it, without a restart.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import logging
import secrets
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import AwareDatetime, Field, model_validator

from recsys.config import StrictConfig
from recsys.errors import ConfigError, RecsysError
from recsys.files import read_json, write_json

Scope = Literal["read", "write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
CHECK_EVERY_S = 1.0
"""how often a gateway looks whether the file has changed"""
_MARK = "rk"
_NOBODY = hashlib.sha256(b"").hexdigest()
_log = logging.getLogger(__name__)


class ApiKey(StrictConfig):
    """One entry of the file."""

    key_id: str = Field(pattern="^[0-9a-f]{16}$", description="public part of the key; what logs call it")
    name: str = Field(pattern="^[A-Za-z0-9._-]{1,64}$", description="whose key it is; several keys may share a name")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of the secret part")
    scopes: tuple[Scope, ...] = Field(min_length=1, description="what the key may do; none includes another")
    requests_per_s: float | None = Field(
        default=None, gt=0, le=1e6, description="rate over all gateways of one machine; null is unlimited"
    )
    burst: int = Field(default=20, ge=1, le=1_000_000, description="requests that may come at once")
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = Field(default=None, description="refused from then on; null never")

    def valid(self, now: datetime) -> bool:
        """Whether the key has not expired."""
        return self.expires_at is None or now < self.expires_at


class KeyFile(StrictConfig):
    """The whole file."""

    version: Literal[1] = 1
    keys: tuple[ApiKey, ...] = ()

    @model_validator(mode="after")
    def _unique(self) -> Self:
        if len({key.key_id for key in self.keys}) < len(self.keys):
            raise ValueError("two keys have the same key_id")
        return self

    @classmethod
    def read(cls, path: Path) -> Self:
        """The file at ``path``.

        :raises ConfigError: when there is none or it is no file of keys.
        """
        try:
            tree = read_json(path)
        except FileNotFoundError:
            raise ConfigError(f"{path}: there is no file of API keys; `recsys keys add` makes one") from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read as a file of API keys: {error}") from error
        return cls.parse(tree, where=str(path))


class Keys:
    """The keys that hold right now. For one event loop."""

    def __init__(self, path: str | Path) -> None:
        """:raises ConfigError: when there is no usable file: an API that nobody can enter is a mistake."""
        self._path = Path(path)
        self._stamp = _stamp(self._path)
        self._by_id = _by_id(KeyFile.read(self._path))
        self._checked = time.monotonic()

    def find(self, presented: str) -> ApiKey | None:
        """The entry of the key that a caller shows; None for one that is unknown, revoked or expired.

        Takes the same time whether the id is known or not.
        """
        self._refresh()
        mark, key_id, secret = [*presented.split("_", 2), "", ""][:3]
        entry = self._by_id.get(key_id)
        digest = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
        same = hmac.compare_digest(digest, _NOBODY if entry is None else entry.sha256)
        if entry is None or not same or mark != _MARK or not entry.valid(datetime.now(UTC)):
            return None
        return entry

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._checked < CHECK_EVERY_S:
            return
        self._checked = now
        try:
            stamp = _stamp(self._path)
            if stamp != self._stamp:
                self._by_id, self._stamp = _by_id(KeyFile.read(self._path)), stamp
        except (RecsysError, OSError) as error:
            # Mounted secrets are away for a moment while they change; a broken file must lock nobody out.
            _log.error("the API keys stay as they were: %s", error)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _by_id(file: KeyFile) -> dict[str, ApiKey]:
    return {key.key_id: key for key in file.keys}


@contextmanager
def _editing(path: Path, *, create: bool = False) -> Generator[list[ApiKey]]:
    """Yield the keys of the file to change in place, and write them when the block ends well; one editor at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = [] if create and not path.exists() else list(KeyFile.read(path).keys)
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o600  # another user's gateway may have to read it
        yield keys
        write_json(path, KeyFile(keys=tuple(keys)).model_dump(mode="json"))
        path.chmod(mode)


def add_key(path: str | Path, name: str, scopes: Sequence[Scope], **settings: Any) -> str:
    """Add a key to the file, which is made where there is none. The key itself is returned and kept nowhere.

    :raises ConfigError: when a setting (see :class:`ApiKey`) is wrong, or the file is not one of keys.
    """
    with _editing(Path(path), create=True) as keys:
        entry, key = _new(name, scopes, settings)
        keys.append(entry)
    return key


def rotate_keys(path: str | Path, name: str, grace: timedelta) -> str:
    """A new key with the scopes, rate and lifetime of the newest one called ``name``; those before it expire after
    ``grace``.

    :raises ConfigError: when no key has this name.
    """
    now = datetime.now(UTC)
    with _editing(Path(path)) as keys:
        former = [key for key in keys if key.name == name and key.valid(now)]
        if not former:
            raise ConfigError(f"{path}: no valid key is called {name!r}")
        newest = former[-1]
        kept = newest.model_dump(include={"requests_per_s", "burst"})
        if newest.expires_at is not None:
            kept["expires_at"] = now + (newest.expires_at - newest.created_at)
        entry, key = _new(name, newest.scopes, kept)
        end = now + grace
        for place, old in enumerate(keys):
            if old in former and (old.expires_at is None or old.expires_at > end):
                keys[place] = old.model_copy(update={"expires_at": end})
        keys.append(entry)
    return key


def revoke_keys(path: str | Path, which: str) -> int:
    """Remove every key of this name or id; how many there were.

    :raises ConfigError: when there was none.
    """
    with _editing(Path(path)) as keys:
        kept = [key for key in keys if which not in {key.name, key.key_id}]
        num_revoked = len(keys) - len(kept)
        if not num_revoked:
            raise ConfigError(f"{path}: no key has the name or id {which!r}")
        keys[:] = kept
    return num_revoked


def _new(name: str, scopes: Sequence[Scope], settings: dict[str, Any]) -> tuple[ApiKey, str]:
    key_id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    tree = {
        "key_id": key_id,
        "name": name,
        "sha256": hashlib.sha256(secret.encode()).hexdigest(),
        "scopes": tuple(dict.fromkeys(scopes)),
        "created_at": datetime.now(UTC),
        **settings,
    }
    return ApiKey.parse(tree, where=f"API key {name}"), f"{_MARK}_{key_id}_{secret}"
