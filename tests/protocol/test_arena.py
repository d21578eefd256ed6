"""The arena: its file, its slot table, the generation protocol, and who is alive."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.arena import (
    PAGE_BYTES,
    Arena,
    ClientLock,
    Geometry,
    HeldSlots,
    SlotState,
    client_is_alive,
    exclusive,
    layer_checksum,
)
from protocol.errors import CapacityError, ConfigError, PeerProtocolError
from protocol.ids import new_id

GEOMETRY = Geometry(layers=3, key_bytes=64, value_bytes=32, chunk_tokens=16)
CAPACITY = 256 * 1024


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A directory on tmpfs, where the arena lives in earnest."""
    tmpfs = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=tmpfs if tmpfs.is_dir() else None) as path:
        yield Path(path)


@pytest.fixture
def arena(run_dir: Path) -> Iterator[Arena]:
    made = Arena.create(run_dir / "arena", GEOMETRY, CAPACITY)
    yield made
    made.close()


def fill(arena: Arena, slot: int, layer: int, value: int, tokens: int = 16) -> None:
    for view in arena.layer(slot, layer, tokens):
        view[:] = value
    arena.set_layer_ready(slot, layer, layer_checksum(*arena.layer(slot, layer, tokens)))


# -- geometry -------------------------------------------------------------------------------------------------


@given(st.integers(1, 80), st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 512))
def test_geometry_adds_up(layers: int, key: int, value: int, chunk_tokens: int) -> None:
    geometry = Geometry(layers, key, value, chunk_tokens)
    assert geometry.layer_bytes % PAGE_BYTES == 0
    assert 0 <= geometry.layer_bytes - chunk_tokens * (key + value) < PAGE_BYTES
    assert geometry.slot_bytes == layers * geometry.layer_bytes
    assert geometry.token_bytes == layers * (key + value)
    assert geometry.entry_bytes % 64 == 0
    assert Geometry.from_message(geometry.to_message()) == geometry


def test_a_zero_in_a_geometry_is_refused() -> None:
    for values in ((0, 1, 1, 1), (1, 0, 1, 1), (1, 1, 0, 1), (1, 1, 1, 0), (-1, 1, 1, 1)):
        with pytest.raises(PeerProtocolError):
            Geometry(*values)


def test_every_field_of_a_geometry_counts_in_its_digest() -> None:
    shapes = [(1, 2, 3, 4), (2, 2, 3, 4), (1, 3, 2, 4), (1, 2, 4, 3), (1, 2, 3, 5)]
    assert len({Geometry(*shape).digest() for shape in shapes}) == len(shapes)


# -- the file -------------------------------------------------------------------------------------------------


def test_create_takes_what_fits_and_no_more(arena: Arena) -> None:
    assert arena.slots == (CAPACITY - 2 * PAGE_BYTES) // (GEOMETRY.slot_bytes + GEOMETRY.entry_bytes)
    assert arena.size_bytes == arena.path.stat().st_size <= CAPACITY
    assert arena.path.stat().st_mode & 0o777 == 0o600
    assert arena.path.stat().st_blocks * 512 >= arena.size_bytes  # all of its memory is taken now
    assert {arena.state(slot) for slot in range(arena.slots)} == {SlotState.FREE}


def test_open_maps_the_same_bytes(arena: Arena) -> None:
    other = Arena.open(arena.path)
    assert (other.geometry, other.slots, other.arena_id) == (arena.geometry, arena.slots, arena.arena_id)
    fill(arena, 1, 2, 77)
    assert other.verify_layer(1, 2, 16)
    assert set(other.layer(1, 2, 16)[0].tolist()) == {77}
    other.close()


def test_slots_and_layers_do_not_overlap(arena: Arena) -> None:
    """Every byte of every view belongs to one (slot, layer, key or value)."""
    where = [(slot, layer) for slot in range(arena.slots) for layer in range(GEOMETRY.layers)]
    assert 2 * len(where) < 256
    for number, (slot, layer) in enumerate(where):
        key, value = arena.layer(slot, layer, 16)
        key[:], value[:] = 2 * number, 2 * number + 1
    for number, (slot, layer) in enumerate(where):
        key, value = arena.layer(slot, layer, 16)
        assert (len(key), len(value)) == (16 * 64, 16 * 32)
        assert set(key.tolist()) == {2 * number}
        assert set(value.tolist()) == {2 * number + 1}
    assert {arena.generation(slot) for slot in range(arena.slots)} == {0}  # the table was not written over
    # Layers begin on pages, as direct I/O and pinned copies want it.
    base = arena.layer(0, 0, 16)[0].ctypes.data
    assert base % PAGE_BYTES == 0
    assert all((arena.layer(slot, layer, 1)[0].ctypes.data - base) % PAGE_BYTES == 0 for slot, layer in where)


