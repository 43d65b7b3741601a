"""The HTTP side of the gateway: routes, their documentation, and errors. No Ray here: any ASGI server runs it."""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request, Response
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from recsys.errors import (
    BundleError,
    ChangeConflictError,
    ConfigError,
    EventStoreError,
    RecsysError,
    RequestError,
    StageOverloadedError,
)
from recsys.events import Event, UserState
from recsys.moments import milliseconds
from serve.access.keys import Scope as KeyScope
from serve.access.middleware import SCOPES_OF_CALLER, Access
from serve.config import AnyAccess, GatewayConfig
from serve.http import wire
from serve.http.answers import BODY_PROBLEMS, KEY, SCOPE, about, as_json, id_of, missing, needs, ok, problems
from serve.http.middleware import Limits
from serve.http.rules import add_rules
from serve.live.items import ItemChanges
from serve.live.service import Service
from serve.live.turns import Turns
from serve.observe.impressions import Impressions
from serve.observe.metrics import Meters, no_sink
from serve.observe.observer import Observer
from serve.problems import printable, problem

_DESCRIPTION = """Real-time recommendations.

Errors are `application/problem+json` (RFC 9457) and carry the `request_id` under which the log knows them.
What a user did (`POST /v1/events`) is in the very next recommendation."""

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class Guarded(APIRoute):
    """Answers 403 to a caller without the scope that the route needs, see :func:`needs`. There is no route for all."""

    @property
    def needed(self) -> KeyScope:
        """The scope."""
        try:
            return (self.openapi_extra or {})[SCOPE]
        except KeyError:
            raise ConfigError(f"route {self.path} does not say which scope it needs") from None

    def get_route_handler(self) -> Handler:
        handle, needed = self.open_handler(), self.needed

        async def guarded(request: Request) -> Response:
            # Without the middleware that notes the scopes this is a KeyError, and nobody comes in.
            if needed not in request.scope[SCOPES_OF_CALLER]:
                return problem(403, f"this API key has no scope {needed!r}", id_of(request))
            return await handle(request)

        return guarded

    def open_handler(self) -> Handler:
        """The handler behind the check."""
        return super().get_route_handler()


class QuickBody(Guarded):
    """Reads a JSON body into its model in one step; a body that is not right is told so in FastAPI's own way.

    Only for endpoints that take a model as their body, the request or nothing else; all others go FastAPI's way whole.
    """

    def open_handler(self) -> Handler:
        usual, endpoint, quick = super().open_handler(), self.endpoint, _only_a_model(self.dependant)
        if quick is None:
            return usual
        name, model = quick
        read = TypeAdapter(model).validate_json
        wants_request = self.dependant.request_param_name

        async def handle(request: Request) -> Response:
            if not _is_json(request.headers.get("content-type", "")):
                return await usual(request)
            try:
                values: dict[str, Any] = {name: read(await request.body())}
            except ValidationError:
                return await usual(request)
            except ClientDisconnect as error:
                raise HTTPException(400, "the connection was closed before the body was complete") from error
            if wants_request is not None:
                values[wants_request] = request
            return await endpoint(**values)

        return handle


def _only_a_model(wanted: Dependant) -> tuple[str, type[BaseModel]] | None:
    """Name and type of the body of an endpoint that wants nothing but it and the request; None for any other."""
    if len(wanted.body_params) != 1:
        return None
    (body,) = wanted.body_params
    others: list[Any] = [
        *wanted.path_params, *wanted.query_params, *wanted.header_params, *wanted.cookie_params, *wanted.dependencies,
        wanted.response_param_name, wanted.background_tasks_param_name, wanted.http_connection_param_name,
        wanted.websocket_param_name, wanted.security_scopes_param_name, getattr(body.field_info, "embed", None),
        *body.field_info.metadata,
    ]  # fmt: skip
    model: Any = body.field_info.annotation
    if any(others) or not (isinstance(model, type) and issubclass(model, BaseModel)):
        return None
    return body.name, model


def _is_json(content_type: str) -> bool:
    kind, _, name = content_type.partition(";")[0].strip().lower().partition("/")
    return kind == "application" and (name == "json" or name.endswith("+json"))


FindTrace = Callable[[str], Awaitable[dict[str, Any] | None]]


async def nowhere_else(request_id: str) -> None:
    """The trace search of a gateway that has no others beside it."""


