"""Logs as JSON, one object per line on the standard error of each process, for whoever collects them."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime

from serve.config import LogLevel

_OURS = ("recsys", "serve")
_USUAL = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """``time``, ``level``, ``logger``, ``message``, what the process is, what the call says by ``extra``, and
    ``exception``.
    """

    def __init__(self, **process: str) -> None:
        """``process`` is in every line."""
        super().__init__()
        self._process = process | {"pid": os.getpid()}

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **self._process,
            **{name: value for name, value in vars(record).items() if name not in _USUAL},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def log_as_json(level: LogLevel, **process: str) -> None:
    """What ``recsys`` and ``serve`` log in this process from now on. ``process`` names it."""
    # Ray puts a stream before standard error that looks up who is calling at every line: dear, and no use for JSON.
    plain = not type(sys.stderr).__module__.startswith("ray.")
    handler = logging.StreamHandler(sys.stderr if plain else sys.__stderr__)
    handler.setFormatter(JsonFormatter(**process))
    for name in _OURS:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False