def test_populate_touches_everything_and_changes_nothing(arena: Arena) -> None:
    before = arena.path.read_bytes()
    assert list(arena.populate())[-1] == arena.size_bytes
    assert arena.path.read_bytes() == before


def test_close_survives_a_view_that_is_still_held(run_dir: Path) -> None:
    arena = Arena.create(run_dir / "arena", GEOMETRY, CAPACITY)
    fill(arena, 0, 0, 5)
    key, _ = arena.layer(0, 0, 16)
    arena.close()
    arena.close()
    assert set(key.tolist()) == {5}


def test_a_new_arena_replaces_the_old_one_without_touching_it(arena: Arena) -> None:
    fill(arena, 0, 0, 9)
    new = Arena.create(arena.path, GEOMETRY, CAPACITY)
    assert new.arena_id != arena.arena_id
    fill(new, 0, 0, 1)
    assert set(arena.layer(0, 0, 16)[0].tolist()) == {9}
    new.close()


def test_a_capacity_below_one_chunk_is_an_error_that_names_the_option(run_dir: Path) -> None:
    with pytest.raises(CapacityError, match="raise --dram"):
        Arena.create(run_dir / "arena", GEOMETRY, GEOMETRY.slot_bytes)
    assert list(run_dir.iterdir()) == []


def test_a_full_tmpfs_is_an_error_and_leaves_nothing(run_dir: Path) -> None:
    too_much = shutil.disk_usage(run_dir).total + 2**30
    with pytest.raises(CapacityError, match="lower --dram or enlarge the tmpfs"):
        Arena.create(run_dir / "arena", GEOMETRY, too_much)
    assert list(run_dir.iterdir()) == []


