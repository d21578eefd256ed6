"""Conversations lie in the journal: the gateway's memory does not grow with their number."""

from __future__ import annotations

import asyncio
import gc
import sys
from pathlib import Path

import httpx
import pytest

import gateway.turns
from tests.gateway.inference_peer import MODEL
from tests.gateway.serving import ServedGateway, talk

_BATCH = 100


async def drop_cancelled_timers() -> None:
    """The loop does so when there are many."""
    loop = asyncio.get_running_loop()
    for _ in range(2000):
        loop.call_later(60, gc.collect).cancel()
    await asyncio.sleep(0)
    await asyncio.sleep(0)


def test_an_idle_conversation_takes_no_memory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one block of Python's memory stays for each of 500 conversations, once what is bounded is full.

    A hundred more or less come and go by themselves, so of three batches the lowest number counts.
    """
    monkeypatch.setattr(gateway.turns, "_REMEMBERED", 16)
    served, blocks = ServedGateway(directory), []
    try:
        with httpx.Client(timeout=30.0) as client:
            for batch in range(10):
                for number in range(_BATCH):
                    asked = {"model": MODEL, "messages": talk(f"{batch} {number}"), "stream": number % 2 == 0}
                    client.post(f"{served.url}/v1/chat/completions", json=asked).raise_for_status()
                served.peer.turns.clear()
                served.daemon.orders.clear()
                served.call(drop_cancelled_timers())
                gc.collect()
                blocks.append(sys.getallocatedblocks())
    finally:
        served.close()
    before, after = min(blocks[2:5]), min(blocks[7:10])
    assert after - before < 5 * _BATCH / 2, blocks
