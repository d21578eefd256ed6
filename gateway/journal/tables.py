"""The journal's tables. Plain SQL types only, so that SQLite and PostgreSQL hold the same.

A conversation is a tree of turns; regenerating or editing makes a branch. A turn holds the messages that are new
since its parent, so a conversation's text is stored once, however often clients send it.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from sqlalchemy import BigInteger, CheckConstraint, Float, ForeignKey, Index, LargeBinary, String, Text
from sqlalchemy.engine import Dialect
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import TypeDecorator

from protocol.ids import ID_BYTES

SCHEMA_VERSION = 1
Status = Literal["pending", "done", "failed", "cancelled"]


class AsciiJson(TypeDecorator[Any]):
    """Any JSON value, a bare string too, as ASCII text: neither database takes every string that JSON can hold.

    PostgreSQL refuses NUL in text, which models do produce, and both refuse lone surrogates; escaped, they pass.
    """

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else json.dumps(value, separators=(",", ":"))

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        return None if value is None else json.loads(value)


class Base(DeclarativeBase):
    pass


class Schema(Base):
    """One row: the version of these tables."""

    __tablename__ = "schema_version"

    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class Conversation(Base):
    __tablename__ = "conversations"

    id: Mapped[bytes] = mapped_column(LargeBinary(ID_BYTES), primary_key=True)
    tenant: Mapped[bytes] = mapped_column(LargeBinary(ID_BYTES), index=True)  # tenants.Tenant.id
    model: Mapped[str] = mapped_column(Text)
    created_at_s: Mapped[float] = mapped_column(Float)  # seconds since 1970, UTC; so are all times here
    updated_at_s: Mapped[float] = mapped_column(Float)


class Turn(Base):
    __tablename__ = "turns"
    __table_args__ = (
        CheckConstraint("status in ('pending', 'done', 'failed', 'cancelled')", name="status"),
        CheckConstraint("(status = 'done') = (turn_key is not null)", name="done_has_key"),
        Index("turns_by_key", "turn_key"),
        Index("turns_by_status", "status"),
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
