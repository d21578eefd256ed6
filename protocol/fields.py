"""Field types of messages: strict, because a peer's "5" is not 5 and its list is not bytes."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge, Len
from pydantic import AfterValidator, Strict

from protocol.ids import ID_BYTES

Str = Annotated[str, Strict()]
Bytes = Annotated[bytes, Strict()]
Bool = Annotated[bool, Strict()]
Int = Annotated[int, Strict()]
Float = Annotated[float, Strict()]  # an integer is accepted, as in JSON
Count = Annotated[int, Strict(), Ge(0)]
Id = Annotated[bytes, Strict(), Len(ID_BYTES, ID_BYTES)]


def _whole_tokens(packed: bytes) -> bytes:
    if len(packed) % 4:
        raise ValueError(f"{len(packed)} bytes are not a whole number of 32-bit token ids")
    return packed


Tokens = Annotated[bytes, Strict(), AfterValidator(_whole_tokens)]  # see ids.pack_tokens
