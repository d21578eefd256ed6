"""The conversation journal: what was said survives any crash of any process.

A turn's messages are committed before the turn is queued, and its answer before the client hears `done`; so nothing
acknowledged is lost. Whatever is wrong with the database becomes JournalUnavailable, and then nothing is
acknowledged. One gateway writes one journal.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from sqlalchemy import URL, Engine, create_engine, event, func, make_url, select, update
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session

from gateway.conversation import Transcript
from gateway.journal import statements
from gateway.journal.driver import Driver, Transaction
from gateway.journal.schema import upgrade
from gateway.journal.statements import Found
from gateway.journal.tables import PENDING, Conversation, Turn, ascii_json
from protocol.errors import CallerError, CapacityError, ConfigError, InternalError
from protocol.ids import ROOT, new_id
from protocol.messages import ChatMessage, TurnUsage

T = TypeVar("T")

_LOCK_WAIT_S = 2.0  # how long SQLite waits for another process that holds the database
_DEADLINE_S = 10.0  # for one piece of work, waiting for the worker included
_CHECKPOINT_S = 1.0
_WAL_PAGES = 16_384  # of 4 KiB; past it a commit does what checkpoints have not
_FIRST_KEYS, _KEYS_AT_ONCE = 8, 64
_TITLE_LENGTH = 80


class JournalUnavailable(CapacityError):
    """The database is locked, full, broken or away. Nothing of the request was acknowledged."""

    code = "journal_unavailable"


class ConversationBusy(CallerError):
    """Another turn of the conversation is under way, or has ended since it was read."""

    code = "conversation_locked"
    http_status = 409
    retryable = True


@dataclass(frozen=True)
class Place:
    """Where a turn goes, where its client says so: behind a turn of a conversation."""

    conversation_id: bytes
    parent_id: bytes | None  # None: at its beginning
    messages: Sequence[ChatMessage]  # new since the parent
    is_end: bool  # the parent is the conversation's end, and has to be it still


@dataclass(frozen=True)
class NewTurn:
    """What is known of a turn before it runs."""

    turn_id: bytes
    tenant: bytes
    model: str
    transcript: Transcript
    content: Transcript  # the same messages under conversation.content_root
    namespace: bytes = ROOT  # messages.ModelInfo.namespace
    place: Place | None = None  # None: the messages tell
    stored: bool = True  # False: its text is not kept
    response: dict[str, Any] | None = None  # tables.Turn.response
    preamble: int = 0  # so many leading messages are instructions, which `response` holds


@dataclass(frozen=True)
class Parent:
    """The finished turn whose context a new one begins with.

    Mostly the turn that it continues; where it branches off, the one that shares most with it.
    """

    turn_id: bytes
    conversation_id: bytes
    turn_key: bytes
    context_tokens: int  # what of it the new one shares at best: prompt + generated - 1, for a branch the prompt
    reason: str = ""  # why its context cannot be used: "model_changed", "tenant_differs"


@dataclass(frozen=True)
class Begun:
    conversation_id: bytes
    is_new: bool  # the conversation is
    messages: int  # of the turn, in the journal
    parent: Parent | None


@dataclass(frozen=True)
class Ending:
    """How a turn ended. usage and turn_key are there for a done turn, error for the others."""

    status: Literal["done", "failed", "cancelled"]
    text: str
    tokens: bytes
    turn_key: bytes | None = None
    finish_reason: str | None = None
    usage: TurnUsage | None = None
    error_code: str | None = None
    error: str | None = None
    content_key: bytes | None = None
    ttft_s: float | None = None
    prefill_s: float | None = None


class Journal:
    """Asynchronous outside; inside, one worker thread does all database work, in the order it was asked for.

    What waits for the disk has a thread of its own, so that no turn waits for it: checkpoints, and vacuums.

    Owned by one loop. Every method raises JournalUnavailable.
    """

    def __init__(self, url: URL) -> None:
        """Use Journal.open."""
        self._url = url
        self._engine = _make_engine(url)
        self._driver = Driver(self._engine)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
        self._aside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal-aside")
        self._checkpointing: asyncio.Task[None] | None = None
        self._is_written = False  # since the last checkpoint
        self._late: set[asyncio.Future[None]] = set()

    @classmethod
    async def open(cls, database_url: str | None, data_dir: Path) -> Journal:
        """The journal at `database_url`, or in SQLite under data_dir; tables are made at the first start, and turns
        that a crash left pending become failed. Raises ConfigError: no such database, damaged, of another version.
        """
        try:
            url = make_url(database_url) if database_url else _make_file(data_dir / "journal.sqlite")
            journal = cls(url)
        except (ArgumentError, NoSuchModuleError, ImportError) as error:
            raise ConfigError(f"database_url: {error}", param="database_url") from error
        try:
            await journal._run(journal._prepare)
        except BaseException as error:
            await journal.close()
            if isinstance(error, JournalUnavailable):
                raise ConfigError(f"the journal at {url!r} cannot be used: {error}", param="database_url") from error
            raise
        if url.get_backend_name() == "sqlite":
            journal._checkpointing = asyncio.create_task(journal._checkpoint_now_and_then())
        return journal

    async def begin(self, turn: NewTurn) -> Begun:
        """Find the turn that this one continues, and commit the messages that are new since it.

        Raises ConversationBusy: its place is the conversation's end, which is not free.
        """
        return await self._run(self._begin, turn)

    async def run(self, work: Callable[[Session], T]) -> T:
        """Do other work in one transaction; see conversations.py. Objects that it returns can be read afterwards."""
        return await self._run(self._transact, work)

    async def finish(self, turn_id: bytes, ending: Ending) -> None:
        """Commit how a turn ended. Changes nothing for one that has ended already and did not end as done."""
        await self._run(self._finish, turn_id, ending)

    def finish_later(self, turn_id: bytes, ending: Ending) -> None:
        """finish without waiting and without an error: for a turn whose `begin` failed, yet may still be committed."""
        late = asyncio.get_running_loop().run_in_executor(self._worker, self._finish, turn_id, ending)
        self._late.add(late)
        late.add_done_callback(self._forget)

    async def answers(self, tenant: bytes, turn_ids: Sequence[bytes]) -> dict[bytes, str]:
        """What these turns of the tenant answered, those that are done."""
        return await self._run(self._answers, tenant, turn_ids)

    async def checkpoint(self) -> None:
        """After something was deleted: the write-ahead log of SQLite still has it until its pages are moved."""
        if self._checkpointing is not None:
            await self._run_on(self._aside, self._checkpoint, "TRUNCATE")

    async def vacuum(self) -> list[str]:
        """After something was deleted: nobody can read it by SQL any more. Returns what is to be said of the files.

        SQLite has nothing to do after `checkpoint`: it overwrites what it deletes.
        """
        if self._url.get_backend_name() == "sqlite":
            return []
        await self._run_on(self._aside, self._vacuum)
        return [
            "the journal's database uses the room of deleted rows again, and keeps its own log of changes for a while"
        ]

    async def count_conversations(self) -> int:
        return await self._run(self._count_conversations)

    async def close(self) -> None:
        """Let the work at hand end, then close the database."""
        loop = asyncio.get_running_loop()
        if self._checkpointing is not None:
            self._checkpointing.cancel()
            await asyncio.gather(self._checkpointing, return_exceptions=True)
        await asyncio.wait({loop.run_in_executor(self._aside, _nothing)}, timeout=_DEADLINE_S)
        await asyncio.wait({loop.run_in_executor(self._worker, self._engine.dispose)}, timeout=_DEADLINE_S)
        for executor in (self._worker, self._aside):
            executor.shutdown(wait=False, cancel_futures=True)

    # -- on the worker thread -----------------------------------------------------------------------------

    def _prepare(self) -> None:
        if self._url.get_backend_name() == "sqlite":
            _check_sqlite(self._engine)
        upgrade(self._engine)
        with Session(self._engine) as session, session.begin():
            interrupted = {"status": "failed", "error_code": "interrupted", "error": "the gateway was interrupted"}
            session.execute(update(Turn).where(Turn.status == PENDING).values(**interrupted, finished_at_s=time.time()))

    def _transact(self, work: Callable[[Session], T]) -> T:
        with Session(self._engine, expire_on_commit=False) as session, session.begin():
            return work(session)

    def _begin(self, turn: NewTurn) -> Begun:
        now = time.time()
        title = ascii_json(title_of(turn.transcript.messages)) if turn.stored else None
        with self._driver.transaction() as transaction:
            origin = _find_origin(transaction, turn)
            place = turn.place or origin.place
            conversation_id = place.conversation_id if place else new_id()
            named = {"conversation": conversation_id, "now": now, "first_title": title, "is_stored": turn.stored}
            if place is None:
                transaction.execute(statements.NEW_CONVERSATION, named | {"tenant": turn.tenant, "model": turn.model})
            else:
                if place.is_end:
                    asked = {"conversation": conversation_id}
                    check_end(transaction.execute(statements.LATEST, asked).fetchone(), place)
                if not transaction.execute(statements.TOUCH, named).rowcount:  # deleted since its turn was found
                    raise ConversationBusy("the conversation was deleted meanwhile; send the request again")
            messages = place.messages if place else turn.transcript.messages[turn.preamble :]
            transaction.execute(
                statements.NEW_TURN,
                {
                    "id": turn.turn_id,
                    "conversation_id": conversation_id,
                    "parent_id": place.parent_id if place else None,
                    "tenant": turn.tenant,
                    "request_key": turn.transcript.request_key,
                    "status": "pending",
                    "messages": ascii_json([compact(message) for message in messages] if turn.stored else []),
                    "created_at_s": now,
                    "namespace": turn.namespace,
                    "response": ascii_json(turn.response),
                    "stored": turn.stored,
                },
            )
        return Begun(conversation_id, place is None, len(messages), origin.parent)

    def _finish(self, turn_id: bytes, ending: Ending) -> None:
        usage = ending.usage
        values = {
            "turn": turn_id,
            "status": ending.status,
            "turn_key": ending.turn_key,
            "content_key": ending.content_key,
            "said": ascii_json(ending.text),
            "said_tokens": ending.tokens,
            "finish_reason": ending.finish_reason,
            "prompt_tokens": usage.prompt_tokens if usage else None,
            "completion_tokens": usage.completion_tokens if usage else None,
            "usage": ascii_json(asdict(usage)) if usage else None,
            "ttft_s": ending.ttft_s,
            "prefill_s": ending.prefill_s,
            "error_code": ending.error_code,
            "error": ascii_json(ending.error),
            "finished_at_s": time.time(),
        }
        with self._driver.transaction() as transaction:
            is_found = transaction.execute(statements.FINISH, values).rowcount
        if not is_found and ending.status == "done":
            raise JournalUnavailable("the journal has lost a turn that is running; was its database replaced?")

    def _checkpoint(self, how: Literal["PASSIVE", "TRUNCATE"]) -> None:
        with self._engine.connect() as connection:
            connection.exec_driver_sql(f"PRAGMA wal_checkpoint({how})").close()

    def _vacuum(self) -> None:
        if self._url.get_backend_name() == "postgresql":
            with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                connection.exec_driver_sql("VACUUM turns, conversations")

    def _answers(self, tenant: bytes, turn_ids: Sequence[bytes]) -> dict[bytes, str]:
        found: dict[bytes, str] = {}
        with Session(self._engine) as session:
            for start in range(0, len(turn_ids), _KEYS_AT_ONCE):
                some = turn_ids[start : start + _KEYS_AT_ONCE]
                asked = select(Turn.id, Turn.answer).where(Turn.id.in_(some))
                rows = session.execute(asked.where(Turn.tenant == tenant, Turn.status == "done"))
                found |= {row.id: row.answer for row in rows}
        return found

    def _count_conversations(self) -> int:
        with Session(self._engine) as session:
            return session.scalar(select(func.count()).select_from(Conversation)) or 0

    # -- between the loop and the worker -----------------------------------------------------------------------

    async def _run(self, work: Callable[..., T], *args: Any) -> T:
        self._is_written = True
        return await self._run_on(self._worker, work, *args)

    async def _run_on(self, executor: ThreadPoolExecutor, work: Callable[..., T], *args: Any) -> T:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_DEADLINE_S):
                return await loop.run_in_executor(executor, work, *args)
        except TimeoutError as error:
            raise JournalUnavailable(f"the journal did not answer in {_DEADLINE_S:g} s") from error
        except (SQLAlchemyError, self._driver.error) as error:
            raise JournalUnavailable(f"the journal cannot be used now: {_reason(error)}") from error
        except RuntimeError as error:
            raise InternalError(f"journal: {error}") from error

    async def _checkpoint_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(_CHECKPOINT_S)
            if self._is_written:
                self._is_written = False
                with contextlib.suppress(JournalUnavailable):  # whoever writes next hears of it
                    await self._run_on(self._aside, self._checkpoint, "PASSIVE")

    def _forget(self, late: asyncio.Future[None]) -> None:
        self._late.discard(late)
        if not late.cancelled():
            late.exception()  # the failure that matters was told when begin failed


@dataclass(frozen=True)
class _Origin:
    """Where a turn comes from, as far as its messages tell: its place in the tree, and the context to begin with."""

    place: Place | None
    parent: Parent | None


class _Finder:
    """Looks for a turn's keys: for the longest prefixes of all kinds at once, which mostly is all there is to ask."""

    def __init__(self, transaction: Transaction, turn: NewTurn) -> None:
        self._transaction = transaction
        self._tenant = turn.tenant
        said, content = turn.transcript, turn.content
        keys = {
            "turn_key": said.answer_keys,
            "request_key": said.asked_keys(None),
            "content_key": content.answer_keys,
        }
        self._first = self._ask({column: found[:_FIRST_KEYS] for column, found in keys.items()}, _FIRST_KEYS)

    def find(self, column: str, keys: Sequence[bytes]) -> list[Found]:
        """Answered turns with any of `keys`, in their order: of each the newest, stored ones first.

        Of very many keys those that come first are enough.
        """
        found = _in_order(self._first, column, keys[:_FIRST_KEYS])
        for start in range(_FIRST_KEYS, len(keys), _KEYS_AT_ONCE):
            if found:
                break
            batch = keys[start : start + _KEYS_AT_ONCE]
            found = _in_order(self._ask({column: batch}, _KEYS_AT_ONCE), column, batch)
        return found

    def _ask(self, keys: Mapping[str, Sequence[bytes]], count: int) -> list[Found]:
        values: dict[str, bytes] = {"tenant": self._tenant}
        for column, some in keys.items():
            for number in range(count):
                values[f"{column}_{number}"] = some[number] if number < len(some) else b""
        rows = self._transaction.execute(statements.newest(tuple(keys), count), values).fetchall()
        return [Found(*row) for row in rows]


