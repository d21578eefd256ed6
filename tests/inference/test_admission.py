"""Admission: memory goes in the gateway's order, to running jobs before new ones; retained contexts give way."""

from __future__ import annotations

import asyncio

import pytest

from inference.admission import Admission
from inference.working_kv import OutOfKv
from tests.inference.harness import run


class Memory:
    """So many free pages, and so many retained ones that may be let go."""

    def __init__(self, free: int, retained: int = 0) -> None:
        self.free = free
        self.retained = retained
        self.is_short = False
        self.entered: list[str] = []
        self.admission = Admission(self._let_go, lambda: self.is_short)

    def _let_go(self) -> bool:
        if not self.retained:
            return False
        self.retained -= 1
        self.free += 1
        return True

    def give(self, pages: int) -> None:
        self.free += pages
        self.admission.wake()

    async def enter(self, name: str, order: int, pages: int) -> None:
        def take() -> str:
            if pages > self.free:
                raise OutOfKv(name)
            self.free -= pages
            return name

        self.entered.append(await self.admission.enter(order, take))


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_large_turn_is_not_overtaken_by_small_ones() -> None:
    async def test() -> None:
        memory = Memory(4)
        tasks = [asyncio.ensure_future(memory.enter("large", 1, 8))]
        tasks += [asyncio.ensure_future(memory.enter(f"small {i}", 2, 1)) for i in range(3)]
        await settle()
        assert memory.entered == []
        memory.give(6)
        await settle()
        assert memory.entered == ["large", "small 0", "small 1"]
        memory.give(1)
        await asyncio.gather(*tasks)
        assert len(memory.admission) == 0

    run(test())


def test_who_is_earlier_in_order_goes_first_whenever_it_came() -> None:
    async def test() -> None:
        memory = Memory(0)
        tasks = [asyncio.ensure_future(memory.enter(str(order), order, 1)) for order in (5, 3, 4)]
        await settle()
        memory.give(1)
        await settle()
        tasks.append(asyncio.ensure_future(memory.enter("1", 1, 1)))
        await settle()
        for _ in range(3):
            memory.give(1)
            await settle()
        await asyncio.gather(*tasks)
        assert memory.entered == ["3", "1", "4", "5"]

    run(test())


def test_retained_contexts_give_way() -> None:
    async def test() -> None:
        memory = Memory(1, retained=5)
        await memory.enter("a", 0, 4)
        assert (memory.free, memory.retained) == (0, 2)

    run(test())


def test_nobody_enters_while_running_jobs_lack_memory() -> None:
    async def test() -> None:
        memory = Memory(4)
        memory.is_short = True
        task = asyncio.ensure_future(memory.enter("a", 0, 1))
        memory.give(1)
        await settle()
        assert memory.entered == []
        memory.is_short = False
        memory.admission.wake()
        await task

    run(test())


def test_who_gives_up_or_fails_holds_up_nobody() -> None:
    async def test() -> None:
        memory = Memory(2)
        first = asyncio.ensure_future(memory.enter("first", 0, 9))
        second = asyncio.ensure_future(memory.enter("second", 1, 2))
        await settle()
        first.cancel()
        await second
        with pytest.raises(ZeroDivisionError):
            await memory.admission.enter(2, lambda: 1 // 0)
        memory.give(1)
        await memory.enter("third", 3, 1)
        assert memory.entered == ["second", "third"]

    run(test())