def http_app(
    service: Service,
    config: GatewayConfig,
    access: AnyAccess,
    observer: Observer | None = None,
    find_trace: FindTrace = nowhere_else,
) -> FastAPI:
    """The API over ``service``, for those whom ``access`` lets in. It does not start without a usable file of keys.

    ``observer`` None keeps traces and measures nothing; ``find_trace`` asks the other gateways.
    """
    observer = observer or Observer(service, config, Meters(no_sink))
    executor = ThreadPoolExecutor(config.event_threads, thread_name_prefix="events")
    impressions = Impressions(service.store, executor, observer.meters) if config.log_impressions else None

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        yield
        if impressions is not None:
            await impressions.written()

    app = FastAPI(
        title="recsys",
        lifespan=lifespan,
        description=_DESCRIPTION,
        version=service.version,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        strict_content_type=False,
        responses=problems(401, 403, 422, 429, 503),
    )
    app.router.route_class = QuickBody
    retry_after = {"retry-after": str(config.retry_after_s)}
    _answer_errors(app, retry_after)

    # One at a time: an encoder takes what cores there are, and nobody else shall wait for them.
    encoding = ThreadPoolExecutor(1, thread_name_prefix="encoding")
    _add_recommendations(app, service, observer, impressions, encoding)
    _add_events(app, service, observer, config, executor)
    _add_look_ups(app, service)
    _add_items(app, service, config.max_items, encoding)
    add_rules(app, service)
    _add_operation(app, service, observer, find_trace, retry_after)
    app.openapi()["components"]["securitySchemes"] = {KEY: {"type": "http", "scheme": "bearer"}}
    app.add_middleware(Access, config=access)
    app.add_middleware(Limits, config=config, observer=observer)  # the outermost: it numbers requests
    return app