def _in_order(rows: Sequence[Found], column: str, keys: Sequence[bytes]) -> list[Found]:
    order = {key: number for number, key in enumerate(keys)}
    found = [row for row in rows if getattr(row, column) in order]
    return sorted(found, key=lambda row: (order[getattr(row, column)], not row.stored, -row.created_at_s))


def _find_origin(transaction: Transaction, turn: NewTurn) -> _Origin:
    said, content, finder = turn.transcript, turn.content, _Finder(transaction, turn)
    continued = finder.find("turn_key", said.answer_keys)
    tree = next((found for found in continued if found.stored or not turn.stored), None)
    place = _behind(tree, said.after(tree.turn_key)) if tree else None
    whole = continued[0] if continued else None
    # Turns that were asked alike: whoever shares most with this one.
    alike = finder.find("request_key", said.asked_keys(whole.turn_key if whole else None))
    if alike:
        branch = alike[0]
        # Its first answer was changed. (Where nothing follows, it may be another conversation with equal first words.)
        is_edited = branch.parent_id is None and branch.request_key != said.request_key
        if place is None and is_edited and (branch.stored or not turn.stored):
            place = Place(branch.conversation_id, None, said.messages[turn.preamble :], is_end=False)
        return _Origin(place, _as_parent(branch, branch.prompt_tokens or 0))
    if whole is not None:
        return _Origin(place, _as_parent(whole, _left_behind(whole)))
    # Nobody said it under this root. Under another one?
    for found in finder.find("content_key", content.answer_keys):
        reason = "model_changed" if found.namespace != turn.namespace else "tenant_differs"
        if place is None and (found.stored or not turn.stored):
            place = _behind(found, content.after(found.content_key))
        return _Origin(place, _as_parent(found, _left_behind(found), reason))
    if turn.place is None or turn.place.parent_id is None:
        return _Origin(place, None)
    row = transaction.execute(statements.NAMED, {"turn": turn.place.parent_id}).fetchone()
    named = None if row is None else Found(*row)
    if named is None or named.prompt_tokens is None:
        return _Origin(place, None)
    reason = "model_changed" if named.namespace not in (None, turn.namespace) else ""
    return _Origin(place, _as_parent(named, _left_behind(named), reason))


