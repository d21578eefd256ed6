"""Damage of every kind, thousands of times over: no wrong byte is delivered, and all of it is counted and put aside.

Bits flip, records and slots are swapped, files are cut and mixed up. `make damage` does it DAMAGES times each way, and
a tenth as often where each needs a start of the daemon. A failed run is repeated by DAMAGE_SEED, which is printed.

What no store can tell from something else is said where it happens: a log that was cut looks like a crash, and a slot
whose state says FREE looks free. What lay there is then a miss.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from kvdaemon.ssd.tables import ChunkRecord, Tables
from protocol.arena import Arena, SlotState
from protocol.messages import Ack, Quarantine, SlotRef
from tests.kvdaemon.client import (
    SMALL,
    DaemonProcess,
    Kv,
    StoreClient,
    eventually,
    metric,
    running_daemon,
    stored_files,
    written_behind,
)
from tests.kvdaemon.contexts import Turn, make_turn, save_turn, tokens

DAMAGES = int(os.environ.get("DAMAGES", "30"))
STARTS = max(3, DAMAGES // 10)
SEED = int(os.environ.get("DAMAGE_SEED", str(random.SystemRandom().randrange(2**32))))
_SLOTS = 48
_DRAM_BYTES = _SLOTS * (SMALL.slot_bytes + SMALL.entry_bytes) + 2 * 4096
_TOKENS = SMALL.chunk_tokens

pytestmark = pytest.mark.timeout(300 + 10 * DAMAGES)


def seeded(test: str) -> random.Random:
    print(f"DAMAGES={DAMAGES} DAMAGE_SEED={SEED}: {test}")
    return random.Random(f"{SEED} {test}")


async def on_ssd(daemon: DaemonProcess) -> None:
    await written_behind(daemon)
    await eventually(lambda: "cachedattention_manifest_queue 0.0" in daemon.metrics(), "all manifests on SSD")


def corrupt(daemon: DaemonProcess, where: str = "") -> int:
    """How many damaged things it counted since its start."""
    label = f'{{where="{where}"' if where else "{"
    return int(metric(daemon.metrics(), f"cachedattention_corrupt_total{label}"))


class Engine(StoreClient):
    """Checks what the daemon tells it to check, as inference does, and trusts the rest."""

    async def read(self, ref: SlotRef, timeout_s: float = 10.0) -> Kv | None:
        assert self.arena is not None
        if ref.tier == "ssd":
            await eventually(lambda: self._arrived(ref), "a chunk from SSD")
        if not self.arena.is_current(ref.slot, ref.generation, ref.chunk_id):
            return None
        if ref.verify and not all(
            self.arena.verify_layer(ref.slot, layer, ref.tokens) for layer in range(self.geometry.layers)
        ):
            await self.rpc.request(Quarantine(ref.slot, ref.generation, ref.chunk_id), Ack, 5.0)
            return None
        copies = [
            tuple(view.copy() for view in self.arena.layer(ref.slot, layer, ref.tokens))
            for layer in range(self.geometry.layers)
        ]
        if not self.arena.is_current(ref.slot, ref.generation, ref.chunk_id):
            return None
        return Kv(ref.chunk_id, b"", ref.tokens, tuple(copies))  # type: ignore[arg-type]

    def _arrived(self, ref: SlotRef) -> bool:
        assert self.arena is not None
        moved_on = not self.arena.is_current(ref.slot, ref.generation, ref.chunk_id)
        return moved_on or self.arena.ready_layers(ref.slot) == self.geometry.layers


# -- the arena ----------------------------------------------------------------------------------------------------

SlotDamage = Callable[[Arena, int, int, random.Random], int]  # changes slots a and b; returns how many are damaged now


def flip_data(arena: Arena, a: int, b: int, random_: random.Random) -> int:
    view = random_.choice(arena.layer(a, random_.randrange(SMALL.layers), _TOKENS))
    view[random_.randrange(len(view))] ^= 1 << random_.randrange(8)
    return 1


def overwrite_data(arena: Arena, a: int, b: int, random_: random.Random) -> int:
    """A run of other bytes, as a stray write leaves."""
    view = random_.choice(arena.layer(a, random_.randrange(SMALL.layers), _TOKENS))
    start = random_.randrange(len(view))
    piece = view[start : start + random_.randrange(1, 512)]
    piece[:] = ~piece
    return 1


def copy_data(arena: Arena, a: int, b: int, random_: random.Random) -> int:
    layer = random_.randrange(SMALL.layers)
    for to, from_ in zip(arena.layer(a, layer, _TOKENS), arena.layer(b, layer, _TOKENS), strict=True):
        to[:] = from_
    return 1


def swap_data(arena: Arena, a: int, b: int, random_: random.Random) -> int:
    for layer in range(SMALL.layers):
        for left, right in zip(arena.layer(a, layer, _TOKENS), arena.layer(b, layer, _TOKENS), strict=True):
            left[:], right[:] = right.copy(), left.copy()
    return 2


def swap_data_and_checksums(arena: Arena, a: int, b: int, random_: random.Random) -> int:
    """Every layer has its checksum, and all of them are another chunk's."""
    arena._checksums[[a, b]] = arena._checksums[[b, a]]
    return swap_data(arena, a, b, random_)


