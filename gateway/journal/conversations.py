"""Conversations as objects: found, listed, changed, forked and deleted in the journal.

Everything is asked for by a tenant, and what belongs to another one does not exist. `Turn` and `Conversation` come
back as they were read; changing them changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import ColumnElement, delete, func, select, tuple_
from sqlalchemy.orm import Session

from gateway.conversation import Transcript, content_root
from gateway.journal import statements
from gateway.journal.journal import ConversationBusy, Journal, Place, check_end, compact, title_of
from gateway.journal.tables import DONE, Conversation, Turn
from protocol.errors import CallerError
from protocol.ids import new_id
from protocol.messages import ChatMessage

Order = Literal["asc", "desc"]
# SQLite may be built with room for 999 parameters in a statement.
_KEYS_AT_ONCE = 500
_COPIED = [column.key for column in Turn.__table__.columns if column.key not in ("id", "conversation_id", "parent_id")]


class NotFound(CallerError):
    code = "not_found"
    http_status = 404


@dataclass(frozen=True)
class History:
    """What was said in a conversation up to one of its turns, and where that is."""

    conversation_id: bytes
    turn_id: bytes | None  # None: nothing was said yet
    messages: tuple[ChatMessage, ...]

    def place(self, new: Sequence[ChatMessage], *, is_end: bool) -> Place:
        return Place(self.conversation_id, self.turn_id, new, is_end)


@dataclass(frozen=True)
class Summary:
    """A conversation as a list shows it. turns: that were answered; tokens: of the longest context."""

    conversation: Conversation
    turns: int
    tokens: int


@dataclass(frozen=True)
class Changes:
    """What a client changes of a conversation; None: nothing. ttl_s 0: it stays for ever."""

    title: str | None = None
    metadata: dict[str, str] | None = None
    pinned: bool | None = None
    ttl_s: float | None = None


class Conversations:
    """Owned by one loop. Every method raises JournalUnavailable; those that name something NotFound."""

    def __init__(self, journal: Journal) -> None:
        self._run = journal.run
        self._checkpoint = journal.checkpoint
        self.vacuum = journal.vacuum

    # -- reading ----------------------------------------------------------------------------------------------

    async def get(self, tenant: bytes, conversation_id: bytes) -> Summary:
        def work(session: Session) -> Summary:
            return _summaries(session, [_conversation(session, tenant, conversation_id)])[0]

        return await self._run(work)

    async def list(
        self, tenant: bytes, limit: int, after: bytes | None = None, order: Order = "desc"
    ) -> tuple[Sequence[Summary], bool]:
        """By last use; and whether there are more."""

        def work(session: Session) -> tuple[Sequence[Summary], bool]:
            place = tuple_(Conversation.updated_at_s, Conversation.id)
            query = select(Conversation).where(Conversation.tenant == tenant, Conversation.stored)
            if after is not None:
                last = _conversation(session, tenant, after)
                border = tuple_(last.updated_at_s, last.id)
                query = query.where(place < border if order == "desc" else place > border)
            by = [
                column.desc() if order == "desc" else column for column in (Conversation.updated_at_s, Conversation.id)
            ]
            found = session.scalars(query.order_by(*by).limit(limit + 1)).all()
            return _summaries(session, found[:limit]), len(found) > limit

        return await self._run(work)

    async def turns(self, tenant: bytes, conversation_id: bytes) -> Sequence[Turn]:
        """All that are stored, oldest first: a tree by `parent_id`."""

        def work(session: Session) -> Sequence[Turn]:
            _conversation(session, tenant, conversation_id)
            return [turn for turn in _turns(session, conversation_id) if turn.stored]

        return await self._run(work)

    async def turn(self, tenant: bytes, turn_id: bytes) -> Turn:
        return await self._run(lambda session: _turn(session, tenant, turn_id))

    async def path(self, tenant: bytes, conversation_id: bytes) -> Sequence[Turn]:
        """The turns from the beginning to the newest one, of all branches the one that was continued last."""

        def work(session: Session) -> Sequence[Turn]:
            _conversation(session, tenant, conversation_id)
            turns = _turns(session, conversation_id)
            return _path(turns, _end(turns))

        return await self._run(work)

    async def path_to(self, tenant: bytes, turn_id: bytes) -> Sequence[Turn]:
        def work(session: Session) -> Sequence[Turn]:
            turn = _turn(session, tenant, turn_id)
            return _path(_turns(session, turn.conversation_id), turn)

        return await self._run(work)

    async def history(self, tenant: bytes, conversation_id: bytes) -> History:
        """Up to its end."""
        path = await self.path(tenant, conversation_id)
        return History(conversation_id, path[-1].id if path else None, _messages(path))

    async def history_to(self, tenant: bytes, turn_id: bytes) -> History:
        """Up to this turn, which must be done."""
        path = await self.path_to(tenant, turn_id)
        if path[-1].status != "done":
            raise NotFound(f"the response is {path[-1].status}; only a completed one can be continued")
        return History(path[-1].conversation_id, turn_id, _messages(path))

    # -- changing ---------------------------------------------------------------------------------------------

    async def create(
        self, tenant: bytes, model: str, metadata: dict[str, str], messages: Sequence[ChatMessage]
    ) -> Summary:
        def work(session: Session) -> Summary:
            now = time.time()
            conversation = Conversation(
                id=new_id(),
                tenant=tenant,
                model=model,
                created_at_s=now,
                updated_at_s=now,
                title=title_of(messages),
                labels=metadata,
            )
            session.add(conversation)
            session.flush()
            if messages:
                session.add(_note(tenant, conversation.id, None, (), messages, now))
            return Summary(conversation, 0, 0)

        return await self._run(work)

    async def add(self, tenant: bytes, conversation_id: bytes, messages: Sequence[ChatMessage]) -> Turn:
        """Put messages at its end. Raises ConversationBusy."""

        def work(session: Session) -> Turn:
            now = time.time()
            conversation = _conversation(session, tenant, conversation_id)
            turns = _turns(session, conversation_id)
            end = _end(turns)
            latest = session.execute(statements.LATEST, {"conversation": conversation_id}).first()
            check_end(latest, Place(conversation_id, end.id if end else None, messages, is_end=True))
            before = _messages(_path(turns, end))
            turn = _note(tenant, conversation_id, end.id if end else None, before, messages, now)
            session.add(turn)
            conversation.updated_at_s = now
            conversation.title = conversation.title or title_of(messages)
            return turn

        return await self._run(work)

    async def change(self, tenant: bytes, conversation_id: bytes, changes: Changes) -> Summary:
        def work(session: Session) -> Summary:
            conversation = _conversation(session, tenant, conversation_id)
            if changes.title is not None:
                conversation.title = changes.title or None
            if changes.metadata is not None:
                conversation.labels = changes.metadata
            if changes.pinned is not None:
                conversation.pinned = changes.pinned
            if changes.ttl_s is not None:
                conversation.ttl_s = changes.ttl_s or None
                conversation.updated_at_s = time.time()  # it counts from now
            return _summaries(session, [conversation])[0]

        return await self._run(work)

    async def fork(self, tenant: bytes, conversation_id: bytes, turn_id: bytes | None, title: str | None) -> Summary:
        """A conversation of its own with the turns up to this one; None: up to the end."""

        def work(session: Session) -> Summary:
            origin = _conversation(session, tenant, conversation_id)
            turns = _turns(session, conversation_id)
            last = _end(turns) if turn_id is None else next((t for t in turns if t.id == turn_id and t.stored), None)
            if turn_id is not None and (last is None or last.status != "done"):
                raise NotFound("this conversation has no such completed turn")
            now = time.time()
            fork = Conversation(
                id=new_id(),
                tenant=tenant,
                model=origin.model,
                created_at_s=now,
                updated_at_s=now,
                title=origin.title if title is None else title or None,
                labels=origin.labels,
            )
            session.add(fork)
            session.flush()
            parent_id = None
            for turn in _path(turns, last):
                copied = {name: getattr(turn, name) for name in _COPIED}
                copy = Turn(id=new_id(), conversation_id=fork.id, parent_id=parent_id, **copied)
                session.add(copy)
                session.flush()
                parent_id = copy.id
            return _summaries(session, [fork])[0]

        return await self._run(work)

    async def delete_message(self, tenant: bytes, conversation_id: bytes, turn_id: bytes, index: int) -> Summary:
        """Take a message out of a turn, whatever else it says; the answer is the one behind its messages."""

        def work(session: Session) -> Summary:
            conversation = _conversation(session, tenant, conversation_id)
            turn = session.get(Turn, turn_id)
            if turn is None or turn.conversation_id != conversation_id or turn.status == "pending":
                raise NotFound("this conversation has no such item")
            said = list(turn.messages)
            if index < len(said) and said[index] is not None:
                turn.messages = [*said[:index], None, *said[index + 1 :]]
            elif index == len(said) and turn.answer is not None:
                turn.answer, turn.answer_tokens = None, None
            else:
                raise NotFound("this conversation has no such item")
            return _summaries(session, [conversation])[0]

        return await self._run(work)

    async def delete_turn(self, tenant: bytes, turn_id: bytes) -> None:
        """Nobody finds it any more; its text goes as soon as no other turn continues it. Raises ConversationBusy."""

        def work(session: Session) -> None:
            turn = _turn(session, tenant, turn_id)
            if turn.status == "pending":
                raise ConversationBusy("the response is still being made; cancel it by closing its connection")
            turn.stored = False
            session.flush()
            _prune(session, turn)

        await self._run(work)

    async def delete(self, tenant: bytes, conversation_id: bytes) -> int:
        """Returns how many turns went with it. Raises ConversationBusy."""

        def work(session: Session) -> int:
            _conversation(session, tenant, conversation_id)
            _check_idle(session, conversation_id)
            turns = session.scalars(select(Turn.id).where(Turn.conversation_id == conversation_id)).all()
            session.execute(delete(Turn).where(Turn.conversation_id == conversation_id))
            session.execute(delete(Conversation).where(Conversation.id == conversation_id))
            return len(turns)

        count = await self._run(work)
        await self._checkpoint()
        return count

    # -- for retention.py ---------------------------------------------------------------------------------------

    async def erasable(self, tenant: bytes, conversation_id: bytes) -> tuple[Sequence[bytes], Sequence[bytes]]:
        """Turn keys whose contexts belong to this conversation alone, those first that continue the others; and those
        that other conversations have too. Raises ConversationBusy.
        """

        def work(session: Session) -> tuple[Sequence[bytes], Sequence[bytes]]:
            _conversation(session, tenant, conversation_id)
            _check_idle(session, conversation_id)
            keys = [turn.turn_key for turn in _turns(session, conversation_id) if turn.turn_key and turn.usage]
            shared: set[bytes] = set()
            for start in range(0, len(keys), _KEYS_AT_ONCE):
                others = select(Turn.turn_key).where(
                    Turn.turn_key.in_(keys[start : start + _KEYS_AT_ONCE]),
                    Turn.status == DONE,
                    Turn.conversation_id != conversation_id,
                )
                shared.update(key for key in session.scalars(others).all() if key)
            return list(dict.fromkeys(key for key in reversed(keys) if key not in shared)), sorted(shared)

        return await self._run(work)

    async def expired(self, now_s: float, limit: int = 100) -> Sequence[tuple[bytes, bytes]]:
        """Tenants and ids of conversations whose time is over."""

        def work(session: Session) -> Sequence[tuple[bytes, bytes]]:
            over = Conversation.updated_at_s + Conversation.ttl_s < now_s
            rows = session.execute(
                select(Conversation.tenant, Conversation.id).where(~Conversation.pinned, over).limit(limit)
            )
            return [(row.tenant, row.id) for row in rows]

        return await self._run(work)

    async def pinned(self, limit: int) -> Sequence[bytes]:
        """The turn keys at the ends of pinned conversations, of all tenants."""

        def work(session: Session) -> Sequence[bytes]:
            found = session.scalars(
                select(Conversation.id)
                .where(Conversation.pinned)
                .order_by(Conversation.updated_at_s.desc())
                .limit(limit)
            )
            ends = [_last_key(session, conversation_id) for conversation_id in found.all()]
            return [key for key in ends if key is not None]

        return await self._run(work)

    async def end_key(self, tenant: bytes, conversation_id: bytes) -> bytes | None:
        """The turn key of the newest answered turn."""

        def work(session: Session) -> bytes | None:
            _conversation(session, tenant, conversation_id)
            return _last_key(session, conversation_id)

        return await self._run(work)


# -- inside a transaction ----------------------------------------------------------------------------------------


def _conversation(session: Session, tenant: bytes, conversation_id: bytes) -> Conversation:
    found = session.get(Conversation, conversation_id)
    if found is None or found.tenant != tenant or not found.stored:
        raise NotFound(f"there is no conversation conv_{conversation_id.hex()}")
    return found


def _turn(session: Session, tenant: bytes, turn_id: bytes) -> Turn:
    found = session.get(Turn, turn_id)
    if found is None or found.tenant != tenant or not found.stored:
        raise NotFound(f"there is no response resp_{turn_id.hex()}")
    return found


def _turns(session: Session, conversation_id: bytes) -> Sequence[Turn]:
    query = select(Turn).where(Turn.conversation_id == conversation_id).order_by(Turn.created_at_s, Turn.id)
    return session.scalars(query).all()


def _end(turns: Sequence[Turn]) -> Turn | None:
    return next((turn for turn in reversed(turns) if turn.status == "done" and turn.stored), None)


def _path(turns: Sequence[Turn], last: Turn | None) -> list[Turn]:
    by_id = {turn.id: turn for turn in turns}
    path: list[Turn] = []
    while last is not None:
        path.append(last)
        last = by_id.get(last.parent_id) if last.parent_id else None
    return path[::-1]


def _messages(path: Sequence[Turn]) -> tuple[ChatMessage, ...]:
    said: list[ChatMessage] = []
    for turn in path:
        said += [ChatMessage(**message) for message in turn.messages if message is not None]
        if turn.answer is not None:
            said.append(ChatMessage("assistant", turn.answer))
    return tuple(said)


def _last_key(session: Session, conversation_id: bytes) -> bytes | None:
    return session.scalars(
        select(Turn.turn_key)
        .where(Turn.conversation_id == conversation_id, Turn.status == "done", Turn.prompt_tokens.is_not(None))
        .order_by(Turn.created_at_s.desc())
        .limit(1)
    ).first()


def _summaries(session: Session, conversations: Sequence[Conversation]) -> list[Summary]:
    answered: ColumnElement[bool] = (Turn.status == "done") & Turn.prompt_tokens.is_not(None) & Turn.stored
    rows = session.execute(
        select(Turn.conversation_id, func.count(), func.max(Turn.prompt_tokens + Turn.completion_tokens))
        .where(Turn.conversation_id.in_([one.id for one in conversations]), answered)
        .group_by(Turn.conversation_id)
    ).all()
    counts = {row[0]: (row[1], row[2] or 0) for row in rows}
    return [Summary(one, *counts.get(one.id, (0, 0))) for one in conversations]


def _note(
    tenant: bytes,
    conversation_id: bytes,
    parent_id: bytes | None,
    before: Sequence[ChatMessage],
    messages: Sequence[ChatMessage],
    now: float,
) -> Turn:
    """A turn of messages that a client adds by themselves: nothing is asked of the model."""
    content = Transcript(content_root(tenant), (*before, *messages))
    return Turn(
        id=new_id(),
        conversation_id=conversation_id,
        parent_id=parent_id,
        tenant=tenant,
        # Without a model there is no turn key; no context is saved under this one.
        request_key=content.request_key,
        turn_key=content.request_key,
        status="done",
        messages=[compact(message) for message in messages],
        created_at_s=now,
        finished_at_s=now,
    )


def _check_idle(session: Session, conversation_id: bytes) -> None:
    pending = select(Turn.id).where(Turn.conversation_id == conversation_id, Turn.status == "pending").limit(1)
    if session.scalars(pending).first() is not None:
        raise ConversationBusy("a turn of this conversation is under way; try again when it has ended")


def _prune(session: Session, turn: Turn | None) -> None:
    """Delete a turn that nobody can find and that none continues, and then perhaps the one before it."""
    while turn is not None and not turn.stored and turn.status != "pending":
        if session.scalars(select(Turn.id).where(Turn.parent_id == turn.id).limit(1)).first() is not None:
            return
        conversation_id, parent_id = turn.conversation_id, turn.parent_id
        session.delete(turn)
        session.flush()
        if session.scalars(select(Turn.id).where(Turn.conversation_id == conversation_id).limit(1)).first() is None:
            session.execute(delete(Conversation).where(Conversation.id == conversation_id))
        turn = session.get(Turn, parent_id) if parent_id else None
