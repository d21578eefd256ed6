"""What every turn asks of the journal; see driver.py.

Values are named as their columns are; those of a `where`, or that are there twice, have names of their own.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, cast

from sqlalchemy import (
    Boolean,
    LargeBinary,
    Select,
    Table,
    Text,
    bindparam,
    case,
    false,
    func,
    literal_column,
    or_,
    select,
)

from gateway.journal.tables import DONE, PENDING, Conversation, Turn

_turns, _conversations = cast(Table, Turn.__table__), cast(Table, Conversation.__table__)


class Found(NamedTuple):
    """What is read of an answered turn."""

    id: bytes
    conversation_id: bytes
    parent_id: bytes | None
    turn_key: bytes
    request_key: bytes
    content_key: bytes | None
    namespace: bytes | None
    stored: bool
    prompt_tokens: int | None
    completion_tokens: int | None
    created_at_s: float


_FOUND = [_turns.c[name] for name in Found._fields]

NAMED = select(*_FOUND).where(_turns.c.id == bindparam("turn"))
LATEST = (
    select(_turns.c.id, _turns.c.status)
    .where(
        _turns.c.conversation_id == bindparam("conversation"),
        _turns.c.status.in_((PENDING, DONE)),
        _turns.c.stored,
    )
    .order_by(_turns.c.created_at_s.desc())
    .limit(1)
)
NEW_CONVERSATION = _conversations.insert().values(
    id=bindparam("conversation"),
    tenant=bindparam("tenant"),
    model=bindparam("model"),
    created_at_s=bindparam("now"),
    updated_at_s=bindparam("now"),
    title=bindparam("first_title"),
    pinned=false(),
    stored=bindparam("is_stored"),
)
TOUCH = (
    _conversations.update()
    .where(_conversations.c.id == bindparam("conversation"))
    .values(
        updated_at_s=bindparam("now"),
        stored=or_(_conversations.c.stored, bindparam("is_stored", type_=Boolean)),
        title=func.coalesce(_conversations.c.title, bindparam("first_title", type_=Text)),
    )
)
NEW_TURN = _turns.insert().values(
    {
        name: bindparam(name)
        for name in (
            "id",
            "conversation_id",
            "parent_id",
            "tenant",
            "request_key",
            "status",
            "messages",
            "created_at_s",
            "namespace",
            "response",
            "stored",
        )
    }
)
FINISH = (
    _turns.update()
    .where(_turns.c.id == bindparam("turn"), _turns.c.status == PENDING)
    .values(
        answer=case((_turns.c.stored, bindparam("said", type_=Text))),
        answer_tokens=case((_turns.c.stored, bindparam("said_tokens", type_=LargeBinary))),
        **{
            name: bindparam(name)
            for name in (
                "status",
                "turn_key",
                "content_key",
                "finish_reason",
                "prompt_tokens",
                "completion_tokens",
                "usage",
                "ttft_s",
                "prefill_s",
                "error_code",
                "error",
                "finished_at_s",
            )
        },
    )
)


@cache
def newest(columns: tuple[str, ...], count: int) -> Select[Any]:
    """Answered turns of the tenant by so many keys of each column: of each key the newest, stored ones first.

    One seek in an index for each key, however many turns have it: many conversations begin with the same words.
    """
    found = [
        select(_turns.c.id)
        .where(
            _turns.c[column] == bindparam(f"{column}_{number}"),
            _turns.c.status == DONE,
            _turns.c.tenant == bindparam("tenant"),
        )
        .order_by(_turns.c.stored.desc(), _turns.c.created_at_s.desc())
        .limit(literal_column("1"))
        .scalar_subquery()
        for column in columns
        for number in range(count)
    ]
    return select(*_FOUND).where(_turns.c.id.in_(found))