def _nothing() -> None:
    """For a thread, to tell that it is done with what came before."""


def _behind(turn: Found, new: Sequence[ChatMessage]) -> Place:
    return Place(turn.conversation_id, turn.id, new, is_end=False)


def _as_parent(turn: Found, context_tokens: int, reason: str = "") -> Parent:
    return Parent(turn.id, turn.conversation_id, turn.turn_key, context_tokens, reason)


def _left_behind(turn: Found) -> int:
    return max(0, (turn.prompt_tokens or 0) + (turn.completion_tokens or 0) - 1)


def check_end(latest: Sequence[Any] | None, place: Place) -> None:
    """latest: the row of statements.LATEST. Raises ConversationBusy: the place is not the conversation's end, or a turn
    there is under way.
    """
    if latest is not None and tuple(latest) != (place.parent_id, "done"):
        raise ConversationBusy("another turn of this conversation is under way; try again in a few seconds")


def title_of(messages: Sequence[ChatMessage]) -> str | None:
    """The beginning of the first thing that a user said."""
    said = next((m.content for m in messages if m.role == "user" and m.content.strip()), "")
    return " ".join(said.split())[:_TITLE_LENGTH] or None


def compact(message: ChatMessage) -> dict[str, str]:
    """A message without its empty optional fields."""
    said = {"role": message.role, "content": message.content}
    optional = {"name": message.name, "tool_call_id": message.tool_call_id, "tool_calls": message.tool_calls}
    return said | {key: value for key, value in optional.items() if value}