def swap_layers(arena: Arena, a: int, b: int, random_: random.Random) -> int:
    """Within one slot, checksums too."""
    arena._checksums[a, [0, 1]] = arena._checksums[a, [1, 0]]
    for left, right in zip(arena.layer(a, 0, _TOKENS), arena.layer(a, 1, _TOKENS), strict=True):
        left[:], right[:] = right.copy(), left.copy()
    return 1


def flip_checksum(arena: Arena, a: int, b: int, random_: random.Random) -> int:
    arena._checksums[a, random_.randrange(SMALL.layers)] ^= 1 << random_.randrange(64)
    return 1


def flip_seal(arena: Arena, a: int, b: int, random_: random.Random) -> int:
    arena._seal[a] ^= 1 << random_.randrange(64)
    return 1


def flip_id(arena: Arena, a: int, b: int, random_: random.Random) -> int:
    field = random_.choice(("chunk_id", "parent_id", "namespace"))
    raw = bytearray(arena._id(field, a))
    raw[random_.randrange(16)] ^= 1 << random_.randrange(8)
    arena._set_id(field, a, bytes(raw))
    return 1


def swap_ids(arena: Arena, a: int, b: int, random_: random.Random) -> int:
    left, right = arena.chunk_id(a), arena.chunk_id(b)
    arena._set_id("chunk_id", a, right)
    arena._set_id("chunk_id", b, left)
    return 2


def flip_tokens(arena: Arena, a: int, b: int, random_: random.Random) -> int:
    arena._tokens[a] ^= 1 << random_.randrange(32)
    return 1


def flip_ready(arena: Arena, a: int, b: int, random_: random.Random) -> int:
    arena._ready[a] ^= 1 << random_.randrange(32)
    return 1


def unknown_state(arena: Arena, a: int, b: int, random_: random.Random) -> int:
    arena._state[a] = random_.randrange(5, 2**32)
    return 1


def flip_generation(arena: Arena, a: int, b: int, random_: random.Random) -> int:
    arena._generation[a] ^= 1 << random_.randrange(32)
    return 1


# What a reader sees that checks every layer; what else the scrub sees; and what adoption sees, to which a generation is
# as good as another.
DATA: tuple[SlotDamage, ...] = (
    *(flip_data, flip_data, flip_data, overwrite_data, copy_data, swap_data, swap_data_and_checksums, swap_layers),
    *(flip_checksum, flip_seal),
)
TABLE: tuple[SlotDamage, ...] = (flip_id, swap_ids, flip_tokens, flip_ready, unknown_state)


def damage_some(
    arena: Arena, slots: Sequence[int], kinds: Sequence[SlotDamage], limit: int, random_: random.Random
) -> set[int]:
    """Damage up to `limit` slots in random ways, each slot once. Returns which."""
    whole = random_.sample(slots, len(slots))
    damaged: set[int] = set()
    while len(whole) >= 2 and len(damaged) < limit:
        a, b = whole.pop(), whole[-1]
        hit = {a, b} if random_.choice(kinds)(arena, a, b, random_) == 2 else {a}
        if b in hit:
            whole.pop()
        damaged |= hit
    return damaged


def where_chunks_lie(arena: Arena) -> dict[bytes, int]:
    return {arena.chunk_id(slot): slot for slot in range(arena.slots) if arena.state(slot) is SlotState.READY}


