"""Who may come in: every request shows an API key, whose scopes and rate it must keep to.

A key comes as ``Authorization: Bearer KEY``; for a browser that wants to read the documentation, a GET takes it as the
password of HTTP Basic as well (no other method does: a browser sends that along with whatever a foreign page asks).
"""

from __future__ import annotations

import base64
import binascii
import fcntl
import hashlib
import logging
import math
import os
import struct
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from recsys.errors import ConfigError
from serve.access.keys import SCOPES, ApiKey, Keys
from serve.config import AnyAccess, KeyAccess
from serve.problems import PROBES, problem

SCOPES_OF_CALLER = "recsys.scopes"
"""where the ASGI scope says what the caller may do"""
CALLER = "recsys.caller"
"""where it says who that is: the name of the API key, or :data:`ANYBODY`"""
ANYBODY = "open access"
_CHALLENGE = 'Bearer realm="recsys", Basic realm="recsys"'
_MAX_KEY_LENGTH = 512
_MAX_OPEN = 256
_log = logging.getLogger(__name__)


class Access:
    """Pure ASGI: answers 401 to those without a valid key and 429 to those who come too often, and notes the scopes of
    all others; the routes ask for the one they need.
    """

    def __init__(self, app: ASGIApp, config: AnyAccess) -> None:
        """:raises ConfigError: when there is no usable file of keys."""
        self._app = app
        self._keys = Keys(config.file) if isinstance(config, KeyAccess) else None
        self._rates = Rates(_rates_folder(config.file)) if isinstance(config, KeyAccess) else None
        self._open_paths = PROBES if isinstance(config, KeyAccess) and config.open_probes else frozenset[str]()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # there is no route for WebSockets
            await send({"type": "websocket.close", "code": 1008})
            return
        if self._keys is None or self._rates is None or scope["path"] in self._open_paths:
            scope[SCOPES_OF_CALLER], scope[CALLER] = frozenset(SCOPES), ANYBODY
            await self._app(scope, receive, send)
            return
        request_id: str = scope["request_id"]
        presented = _presented(scope)
        key = None if presented is None else self._keys.find(presented)
        if key is None:
            detail = "show an API key: Authorization: Bearer KEY"
            if presented is not None:
                detail = "this API key is unknown, revoked or expired"
            answer = problem(401, detail, request_id, headers={"www-authenticate": _CHALLENGE})
        elif wait_s := self._rates.wait_s(key):
            detail = f"more than {key.requests_per_s:g} requests/s with this key"
            answer = problem(429, detail, request_id, headers={"retry-after": str(math.ceil(wait_s))})
        else:
            scope[SCOPES_OF_CALLER], scope[CALLER] = frozenset(key.scopes), key.name
            await self._app(scope, receive, send)
            return
        name = "nobody" if key is None else f"{key.name} ({key.key_id})"
        about = {"request_id": request_id, "key": name, "status": answer.status_code}
        _log.debug("request %s of %s: refused, %d", request_id, name, answer.status_code, extra=about)
        await answer(scope, receive, send)


def _presented(scope: Scope) -> str | None:
    """What the caller shows as a key, or None."""
    found = [value for name, value in scope["headers"] if name == b"authorization"]
    if len(found) != 1 or len(found[0]) > _MAX_KEY_LENGTH:
        return None
    kind, _, value = found[0].decode("latin-1").partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic" and scope["method"] in {"GET", "HEAD"}:
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return None
    return None


class Rates:
    """The rate of each key, over all gateways of this machine.

    The generic cell rate algorithm (ITU-T I.371): per key one number, the moment at which all that was admitted will
    have been earned. It lies in a small file that the processes share and lock for the microseconds they need it.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` must be the same for all processes, as the monotonic clock of one machine is (seconds).

        :raises ConfigError: when ``folder`` is somebody else's.
        """
        self._folder = folder
        self._clock = clock
        self._files: OrderedDict[str, int] = OrderedDict()
        if folder.exists():
            self._refuse_foreign()

    def wait_s(self, key: ApiKey) -> float:
        """0 where a request of ``key`` may come in, which counts it; else seconds until one may."""
        if key.requests_per_s is None:
            return 0.0
        try:
            return self._wait_s(key, key.requests_per_s)
        except OSError as error:
            # A full disk, say. Better a caller too many than nobody at all.
            _log.error("the rate of API key %s is not kept: %s", key.key_id, error)
            return 0.0

    def _wait_s(self, key: ApiKey, requests_per_s: float) -> float:
        file = self._file(key.key_id)
        interval_s = 1 / requests_per_s
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            now = self._clock()
            stored = os.pread(file, 8, 0)
            earned_at = struct.unpack("d", stored)[0] if len(stored) == 8 else 0.0
            if earned_at > now + key.burst * interval_s + 1e-6:
                earned_at = 0.0  # nothing admitted since the machine started leads there
            wait_s = earned_at - now - (key.burst - 1) * interval_s
            if wait_s > 1e-9:
                return wait_s
            os.pwrite(file, struct.pack("d", max(earned_at, now) + interval_s), 0)
            return 0.0
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)

    def _file(self, key_id: str) -> int:
        """The open file of a key; those not used for longest are closed."""
        file = self._files.get(key_id)
        if file is None:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._refuse_foreign()
            file = os.open(self._folder / key_id, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            self._files[key_id] = file
        self._files.move_to_end(key_id)
        while len(self._files) > _MAX_OPEN:
            os.close(self._files.popitem(last=False)[1])
        return file

    def _refuse_foreign(self) -> None:
        if self._folder.lstat().st_uid != os.getuid():
            raise ConfigError(
                f"{self._folder} belongs to somebody else: remove it, or set TMPDIR to a folder of your own"
            )


def _rates_folder(file: str) -> Path:
    name = hashlib.sha256(str(Path(file).resolve()).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"recsys-rates-{os.getuid()}-{name}"
