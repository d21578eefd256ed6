"""`cachedattention kv` against a real daemon: what it tells is so, what it moves is equal, what it erases is gone."""

from __future__ import annotations

import asyncio
import io
import json
import re
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from cli.main import run
from protocol.arena import Geometry
from protocol.messages import GeometryFields
from tests.cli.running import cli
from tests.faults.test_kvdaemon_full import small_disk
from tests.kvdaemon.client import (
    NAMESPACE,
    SMALL,
    DaemonProcess,
    StoreClient,
    eventually,
    running_daemon,
    stored_files,
    written_behind,
)
from tests.kvdaemon.contexts import Turn, make_turn, markers, save_turn, tokens

SECRET = "the user's own words"


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that was just started may take long to answer, on a busy machine."""
    monkeypatch.setattr("cli.store._CONNECT_S", 60.0)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    with running_daemon(tmp_path, scrub_bytes_per_s=0) as process:
        yield process


def kv(daemon: DaemonProcess, *arguments: str | Path, stdin: bytes = b"") -> CompletedProcess[str]:
    """Run a command as the entry point does, in this process. No command says a word of a conversation's text."""
    line = ["cachedattention", "kv", *map(str, arguments), *places_of(daemon)]
    streams = [io.TextIOWrapper(io.BytesIO(stdin)), io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "200")
        patch.setattr(sys, "argv", line)
        for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            patch.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as end:
            run()
    for stream in streams[1:]:
        stream.seek(0)
    out, err = (stream.read() for stream in streams[1:])
    assert SECRET not in out + err
    return CompletedProcess(line, int(end.value.code or 0), out, err)


def places_of(daemon: DaemonProcess) -> tuple[str, ...]:
    return ("--run-dir", str(daemon.run_dir), "--data-dir", str(daemon.data_dir))


def asked(daemon: DaemonProcess, *arguments: str | Path, code: int = 0) -> dict[str, Any]:
    """What a command says as JSON."""
    done = kv(daemon, *arguments, "--json")
    assert done.returncode == code, done.stderr
    return dict(json.loads(done.stdout))


def refused(daemon: DaemonProcess, *arguments: str | Path, why: str) -> None:
    """The command fails with one clear line and prints no result."""
    done = kv(daemon, *arguments)
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert why in done.stderr
    assert len(done.stderr.splitlines()) == 1


def conversation(seed: int, *lengths: int, geometry: Geometry = SMALL) -> list[Turn]:
    """Turns of one conversation, each the context so far."""
    all_tokens = tokens(max(lengths), seed)
    return [make_turn(all_tokens[:n], text=f"{SECRET} {seed} {n}", geometry=geometry) for n in lengths]


def save(daemon: DaemonProcess, *turns: Turn, geometry: Geometry = SMALL) -> None:
    """As inference does, and wait until all of it is on SSD too."""

    async def main() -> None:
        client = await StoreClient(daemon.run_dir, geometry).start()
        for turn in turns:
            await save_turn(client, turn)
        await client.stop()
        if daemon.fields["ssd_bytes"]:
            await written_behind(daemon)
            await eventually(lambda: "cachedattention_manifest_queue 0.0" in daemon.metrics(), "contexts on SSD")

    asyncio.run(main())


def load(daemon: DaemonProcess, turn: Turn, geometry: Geometry = SMALL) -> list[str]:
    """The tiers that the turn's chunks were found in; every byte of them is compared, and so is the manifest."""

    async def main() -> list[str]:
        client = await StoreClient(daemon.run_dir, geometry).start()
        tiers = await client.load(turn.chain)
        assert (await client.get_manifest(turn.key)).manifest in (turn.manifest, None)
        await client.stop()
        return tiers

    return asyncio.run(main())


def places(daemon: DaemonProcess, turns: Sequence[Turn]) -> set[str]:
    """The files of arena and database in which KV, text or the last tokens of the turns can be read."""
    searched = [marker for turn in turns for kv in turn.chain for marker in markers(kv)]
    searched += [turn.manifest.text.encode() for turn in turns] + [turn.manifest.token_ids[-64:] for turn in turns]
    files = [daemon.run_dir / "arena", *stored_files(daemon.data_dir)]
    return {path.name for path in files if any(marker in path.read_bytes() for marker in searched)}