async def save_some(client: StoreClient, random_: random.Random, count: int) -> list[Kv]:
    """Full chunks that belong to no context in common."""
    chunks = [make_turn(tokens(_TOKENS + 1, random_.randrange(2**32))).chain[0] for _ in range(count)]
    await client.save(chunks)
    return chunks


def test_slots_while_the_daemon_is_down(tmp_path: Path) -> None:
    """Adoption counts exactly what was damaged, and frees it; SSD serves those, DRAM the others."""
    random_ = seeded("slots, daemon down")

    async def main() -> None:
        done = 0
        client = await Engine(daemon.run_dir).start()
        chunks = await save_some(client, random_, _SLOTS - 8)
        while done < DAMAGES:
            await on_ssd(daemon)
            for kv in chunks:  # into DRAM, all of them
                await client.load([kv])
            assert daemon.terminate() == 0
            arena = Arena.open(daemon.run_dir / "arena")
            places = where_chunks_lie(arena)
            assert len(places) == len(chunks)
            damaged = damage_some(arena, list(places.values()), DATA + TABLE, 30, random_)
            arena.close()
            done += len(damaged)
            daemon.start()
            await eventually(lambda before=client.opened: client.rpc.is_connected and client.opened > before, "again")
            assert corrupt(daemon) == corrupt(daemon, "adoption") == len(damaged)
            for kv in chunks:
                assert await client.load([kv]) == ["ssd" if places[kv.chunk_id] in damaged else "dram"]
        print(f"{done} slots damaged")
        await client.stop()

    with running_daemon(tmp_path, dram_bytes=_DRAM_BYTES, verify="always") as daemon:
        asyncio.run(main())


def test_slots_under_a_running_daemon_that_has_every_load_verified(tmp_path: Path) -> None:
    """--verify always, without the scrub: the load that meets damage is a miss, counted; the next comes from SSD."""
    random_ = seeded("slots, verify always")

    async def main() -> None:
        done = 0
        client = await Engine(daemon.run_dir).start()
        chunks = await save_some(client, random_, _SLOTS - 8)
        await on_ssd(daemon)
        assert client.arena is not None
        while done < DAMAGES:
            places = where_chunks_lie(client.arena)
            damaged = damage_some(client.arena, list(places.values()), DATA, 20, random_)
            done += len(damaged)
            for kv in random_.sample(chunks, len(chunks)):
                is_damaged = places[kv.chunk_id] in damaged
                assert await client.load([kv]) == ([] if is_damaged else ["dram"])
            assert corrupt(daemon) == corrupt(daemon, "dram") == done
            for kv in chunks:
                assert await client.load([kv]) == ["ssd" if places[kv.chunk_id] in damaged else "dram"]
            await at_rest(client)
        print(f"{done} slots damaged")
        await client.stop()

    with running_daemon(tmp_path, dram_bytes=_DRAM_BYTES, verify="always", scrub_bytes_per_s=0) as daemon:
        asyncio.run(main())


def test_slots_under_a_running_daemon_that_scrubs(tmp_path: Path) -> None:
    """The default mode: whatever is damaged in a slot or its entry, the scrub counts it exactly and puts it aside."""
    random_ = seeded("slots, scrub")

    async def main() -> None:
        done = 0
        client = await Engine(daemon.run_dir).start()
        chunks = await save_some(client, random_, _SLOTS - 8)
        await on_ssd(daemon)
        assert client.arena is not None
        while done < DAMAGES:
            places = where_chunks_lie(client.arena)
            damaged = damage_some(client.arena, list(places.values()), (*DATA, *TABLE, flip_generation), 20, random_)
            done += len(damaged)
            await eventually(lambda total=done: corrupt(daemon, "dram") >= total, "the scrub's round")
            for kv in chunks:
                assert await client.load([kv]) == ["ssd" if places[kv.chunk_id] in damaged else "dram"]
            assert corrupt(daemon) == corrupt(daemon, "dram") == done
            await at_rest(client)
        print(f"{done} slots damaged")
        await client.stop()

    with running_daemon(tmp_path, dram_bytes=_DRAM_BYTES, scrub_bytes_per_s=2**40) as daemon:
        asyncio.run(main())


