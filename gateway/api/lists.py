"""Lists of objects, as OpenAI's routes answer them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

from typing_extensions import TypedDict

T = TypeVar("T", bound=Mapping[str, Any])


class Listed(TypedDict, Generic[T]):
    """first_id, last_id: of `data`; null where it is empty."""

    object: Literal["list"]
    data: list[T]
    first_id: str | None
    last_id: str | None
    has_more: bool


def listed(data: Sequence[T], has_more: bool = False) -> Listed[T]:
    return {
        "object": "list",
        "data": list(data),
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": has_more,
    }
