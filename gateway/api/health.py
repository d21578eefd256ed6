"""/health, /ready and /metrics, in the same form as those of the other processes."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter
from starlette.responses import PlainTextResponse, Response

from gateway.api.errors import JsonResponse
from monitoring.gateway_metrics import GatewayMetrics
from monitoring.status_server import Readiness


def health_router(readiness: Callable[[], Readiness], metrics: GatewayMetrics) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> JsonResponse:
        return JsonResponse(readiness()._asdict())

    @router.get("/ready", responses={503: {"description": "It takes no turns yet, or no more"}})
    async def ready() -> JsonResponse:
        now = readiness()
        return JsonResponse(now._asdict(), 200 if now.ready else 503)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def render_metrics() -> Response:
        content_type, body = metrics.render()
        return Response(body, headers={"Content-Type": content_type})

    return router
