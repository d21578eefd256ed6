"""The journal on SQLite and on PostgreSQL: what it finds, what it keeps, and how it fails."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect, select, text
from sqlalchemy.orm import Session

import gateway.journal.journal
from gateway.conversation import Transcript, answer_key, content_root
from gateway.journal.conversations import Changes, Conversations, NotFound
from gateway.journal.journal import Ending, Journal, JournalUnavailable, NewTurn, Parent
from gateway.journal.tables import Base, Turn
from protocol.errors import ConfigError
from protocol.ids import new_id, pack_tokens
from protocol.messages import ChatMessage, TurnUsage
from tests.gateway.postgres import postgres_url

TENANT = bytes(16)
ROOT = b"r" * 16


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with postgres_url() as url:
        yield url


@pytest.fixture
def empty_postgres(postgres: str) -> Iterator[str]:
    """For one test; afterwards its tables are gone."""
    yield postgres
    engine = create_engine(postgres)
    with engine.begin() as connection:
        connection.execute(text("drop table if exists turns, conversations, schema_version, alembic_version"))
    engine.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/journal.sqlite"
        return
    yield request.getfixturevalue("empty_postgres")


# As `create_all` made them before there were migrations.
BEFORE_ALEMBIC = """
CREATE TABLE conversations (
    id BLOB NOT NULL, tenant BLOB NOT NULL, model TEXT NOT NULL, created_at_s FLOAT NOT NULL,
    updated_at_s FLOAT NOT NULL, PRIMARY KEY (id));
CREATE INDEX ix_conversations_tenant ON conversations (tenant);
CREATE TABLE schema_version (version INTEGER NOT NULL, PRIMARY KEY (version));
CREATE TABLE turns (
    id BLOB NOT NULL, conversation_id BLOB NOT NULL, parent_id BLOB, tenant BLOB NOT NULL, request_key BLOB NOT NULL,
    turn_key BLOB, status VARCHAR(16) NOT NULL, messages TEXT NOT NULL, answer TEXT, answer_tokens BLOB,
    finish_reason VARCHAR(16), prompt_tokens BIGINT, completion_tokens BIGINT, usage TEXT, error_code VARCHAR(64),
    error TEXT, created_at_s FLOAT NOT NULL, finished_at_s FLOAT, PRIMARY KEY (id),
    CONSTRAINT status CHECK (status in ('pending', 'done', 'failed', 'cancelled')),
    CONSTRAINT done_has_key CHECK ((status = 'done') = (turn_key is not null)),
    FOREIGN KEY(conversation_id) REFERENCES conversations (id), FOREIGN KEY(parent_id) REFERENCES turns (id));
