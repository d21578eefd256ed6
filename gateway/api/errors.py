"""Errors as OpenAI's clients know them. The only place where our errors become HTTP."""

from __future__ import annotations

import json
import math
from typing import Any

import pydantic_core
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from monitoring.logs import get_logger
from protocol.errors import CachedAttentionError, CallerError, InternalError, InvalidRequest

log = get_logger(__name__)

_RETRY_AFTER_S = 1.0  # where nobody knows better


class RequestTooLarge(CallerError):
    code = "request_too_large"
    http_status = 413


class RequestTimeout(CallerError):
    code = "request_timeout"
    http_status = 408


class UnknownRoute(CallerError):
    code = "not_found"
    http_status = 404


class MethodNotAllowed(CallerError):
    code = "method_not_allowed"
    http_status = 405


class JsonResponse(Response):
    """JSON of any value. A string with a lone surrogate, which UTF-8 cannot hold, is shown with a question mark."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return to_json(content)


def to_json(content: Any) -> bytes:
    try:
        return pydantic_core.to_json(content, inf_nan_mode="null")  # in a tenth of json's time: every token is sent so
    except pydantic_core.PydanticSerializationError:  # a lone surrogate
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "replace")


def error_body(error: CachedAttentionError) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": _type(error), "param": error.param, "code": error.code}}


def error_response(error: CachedAttentionError) -> JsonResponse:
    headers = None
    if error.retryable and error.http_status in (429, 503):
        wait_s = _RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        headers = {"Retry-After": str(max(1, math.ceil(wait_s)))}
    return JsonResponse(error_body(error), error.http_status, headers)


async def answer_error(_: Request, error: Exception) -> JsonResponse:
    """An exception handler for all of ours, and for what Starlette raises before a route is found."""
    return error_response(_translate(error))


def _translate(error: Exception) -> CachedAttentionError:
    if isinstance(error, CachedAttentionError):
        return error
    if isinstance(error, RequestValidationError):  # of the query; bodies are checked by hand
        first = error.errors()[0]
        return InvalidRequest(f"'{first['loc'][-1]}': {first['msg']}", param=str(first["loc"][-1]))
    if isinstance(error, HTTPException):
        if error.status_code == 404:
            return UnknownRoute("there is no such route; see /openapi.json")
        if error.status_code == 405:
            return MethodNotAllowed("this route does not know that method")
    return InternalError("the gateway failed; see its log")


def _type(error: CachedAttentionError) -> str:
    if error.http_status == 401:
        return "authentication_error"
    if error.http_status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if isinstance(error, CallerError) else "server_error"
