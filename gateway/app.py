"""The HTTP application: routes, errors in one form, every request counted."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter, FastAPI
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.api.errors import answer_error
from monitoring.gateway_metrics import GatewayMetrics
from protocol.errors import CachedAttentionError

_CLIENT_LEFT = 499  # what nginx calls a request whose client did not wait for a status


def make_app(routers: Sequence[APIRouter], metrics: GatewayMetrics) -> ASGIApp:
    # No pages of FastAPI's own: bodies are checked by hand, so it would describe them wrongly.
    app = FastAPI(title="CachedAttention", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    for router in routers:
        app.include_router(router)
    for kind in (CachedAttentionError, HTTPException, Exception):
        app.add_exception_handler(kind, answer_error)
    return RequestCounter(app, metrics)


class RequestCounter:
    """Counts HTTP requests by the pattern of their route, which is bounded, and their status."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
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
