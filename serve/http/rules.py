"""Routes of the reranking rules, for admins."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import FastAPI, Query, Request, Response
from pydantic import BaseModel, Field

from recsys.bundle.live import split_id
from recsys.pipeline.rules.changes import unknown_names
from serve.access.middleware import CALLER
from serve.http import wire
from serve.http.answers import BODY_PROBLEMS, about, as_json, id_of, missing, ok, problems
from serve.live.rules import RuleChanges
from serve.live.service import Service
from serve.problems import problem

_Version = Annotated[int, Field(ge=0, lt=10**8)]


class _ShowQuery(BaseModel, extra="forbid"):
    version: _Version | None = None


class _ResetQuery(BaseModel, extra="forbid"):
    after: _Version | None = Field(None, description="as in PUT; left out: whatever the rules are now")
    note: wire.Note | None = Field(None, description="why; kept with the change")


def add_rules(app: FastAPI, service: Service) -> None:
    """Add them to ``app``."""
    changes = RuleChanges(service)

    def fixed(request: Request) -> Response | None:
        """The answer where there is no store to write to."""
        if service.rules is not None:
            return None
        return problem(409, "this server answers from one Bundle; to change its rules serve a store", id_of(request))

    @app.get("/v1/rules", **about("admin", "rules", "The reranking rules", ok(wire.RulesAnswer) | problems(404)))
    async def show(request: Request, query: Annotated[_ShowQuery, Query()]) -> Response:
        """Those that hold and those that come, and who changed them when. With `version`, those of an earlier change:
        to return to them, put them again.
        """
        history = await changes.history(query.version)
        if history is None:
            return missing(request, f"no version {query.version} of the rules is kept")
        answering = split_id(service.current.bundle_id)[1].rules
        return as_json(wire.rules_answer(history, answering))

    @app.put(
        "/v1/rules",
        **about(
            "admin", "rules", "Replace the reranking rules", ok(wire.RulesChangedAnswer) | problems(409) | BODY_PROBLEMS
        ),
    )
    async def put(body: wire.RulesBody, request: Request) -> Response:
        """Answered once the change is durable; every answer goes by it within seconds, whichever Bundle is current.
        Hard rules hold all the same.
        """
        if (refused := fixed(request)) is not None:
            return refused
        items, categories = await asyncio.to_thread(unknown_names, body.rules, service.current.catalogue)
        version = await changes.put(body.rules, after=body.after, by=request.scope[CALLER], note=body.note)
        return as_json({"version": version, "unknown_items": items, "unknown_categories": categories})

    @app.delete(
        "/v1/rules",
        **about("admin", "rules", "Return to the Bundle's own rules", ok(wire.RulesChangedAnswer) | problems(409)),
    )
    async def reset(request: Request, query: Annotated[_ResetQuery, Query()]) -> Response:
        """A change like any other: what was put before can still be read."""
        if (refused := fixed(request)) is not None:
            return refused
        version = await changes.put(None, after=query.after, by=request.scope[CALLER], note=query.note)
        return as_json({"version": version, "unknown_items": [], "unknown_categories": []})
