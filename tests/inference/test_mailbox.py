"""The mailbox: everything arrives, in order, at once or together, from whichever thread it comes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

from inference.mailbox import Mailbox

_FOREVER_S = 60.0  # longer than a test may take
_SOON_S = 5.0


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 4 * _SOON_S))


async def taken(queue: asyncio.Queue[int], count: int) -> list[int]:
    async with asyncio.timeout(_SOON_S):
        return [await queue.get() for _ in range(count)]


def test_the_first_goes_at_once_and_what_follows_waits_for_an_urgent_one() -> None:
    async def check() -> None:
        mailbox, queue = Mailbox(asyncio.get_running_loop(), _FOREVER_S), asyncio.Queue[int]()
        mailbox.put(queue, 1, urgent=False)
        assert await taken(queue, 1) == [1]
        mailbox.put(queue, 2, urgent=False)
        mailbox.put(queue, 3, urgent=False)
        await asyncio.sleep(0.05)
        assert queue.empty()
        mailbox.put(queue, 4, urgent=True)
        assert await taken(queue, 3) == [2, 3, 4]

    run(check())


def test_what_nothing_follows_is_delivered_a_little_later() -> None:
    async def check() -> None:
        interval_s = 0.1
        loop = asyncio.get_running_loop()
        mailbox, queue = Mailbox(loop, interval_s), asyncio.Queue[int]()
        for first in (1, 4):  # the second time after a silence
            begun_s = loop.time()
            for number in (first, first + 1, first + 2):
                mailbox.put(queue, number, urgent=False)
                if number == first:
                    assert await taken(queue, 1) == [first]
            assert await taken(queue, 2) == [first + 1, first + 2]
            assert loop.time() - begun_s >= interval_s
            await asyncio.sleep(2 * interval_s)

    run(check())


def test_without_an_interval_nothing_waits() -> None:
    async def check() -> None:
        mailbox, queue = Mailbox(asyncio.get_running_loop(), 0.0), asyncio.Queue[int]()
        for number in range(3):
            mailbox.put(queue, number, urgent=False)
            assert await taken(queue, 1) == [number]

    run(check())


def test_nothing_is_lost_or_out_of_order_from_many_threads() -> None:
    """Threads put as fast as they can, now and then urgently, while the interval ends again and again."""

    async def check() -> None:
        mailbox = Mailbox(asyncio.get_running_loop(), 0.001)
        queues = [asyncio.Queue[int]() for _ in range(4)]

        def put_all(queue: asyncio.Queue[int]) -> None:
            for number in range(3000):
                mailbox.put(queue, number, urgent=number % 97 == 0)

        threads = [threading.Thread(target=put_all, args=(queue,)) for queue in queues]
        for thread in threads:
            thread.start()
        for queue in queues:
            assert await taken(queue, 3000) == list(range(3000))
        for thread in threads:
            thread.join(_SOON_S)
            assert not thread.is_alive()

    run(check())
