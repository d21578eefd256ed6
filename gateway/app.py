"""The HTTP application: routes, errors in one form, every request counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api.errors import JsonResponse, answer_error, error_response
from gateway.api.openapi import describe
from monitoring import traces
from monitoring.gateway_metrics import GatewayMetrics
from protocol.errors import CachedAttentionError

_TURNS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_CLIENT_LEFT = 499  # what nginx calls a request whose client did not wait for a status


def make_app(
    routers: Sequence[APIRouter],
    metrics: GatewayMetrics,
    cors_origins: Sequence[str] = (),
    page: Callable[[ASGIApp], ASGIApp] | None = None,
) -> ASGIApp:
    """cors_origins: whose pages may ask from a browser. page: puts our own page in front of the API."""
    # No pages of FastAPI's own: they load scripts from other hosts.
    app = FastAPI(title="CachedAttention", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.openapi = describe(app)  # type: ignore[method-assign]

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> JsonResponse:
        return JsonResponse(app.openapi())

    for router in routers:
        app.include_router(router)
    for kind in (CachedAttentionError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, answer_error)
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    api = Direct([route for route in routes if route.path in _TURNS and "POST" in (route.methods or ())], app)
    counted = RequestCounter(api if page is None else page(api), metrics)
    if not cors_origins:
        return counted
    # No cookies: callers are known by their Authorization header, which a page must have itself.
    return CORSMiddleware(
        counted,
        allow_origins=cors_origins,
        allow_methods=["GET", "POST", "PATCH", "DELETE"],
        allow_headers=["*"],
        expose_headers=["Retry-After"],
        max_age=600,
    )


class Direct:
    """Hands requests for turns to their endpoints, which take them as they are; all others go on to `app`, which has
    these routes to describe them. Through its layers and back a request takes 0.2 ms more of a gateway that has slept.
    """

    def __init__(self, routes: Sequence[APIRoute], app: ASGIApp) -> None:
        self._routes = {route.path: route for route in routes}
        self._direct = ServerErrorMiddleware(self._answer, handler=answer_error)
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if route is None:
            await self._app(scope, receive, send)
        else:
            scope["route"] = route
            await self._direct(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await scope["route"].endpoint(Request(scope, receive))
        except CachedAttentionError as error:
            response = error_response(error)
        await response(scope, receive, send)


class RequestCounter:
    """Counts HTTP requests by the pattern of their route, which is bounded, and their status."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if traces.is_on():
            traces.caller.set(Headers(scope=scope).get("traceparent", ""))
        code = _CLIENT_LEFT

        async def watched_send(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched_send)
        finally:
            self._metrics.observe_request(getattr(scope.get("route"), "path", "other"), code)
