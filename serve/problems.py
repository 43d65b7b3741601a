"""Errors as RFC 9457 problems, and the paths of probes."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import Response

PROBLEM_JSON = "application/problem+json"
PROBES = frozenset({"/healthz", "/readyz"})
"""paths that are answered however many requests are in flight"""


def problem(
    status: int,
    detail: str,
    request_id: str,
    *,
    errors: Sequence[dict[str, Any]] | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    """An error as ``application/problem+json``."""
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": printable(detail),
        "request_id": request_id,
    }
    if errors is not None:
        body["errors"] = errors
    return Response(orjson.dumps(body), status, headers, media_type=PROBLEM_JSON)


def printable(text: str) -> str:
    """``text`` with what is no valid Unicode replaced: error messages quote what callers send."""
    return text.encode("utf-8", "replace").decode()