def _add_recommendations(
    app: FastAPI, service: Service, observer: Observer, impressions: Impressions | None, encoding: ThreadPoolExecutor
) -> None:
    @app.post(
        "/v1/recommend",
        **about("read", "recommendations", "Recommend items to a user", ok(wire.RecommendAnswer) | BODY_PROBLEMS),
    )
    async def recommend(body: wire.RecommendBody, request: Request) -> Response:
        """Items for a known user, for a history given here, for both together, or for a stranger.

        Stages that are slow or down are skipped and named in `degraded`; availability and filters never are.
        """
        asked = wire.recommend_request(body, id_of(request))
        answer, generation = await service.recommend(asked)
        observer.answered(answer, generation)
        if impressions is not None:
            impressions.shown(answer, time.time_ns() // 1_000_000, asked.context.get("surface"))
        return as_json(wire.recommend_answer(answer, explain=body.explain))

    @app.post(
        "/v1/similar",
        **about(
            "read", "recommendations", "Items like one item", ok(wire.RecommendAnswer) | problems(404) | BODY_PROBLEMS
        ),
    )
    async def similar(body: wire.SimilarBody, request: Request) -> Response:
        """Items whose vectors are nearest to those of `item_id`, best first, without the item itself."""
        with service.knowing(body.item_id).pinned() as generation:
            recommender = generation.recommender
            if recommender.item(body.item_id) is None:
                return missing(request, f"no item {body.item_id!r} in the catalogue")
            answer = await asyncio.to_thread(recommender.similar, wire.similar_request(body, id_of(request)))
        return as_json(wire.recommend_answer(answer))

    searches = Turns("searches wait", "search", encoding)

    @app.post(
        "/v1/search", **about("read", "recommendations", "Items by words", ok(wire.RecommendAnswer) | BODY_PROBLEMS)
    )
    async def search(body: wire.SearchBody, request: Request) -> Response:
        """Items whose texts mean most nearly what `query` says, best first. Needs a Bundle with a text encoder."""
        with service.current.pinned() as generation:
            find = functools.partial(generation.recommender.search, wire.search_request(body, id_of(request)))
            answer = await searches.run(find)
        return as_json(wire.recommend_answer(answer))


def _add_events(
    app: FastAPI, service: Service, observer: Observer, config: GatewayConfig, executor: ThreadPoolExecutor
) -> None:
    # A disk that is slow or full of others' locks must not take the places of those who ask for recommendations.
    max_waiting = max(1, config.max_ongoing_requests // 2)
    writes = Turns("calls wait for the event store", "events", executor, max_waiting=max_waiting)

    @app.post("/v1/events", **about("write", "events", "Record what users did", ok(wire.EventsAnswer) | BODY_PROBLEMS))
    async def events(body: wire.EventsBody) -> Response:
        """Answered only once the events are durable. Sending a batch again is harmless: `event_id` tells it."""
        if len(body.events) > config.max_events:
            raise RequestError(f"{len(body.events)} events in one call, at most {config.max_events} are taken")
        batch = [_event(event) for event in body.events]
        result = await writes.run(functools.partial(service.store.append, batch))
        observer.recorded(batch, result.duplicates)
        return as_json({"accepted": result.accepted, "duplicates": result.duplicates})

    @app.post(
        "/v1/users/{user_id}/merge",
        **about("write", "events", "Count what was done under another id", ok(wire.EventsAnswer) | BODY_PROBLEMS),
    )
    async def merge(user_id: Annotated[wire.Id, Path()], body: wire.MergeBody) -> Response:
        """The interactions known of `from_user_id` become events of this user, at the times they have. Sending it again
        adds only what came since.
        """
        if user_id == body.from_user_id:
            raise RequestError("a user cannot be merged into themselves", field="from_user_id")
        result = await writes.run(functools.partial(service.store.merge, body.from_user_id, user_id))
        observer.meters.count("recsys_events_total", "accepted", amount=result.accepted)
        observer.meters.count("recsys_events_total", "duplicate", amount=result.duplicates)
        return as_json({"accepted": result.accepted, "duplicates": result.duplicates})


def _add_look_ups(app: FastAPI, service: Service) -> None:
    @app.get(
        "/v1/users/{user_id}",
        **about("read", "look-ups", "What is known of a user", ok(wire.UserAnswer) | problems(404)),
    )
    async def user(user_id: Annotated[wire.Id, Path()], request: Request) -> Response:
        """The newest interactions, those of the Bundle and those that came as events, oldest first."""
        state = await asyncio.to_thread(service.store.user, user_id)
        return (
            missing(request, f"nothing is known of user {user_id!r}")
            if state is None
            else as_json(_user(service, state))
        )

    @app.get(
        "/v1/items/{item_id}",
        **about("read", "look-ups", "One item of the catalogue", ok(wire.CatalogueItemAnswer) | problems(404)),
    )
    async def item(item_id: Annotated[wire.Id, Path()], request: Request) -> Response:
        """The item as it is now."""
        row = service.knowing(item_id).recommender.item(item_id)
        return missing(request, f"no item {item_id!r} in the catalogue") if row is None else as_json(row)

    @app.get("/v1/bundle", **about("read", "look-ups", "The Bundle that answers", ok(wire.BundleAnswer)))
    async def bundle() -> Response:
        """Id and manifest, without the list of files."""
        current, canary = service.current, service.canary
        return as_json(
            {
                "bundle_id": current.bundle_id,
                "manifest": current.manifest,
                "canary": None if canary is None else {"bundle_id": canary.generation.bundle_id, "share": canary.share},
                "refused": service.refused,
            }
        )


def _add_items(app: FastAPI, service: Service, max_items: int, encoding: ThreadPoolExecutor) -> None:
    changes = ItemChanges(service, encoding)

    def fixed(request: Request) -> Response | None:
        """The answer where there is no store to write to."""
        if service.items is not None:
            return None
        return problem(
            409, "this server answers from one Bundle; for changes of its items serve a store", id_of(request)
        )

    @app.put(
        "/v1/items",
        **about("admin", "items", "Add items, or change them", ok(wire.ItemsAnswer) | problems(409) | BODY_PROBLEMS),
    )
    async def put(body: wire.ItemsBody, request: Request) -> Response:
        """Answered once the change is durable; shown in seconds. A new item is found by those who like the items that
        are most like it; the next Bundle learns from what is done with it.
        """
        if len(body.items) > max_items:
            raise RequestError(f"{len(body.items)} items in one call, at most {max_items} are taken", field="items")
        return fixed(request) or as_json({"version": await changes.put([item.model_dump() for item in body.items])})

    @app.delete(
        "/v1/items/{item_id}",
        **about("admin", "items", "Take an item out of the catalogue", ok(wire.ItemsAnswer) | problems(404, 409)),
    )
    async def remove(item_id: Annotated[wire.Id, Path()], request: Request) -> Response:
        """Not shown any more in seconds. Put again, it is back."""
        if (refused := fixed(request)) is not None:
            return refused
        version = await changes.remove(item_id)
        if version is None:
            return missing(request, f"no item {item_id!r} in the catalogue")
        return as_json({"version": version})


def _add_operation(
    app: FastAPI, service: Service, observer: Observer, find_trace: FindTrace, retry_after: dict[str, str]
) -> None:
    @app.get(
        "/v1/traces/{request_id}",
        **about("admin", "operation", "How an answer came about", ok(wire.TraceAnswer) | problems(404)),
    )
    async def trace(request_id: Annotated[str, Path(max_length=64)], request: Request) -> Response:
        """Which source brought each item, how each stage scored it, and why the others are not shown; for the newest
        answers only.
        """
        found = observer.trace(request_id) or await find_trace(request_id)
        return missing(request, f"no trace of {request_id!r} is kept") if found is None else as_json(found)

    @app.get("/healthz", **about("read", "probes", "Is the process alive?", ok(wire.HealthAnswer)))
    async def healthz() -> Response:
        """Answered whatever the load."""
        return as_json({"status": "ok"})

    @app.get("/readyz", **about("read", "probes", "May it get traffic?", ok(wire.HealthAnswer)))
    async def readyz(request: Request) -> Response:
        """Yes once the golden query of the Bundle was answered as it must be and the event store can be read. One on
        another machine is no condition: without it users are answered like strangers.
        """
        if not service.current.proven:
            return problem(503, "the golden query has not been answered yet", id_of(request), headers=retry_after)
        if not service.store.is_remote:
            service.store.watermark()
        return as_json({"status": "ready"})

    @app.get("/openapi.json", include_in_schema=False, **needs("read"))
    async def openapi() -> Response:
        return as_json(app.openapi())

    @app.get("/docs", include_in_schema=False, **needs("read"))
    async def docs() -> Response:
        return get_swagger_ui_html(openapi_url="/openapi.json", title=app.title)


def _answer_errors(app: FastAPI, retry_after: Mapping[str, str]) -> None:
    """Errors of this library and of the framework, as problems."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        found = error.errors()
        if any(each["type"] == "json_invalid" for each in found):
            where = found[0]["ctx"].get("error", "") if found[0].get("ctx") else ""
            return problem(
                400, f"the body is not valid JSON: {where} at character {found[0]['loc'][-1]}", id_of(request)
            )
        content_type = request.headers.get("content-type", "application/json")
        if not _is_json(content_type) and any(each["loc"] == ("body",) for each in found):
            return problem(415, f"send the body as application/json, not {content_type}", id_of(request))
        fields = [
            {"field": ".".join(printable(str(key)) for key in each["loc"]), "message": printable(each["msg"])}
            for each in found[:20]
        ]
        detail = "; ".join(f"{each['field']}: {each['message']}" for each in fields[:3])
        return problem(422, detail, id_of(request), errors=fields)

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> Response:
        name = error.details.get("field")
        name = _WIRE_NAMES.get(str(name), name)
        if "row" in error.details:
            name = f"events.{error.details['row']}.{name}"
        errors = None if name is None else [{"field": f"body.{name}", "message": printable(error.message)}]
        return problem(422, error.message, id_of(request), errors=errors)

    @app.exception_handler(ChangeConflictError)
    async def outrun(request: Request, error: ChangeConflictError) -> Response:
        return problem(409, error.message, id_of(request))

    @app.exception_handler(EventStoreError)
    @app.exception_handler(StageOverloadedError)
    @app.exception_handler(BundleError)
    async def unavailable(request: Request, error: RecsysError) -> Response:
        return problem(503, error.message, id_of(request), headers=dict(retry_after))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        headers = None if error.headers is None else dict(error.headers)
        return problem(error.status_code, str(error.detail), id_of(request), headers=headers)


_WIRE_NAMES = {"timestamp_ms": "timestamp", "slate_position": "position", "exclude_items": "filters.exclude_items"}
"""fields that callers know by another name than the library"""


def _event(body: wire.EventBody) -> Event:
    return Event(
        event_id=body.event_id,
        user_id=body.user_id,
        item_id=body.item_id,
        event=body.event,
        timestamp_ms=milliseconds(body.timestamp),
        value=body.value,
        request_id=body.request_id,
        slate_position=body.position,
        surface=body.surface,
    )


def _user(service: Service, state: UserState) -> dict[str, Any]:
    titles = service.current.titles(state.item_ids)
    columns = zip(
        state.item_ids, titles, state.events, state.timestamps_ms.tolist(), state.values.tolist(), strict=True
    )
    history = [
        {
            "item_id": item_id,
            "title": title,
            "event": event,
            "timestamp": datetime.fromtimestamp(timestamp_ms / 1e3, UTC) if timestamp_ms else None,
            "value": None if math.isnan(value) else value,
        }
        for item_id, title, event, timestamp_ms, value in columns
    ]
    return {"user_id": state.user_id, "version": state.version, "history": history}