def test_open_without_a_file(run_dir: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Arena.open(run_dir / "arena")


@pytest.mark.parametrize("length", [0, 7, 100, PAGE_BYTES, CAPACITY // 2])
def test_a_truncated_arena_is_refused(arena: Arena, length: int) -> None:
    copy = arena.path.with_name("copy")
    copy.write_bytes(arena.path.read_bytes()[:length])
    with pytest.raises(PeerProtocolError, match=r"truncated|not an arena"):
        Arena.open(copy)


def test_a_longer_file_is_refused(arena: Arena) -> None:
    copy = arena.path.with_name("copy")
    copy.write_bytes(arena.path.read_bytes() + bytes(PAGE_BYTES))
    with pytest.raises(PeerProtocolError):
        Arena.open(copy)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 79), st.integers(0, 255))
def test_no_byte_of_the_geometry_can_be_tampered_with(at: int, value: int) -> None:
    """Whatever byte of the header's shape fields changes, the file is refused, never mapped with another shape."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "arena"
        Arena.create(path, GEOMETRY, 64 * 1024).close()
        raw = bytearray(path.read_bytes())
        raw[at], old = value, raw[at]
        path.write_bytes(raw)
        try:
            opened = Arena.open(path)
        except PeerProtocolError:
            assert value != old
        else:
            assert opened.geometry == GEOMETRY
            opened.close()


def test_an_arena_without_slots_is_refused(run_dir: Path) -> None:
    arena = Arena.create(run_dir / "arena", GEOMETRY, CAPACITY)
    arena.close()
    raw = bytearray(arena.path.read_bytes()[:PAGE_BYTES])
    raw[48:64] = (0).to_bytes(8, "little") + PAGE_BYTES.to_bytes(8, "little")  # slots, size
    arena.path.write_bytes(raw)
    with pytest.raises(PeerProtocolError, match="damaged"):
        Arena.open(arena.path)


def test_another_layout_version_is_refused_by_name(arena: Arena) -> None:
    raw = bytearray(arena.path.read_bytes())
    raw[8] = 99
    arena.path.write_bytes(raw)
    with pytest.raises(PeerProtocolError, match="layout version 99"):
        Arena.open(arena.path)


# -- the slot table -------------------------------------------------------------------------------------------


def test_ids_keep_their_trailing_zero_bytes(arena: Arena) -> None:
    chunk, parent, namespace, owner = (bytes((n,)) + bytes(15) for n in (1, 2, 3, 4))
    arena.take(0, SlotState.RESERVED, owner)
    arena.set_identity(0, chunk, parent, namespace, 11)
    assert (arena.chunk_id(0), arena.parent_id(0), arena.namespace(0)) == (chunk, parent, namespace)
    assert (arena.owner(0), arena.tokens(0)) == (owner, 11)
    assert arena.is_current(0, 1, chunk)


def test_a_damaged_state_is_a_protocol_error(arena: Arena) -> None:
    raw = bytearray(arena.path.read_bytes())
    raw[PAGE_BYTES + 8] = 200
    arena.path.write_bytes(raw)
    with pytest.raises(PeerProtocolError, match="slot 0"):
        arena.state(0)


def test_a_reader_notices_that_its_slot_was_given_away(arena: Arena) -> None:
    """Every step of taking a slot away is visible to a holder of the old generation before foreign bytes are."""
    old, new = new_id(), new_id()
    generation = arena.take(0, SlotState.RESERVED, b"w" * 16)
    arena.set_identity(0, old, bytes(16), b"n" * 16, 16)
    fill(arena, 0, 0, 1)
    arena.set_state(0, SlotState.READY)
    assert arena.is_current(0, generation, old)
    arena.free(0)
    assert not arena.is_current(0, generation, old)
    again = arena.take(0, SlotState.RESERVED, b"v" * 16)
    assert again > generation + 1
    assert arena.ready_layers(0) == 0
    assert arena.tokens(0) == 0
    assert arena.chunk_id(0) == bytes(16)
    arena.set_identity(0, new, bytes(16), b"n" * 16, 16)
    assert not arena.is_current(0, generation, old)
    assert arena.is_current(0, again, new)
    # The same chunk coming back to the same slot is still another generation.
    arena.set_identity(0, old, bytes(16), b"n" * 16, 16)
    assert not arena.is_current(0, generation, old)


@pytest.mark.parametrize("field", ["chunk_id", "parent_id", "namespace", "tokens", "checksum", "seal", "another's"])
def test_a_seal_binds_a_chunk_to_its_checksums(arena: Arena, field: str) -> None:
    """A bit of the ids, the count or any checksum; also where bytes and checksums are whole, but another chunk's."""
    for slot in (0, 1):
        arena.take(slot, SlotState.RESERVED, b"w" * 16)
        for layer in range(GEOMETRY.layers):
            fill(arena, slot, layer, slot)
        arena.set_identity(slot, new_id(), new_id(), new_id(), 16)
        arena.seal(slot)
        arena.set_state(slot, SlotState.READY)
        assert arena.is_sealed(slot)
        assert all(arena.verify_layer(slot, layer, 16) for layer in range(GEOMETRY.layers))
    match field:
        case "tokens":
            arena._tokens[0] ^= 1
        case "checksum":
            arena._checksums[0, GEOMETRY.layers - 1] ^= 1
        case "seal":
            arena._seal[0] ^= 1
        case "another's":
            arena._checksums[0] = arena._checksums[1]
            for layer in range(GEOMETRY.layers):
                for mine, other in zip(arena.layer(0, layer, 16), arena.layer(1, layer, 16), strict=True):
                    mine[:] = other
        case _:
            arena._set_id(field, 0, arena._id(field, 0)[:-1] + b"?")
    assert not arena.is_sealed(0)
    assert not any(arena.verify_layer(0, layer, 16) for layer in range(GEOMETRY.layers))
    assert arena.is_sealed(1)


def test_layers_become_ready_in_order_with_their_checksums(arena: Arena) -> None:
    arena.take(0, SlotState.LOADING, bytes(16))
    for layer in range(GEOMETRY.layers):
        assert arena.ready_layers(0) == layer
        fill(arena, 0, layer, 10 + layer)
        assert arena.verify_layer(0, layer, 16)
    assert arena.ready_layers(0) == GEOMETRY.layers
    arena.layer(0, 1, 16)[1][-1] ^= 1
    assert [arena.verify_layer(0, layer, 16) for layer in range(3)] == [True, False, True]


def test_a_partial_chunk_is_checked_over_its_own_tokens(arena: Arena) -> None:
    fill(arena, 2, 0, 3, tokens=5)
    assert arena.verify_layer(2, 0, 5)
    assert not arena.verify_layer(2, 0, 6)


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 300])
def test_a_layer_is_written_and_checksummed_in_one_pass(run_dir: Path, tokens: int) -> None:
    """Blocks, part of a block, and both: bytes and checksum are those of the whole, and nothing else is touched."""
    arena = Arena.create(run_dir / "arena", Geometry(2, key_bytes=2048, value_bytes=1024, chunk_tokens=300), 4 << 20)
    noise = np.random.default_rng(0)
    key, value = (noise.integers(0, 256, tokens * each, dtype=np.uint8) for each in (2048, 1024))
    arena.write_layer(1, 0, key, value)
    written_key, written_value = arena.layer(1, 0, 300)
    assert np.array_equal(written_key[: len(key)], key)
    assert np.array_equal(written_value[: len(value)], value)
    assert not written_key[len(key) :].any()
    assert not written_value[len(value) :].any()
    assert arena.ready_layers(1) == 1
    assert arena.checksum(1, 0) == layer_checksum(key, value)
    assert arena.verify_layer(1, 0, tokens)
    arena.close()


