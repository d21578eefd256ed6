"""The OpenAPI document. Bodies are read and checked by hand, so each route names the types that it goes by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, TypeAdapter

_COMPONENTS = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
_OPEN = ("/health", "/ready", "/metrics")
# What any other route may answer instead of what was asked for.
_FAILURES = {
    "400": "The request is wrong; `param` names the field",
    "401": "No known key",
    "403": "This key may not",
    "404": "No such model, response, conversation or item",
    "409": "Another turn of the conversation is under way; try again",
    "413": "The body is too large",
    "429": "Too many turns are waiting; see Retry-After",
    "503": "The model or the journal is away; see Retry-After",
    "504": "Another process did not answer in time",
}


def json_body(model: type[BaseModel], *, required: bool = True, stream: str = "") -> dict[str, Any]:
    """For a route's `openapi_extra`. stream: what it answers where the body asks for server-sent events."""
    schema = model.model_json_schema(ref_template=_COMPONENTS)
    definitions = schema.pop("$defs", {}) | {model.__name__: schema}
    content = {"application/json": {"schema": {"$ref": _COMPONENTS.format(model=model.__name__)}}}
    return {
        "requestBody": {"required": required, "content": content},
        "x-definitions": definitions,
        "x-stream": stream,
    }


def json_answer(kind: Any, status: int = 200, description: str = "OK") -> dict[int | str, dict[str, Any]]:
    """For a route's `responses`. kind: a TypedDict."""
    schema = TypeAdapter(kind).json_schema(ref_template=_COMPONENTS)
    definitions = schema.pop("$defs", {})
    content = {"application/json": {"schema": schema}}
    return {status: {"description": description, "content": content, "x-definitions": definitions}}


def describe(app: FastAPI) -> Callable[[], dict[str, Any]]:
    """For `app.openapi`: the document, made at the first call."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    return openapi


def _document(app: FastAPI) -> dict[str, Any]:
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas["Error"] = _ERROR
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _complete(operation, schemas, is_api=path not in _OPEN)
    return document


def _complete(operation: dict[str, Any], schemas: dict[str, Any], *, is_api: bool) -> None:
    schemas.update(operation.pop("x-definitions", {}))
    answers = operation["responses"]
    answers.pop("422", None)  # FastAPI's own; ours is 400
    for answer in answers.values():
        schemas.update(answer.pop("x-definitions", {}))
    if stream := operation.pop("x-stream", ""):
        answers["200"]["content"]["text/event-stream"] = {"schema": {"description": stream}}
    if is_api:
        for status, description in _FAILURES.items():
            content = {"application/json": {"schema": {"$ref": _COMPONENTS.format(model="Error")}}}
            answers.setdefault(status, {"description": description, "content": content})