async def at_rest(client: StoreClient) -> None:
    """All chunks that were loaded are READY in their slots, so that damage meets them there."""
    assert client.arena is not None
    arena = client.arena
    await eventually(
        lambda: all(arena.state(slot) in (SlotState.READY, SlotState.FREE) for slot in range(arena.slots)), "at rest"
    )


def test_the_arenas_file(tmp_path: Path) -> None:
    """Cut, grown, its header changed: counted, replaced, and everything comes from SSD."""
    random_ = seeded("the arena's file")

    async def main() -> None:
        client = await Engine(daemon.run_dir).start()
        chunks = await save_some(client, random_, 20)
        path = daemon.run_dir / "arena"
        for _ in range(STARTS):
            await on_ssd(daemon)
            assert daemon.terminate() == 0
            size = path.stat().st_size
            match random_.randrange(3):
                case 0:
                    os.truncate(path, random_.randrange(size))
                case 1:
                    os.truncate(path, size + random_.randrange(1, 10_000))
                case 2:
                    raw = bytearray(path.read_bytes())
                    # Of magic, version, geometry, slots, size and the digest of them: the rest is free, or an id.
                    at = random_.choice([*range(12), *range(16, 64), *range(72, 88)])
                    raw[at] ^= 1 << random_.randrange(8)
                    path.write_bytes(raw)
            daemon.start()
            await eventually(lambda before=client.opened: client.rpc.is_connected and client.opened > before, "again")
            assert corrupt(daemon) == corrupt(daemon, "arena") == 1
            for kv in chunks:
                assert await client.load([kv]) == ["ssd"]
        await client.stop()

    with running_daemon(tmp_path, dram_bytes=_DRAM_BYTES) as daemon:
        asyncio.run(main())


# -- the database's records -----------------------------------------------------------------------------------------


class Records:
    """The SSD tier's records and files while no daemon has them; changed values have RocksDB's own checksums."""

    def __init__(self, path: Path, random_: random.Random) -> None:
        self.tables = Tables(path)
        self.random = random_
        self._chunk_files = path / "chunks"

    def _record(self, kv: Kv) -> ChunkRecord:
        record = self.tables.record(kv.chunk_id)
        assert record is not None
        return record

    def _read(self, record: ChunkRecord, layer: int) -> bytes:
        with open(self._chunk_files / str(record.place.slot_bytes), "rb") as file:
            file.seek(record.place.offset + layer * record.layer_stride)
            return file.read(record.layer_bytes)

    def _write(self, record: ChunkRecord, layer: int, raw: bytes) -> None:
        with open(self._chunk_files / str(record.place.slot_bytes), "r+b") as file:
            file.seek(record.place.offset + layer * record.layer_stride)
            file.write(raw)

    def _change(self, family: object, key: bytes) -> None:
        raw = bytearray(family.get(key))  # type: ignore[attr-defined]
        match self.random.randrange(3):
            case 0:
                raw[self.random.randrange(len(raw))] ^= 1 << self.random.randrange(8)
            case 1:
                del raw[self.random.randrange(len(raw)) :]
            case 2:
                raw += b"x"
        family[key] = bytes(raw)  # type: ignore[index]

    def layer(self, a: Kv, b: Kv) -> int:
        record, layer = self._record(a), self.random.randrange(SMALL.layers)
        raw = bytearray(self._read(record, layer))
        raw[self.random.randrange(len(raw))] ^= 1 << self.random.randrange(8)
        self._write(record, layer, bytes(raw))
        return 1

    def record(self, a: Kv, b: Kv) -> int:
        self._change(self.tables._chunks, a.chunk_id)
        return 1

    def lost_layer(self, a: Kv, b: Kv) -> int:
        """It never reached the disk."""
        record = self._record(a)
        self._write(record, self.random.randrange(SMALL.layers), bytes(record.layer_bytes))
        return 1

    def swapped_layers(self, a: Kv, b: Kv) -> int:
        left, right, layer = self._record(a), self._record(b), self.random.randrange(SMALL.layers)
        values = self._read(left, layer), self._read(right, layer)
        self._write(left, layer, values[1])
        self._write(right, layer, values[0])
        return 2

    def swapped_within(self, a: Kv, b: Kv) -> int:
        record = self._record(a)
        values = self._read(record, 0), self._read(record, 1)
        self._write(record, 0, values[1])
        self._write(record, 1, values[0])
        return 1

    def swapped_records(self, a: Kv, b: Kv) -> int:
        values = self.tables._chunks.get(a.chunk_id), self.tables._chunks.get(b.chunk_id)
        self.tables._chunks[a.chunk_id], self.tables._chunks[b.chunk_id] = reversed(values)
        return 2

    def copied_record(self, a: Kv, b: Kv) -> int:
        self.tables._chunks[a.chunk_id] = self.tables._chunks.get(b.chunk_id)
        return 1

    def manifest(self, a: bytes, b: bytes) -> int:
        self._change(self.tables._manifests, a)
        return 1

    def swapped_manifests(self, a: bytes, b: bytes) -> int:
        values = self.tables._manifests.get(a), self.tables._manifests.get(b)
        self.tables._manifests[a], self.tables._manifests[b] = reversed(values)
        return 2