def test_held_slots_are_looked_at_together(arena: Arena) -> None:
    """One slot that changed hands is enough; the slowest says how many layers are there."""
    held = []
    for slot in (2, 0):
        generation = arena.take(slot, SlotState.LOADING, bytes(16))
        identity = new_id()
        arena.set_identity(slot, identity, new_id(), new_id(), 16)
        held.append((slot, generation, identity))
    slots = HeldSlots(arena, held)
    assert slots.are_current()
    assert slots.ready_layers() == 0
    fill(arena, 2, 0, 1)
    assert slots.ready_layers() == 0
    fill(arena, 0, 0, 1)
    fill(arena, 0, 1, 1)
    assert slots.ready_layers() == 1
    arena.set_identity(0, new_id(), new_id(), new_id(), 16)
    assert not slots.are_current()
    arena.set_identity(0, held[1][2], new_id(), new_id(), 16)
    assert slots.are_current()
    arena.free(2)
    assert not slots.are_current()


def test_a_checksum_tells_keys_from_values() -> None:
    one, two = np.full(8, 1, np.uint8), np.full(8, 2, np.uint8)
    assert layer_checksum(one, two) != layer_checksum(two, one)


# -- who is alive -----------------------------------------------------------------------------------------------

HOLD_CLIENT_LOCK = """
import sys, time
from pathlib import Path
from protocol.arena import ClientLock
lock = ClientLock(Path(sys.argv[1]), bytes.fromhex(sys.argv[2]))
print("locked", flush=True)
time.sleep(60)
"""


def test_a_client_lock_dies_with_its_process(run_dir: Path) -> None:
    client = new_id()
    assert not client_is_alive(run_dir, client)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD_CLIENT_LOCK, str(run_dir), client.hex()], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"locked\n"
        assert client_is_alive(run_dir, client)
        assert client_is_alive(run_dir, client)  # asking does not take the lock away
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not client_is_alive(run_dir, client)
    assert list((run_dir / "clients").iterdir()) == []  # and the dead one's file is swept away


def test_a_client_lock_ends_with_close(run_dir: Path) -> None:
    client = new_id()
    lock = ClientLock(run_dir, client)
    assert client_is_alive(run_dir, client)
    with pytest.raises(ConfigError):
        ClientLock(run_dir, client)
    lock.close()
    assert not client_is_alive(run_dir, client)


def test_exclusive_names_who_is_in_the_way_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "data" / "kvdaemon.lock"
    with exclusive(path, "kvdaemon"):
        with pytest.raises(ConfigError, match=r"another kvdaemon is using .*data"), exclusive(path, "kvdaemon"):
            pass
        assert path.exists()
    assert not path.exists()
    with exclusive(path, "kvdaemon"):
        pass


def test_exclusive_is_free_again_when_its_holder_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "kvdaemon.lock"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom protocol.arena import exclusive\n"
        "with exclusive(Path(sys.argv[1]), 'kvdaemon'):\n print('locked', flush=True)\n time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"locked\n"
        with pytest.raises(ConfigError), exclusive(path, "kvdaemon"):
            pass
        child.kill()
        child.wait()
    with exclusive(path, "kvdaemon"):
        pass


def test_exclusive_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot lock"), exclusive(tmp_path / "file" / "lock", "kvdaemon"):
        pass


def test_a_crash_while_creating_costs_no_memory_for_long(run_dir: Path) -> None:
    """Killed before the arena is whole, a process leaves no arena, and the next one takes its memory over."""
    path = run_dir / "arena"
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom protocol import arena\n"
        "os.pwrite = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "arena.Arena.create(Path(sys.argv[1]), arena.Geometry(3, 64, 32, 16), 1 << 20)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not path.exists()
    Arena.create(path, GEOMETRY, CAPACITY).close()
    assert os.listdir(run_dir) == ["arena"]