def _make_file(path: Path) -> URL:
    """A database file that only we may read. Raises ConfigError: the directory cannot be written."""
    try:
        path.touch(mode=0o600)  # the files of its write-ahead log take this mode over
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}", param="data_dir") from error
    return URL.create("sqlite", database=str(path))


def _make_engine(url: URL) -> Engine:
    if url.get_backend_name() != "sqlite":
        # pre_ping: a server that was restarted is met calmly. The limits keep a dead one from holding the worker.
        limits: dict[str, Any] = {}
        if url.get_backend_name() == "postgresql":
            limits = {"connect_timeout": int(_DEADLINE_S), "options": f"-c statement_timeout={int(_DEADLINE_S * 1e3)}"}
        return create_engine(url, pool_size=1, max_overflow=1, pool_pre_ping=True, connect_args=limits)
    engine = create_engine(url, connect_args={"timeout": _LOCK_WAIT_S})

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        # WAL: a reader never blocks us, and a commit is one write. NORMAL: a killed process loses nothing; a machine
        # that loses power may lose the last commits, never the database. secure_delete: what is erased is overwritten.
        # cache_size: KiB of pages in memory, for each connection.
        for pragma in (
            "journal_mode = WAL",
            "synchronous = NORMAL",
            "foreign_keys = ON",
            "secure_delete = ON",
            "cache_size = -2048",
            f"wal_autocheckpoint = {_WAL_PAGES}",
        ):
            connection.execute(f"PRAGMA {pragma}").close()

    return engine


def _check_sqlite(engine: Engine) -> None:
    """Raises ConfigError: a damaged file, told at the start rather than in the middle of some turn."""
    with engine.connect() as connection:
        verdict = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
        if verdict != "ok":
            raise ConfigError(f"the journal at {engine.url!r} is damaged: {verdict}", param="data_dir")


def _reason(error: Exception) -> str:
    """What the database said, in one line and without our statement and its values, which hold conversations."""
    return (str(getattr(error, "orig", None) or error).strip().splitlines() or [type(error).__name__])[0]
