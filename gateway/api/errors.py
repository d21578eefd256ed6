"""Errors as OpenAI's clients know them. The only place where our errors become HTTP."""

from __future__ import annotations

import json
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from monitoring.logs import get_logger
from protocol.errors import CachedAttentionError, CallerError, InternalError, QueueFull

log = get_logger(__name__)

_RETRY_AFTER_S = "1"


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
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace")


def error_body(error: CachedAttentionError) -> dict[str, Any]:
    return {"error": {"message": error.message, "type": _type(error), "param": error.param, "code": error.code}}


def error_response(error: CachedAttentionError) -> JsonResponse:
    headers = {"Retry-After": _RETRY_AFTER_S} if error.retryable and error.http_status in (429, 503) else None
    return JsonResponse(error_body(error), error.http_status, headers)


async def answer_error(_: Request, error: Exception) -> JsonResponse:
    """An exception handler for all of ours, and for what Starlette raises before a route is found."""
    return error_response(_translate(error))


def _translate(error: Exception) -> CachedAttentionError:
    if isinstance(error, CachedAttentionError):
        return error
    if isinstance(error, HTTPException):
        if error.status_code == 404:
            return UnknownRoute("there is no such route; see /v1/models and /v1/chat/completions")
        if error.status_code == 405:
            return MethodNotAllowed("this route does not know that method")
    return InternalError("the gateway failed; see its log")


def _type(error: CachedAttentionError) -> str:
    if error.http_status == 401:
        return "authentication_error"
    if isinstance(error, QueueFull):
        return "rate_limit_error"
    return "invalid_request_error" if isinstance(error, CallerError) else "server_error"
