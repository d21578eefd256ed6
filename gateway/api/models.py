"""GET /v1/models: the one model that is served."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request

from gateway.api.chat import check_model
from gateway.api.errors import JsonResponse
from gateway.tenants import Tenants
from gateway.workers import Workers
from protocol.messages import ModelInfo


def models_router(workers: Workers, tenants: Tenants) -> APIRouter:
    router = APIRouter()
    started_s = int(time.time())

    def describe(model: ModelInfo) -> dict[str, Any]:
        return {
            "id": model.model,
            "object": "model",
            "created": started_s,
            "owned_by": "cachedattention",
            "max_model_len": model.max_context,
        }

    @router.get("/v1/models")
    async def list_models(request: Request) -> JsonResponse:
        tenants.identify(request.headers.get("authorization"))
        return JsonResponse({"object": "list", "data": [describe(workers.model)]})

    @router.get("/v1/models/{model_id:path}")
    async def retrieve_model(model_id: str, request: Request) -> JsonResponse:
        tenants.identify(request.headers.get("authorization"))
        check_model(model_id, workers.model.model)
        return JsonResponse(describe(workers.model))

    return router