CREATE INDEX turns_by_key ON turns (turn_key);
CREATE INDEX ix_turns_parent_id ON turns (parent_id);
CREATE INDEX ix_turns_conversation_id ON turns (conversation_id);
CREATE INDEX turns_by_status ON turns (status);
INSERT INTO schema_version (version) VALUES (1);
"""


def make_before_alembic(url: str) -> None:
    """A database of the first schema with one conversation of one turn: "a", answered by "b"."""
    engine = create_engine(url)
    asked = transcript("a")
    turn = {
        "id": new_id(),
        "conversation": new_id(),
        "tenant": TENANT,
        "asked": asked.request_key,
        "key": answer_key(asked.request_key, "b"),
    }
    with engine.begin() as connection:
        for statement in BEFORE_ALEMBIC.split(";"):
            if statement.strip():
                as_there = statement if engine.dialect.name == "sqlite" else statement.replace("BLOB", "BYTEA")
                connection.execute(text(as_there))
        connection.execute(text("insert into conversations values (:conversation, :tenant, 'm', 1.0, 2.0)"), turn)
        connection.execute(
            text(
                "insert into turns (id, conversation_id, tenant, request_key, turn_key, status, messages, answer,"
                " prompt_tokens, completion_tokens, usage, created_at_s) values (:id, :conversation, :tenant, :asked,"
                " :key, 'done', :messages, :answer, 10, 5, :usage, 1.0)"
            ),
            turn
            | {
                "messages": '[{"role":"user","content":"a"}]',
                "answer": '"b"',
                "usage": '{"prompt_tokens":10,"completion_tokens":5,"computed":10,"missed":{}}',
            },
        )
    engine.dispose()


def with_journal(url: str, work: Callable[[Journal], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        journal = await Journal.open(url, Path("/nonexistent"))
        try:
            await work(journal)
        finally:
            await journal.close()

    asyncio.run(main())


def rows(url: str) -> list[Turn]:
    engine = create_engine(url)
    try:
        with Session(engine) as session:
            return list(session.scalars(select(Turn).order_by(Turn.created_at_s)).all())
    finally:
        engine.dispose()


def transcript(*texts: str) -> Transcript:
    return Transcript(ROOT, tuple(ChatMessage(("user", "assistant")[i % 2], said) for i, said in enumerate(texts)))


def new_turn(asked: Transcript, tenant: bytes = TENANT) -> NewTurn:
    return NewTurn(new_id(), tenant, "m", asked, Transcript(content_root(tenant), asked.messages))


def done(asked: Transcript, answer: str, prompt: int = 10, completion: int = 5) -> Ending:
    usage = TurnUsage(prompt, completion, computed=prompt - 1, missed={"evicted": 1})
    content = Transcript(content_root(TENANT), asked.messages)
    return Ending(
        "done",
        answer,
        pack_tokens([1, 2]),
        answer_key(asked.request_key, answer),
        "stop",
        usage,
        content_key=answer_key(content.request_key, answer),
    )


async def say(journal: Journal, answer: str, *texts: str) -> Parent | None:
    asked = transcript(*texts)
    turn = new_turn(asked)
    begun = await journal.begin(turn)
    await journal.finish(turn.turn_id, done(asked, answer))
    return begun.parent


def test_a_turn_is_kept_whole(url: str) -> None:
    """NUL and half surrogate pairs too: no database may be the reason to lose a turn."""
    odd = "nul \x00, half \ud800, ✓ 'quote' %s"

    async def work(journal: Journal) -> None:
        assert await say(journal, odd, odd) is None
        assert await journal.count_conversations() == 1

    with_journal(url, work)
    (row,) = rows(url)
    assert row.messages == [{"role": "user", "content": odd}]
    assert (row.answer, row.status, row.finish_reason) == (odd, "done", "stop")
    assert row.answer_tokens == pack_tokens([1, 2])
    assert (row.prompt_tokens, row.completion_tokens, row.usage["missed"]) == (10, 5, {"evicted": 1})
    assert row.finished_at_s is not None
    assert row.created_at_s <= row.finished_at_s


def test_finds_the_longest_known_prefix(url: str) -> None:
    async def work(journal: Journal) -> None:
        await say(journal, "b", "a")
        first = await say(journal, "d", "a", "b", "c")
        assert first is not None
        assert first.context_tokens == 14
        longest = (await journal.begin(new_turn(transcript("a", "b", "c", "d", "e")))).parent
        shorter = (await journal.begin(new_turn(transcript("a", "b", "other", "d", "e")))).parent
        assert longest is not None
        assert shorter is not None
        assert longest.turn_key == transcript("a", "b", "c", "d").request_key
        assert shorter.turn_id == first.turn_id
        assert longest.conversation_id == shorter.conversation_id
        assert (await journal.begin(new_turn(transcript("other", "b", "c")))).parent is None
        ends_with_answer = (await journal.begin(new_turn(transcript("a", "b")))).parent
        assert ends_with_answer is not None

    with_journal(url, work)
    assert rows(url)[-1].messages == []


def test_another_tenants_turn_is_not_found(url: str) -> None:
    async def work(journal: Journal) -> None:
        await say(journal, "b", "a")
        assert (await journal.begin(new_turn(transcript("a", "b", "c"), tenant=b"t" * 16))).parent is None

    with_journal(url, work)


def test_only_done_turns_are_continued(url: str) -> None:
    async def work(journal: Journal) -> None:
        for status in ("failed", "cancelled"):
            asked = transcript(status)
            turn = new_turn(asked)
            await journal.begin(turn)
            await journal.finish(turn.turn_id, Ending(status, "part", pack_tokens([7]), error_code="x", error="y\x00"))
            assert (await journal.begin(new_turn(transcript(status, "part", "more")))).parent is None

    with_journal(url, work)
    failed = rows(url)[0]
    assert (failed.status, failed.answer, failed.error_code, failed.error) == ("failed", "part", "x", "y\x00")


def test_of_equal_answers_the_newest_is_the_parent(url: str) -> None:
    async def work(journal: Journal) -> None:
        await say(journal, "b", "a")
        await say(journal, "b", "a")
        parent = (await journal.begin(new_turn(transcript("a", "b", "c")))).parent
        assert parent is not None
        assert parent.turn_id == rows(url)[1].id

    with_journal(url, work)


def test_a_long_history_is_searched_from_its_end(url: str) -> None:
    async def work(journal: Journal) -> None:
        await say(journal, "b", "a")
        texts = ["a", "b", *("x" for _ in range(2 * 1100 - 1))]
        parent = (await journal.begin(new_turn(transcript(*texts)))).parent
        assert parent is not None
        assert parent.turn_key == transcript("a", "b").request_key

    with_journal(url, work)


def test_a_start_fails_what_a_crash_left(url: str) -> None:
    asked = transcript("a")

    async def crash(journal: Journal) -> None:
        await journal.begin(new_turn(asked))

    async def after(journal: Journal) -> None:
        (row,) = rows(url)
        assert (row.status, row.error_code) == ("failed", "interrupted")
        with pytest.raises(JournalUnavailable):  # whoever still held it cannot end it any more
            await journal.finish(row.id, done(asked, "late"))
        assert rows(url)[0].status == "failed"

    with_journal(url, crash)
    with_journal(url, after)


def test_an_end_is_final(url: str) -> None:
    async def work(journal: Journal) -> None:
        asked = transcript("a")
        turn = new_turn(asked)
        await journal.begin(turn)
        await journal.finish(turn.turn_id, done(asked, "b"))
        await journal.finish(turn.turn_id, Ending("cancelled", "", b""))
        journal.finish_later(new_id(), Ending("failed", "", b""))  # of a turn that was never begun

    with_journal(url, work)
    assert [row.status for row in rows(url)] == ["done"]


def test_another_schema_version_is_refused(url: str) -> None:
    async def nothing(journal: Journal) -> None:
        pass

    with_journal(url, nothing)
    engine = create_engine(url)
    with engine.begin() as connection:
        connection.execute(text("update alembic_version set version_num = '99'"))
    engine.dispose()
    with pytest.raises(ConfigError, match="99"):
        with_journal(url, nothing)


def test_a_locked_database_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/journal.sqlite"

    async def work(journal: Journal) -> None:
        other = sqlite3.connect(tmp_path / "journal.sqlite", isolation_level=None)
        other.execute("begin immediate")
        with pytest.raises(JournalUnavailable, match="locked"):
            await journal.begin(new_turn(transcript("a")))
        other.execute("rollback")
        other.close()
        assert (await journal.begin(new_turn(transcript("b")))).is_new

    with_journal(url, work)
    assert [row.messages[0]["content"] for row in rows(url)] == ["b"]


def test_a_server_that_drops_connections_costs_the_turn_under_way_at_most(
    empty_postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two turns nobody notices; in the middle of one, that one fails and the next one does not."""
    find = gateway.journal.journal._find_origin

    def drop() -> None:
        engine = create_engine(empty_postgres)
        with engine.begin() as connection:
            connection.execute(
                text("select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()")
            )
        engine.dispose()

    def find_and_drop(*arguments: Any) -> Any:
        found = find(*arguments)
        drop()
        return found

    async def check(journal: Journal) -> None:
        await say(journal, "b", "a")
        drop()
        assert await say(journal, "d", "a", "b", "c") is not None
        with monkeypatch.context() as patched:
            patched.setattr(gateway.journal.journal, "_find_origin", find_and_drop)
            with pytest.raises(JournalUnavailable):
                await say(journal, "f", "a", "b", "c", "d", "e")
        assert await say(journal, "f", "a", "b", "c", "d", "e") is not None

    with_journal(empty_postgres, check)
    assert [turn.answer for turn in rows(empty_postgres)] == ["b", "d", "f"]