def test_records(tmp_path: Path) -> None:
    """Chunks and manifests on SSD, changed, cut or swapped: exactly those are lost, each counted, all are replaced."""
    random_ = seeded("records")

    def damage(turns: Sequence[Turn]) -> tuple[set[bytes], set[bytes]]:
        """Returns the ids of damaged chunks and the keys of damaged manifests."""
        records = Records(daemon.data_dir / "ssd", random_)
        chunks = {turn.chain[0].chunk_id: turn.chain[0] for turn in turns}
        keys = [turn.key for turn in turns]
        hit: tuple[set[bytes], set[bytes]] = set(), set()
        of_chunks = (records.layer, records.record, records.lost_layer, records.swapped_within)
        of_pairs = (records.swapped_layers, records.swapped_records, records.copied_record)
        whole = random_.sample(list(chunks), len(chunks))
        while len(whole) > 10:
            a, b = whole.pop(), whole[-1]
            if random_.choice((*of_chunks, *of_pairs))(chunks[a], chunks[b]) == 2:
                hit[0].add(whole.pop())
            hit[0].add(a)
        whole = random_.sample(keys, len(keys))
        while len(whole) > 10:
            a, b = whole.pop(), whole[-1]
            if random_.choice((records.manifest, records.swapped_manifests))(a, b) == 2:
                hit[1].add(whole.pop())
            hit[1].add(a)
        records.tables.close()
        return hit

    async def main() -> None:
        done: Counter[str] = Counter()
        client = await Engine(daemon.run_dir).start()
        turns = [make_turn(tokens(_TOKENS + 1, random_.randrange(2**32))) for _ in range(40)]
        while done.total() < DAMAGES:
            for turn in turns:
                await save_turn(client, turn)
            await on_ssd(daemon)
            assert daemon.terminate() == 0
            (daemon.run_dir / "arena").unlink()
            chunks, manifests = damage(turns)
            done.update(chunks=len(chunks), manifests=len(manifests))
            daemon.start()
            await eventually(lambda before=client.opened: client.rpc.is_connected and client.opened > before, "again")
            for turn in turns:
                found = await client.load(turn.chain)
                assert found in ([], ["ssd"])
                # A layer that is found damaged on its way ends the load; the next one hears that it is gone.
                assert found == ([] if turn.chain[0].chunk_id in chunks else ["ssd"])
                assert await client.load(turn.chain) == (["dram"] if found else [])
                manifest = (await client.get_manifest(turn.key)).manifest
                assert manifest == (None if turn.key in manifests else turn.manifest)
            expected = len(chunks) + len(manifests)
            await eventually(lambda expected=expected: corrupt(daemon) >= expected, "counted")
            assert corrupt(daemon) == expected
        print(f"{done['chunks']} chunks and {done['manifests']} manifests damaged")
        await client.stop()

    with running_daemon(tmp_path, dram_bytes=_DRAM_BYTES) as daemon:
        asyncio.run(main())


# -- the database's files -------------------------------------------------------------------------------------------


def flip_bits(path: Path, other: Path, random_: random.Random) -> None:
    raw = bytearray(path.read_bytes())
    for _ in range(random_.choice((1, 1, 1, 10, 100))):
        if raw:
            raw[random_.randrange(len(raw))] ^= 1 << random_.randrange(8)
    path.write_bytes(raw)


