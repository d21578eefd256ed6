"""The journal's tables, as the newest of the `migrations` leaves them. Plain SQL types only, so that SQLite and
PostgreSQL hold the same.

A conversation is a tree of turns; regenerating or editing makes a branch. A turn holds the messages that are new
since its parent, so a conversation's text is stored once, however often clients send it. A done turn without an
answer holds messages that a client added by themselves. A message that was deleted leaves a null in its place.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    ColumnElement,
    Float,
    ForeignKey,
    Index,
    LargeBinary,
    String,
    Text,
    false,
    literal_column,
    text,
    true,
)
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from protocol.ids import ID_BYTES

Status = Literal["pending", "done", "failed", "cancelled"]


_encode = json.JSONEncoder(separators=(",", ":")).encode


def ascii_json(value: Any) -> str | None:
    """Any JSON value, a bare string too, as ASCII text: neither database takes every string that JSON can hold.

    PostgreSQL refuses NUL in text, which models do produce, and both refuse lone surrogates; escaped, they pass.
    """
    return None if value is None else _encode(value)


class AsciiJson(TypeDecorator[Any]):
    """A column of it."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return ascii_json(value)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        return None if value is None else json.loads(value)


# As text, not as parameters: only so does a database see that one of the indexes below has all the rows it looks for.
PENDING, DONE = literal_column("'pending'", String), literal_column("'done'", String)


def _partial(name: str, status: ColumnElement[Any], *columns: str) -> Index:
    """An index of the turns with this status."""
    where = text(f"status = {status}")
    return Index(name, *columns, sqlite_where=where, postgresql_where=where)


class Base(DeclarativeBase):
    pass


class Conversation(Base):
    __tablename__ = "conversations"
    __table_args__ = (Index("conversations_by_use", "tenant", "updated_at_s"),)

    id: Mapped[bytes] = mapped_column(LargeBinary(ID_BYTES), primary_key=True)
    tenant: Mapped[bytes] = mapped_column(LargeBinary(ID_BYTES))  # tenants.Tenant.id
    model: Mapped[str] = mapped_column(Text)
    created_at_s: Mapped[float] = mapped_column(Float)  # seconds since 1970, UTC; so are all times here
    updated_at_s: Mapped[float] = mapped_column(Float)
    title: Mapped[Any | None] = mapped_column(AsciiJson)  # text
    labels: Mapped[Any | None] = mapped_column("metadata", AsciiJson)  # OpenAI's: an object of strings
    pinned: Mapped[bool] = mapped_column(Boolean, server_default=false(), default=False)
    ttl_s: Mapped[float | None] = mapped_column(Float)  # after updated_at_s, unless pinned; None: for ever
    stored: Mapped[bool] = mapped_column(Boolean, server_default=true(), default=True)  # a turn of it is


class Turn(Base):
    __tablename__ = "turns"
    __table_args__ = (
        CheckConstraint("status in ('pending', 'done', 'failed', 'cancelled')", name="status"),
        CheckConstraint("(status = 'done') = (turn_key is not null)", name="done_has_key"),
        _partial("turns_pending", PENDING, "status"),
        # By these a turn's origin is found: of each key the newest turn, stored ones first.
        _partial("turns_by_key", DONE, "turn_key", "stored", "created_at_s"),
        _partial("turns_by_request_key", DONE, "request_key", "stored", "created_at_s"),
        _partial("turns_by_content_key", DONE, "content_key", "stored", "created_at_s"),
    )

    id: Mapped[bytes] = mapped_column(LargeBinary(ID_BYTES), primary_key=True)
    conversation_id: Mapped[bytes] = mapped_column(ForeignKey("conversations.id"), index=True)
    parent_id: Mapped[bytes | None] = mapped_column(ForeignKey("turns.id"), index=True)
    tenant: Mapped[bytes] = mapped_column(LargeBinary(ID_BYTES))
    request_key: Mapped[bytes] = mapped_column(LargeBinary(ID_BYTES))  # the turn key after `messages`
    turn_key: Mapped[bytes | None] = mapped_column(LargeBinary(ID_BYTES))  # after the answer
    status: Mapped[str] = mapped_column(String(16))
    messages: Mapped[Any] = mapped_column(AsciiJson)  # list of messages.ChatMessage as objects, new since the parent
    answer: Mapped[Any | None] = mapped_column(AsciiJson)  # text; of a failed or cancelled turn what there was
    answer_tokens: Mapped[bytes | None] = mapped_column(LargeBinary)  # ids.pack_tokens
    finish_reason: Mapped[str | None] = mapped_column(String(16))
    prompt_tokens: Mapped[int | None] = mapped_column(BigInteger)
    completion_tokens: Mapped[int | None] = mapped_column(BigInteger)
    usage: Mapped[Any | None] = mapped_column(AsciiJson)  # messages.TurnUsage as an object
    error_code: Mapped[str | None] = mapped_column(String(64))
    error: Mapped[Any | None] = mapped_column(AsciiJson)  # text
    created_at_s: Mapped[float] = mapped_column(Float)
    finished_at_s: Mapped[float | None] = mapped_column(Float)
    content_key: Mapped[bytes | None] = mapped_column(LargeBinary(ID_BYTES))  # as turn_key, of any model and salt
    namespace: Mapped[bytes | None] = mapped_column(LargeBinary(ID_BYTES))  # messages.ModelInfo.namespace
    response: Mapped[Any | None] = mapped_column(AsciiJson)  # of /v1/responses: what its object repeats of the request
    # False: `store` was false, or the response was deleted: nobody finds it any more but by its keys.
    stored: Mapped[bool] = mapped_column(Boolean, server_default=true(), default=True)
    ttft_s: Mapped[float | None] = mapped_column(Float)
    prefill_s: Mapped[float | None] = mapped_column(Float)
