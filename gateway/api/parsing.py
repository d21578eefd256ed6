"""Bodies of requests as checked values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, from_json

from protocol.errors import InvalidRequest

M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    """Fields that we do not know are ignored: OpenAI's clients send many."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


# OpenAI's limits.
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


def parse_body(body: bytes, model: type[M], *, optional: bool = False) -> M:
    """Raises InvalidRequest: what is wrong first, and its field. optional: an empty body is an empty object."""
    return validate(read_json(body if body or not optional else b"{}"), model)


def read_json(body: bytes) -> dict[str, Any]:
    try:
        # Its cache of strings would keep what clients say; keys are mostly ours.
        raw = from_json(body, allow_inf_nan=False, cache_strings="keys")
    except ValueError as error:  # malformed, nested too deeply, half a surrogate pair
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise InvalidRequest("the body must be a JSON object")
    return raw


def check_supported(raw: Mapping[str, Any], unsupported: Mapping[str, Collection[Any]]) -> None:
    """unsupported: fields, with the values that ask for nothing. Raises InvalidRequest."""
    for field, harmless in unsupported.items():
        value = raw.get(field)
        if value is not None and value not in harmless:
            raise InvalidRequest(f"'{field}' is not supported", param=field)


def path_of(error: ErrorDetails) -> str:
    """Of the field that is wrong, as a client writes it: messages[0].role."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).removeprefix(".")


def explain(error: ErrorDetails, param: str) -> InvalidRequest:
    if error["type"] == "missing":
        return InvalidRequest(f"'{param}' is required", param=param)
    return InvalidRequest(f"'{param}': {error['msg']}", param=param)


def validate(
    raw: dict[str, Any], model: type[M], explained: Callable[[ErrorDetails, str], InvalidRequest] = explain
) -> M:
    """explained: what is wrong with a field, by what pydantic says and the field's path."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise explained(first, path_of(first)) from error
