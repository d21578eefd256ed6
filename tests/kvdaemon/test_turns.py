"""Turns: order of pieces on the database thread."""

from __future__ import annotations

import asyncio

import pytest

from kvdaemon.ssd.turns import BACKGROUND, URGENT, Turns


async def _queue(turns: Turns, asked: list[tuple[str, int]]) -> list[str]:
    """Hold the turn while `asked` queue up, then let go. Returns the order in which they had it."""
    served: list[str] = []

    async def work(name: str, urgency: int) -> None:
        async with turns.turn(urgency):
            served.append(name)
            await asyncio.sleep(0)

    async with turns.turn(URGENT):
        tasks = []
        for name, urgency in asked:
            tasks.append(asyncio.ensure_future(work(name, urgency)))
            await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    return served


def test_reads_before_writes_each_in_order() -> None:
    asked = [("w1", BACKGROUND), ("r1", URGENT), ("w2", BACKGROUND), ("r2", URGENT)]
    assert asyncio.run(_queue(Turns(), asked)) == ["r1", "r2", "w1", "w2"]


def test_a_write_is_not_starved() -> None:
    """Out of patience, the one who waits longest is next, whatever it is."""
    asked = [("w1", BACKGROUND), ("r1", URGENT)]
    assert asyncio.run(_queue(Turns(patience_s=-1.0), asked)) == ["w1", "r1"]


def test_pieces_of_the_older_request_go_first() -> None:
    """A read's second piece does not queue behind a later read."""

    async def main() -> list[str]:
        turns = Turns()
        served: list[str] = []

        async def read(name: str, pieces: int) -> None:
            order = turns.order()
            for _ in range(pieces):
                async with turns.turn(URGENT, order):
                    served.append(name)
                    await asyncio.sleep(0)

        await asyncio.gather(read("old", 3), read("new", 2))
        return served

    assert asyncio.run(main()) == ["old", "old", "old", "new", "new"]


def test_a_cancelled_waiter_loses_nothing() -> None:
    """Cancelled while it waits, or at the very moment it is given the turn: the turn goes on."""

    async def main() -> None:
        turns = Turns()
        async with turns.turn(URGENT):
            waiter = asyncio.ensure_future(turns.turn(URGENT).__aenter__())
            given = asyncio.ensure_future(turns.turn(URGENT).__aenter__())
            await asyncio.sleep(0)
            waiter.cancel()
            await asyncio.sleep(0)
        given.cancel()  # the turn was handed to it when the block above ended
        for task in (waiter, given):
            with pytest.raises(asyncio.CancelledError):
                await task
        async with asyncio.timeout(1.0), turns.turn(BACKGROUND):
            pass

    asyncio.run(main())
