"""What routes say of themselves and how they answer."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import Request, Response

from serve.access.keys import Scope as KeyScope
from serve.http import wire
from serve.problems import PROBLEM_JSON, problem

Answers = dict[int | str, dict[str, Any]]
KEY = "key"
SCOPE = "x-scope"


def needs(scope: KeyScope) -> dict[str, Any]:
    """What a route says of the scope that a caller must have."""
    return {"openapi_extra": {SCOPE: scope, "security": [{KEY: []}]}}


def about(scope: KeyScope, tag: str, summary: str, answers: Answers) -> dict[str, Any]:
    """All that a route says of itself."""
    return {"tags": [tag], "summary": summary, "responses": answers, **needs(scope)}


def id_of(request: Request) -> str:
    """The number that the request was given."""
    return request.scope["request_id"]


def as_json(value: Any) -> Response:
    """The answer 200."""
    return Response(orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY), media_type="application/json")


def missing(request: Request, detail: str) -> Response:
    """The answer 404."""
    return problem(404, detail, id_of(request))


def ok(model: type) -> Answers:
    """The documentation of 200."""
    # Named for the documentation only: answers are made from our own data and are not validated once more.
    return {200: {"model": model, "description": "The answer"}}


def problems(*statuses: int) -> Answers:
    """The documentation of errors."""
    texts = {
        400: "The body is not JSON",
        401: "No valid API key; `Authorization: Bearer KEY`",
        403: "The API key lacks the scope",
        404: "Nothing of that name",
        409: "There is no store of Bundles to write to, or somebody else wrote first",
        413: "The body is too large",
        415: "The body is not announced as JSON",
        422: "The request is well-formed but not usable",
        429: "Too many requests with this API key; `Retry-After` says when to come again",
        503: "Too much load or not ready; `Retry-After` says when to come again",
    }
    schema = {PROBLEM_JSON: {"schema": wire.Problem.model_json_schema()}}
    return {status: {"description": texts[status], "content": schema} for status in statuses}


BODY_PROBLEMS = problems(400, 413, 415)