def test_a_full_database_is_an_error(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/journal.sqlite"

    async def work(journal: Journal) -> None:
        await say(journal, "b", "a")
        with journal._engine.connect() as connection:
            pages = connection.exec_driver_sql("pragma page_count").scalar()
            connection.exec_driver_sql(f"pragma max_page_count = {pages}")
        with pytest.raises(JournalUnavailable, match="full"):
            await journal.begin(new_turn(transcript("x" * 1_000_000)))

    with_journal(url, work)
    assert len(rows(url)) == 1


@pytest.mark.parametrize("damage", ["garbage", "truncated", "torn"])
def test_a_damaged_database_stops_the_start(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "journal.sqlite"

    async def fill(journal: Journal) -> None:
        for number in range(30):
            await say(journal, "b" * 3000, f"a{number}")

    async def nothing(journal: Journal) -> None:
        pass

    with_journal(f"sqlite:///{path}", fill)
    whole = path.read_bytes()
    assert len(whole) > 100_000
    middle = len(whole) // 2
    path.write_bytes(
        {
            "garbage": b"this is no database " * 1000,
            "truncated": whole[:middle],
            "torn": whole[:20_000] + b"\xa5" * 40_000 + whole[60_000:],
        }[damage]
    )
    with pytest.raises(ConfigError, match="journal"):
        with_journal(f"sqlite:///{path}", nothing)


def test_impossible_urls_stop_the_start(tmp_path: Path) -> None:
    for url in ("nonsense", "nodb://x", f"sqlite:////{tmp_path}/none/journal.sqlite"):
        with pytest.raises(ConfigError) as caught:
            asyncio.run(Journal.open(url, tmp_path))
        assert caught.value.param == "database_url"


def test_the_default_is_a_private_file(tmp_path: Path) -> None:
    async def main() -> None:
        journal = await Journal.open(None, tmp_path)
        await say(journal, "b", "a")
        for name in ("journal.sqlite", "journal.sqlite-wal"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
        await journal.close()

    asyncio.run(main())


def test_an_error_does_not_tell_what_was_said(tmp_path: Path) -> None:
    async def work(journal: Journal) -> None:
        await say(journal, "b", "a")
        with journal._engine.begin() as connection:
            connection.exec_driver_sql("drop table turns")
        with pytest.raises(JournalUnavailable) as caught:
            await journal.begin(new_turn(transcript("a secret")))
        assert "secret" not in caught.value.message

    with_journal(f"sqlite:///{tmp_path}/journal.sqlite", work)


def test_no_turn_is_looked_at_but_those_it_asks_for(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a turn's beginning and end ask for is found by an index: they take as long in a large journal."""
    asked: list[tuple[str, Any]] = []

    async def work(journal: Journal) -> None:
        prepare = journal._driver.prepare

        def note(*given: Any) -> tuple[str, Any]:
            asked.append(prepare(*given))
            return asked[-1]

        monkeypatch.setattr(journal._driver, "prepare", note)
        await say(journal, "b", "a")
        await say(journal, "d", "a", "b", "c")
        await say(journal, "f", *"xyxyxyxyxyxyxyxyxyxyz")

    with_journal(url, work)
    engine = create_engine(url)
    with engine.connect() as connection:
        is_sqlite = engine.dialect.name == "sqlite"
        if not is_sqlite:  # which scans small tables whatever indexes they have
            connection.execute(text("set enable_seqscan = off"))
        for statement, parameters in asked:
            explain = "EXPLAIN QUERY PLAN" if is_sqlite else "EXPLAIN"
            plan = str(connection.exec_driver_sql(f"{explain} {statement}", parameters).all())
            assert "SCAN turns" not in plan, (statement, plan)
            assert "(status=" not in plan, (statement, plan)  # SQLite takes that for better than a few keys
            assert "Seq Scan" not in plan, (statement, plan)
    engine.dispose()
    assert sum("request_key" in statement for statement, _ in asked) > 6


# -- migrations ------------------------------------------------------------------------------------------------


def test_a_database_from_before_migrations_is_upgraded(url: str) -> None:
    """What was said is still there, is continued, and has a title."""
    make_before_alembic(url)

    async def work(journal: Journal) -> None:
        parent = await say(journal, "d", "a", "b", "c")
        assert parent is not None
        conversations = Conversations(journal)
        found, more = await conversations.list(TENANT, 10)
        assert [(one.conversation.title, one.turns, more) for one in found] == [("a", 2, False)]
        history = await conversations.history(TENANT, parent.conversation_id)
        assert [message.content for message in history.messages] == ["a", "b", "c", "d"]

    with_journal(url, work)
    engine = create_engine(url)
    assert not inspect(engine).has_table("schema_version")
    engine.dispose()


@pytest.mark.parametrize("is_old", [False, True])
def test_migrations_make_what_the_program_reads(url: str, is_old: bool) -> None:
    async def nothing(journal: Journal) -> None:
        pass

    if is_old:
        make_before_alembic(url)
    with_journal(url, nothing)
    engine = create_engine(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": False})
        assert compare_metadata(context, Base.metadata) == []
        assert context.get_current_revision() == "0003"
    engine.dispose()


def test_an_upgrade_that_fails_changes_nothing(url: str) -> None:
    """A later start finds the database as it was, and can do it."""

    async def nothing(journal: Journal) -> None:
        pass

    make_before_alembic(url)
    engine = create_engine(url)
    with engine.begin() as connection:  # a name that the last step of the migration needs
        connection.execute(text("create index turns_by_content_key on turns (error_code)"))
    with pytest.raises(ConfigError, match="turns_by_content_key"):
        with_journal(url, nothing)
    assert "title" not in [column["name"] for column in inspect(engine).get_columns("conversations")]
    assert inspect(engine).has_table("schema_version")
    assert not inspect(engine).has_table("alembic_version")
    with engine.begin() as connection:
        connection.execute(text("drop index turns_by_content_key"))
    engine.dispose()
    with_journal(url, nothing)


# -- branches --------------------------------------------------------------------------------------------------


def test_a_question_asked_again_shares_its_whole_prompt(url: str) -> None:
    """It continues the turn before, and begins with the context of its sibling."""

    async def work(journal: Journal) -> None:
        await say(journal, "b", "a")
        await say(journal, "d", "a", "b", "c")
        again = await journal.begin(new_turn(transcript("a", "b", "c")))
        assert again.parent is not None
        assert again.parent.turn_id == rows(url)[1].id
        assert again.parent.context_tokens == 10  # its prompt, none of its answer
        assert rows(url)[2].parent_id == rows(url)[0].id

    with_journal(url, work)


def test_an_answer_without_its_reasoning_makes_a_branch(url: str) -> None:
    async def work(journal: Journal) -> None:
        await say(journal, "<think>hm</think>b", "a")
        await say(journal, "d", "a", "<think>hm</think>b", "c")
        first = await say(journal, "d2", "a", "b", "c")
        assert first is not None
        one, two, stripped = rows(url)
        assert (stripped.conversation_id, stripped.parent_id, len(stripped.messages)) == (one.conversation_id, None, 3)
        assert (first.turn_id, first.context_tokens) == (one.id, 10)
        second = await say(journal, "f", "a", "b", "c", "d2", "e")
        assert second is not None
        assert rows(url)[3].parent_id == second.turn_id == stripped.id
        assert two.parent_id == one.id

    with_journal(url, work)


def test_equal_first_words_are_two_conversations(url: str) -> None:
    async def work(journal: Journal) -> None:
        await say(journal, "b", "a")
        again = await journal.begin(new_turn(transcript("a")))
        assert again.is_new
        assert again.parent is not None

    with_journal(url, work)


@pytest.mark.parametrize(("namespace", "reason"), [(b"n" * 16, "model_changed"), (bytes(16), "tenant_differs")])
def test_why_a_known_conversation_has_no_context(url: str, namespace: bytes, reason: str) -> None:
    """Under another root its words are known and its turn keys are not: another model, or another salt."""

    async def work(journal: Journal) -> None:
        await say(journal, "b", "a")
        asked = Transcript(b"x" * 16, transcript("a", "b", "c").messages)
        begun = await journal.begin(replace(new_turn(asked), namespace=namespace))
        assert begun.parent is not None
        assert (begun.parent.reason, begun.parent.context_tokens) == (reason, 14)
        one, two = rows(url)
        assert (two.conversation_id, two.parent_id, len(two.messages)) == (one.conversation_id, one.id, 1)

    with_journal(url, work)


# -- conversations ---------------------------------------------------------------------------------------------


def test_conversations_on_either_database(url: str) -> None:
    """What the routes do is tested over HTTP, on SQLite; here the same statements run on both."""

    async def work(journal: Journal) -> None:
        conversations = Conversations(journal)
        made = [await conversations.create(TENANT, "m", {"n": str(n)}, ()) for n in range(3)]
        ids = [one.conversation.id for one in made]
        first, more = await conversations.list(TENANT, 2)
        assert more
        rest, more = await conversations.list(TENANT, 2, first[-1].conversation.id)
        assert not more
        assert [one.conversation.id for one in (*first, *rest)] == ids[::-1]
        await say(journal, "b", "a")
        turn = rows(url)[0]
        fork = await conversations.fork(TENANT, turn.conversation_id, None, None)
        assert (fork.turns, fork.tokens, fork.conversation.title) == (1, 15, "a")
        assert await conversations.erasable(TENANT, turn.conversation_id) == ([], [turn.turn_key])
        changed = await conversations.change(TENANT, ids[0], Changes(pinned=True, ttl_s=5.0))
        assert changed.conversation.pinned
        await conversations.change(TENANT, ids[1], Changes(ttl_s=5.0))
        now = changed.conversation.updated_at_s
        assert await conversations.expired(now + 100) == [(TENANT, ids[1])]
        added = await conversations.add(TENANT, turn.conversation_id, [ChatMessage("user", "note")])
        assert added.parent_id == turn.id
        await conversations.delete_turn(TENANT, added.id)
        assert await conversations.delete(TENANT, turn.conversation_id) == 1
        assert bool(await conversations.vacuum()) == url.startswith("postgresql")
        assert await conversations.erasable(TENANT, fork.conversation.id) == ([turn.turn_key], [])
        with pytest.raises(NotFound):
            await conversations.get(b"t" * 16, ids[0])

    with_journal(url, work)
