"""The conversation journal: what was said survives any crash of any process.

A turn's messages are committed before the turn is queued, and its answer before the client hears `done`; so nothing
acknowledged is lost. Whatever is wrong with the database becomes JournalUnavailable, and then nothing is
acknowledged. One gateway writes one journal.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from sqlalchemy import URL, Engine, create_engine, event, func, make_url, select, update
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session

from gateway.journal.tables import SCHEMA_VERSION, Base, Conversation, Schema, Turn
from protocol.errors import CapacityError, ConfigError, InternalError
from protocol.ids import new_id
from protocol.messages import ChatMessage, TurnUsage

T = TypeVar("T")

_LOCK_WAIT_S = 2.0  # how long SQLite waits for another process that holds the database
_DEADLINE_S = 10.0  # for one piece of work, waiting for the worker included
# SQLite may be built with room for 999 parameters in a statement; more keys than this are asked for in turn.
_KEYS_AT_ONCE = 500


class JournalUnavailable(CapacityError):
    """The database is locked, full, broken or away. Nothing of the request was acknowledged."""

    code = "journal_unavailable"


@dataclass(frozen=True)
class NewTurn:
    """What is known of a turn before it runs."""

    turn_id: bytes
    tenant: bytes
    model: str
    request_key: bytes
    answer_keys: Sequence[bytes]  # turn keys at which the parent may end, the best first
    messages_after: Callable[[bytes | None], Sequence[ChatMessage]]  # the messages new since such a key


@dataclass(frozen=True)
class Parent:
    """The finished turn that a new one continues."""

    turn_id: bytes
    conversation_id: bytes
    turn_key: bytes
    context_tokens: int  # what it left behind: prompt + generated - 1


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


class Journal:
    """Asynchronous outside; inside, one worker thread does all database work, in the order it was asked for.

    Owned by one loop. Every method raises JournalUnavailable.
    """

    def __init__(self, url: URL) -> None:
        """Use Journal.open."""
        self._url = url
        self._engine = _make_engine(url)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="journal")
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
        return journal

    async def begin(self, turn: NewTurn) -> Parent | None:
        """Find the turn that this one continues, and commit the messages that are new since it."""
        return await self._run(self._begin, turn)

    async def finish(self, turn_id: bytes, ending: Ending) -> None:
        """Commit how a turn ended. Changes nothing for one that has ended already and did not end as done."""
        await self._run(self._finish, turn_id, ending)

    def finish_later(self, turn_id: bytes, ending: Ending) -> None:
        """finish without waiting and without an error: for a turn whose `begin` failed, yet may still be committed."""
        late = asyncio.get_running_loop().run_in_executor(self._worker, self._finish, turn_id, ending)
        self._late.add(late)
        late.add_done_callback(self._forget)

    async def count_conversations(self) -> int:
        return await self._run(self._count_conversations)

    async def close(self) -> None:
        """Let the work at hand end, then close the database."""
        done = asyncio.get_running_loop().run_in_executor(self._worker, self._engine.dispose)
        await asyncio.wait({done}, timeout=_DEADLINE_S)
        self._worker.shutdown(wait=False, cancel_futures=True)

    # -- on the worker thread -----------------------------------------------------------------------------

    def _prepare(self) -> None:
        if self._url.get_backend_name() == "sqlite":
            _check_sqlite(self._engine)
        Base.metadata.create_all(self._engine)
        with Session(self._engine) as session, session.begin():
            version = session.scalar(select(Schema.version))
            if version is None:
                session.add(Schema(version=SCHEMA_VERSION))
            elif version != SCHEMA_VERSION:
                raise ConfigError(
                    f"the journal at {self._url!r} has schema version {version}, this program reads {SCHEMA_VERSION}",
                    param="database_url",
                )
            interrupted = {"status": "failed", "error_code": "interrupted", "error": "the gateway was interrupted"}
            session.execute(
                update(Turn).where(Turn.status == "pending").values(**interrupted, finished_at_s=time.time())
            )

    def _begin(self, turn: NewTurn) -> Parent | None:
        now = time.time()
        with Session(self._engine) as session, session.begin():
            parent = _find_parent(session, turn.tenant, turn.answer_keys)
            if parent is None:
                conversation_id = new_id()
                session.add(
                    Conversation(
                        id=conversation_id, tenant=turn.tenant, model=turn.model, created_at_s=now, updated_at_s=now
                    )
                )
                session.flush()
            else:
                conversation_id = parent.conversation_id
                session.execute(update(Conversation).where(Conversation.id == conversation_id).values(updated_at_s=now))
            messages = turn.messages_after(parent.turn_key if parent else None)
            session.add(
                Turn(
                    id=turn.turn_id,
                    conversation_id=conversation_id,
                    parent_id=parent.turn_id if parent else None,
                    tenant=turn.tenant,
                    request_key=turn.request_key,
                    status="pending",
                    messages=[_compact(message) for message in messages],
                    created_at_s=now,
                )
            )
        return parent

    def _finish(self, turn_id: bytes, ending: Ending) -> None:
        usage = ending.usage
        with Session(self._engine) as session, session.begin():
            found = session.scalars(
                update(Turn)
                .where(Turn.id == turn_id, Turn.status == "pending")
                .values(
                    status=ending.status,
                    answer=ending.text,
                    answer_tokens=ending.tokens,
                    turn_key=ending.turn_key,
                    finish_reason=ending.finish_reason,
                    prompt_tokens=usage.prompt_tokens if usage else None,
                    completion_tokens=usage.completion_tokens if usage else None,
                    usage=asdict(usage) if usage else None,
                    error_code=ending.error_code,
                    error=ending.error,
                    finished_at_s=time.time(),
                )
                .returning(Turn.id)
            ).all()
            if not found and ending.status == "done":
                raise JournalUnavailable("the journal has lost a turn that is running; was its database replaced?")

    def _count_conversations(self) -> int:
        with Session(self._engine) as session:
            return session.scalar(select(func.count()).select_from(Conversation)) or 0

    # -- between the loop and the worker -----------------------------------------------------------------------

    async def _run(self, work: Callable[..., T], *args: Any) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await asyncio.wait_for(loop.run_in_executor(self._worker, work, *args), _DEADLINE_S)
        except TimeoutError as error:
            raise JournalUnavailable(f"the journal did not answer in {_DEADLINE_S:g} s") from error
        except SQLAlchemyError as error:
            raise JournalUnavailable(f"the journal cannot be used now: {_reason(error)}") from error
        except RuntimeError as error:
            raise InternalError(f"journal: {error}") from error

    def _forget(self, late: asyncio.Future[None]) -> None:
        self._late.discard(late)
        if not late.cancelled():
            late.exception()  # the failure that matters was told when begin failed


def _find_parent(session: Session, tenant: bytes, answer_keys: Sequence[bytes]) -> Parent | None:
    """The done turn with the first of `answer_keys` that any has; of several with equal text, the newest."""
    for start in range(0, len(answer_keys), _KEYS_AT_ONCE):
        keys = answer_keys[start : start + _KEYS_AT_ONCE]
        rows = session.execute(
            select(Turn.id, Turn.conversation_id, Turn.turn_key, Turn.prompt_tokens, Turn.completion_tokens)
            .where(Turn.turn_key.in_(keys), Turn.status == "done", Turn.tenant == tenant)
            .order_by(Turn.created_at_s)
        ).all()
        newest = {row.turn_key: row for row in rows}
        for key in keys:
            if key in newest:
                row = newest[key]
                return Parent(row.id, row.conversation_id, key, row.prompt_tokens + row.completion_tokens - 1)
    return None


def _compact(message: ChatMessage) -> dict[str, str]:
    """A message without its empty optional fields."""
    return {key: value for key, value in asdict(message).items() if value or key in ("role", "content")}


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
        return create_engine(url, pool_size=1, max_overflow=0, pool_pre_ping=True, connect_args=limits)
    engine = create_engine(url, connect_args={"timeout": _LOCK_WAIT_S})

    @event.listens_for(engine, "connect")
    def configure(connection: Any, _: Any) -> None:
        # WAL: a reader never blocks us, and a commit is one write. NORMAL: a killed process loses nothing; a machine
        # that loses power may lose the last commits, never the database.
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}").close()

    return engine


def _check_sqlite(engine: Engine) -> None:
    """Raises ConfigError: a damaged file, told at the start rather than in the middle of some turn."""
    with engine.connect() as connection:
        verdict = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
        if verdict != "ok":
            raise ConfigError(f"the journal at {engine.url!r} is damaged: {verdict}", param="data_dir")


def _reason(error: SQLAlchemyError) -> str:
    """What the database said, in one line and without our statement and its values, which hold conversations."""
    return (str(getattr(error, "orig", None) or error).strip().splitlines() or [type(error).__name__])[0]