def kv_bytes(*turns: Turn) -> int:
    """Of the turns' different chunks."""
    return sum({kv.chunk_id: kv.tokens for turn in turns for kv in turn.chain}.values()) * SMALL.token_bytes


def test_as_a_process_of_its_own(daemon: DaemonProcess, tmp_path: Path) -> None:
    """What the other tests run in their own process, as a user does: results, errors and exit codes."""
    (turn,) = conversation(1, 40)
    save(daemon, turn)
    done = cli("kv", "ls", "--json", *places_of(daemon))
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["conversations"][0]["turn_key"] == turn.key.hex()
    done = cli("kv", "import", str(tmp_path), *places_of(daemon))
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode() == f"error cannot read {tmp_path}: Is a directory\n"
    done = cli("kv", "ls", "--run-dir", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error no kvdaemon answers at ipc://{tmp_path}/kvdaemon.sock".encode())


# -- ls and stat ------------------------------------------------------------------------------------------------


def test_conversations_are_listed_with_what_they_take(daemon: DaemonProcess) -> None:
    """Turns of one conversation are one line, the one saved last first; a load is seen as the last hit."""
    assert asked(daemon, "ls") == {"conversations": [], "all": 0, "problem": ""}
    ours, other = conversation(1, 40, 80, 150), conversation(2, 65)
    save(daemon, *ours, *other)
    first, second = asked(daemon, "ls")["conversations"]
    assert first["turn_key"] == other[-1].key.hex()
    assert second == second | {
        "turn_key": ours[-1].key.hex(),
        "turns": 3,
        "tokens": 150,
        "kv_tokens": 149,
        "stored_tokens": 149,
        "dram_tokens": 149,
        "ssd_tokens": 149,
        "dram_bytes": kv_bytes(*ours),
        "ssd_bytes": kv_bytes(*ours),
        "text_bytes": len(ours[-1].manifest.text),
        "last_hit_s": 0.0,
    }
    assert load(daemon, ours[-1]) == ["dram"] * 5
    assert asked(daemon, "ls")["conversations"][1]["last_hit_s"] > second["saved_s"] > 0
    assert len(asked(daemon, "ls", "--limit", "1")["conversations"]) == 1
    lines = [line.rstrip() for line in kv(daemon, "ls").stdout.splitlines()]
    assert [line.split()[:3] for line in lines[1:3]] == [
        [other[-1].key.hex()[:12], "1", "65"],
        [ours[-1].key.hex()[:12], "3", "150"],
    ]
    assert lines[1].endswith("-")  # no hit yet
    assert re.search(r"\d+s ago +\d+s ago$", lines[2])
    assert lines[3].startswith("2 conversations.")


def test_a_turn_is_shown_with_its_relatives_and_chunks(daemon: DaemonProcess) -> None:
    turns = conversation(1, 40, 80, 150)
    save(daemon, *turns, *conversation(2, 65))
    shown = asked(daemon, "stat", turns[1].key.hex()[:10])
    assert (shown["turn_key"], shown["namespace"]) == (turns[1].key.hex(), NAMESPACE.hex())
    assert (shown["tokens"], shown["kv_tokens"]) == (80, 79)
    assert [(turn["relation"], turn["turn_key"]) for turn in shown["turns"]] == [
        ("earlier", turns[0].key.hex()),
        ("same", turns[1].key.hex()),
        ("later", turns[2].key.hex()),
    ]
    assert [(chunk["chunk_id"], chunk["tokens"]) for chunk in shown["chunks"]] == [
        (kv.chunk_id.hex(), kv.tokens) for kv in turns[1].chain
    ]
    assert {chunk["dram_bytes"] // chunk["tokens"] for chunk in shown["chunks"]} == {SMALL.token_bytes}
    text = kv(daemon, "stat", turns[1].key.hex()).stdout
    assert turns[1].key.hex() in text
    assert "this one" in text


def test_the_store_itself_is_shown(daemon: DaemonProcess) -> None:
    shown = asked(daemon, "stat")
    assert (shown["state"], shown["geometry"], shown["namespaces"]) == ("ok", None, [])
    save(daemon, *conversation(1, 40))
    shown = asked(daemon, "stat")
    assert GeometryFields(**shown["geometry"]) == SMALL.to_message()
    assert (shown["dram"]["chunks"], shown["ssd"]["chunks"]) == (2, 2)
    assert shown["ssd"]["used_bytes"] == 39 * SMALL.token_bytes
    assert shown["namespaces"] == [NAMESPACE.hex()]
    assert "chunks of 32 tokens, 3 layers of 64 + 96 bytes" in kv(daemon, "stat").stdout


# -- export and import ------------------------------------------------------------------------------------------


def test_exported_erased_imported_and_equal(daemon: DaemonProcess, tmp_path: Path) -> None:
    """Byte for byte: in DRAM, on SSD after a restart, and in a second export. The file is the user's alone."""
    turns, other = conversation(1, 50, 200), conversation(2, 90)
    save(daemon, *turns, *other)
    archive = tmp_path / "conversation"
    said = asked(daemon, "export", turns[1].key.hex(), archive)
    assert said == {
        "turn_key": turns[1].key.hex(),
        "file": str(archive),
        "file_bytes": archive.stat().st_size,
        "chunks": 7,
        "kv_tokens": 199,
        "kv_bytes": 199 * SMALL.token_bytes,
    }
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    asked(daemon, "erase", turns[1].key.hex(), "--yes")
    assert places(daemon, turns) == set()
    assert load(daemon, turns[1]) == []
    assert asked(daemon, "import", archive) == said
    assert load(daemon, turns[1]) == ["dram"] * 7
    assert asked(daemon, "import", archive) == said  # once more: nothing to do, no harm
    asked(daemon, "export", turns[1].key.hex()[:16], tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == archive.read_bytes()
    assert daemon.terminate() == 0
    (daemon.run_dir / "arena").unlink()
    daemon.start()
    assert load(daemon, turns[1]) == ["ssd"] * 7
    assert load(daemon, other[0]) == ["ssd"] * 3
    assert {one["turn_key"] for one in asked(daemon, "ls")["conversations"]} == {turns[1].key.hex(), other[0].key.hex()}


def test_import_into_an_empty_store(daemon: DaemonProcess, tmp_path: Path) -> None:
    """No model has opened it: the file knows the shape of its KV. The model that comes finds it."""
    (turn,) = conversation(1, 150)
    save(daemon, turn)
    kv(daemon, "export", turn.key.hex(), tmp_path / "archive")
    with running_daemon(tmp_path / "second") as second:
        done = kv(second, "import", tmp_path / "archive")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"imported {turn.key.hex()}: 149 tokens in 5 chunks")
        assert load(second, turn) == ["dram"] * 5


def test_a_conversation_larger_than_dram(daemon: DaemonProcess, tmp_path: Path) -> None:
    """Out of SSD and into it, through the slots there are, while others hold most of DRAM."""
    (turn,) = conversation(1, 32 * 150)
    assert 150 * SMALL.slot_bytes > daemon.fields["dram_bytes"]
    save(daemon, turn)
    kv(daemon, "export", turn.key.hex(), tmp_path / "archive")
    asked(daemon, "erase", turn.key.hex(), "--yes")
    save(daemon, *conversation(2, 32 * 100))
    assert asked(daemon, "import", tmp_path / "archive")["chunks"] == 150
    assert asked(daemon, "stat", turn.key.hex())["turns"][0]["stored_tokens"] == 32 * 150 - 1
    asked(daemon, "export", turn.key.hex(), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "archive").read_bytes()


def test_a_store_too_small_for_an_import_says_so(daemon: DaemonProcess, tmp_path: Path) -> None:
    (turn,) = conversation(1, 32 * 150)
    save(daemon, turn)
    kv(daemon, "export", turn.key.hex(), tmp_path / "archive")
    with running_daemon(tmp_path / "second", ssd_bytes=0) as second:
        done = kv(second, "import", tmp_path / "archive")
        assert done.returncode == 1
        assert "of its tokens are not in the store any more" in done.stderr


def test_every_damage_to_an_archive_is_refused(daemon: DaemonProcess, tmp_path: Path) -> None:
    """With a clear line, and nothing of it gets into the store. (All damage there is: kvdaemon/test_archive.py.)"""
    (turn,) = conversation(1, 100)
    save(daemon, turn)
    archive = tmp_path / "archive"
    kv(daemon, "export", turn.key.hex(), archive)
    asked(daemon, "erase", turn.key.hex(), "--yes")
    sound = archive.read_bytes()
    flipped = [bytearray(sound) for _ in range(5)]
    for raw, at in zip(flipped, (30, len(sound) // 3, len(sound) // 2, len(sound) - 40, len(sound) - 1), strict=True):
        raw[at] ^= 16
    damaged = [*flipped, sound[:-1], sound[: len(sound) // 2], sound + b"\0", sound + sound]
    for raw in damaged:
        archive.write_bytes(raw)
        refused(daemon, "import", archive, why=f"{archive} is damaged: its digest is wrong")
    archive.write_bytes(sound[:8] + b"\2" + sound[9:])
    refused(daemon, "import", archive, why="has version 2, this program reads 1")
    for raw in (b"", b"hello", b"x" + sound[1:]):
        archive.write_bytes(raw)
        refused(daemon, "import", archive, why="is not a conversation's file")
    refused(daemon, "import", tmp_path, why="Is a directory")
    refused(daemon, "import", tmp_path / "none", why="No such file")
    shown = asked(daemon, "stat")
    assert (shown["dram"]["chunks"], shown["ssd"]["chunks"], shown["manifests"]) == (0, 0, 0)
    assert (shown["reserved_slots"], shown["leases"]) == (0, 0)
    assert asked(daemon, "ls")["all"] == 0
    assert places(daemon, [turn]) == set()
    archive.write_bytes(sound)
    asked(daemon, "import", archive)
    assert load(daemon, turn) == ["dram"] * 4


def test_another_models_archive_is_refused_and_another_tenants_noted(daemon: DaemonProcess, tmp_path: Path) -> None:
    """KV of another shape cannot be stored. Of another namespace it can, and never hits for others: a warning."""
    (turn,) = conversation(1, 100)
    save(daemon, turn)
    kv(daemon, "export", turn.key.hex(), tmp_path / "archive")
    shape = Geometry(layers=2, key_bytes=64, value_bytes=96, chunk_tokens=32)
    with running_daemon(tmp_path / "second") as second:
        save(second, *conversation(2, 40, geometry=shape), geometry=shape)
        refused(second, "import", tmp_path / "archive", why="holds KV of another model")
        assert asked(second, "stat")["dram"]["chunks"] == 2
    stranger = make_turn(tokens(50, 5), text=SECRET, namespace=b"n" * 16)
    with running_daemon(tmp_path / "third") as third:

        async def main() -> None:
            client = await StoreClient(third.run_dir, namespace=b"n" * 16).start()
            await save_turn(client, stranger)
            await client.stop()

        asyncio.run(main())
        done = kv(third, "import", tmp_path / "archive")
        assert done.returncode == 0
        assert f"nothing else of namespace {NAMESPACE.hex()}" in done.stderr
        assert load(third, turn) == ["dram"] * 4


def test_an_earlier_models_conversation_stays_as_it_is(daemon: DaemonProcess, tmp_path: Path) -> None:
    """The store was opened for KV of another shape since: the export says so, and leaves the KV on SSD whole."""
    (turn,) = conversation(1, 100)
    save(daemon, turn)
    shape = Geometry(layers=2, key_bytes=64, value_bytes=96, chunk_tokens=32)
    save(daemon, *conversation(2, 40, geometry=shape), geometry=shape)
    refused(daemon, "export", turn.key.hex(), tmp_path / "archive", why="is of another model")
    assert list(tmp_path.glob("*archive*")) == []
    assert load(daemon, turn) == ["ssd"] * 4


# -- verify -----------------------------------------------------------------------------------------------------


def test_verify_finds_a_flipped_bit_in_dram(daemon: DaemonProcess, tmp_path: Path) -> None:
    """And discards that copy; an export before that refuses it, too. What SSD has is whole."""
    (turn,) = conversation(1, 100)
    save(daemon, turn)
    report = asked(daemon, "verify")
    assert (report["dram_chunks"], report["ssd_chunks"], report["manifests"]) == (4, 4, 1)
    assert report["dram_bytes"] == report["ssd_bytes"] == 99 * SMALL.token_bytes
    assert (report["dram_damaged"], report["ssd_damaged"], report["manifests_damaged"]) == ([], [], [])
    _flip_in_arena(daemon, turn, 2)
    done = kv(daemon, "verify")
    assert done.returncode == 1
    assert f"chunk in DRAM {turn.chain[2].chunk_id.hex()}" in done.stdout
    assert asked(daemon, "verify")["dram_chunks"] == 3
    assert load(daemon, turn) == ["dram", "dram", "ssd", "dram"]
    _flip_in_arena(daemon, turn, 1)
    refused(
        *(daemon, "export", turn.key.hex(), tmp_path / "archive"),
        why=f"chunk {turn.chain[1].chunk_id.hex()} is corrupt in DRAM",
    )
    assert list(tmp_path.glob("*archive*")) == []
    asked(daemon, "export", turn.key.hex(), tmp_path / "archive")  # from SSD now
    assert load(daemon, turn) == ["dram"] * 4


def _flip_in_arena(daemon: DaemonProcess, turn: Turn, index: int) -> None:
    arena = daemon.run_dir / "arena"
    with arena.open("r+b") as file:
        at = file.read().index(turn.chain[index].layers[1][0].tobytes()) + 20
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_verify_finds_a_flipped_bit_on_ssd(daemon: DaemonProcess) -> None:
    """And names the chunk; the conversation's list shows what is left of it."""
    (turn,) = conversation(1, 100)
    save(daemon, turn)
    assert daemon.terminate() == 0
    (daemon.run_dir / "arena").unlink()
    victim = turn.chain[1].layers[1][0].tobytes()
    (path,) = [path for path in stored_files(daemon.data_dir) if victim in path.read_bytes()]
    raw = bytearray(path.read_bytes())
    raw[raw.index(victim) + 20] ^= 1
    path.write_bytes(raw)
    daemon.start()
    report = asked(daemon, "verify", code=1)
    assert report["ssd_damaged"] == [turn.chain[1].chunk_id.hex()]
    (shown,) = asked(daemon, "ls")["conversations"]
    assert shown["stored_tokens"] < shown["kv_tokens"] == 99
    assert asked(daemon, "verify")["ssd_damaged"] == []


# -- erase ------------------------------------------------------------------------------------------------------


def test_the_receipt_says_what_a_byte_search_finds(daemon: DaemonProcess) -> None:
    """Before: KV, text and tokens in arena and files. After: none, and the receipt names each chunk and tier."""
    turns, other = conversation(1, 40, 80, 150), conversation(2, 150)
    save(daemon, *turns, *other)
    written = eventually(lambda: {"arena", str(SMALL.slot_bytes)} <= places(daemon, turns), "in memory and files")
    asyncio.run(written)
    receipt = asked(daemon, "erase", turns[0].key.hex(), "--yes")
    ours = {kv.chunk_id.hex() for turn in turns for kv in turn.chain}
    assert set(receipt["turn_keys"]) == {turn.key.hex() for turn in turns}
    assert set(receipt["dram_chunks"]) == set(receipt["ssd_chunks"]) == ours
    assert receipt["dram_bytes"] == receipt["ssd_bytes"] == kv_bytes(*turns)
    assert receipt["wiped_bytes"] >= len(ours) * SMALL.slot_bytes
    assert receipt["ssd_manifests"] == 3
    files = sum(path.stat().st_blocks * 512 for path in stored_files(daemon.data_dir))
    assert files == receipt["ssd_physical_after"] < receipt["ssd_physical_before"]
    assert (receipt["left"], receipt["deferred_slots"], receipt["shared_chunks"]) == ([], 0, 0)
    assert places(daemon, turns) == set()
    assert load(daemon, other[0]) == ["dram"] * 5
    text = kv(daemon, "erase", other[0].key.hex(), "--yes").stdout
    assert f"erased turn {other[0].key.hex()}" in text
    assert "overwritten with zeros" in text
    assert "compacted" in text


def test_erase_asks_first(daemon: DaemonProcess) -> None:
    """No, and no answer at all: nothing happens. The question says how much goes."""
    turns = conversation(1, 40, 80, 150)
    save(daemon, *turns)
    for answer in (b"n\n", b"", b"\n"):
        done = kv(daemon, "erase", turns[1].key.hex(), stdin=answer)
        assert (done.returncode, done.stdout.strip()) == (130, "")
        assert "1 that continue it, and those of 1 earlier ones" in done.stderr
    assert load(daemon, turns[2]) == ["dram"] * 5
    assert kv(daemon, "erase", turns[1].key.hex(), stdin=b"y\n").returncode == 0
    assert asked(daemon, "ls")["all"] == 0


# -- what can go wrong ------------------------------------------------------------------------------------------


def test_names_that_name_nothing(daemon: DaemonProcess, tmp_path: Path) -> None:
    """Unknown, no key at all, or several: for each command that takes one."""
    turns = [turn for seed in range(17) for turn in conversation(seed, 33)]
    save(daemon, *turns)
    digits = [turn.key.hex()[0] for turn in turns]
    several = next(digit for digit in digits if digits.count(digit) > 1)  # 17 keys, 16 digits
    for command, more in (("stat", ()), ("export", (tmp_path / "archive",)), ("erase", ("--yes",))):
        refused(daemon, command, "f" * 32, *more, why="no saved turn's key begins with")
        refused(daemon, command, "xyz", *more, why="'xyz' is not the beginning of a turn key")
        refused(daemon, command, several, *more, why=f"{several} is ambiguous")
    assert list(tmp_path.glob("*archive*")) == []
    assert asked(daemon, "ls")["all"] == 17


def test_without_a_daemon(daemon: DaemonProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was killed, its socket is still there: every command says so, and where it looked."""
    monkeypatch.setattr("cli.store._CONNECT_S", 0.5)
    save(daemon, *conversation(1, 40))
    daemon.kill()
    archive = tmp_path / "archive"
    commands: list[tuple[str, ...]] = [("ls",), ("stat",), ("verify",), ("erase", "00", "--yes")]
    for command in (*commands, ("export", "00", str(archive)), ("import", str(archive))):
        refused(daemon, *command, why=f"no kvdaemon answers at ipc://{daemon.run_dir}/kvdaemon.sock")
    assert not archive.exists()


def test_before_any_model_nothing_can_be_exported(daemon: DaemonProcess, tmp_path: Path) -> None:
    """After a restart without its arena the store knows contexts, but not yet the shape of their KV."""
    (turn,) = conversation(1, 40)
    save(daemon, turn)
    assert daemon.terminate() == 0
    (daemon.run_dir / "arena").unlink()
    daemon.start()
    assert asked(daemon, "ls")["conversations"][0]["ssd_tokens"] == 39
    refused(daemon, "export", turn.key.hex(), tmp_path / "archive", why="no model has opened the store yet")


def test_places_that_cannot_be_written(daemon: DaemonProcess, tmp_path: Path) -> None:
    """A file that is there is replaced on demand only; what is no file never."""
    (turn,) = conversation(1, 40)
    save(daemon, turn)
    key, archive = turn.key.hex(), tmp_path / "archive"
    archive.write_bytes(b"precious")
    refused(daemon, "export", key, archive, why="is there already; --force replaces it")
    assert archive.read_bytes() == b"precious"
    asked(daemon, "export", key, archive, "--force")
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    asked(daemon, "import", archive)
    refused(daemon, "export", key, tmp_path, "--force", why="is not a regular file")
    refused(daemon, "export", key, Path("/dev/null"), "--force", why="is not a regular file")
    refused(daemon, "export", key, tmp_path / "none" / "archive", why="No such file or directory")


def test_an_export_to_a_full_disk(daemon: DaemonProcess, tmp_path: Path) -> None:
    """Refused, with nothing left there; what was there under the name is untouched."""
    (turn,) = conversation(1, 32 * 100)
    save(daemon, turn)
    with small_disk(tmp_path / "disk", 1) as disk:
        (disk / "archive").write_bytes(b"precious")
        refused(daemon, "export", turn.key.hex(), disk / "archive", "--force", why=f"{disk} is full")
        assert [(path.name, path.read_bytes()) for path in disk.iterdir()] == [("archive", b"precious")]
    assert asked(daemon, "stat")["leases"] == 0
