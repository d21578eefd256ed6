"""Somebody is typing: their context comes into DRAM before their turn does. And what is told of contexts and losses."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from protocol.arena import Geometry
from protocol.ids import new_id
from protocol.messages import Ack, Anticipate, DescribeTurns, TurnPlace, TurnsDescribed
from tests.kvdaemon.client import StoreClient, eventually, make_chain, running_daemon, written_behind

_GEOMETRY = Geometry(layers=2, key_bytes=512, value_bytes=512, chunk_tokens=32)  # 64 KiB a chunk
_CHUNK = _GEOMETRY.slot_bytes
_DRAM = 16 * (_CHUNK + 4096)
_LENGTH = 4  # chunks of a context


async def describe(client: StoreClient, *turn_keys: bytes) -> tuple[list[TurnPlace], TurnsDescribed]:
    found = await client.rpc.request(DescribeTurns(turn_keys), TurnsDescribed, 5.0)
    return [TurnPlace(*turn) for turn in found.turns], found


def test_an_anticipated_context_comes_into_dram(tmp_path: Path) -> None:
    """A hint alone fetches nothing; with `fetch` all of it comes, and its turn then finds it there."""

    async def main() -> None:
        client = await StoreClient(daemon.run_dir, _GEOMETRY).start()
        chain, turn_key = make_chain(_GEOMETRY, _LENGTH, 0), new_id()
        await client.save(chain)
        await client.save_manifest(turn_key, chain)
        for seed in range(1, 8):
            await client.save(make_chain(_GEOMETRY, _LENGTH, seed))
        await written_behind(daemon)

        async def dram_tokens() -> int:
            (place,), _ = await describe(client, turn_key)
            return place.dram_tokens

        assert await dram_tokens() == 0
        await client.rpc.request(Anticipate(turn_key, 1.0), Ack, 5.0)
        await asyncio.sleep(0.2)
        assert await dram_tokens() == 0
        await client.rpc.request(Anticipate(turn_key, 1.0, fetch=True), Ack, 5.0)
        await client.rpc.request(Anticipate(turn_key, 1.0, fetch=True), Ack, 5.0)  # at the next key

        async def is_there() -> bool:
            return await dram_tokens() == _LENGTH * _GEOMETRY.chunk_tokens

        await eventually(is_there, "the context is in DRAM")
        (place,), found = await describe(client, turn_key)
        assert (place.kv_tokens, place.stored_tokens, place.ssd_tokens) == (128, 128, 128)
        assert (found.dram_bytes, found.ssd_bytes) == (_LENGTH * _CHUNK, _LENGTH * _CHUNK)
        assert await client.load(chain) == ["dram"] * _LENGTH
        (place,), _ = await describe(client, turn_key)
        assert place.last_hit_s > 0
        await client.stop()

    with running_daemon(tmp_path, dram_bytes=_DRAM, ssd_bytes=64 * 2**20) as daemon:
        asyncio.run(main())


def test_shared_chunks_count_once_and_unknown_turns_are_zero(tmp_path: Path) -> None:
    async def main() -> None:
        client = await StoreClient(daemon.run_dir, _GEOMETRY).start()
        chain, one, other, unknown = make_chain(_GEOMETRY, 3, 0), new_id(), new_id(), new_id()
        await client.save(chain)
        await client.save_manifest(one, chain[:2])
        await client.save_manifest(other, chain)
        places, found = await describe(client, one, other, unknown)
        assert [place.kv_tokens for place in places] == [64, 96, 0]
        assert found.dram_bytes == 3 * _CHUNK
        await client.stop()

    with running_daemon(tmp_path, dram_bytes=_DRAM, ssd_bytes=0) as daemon:
        asyncio.run(main())


def test_a_loss_is_told_with_tier_and_time(tmp_path: Path) -> None:
    async def main() -> None:
        client = await StoreClient(daemon.run_dir, _GEOMETRY).start()
        chains = [make_chain(_GEOMETRY, _LENGTH, seed) for seed in range(8)]
        for chain in chains:
            await client.save(chain)
        lost = await client.acquire([chains[0][-1].chunk_id])
        assert lost.miss_reason == "evicted"
        assert re.fullmatch(r"evicted from dram at \d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", lost.miss_explained)
        unknown = await client.acquire([new_id()])
        assert (unknown.miss_reason, unknown.miss_explained) == ("unknown", "")
        await client.stop()

    with running_daemon(tmp_path, dram_bytes=_DRAM, ssd_bytes=0) as daemon:
        asyncio.run(main())
