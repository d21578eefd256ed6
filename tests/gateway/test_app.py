"""The HTTP application around the routes."""

from __future__ import annotations

import asyncio

import httpx
from fastapi import APIRouter, Request
from starlette.responses import Response

from gateway.api.errors import JsonResponse
from gateway.app import make_app
from monitoring.gateway_metrics import GatewayMetrics
from monitoring.registry import new_registry
from protocol.errors import InvalidRequest


def test_requests_for_turns_pass_fastapi_by_and_nobody_notices() -> None:
    """Their answers, errors, bugs and counts are as those of any other route, and they are described."""
    metrics = GatewayMetrics(new_registry())
    router = APIRouter()

    @router.post("/v1/chat/completions")
    @router.post("/v1/other")
    async def answer(request: Request) -> Response:
        match await request.json():
            case "wrong":
                raise InvalidRequest("it is wrong", param="it")
            case "bug":
                raise RuntimeError("a secret")
        return JsonResponse("x")

    async def ask() -> dict[str, list[tuple[int, object]]]:
        transport = httpx.ASGITransport(make_app([router], metrics), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            document = (await client.get("/openapi.json")).json()
            assert {"/v1/chat/completions", "/v1/other"} <= document["paths"].keys()
            answers = {}
            for path in ("/v1/chat/completions", "/v1/other"):
                asked = [await client.post(path, json=content) for content in ("right", "wrong", "bug")]
                asked += [await client.get(path), await client.post(path + "/")]
                answers[path] = [(each.status_code, each.json()) for each in asked]
            return answers

    answers = asyncio.run(ask())
    assert answers["/v1/chat/completions"] == answers["/v1/other"]
    assert [status for status, _ in answers["/v1/other"]] == [200, 400, 500, 405, 404]
    assert "secret" not in str(answers)
    counts = metrics.render()[1]
    for code in (200, 400, 500):
        assert f'cachedattention_requests_total{{code="{code}",route="/v1/chat/completions"}} 1.0' in counts.decode()


def test_json_of_what_neither_utf8_nor_json_can_hold() -> None:
    assert JsonResponse("\ud800é").body == b'"?' + "é".encode() + b'"'
    assert JsonResponse({"a": float("nan")}).body == b'{"a":null}'
