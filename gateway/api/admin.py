"""/admin: what tenants use, who waits, and a gateway that takes no new turns. For admins' API keys only."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request

from gateway.api.errors import JsonResponse
from gateway.dispatch import Dispatcher
from gateway.tenants import Tenants
from gateway.turns import Turns


def admin_router(tenants: Tenants, turns: Turns, dispatcher: Dispatcher) -> APIRouter:
    router = APIRouter(prefix="/admin")

    def check(request: Request) -> None:
        tenants.require_admin(request.headers.get("authorization"))

    @router.get("/tenants")
    async def list_tenants(request: Request) -> JsonResponse:
        """Since the gateway started."""
        check(request)
        data = [
            {
                "tenant": meter.name,
                "id": tenant.hex(),
                "requests": meter.requests,
                "refused": meter.refused,
                "prompt_tokens": meter.prompt_tokens,
                "cached_tokens": meter.cached_tokens,
                "completion_tokens": meter.completion_tokens,
                "stored_bytes": meter.stored_bytes if meter.limits.stored_bytes is not None else None,
                "limits": {
                    "requests_per_minute": meter.limits.requests_per_minute,
                    "tokens_per_minute": meter.limits.tokens_per_minute,
                    "stored_bytes": meter.limits.stored_bytes,
                    "priority": meter.limits.priority,
                },
            }
            for tenant, meter in turns.meters
        ]
        return JsonResponse({"object": "list", "data": data})

    @router.get("/queue")
    async def show_queue(request: Request) -> JsonResponse:
        """The running turns, then the waiting ones in the order in which they would be dispatched now."""
        check(request)
        return JsonResponse({"drained": turns.is_drained, **queue_view(turns, dispatcher)})

    @router.post("/drain")
    async def drain(request: Request) -> JsonResponse:
        """Take no new turns; those at hand come to their end. /ready says 503 from now on."""
        check(request)
        turns.is_drained = True
        return JsonResponse({"drained": True, **queue_view(turns, dispatcher)})

    @router.post("/resume")
    async def resume(request: Request) -> JsonResponse:
        check(request)
        turns.is_drained = False
        return JsonResponse({"drained": False, **queue_view(turns, dispatcher)})

    return router


def queue_view(turns: Turns, dispatcher: Dispatcher) -> dict[str, Any]:
    at_hand = {turn.id: turn for turn in turns}
    running = [turn for turn in at_hand.values() if turn.is_running]
    waiting = [at_hand[turn_id] for turn_id in dispatcher.order if turn_id in at_hand]
    return {
        "running": [turn.describe() for turn in running],
        "waiting": [turn.describe() for turn in waiting],
        "next_wait_s": round(dispatcher.estimate_wait_s(), 3),
    }