def cut(path: Path, other: Path, random_: random.Random) -> None:
    os.truncate(path, random_.randrange(path.stat().st_size + 1))


def grow(path: Path, other: Path, random_: random.Random) -> None:
    with open(path, "ab") as file:
        file.write(random_.randbytes(random_.randrange(1, 5000)))


def zero(path: Path, other: Path, random_: random.Random) -> None:
    """A page that never reached the disk."""
    raw = bytearray(path.read_bytes())
    start = random_.randrange(len(raw) + 1) & ~4095
    raw[start : start + 4096] = bytes(len(raw[start : start + 4096]))
    path.write_bytes(raw)


def swap_pages(path: Path, other: Path, random_: random.Random) -> None:
    """Writes that went to the wrong place, in this file or another."""
    left, right = bytearray(path.read_bytes()), bytearray(other.read_bytes())
    at, to = (random_.randrange(len(raw) + 1) & ~4095 for raw in (left, right))
    size = min(4096, len(left) - at, len(right) - to)
    left[at : at + size], right[to : to + size] = right[to : to + size], left[at : at + size]
    path.write_bytes(left)
    if other != path:
        other.write_bytes(right)


def swap_files(path: Path, other: Path, random_: random.Random) -> None:
    left, right = path.read_bytes(), other.read_bytes()
    path.write_bytes(right)
    other.write_bytes(left)


def lose(path: Path, other: Path, random_: random.Random) -> None:
    path.unlink()


def test_files(tmp_path: Path) -> None:
    """Any file of the database, changed in any way: what is served is right, chunks that are lost without a word are
    those of a log or a list of files that was cut short, and the tier takes new chunks at once."""
    random_ = seeded("files")
    ways = (flip_bits, flip_bits, flip_bits, cut, grow, zero, swap_pages, swap_files, lose)

    async def main() -> None:
        outcomes: Counter[str] = Counter()
        client = await Engine(daemon.run_dir).start()
        turns = [make_turn(tokens(_TOKENS * 2 + 5, random_.randrange(2**32))) for _ in range(20)]
        for n in range(STARTS):
            for turn in turns:
                await save_turn(client, turn)
            await on_ssd(daemon)
            if n % 2:  # a second table of each family
                worker = daemon.worker_pid()
                await asyncio.sleep(2.5)
                assert worker == daemon.worker_pid()
            assert daemon.terminate() == 0
            (daemon.run_dir / "arena").unlink()
            unread = ("LOCK", "IDENTITY", "LOG", "OPTIONS")
            files = [path for path in stored_files(daemon.data_dir) if not path.name.startswith(unread)]
            path, other = random_.choice(files), random_.choice(files)
            way = random_.choice(ways)
            before = path.read_bytes(), other.read_bytes()
            way(path, other, random_)
            changed = not path.exists() or (path.read_bytes(), other.read_bytes()) != before
            daemon.start()
            await eventually(lambda before=client.opened: client.rpc.is_connected and client.opened > before, "again")
            await eventually(lambda: '"ok"' in daemon.health(), "a tier that works", 60.0)
            lost = 0
            for turn in turns:
                lost += len(turn.chain) - len(await client.load(turn.chain))
                manifest = (await client.get_manifest(turn.key)).manifest
                assert manifest in (None, turn.manifest)
            kind = "chunks" if path.parent.name == "chunks" else path.suffix or path.name.partition("-")[0]
            what = f"{way.__name__} {kind}"
            looks_like_a_crash = path.name.startswith("MANIFEST") or path.suffix == ".log"
            if lost and not looks_like_a_crash:
                assert changed
                await eventually(lambda: corrupt(daemon) > 0, f"{what} is counted")
            outcomes[f"{what}: {'some' if 0 < lost < 60 else 'all' if lost else 'none'} lost"] += 1
            for aside in daemon.data_dir.glob("ssd.damaged-*"):
                shutil.rmtree(aside)
        for outcome, count in sorted(outcomes.items()):
            print(count, outcome)
        fresh = await save_some(client, random_, 5)
        await on_ssd(daemon)
        assert await client.load([fresh[0]]) == ["dram"]
        await client.stop()

    with running_daemon(tmp_path, dram_bytes=4 * _DRAM_BYTES) as daemon:
        asyncio.run(main())
