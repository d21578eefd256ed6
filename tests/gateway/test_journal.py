"""The journal on SQLite and on PostgreSQL: what it finds, what it keeps, and how it fails."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, select, text
from sqlalchemy.orm import Session

from gateway.conversation import Transcript, answer_key
from gateway.journal.journal import Ending, Journal, JournalUnavailable, NewTurn, Parent
from gateway.journal.tables import Turn
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


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/journal.sqlite"
        return
    address: str = request.getfixturevalue("postgres")
    yield address
    engine = create_engine(address)
    with engine.begin() as connection:
        connection.execute(text("drop table turns, conversations, schema_version"))
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
    return NewTurn(new_id(), tenant, "m", asked.request_key, asked.answer_keys, asked.after)


def done(asked: Transcript, answer: str, prompt: int = 10, completion: int = 5) -> Ending:
    usage = TurnUsage(prompt, completion, computed=prompt - 1, missed={"evicted": 1})
    return Ending("done", answer, pack_tokens([1, 2]), answer_key(asked.request_key, answer), "stop", usage)


async def say(journal: Journal, answer: str, *texts: str) -> Parent | None:
    asked = transcript(*texts)
    turn = new_turn(asked)
    parent = await journal.begin(turn)
    await journal.finish(turn.turn_id, done(asked, answer))
    return parent


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
        longest = await journal.begin(new_turn(transcript("a", "b", "c", "d", "e")))
        shorter = await journal.begin(new_turn(transcript("a", "b", "c", "other", "e")))
        assert longest is not None
        assert shorter is not None
        assert longest.turn_key == transcript("a", "b", "c", "d").request_key
        assert shorter.turn_id == first.turn_id
        assert longest.conversation_id == shorter.conversation_id
        assert await journal.begin(new_turn(transcript("a", "other", "c"))) is None
        ends_with_answer = await journal.begin(new_turn(transcript("a", "b")))
        assert ends_with_answer is not None

    with_journal(url, work)
    assert rows(url)[-1].messages == []


def test_another_tenants_turn_is_not_found(url: str) -> None:
    async def work(journal: Journal) -> None:
        await say(journal, "b", "a")
        assert await journal.begin(new_turn(transcript("a", "b", "c"), tenant=b"t" * 16)) is None

    with_journal(url, work)


def test_only_done_turns_are_continued(url: str) -> None:
    async def work(journal: Journal) -> None:
        for status in ("failed", "cancelled"):
            asked = transcript(status)
            turn = new_turn(asked)
            await journal.begin(turn)
            await journal.finish(turn.turn_id, Ending(status, "part", pack_tokens([7]), error_code="x", error="y\x00"))
            assert await journal.begin(new_turn(transcript(status, "part", "more"))) is None

    with_journal(url, work)
    failed = rows(url)[0]
    assert (failed.status, failed.answer, failed.error_code, failed.error) == ("failed", "part", "x", "y\x00")


def test_of_equal_answers_the_newest_is_the_parent(url: str) -> None:
    async def work(journal: Journal) -> None:
        await say(journal, "b", "a")
        await say(journal, "b", "a")
        parent = await journal.begin(new_turn(transcript("a", "b", "c")))
        assert parent is not None
        assert parent.turn_id == rows(url)[1].id

    with_journal(url, work)


def test_a_long_history_is_searched_from_its_end(url: str) -> None:
    async def work(journal: Journal) -> None:
        await say(journal, "b", "a")
        texts = ["a", "b", *("x" for _ in range(2 * 1100 - 1))]
        parent = await journal.begin(new_turn(transcript(*texts)))
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
        connection.execute(text("update schema_version set version = 99"))
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
        assert await journal.begin(new_turn(transcript("b"))) is None

    with_journal(url, work)
    assert [row.messages[0]["content"] for row in rows(url)] == ["b"]


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
