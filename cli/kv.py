"""`cachedattention kv`: what a running kvdaemon has stored; verify it, move one conversation, erase one."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from cli.conversations import Conversation, conversations
from cli.options import with_settings
from cli.settings import Settings
from cli.sizes import format_size
from cli.store import StoreClient
from kvdaemon.archive import ArchiveReader, ArchiveWriter, Contents
from kvdaemon.conversations import Relation, relation
from protocol.arena import Geometry
from protocol.errors import InvalidRequest, PeerError
from protocol.ids import ROOT
from protocol.lineage import kept_ranges
from protocol.messages import (
    ChunkPlace,
    DescribeStore,
    Erase,
    ErasureReceipt,
    GetStatus,
    Manifest,
    ManifestEntry,
    ScrubProgress,
    ScrubReport,
    ScrubStore,
    StoreDescription,
    StoreStatus,
)

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Look into the KV store of a running kvdaemon: list, verify, export, import, erase.",
)

_LINKS = ("data_dir", "run_dir", "kvdaemon_endpoint", "keys")
_SHOWN_DIGITS = 12  # of a turn key; enough of them to name it again
_PIPE_COLUMNS = 200
_SCRUB_S, _SCRUB_IDLE_S = 7 * 24 * 3600.0, 600.0
_ERASE_S = 4 * 3600.0  # compaction rewrites what held records and manifests
_TEXT_COLUMNS = ("", "id", "saved", "last hit")

Key = Annotated[
    str, typer.Argument(metavar="TURN", help="Turn key in hexadecimal, or its beginning.", show_default=False)
]
MaybeKey = Annotated[str | None, typer.Argument(metavar="TURN", help="Turn key, or its beginning.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


# -- ls and stat -----------------------------------------------------------------------------------------------


@app.command("ls")
@with_settings(*_LINKS)
def list_conversations(
    settings: Settings,
    limit: Annotated[int, typer.Option(metavar="N", min=0, help="Show the N saved last; 0 shows all.")] = 50,
    as_json: AsJson = False,
) -> None:
    """List conversations: tokens, bytes, tiers, when they were last of use."""

    async def work() -> tuple[list[Conversation], str]:
        async with StoreClient(settings) as store:
            with _spinner("reading", quiet=as_json):
                return await conversations(store.entries), store.problem

    found, problem = asyncio.run(work())
    shown = found[:limit] if limit else found
    if as_json:
        _print_json(
            {"conversations": [dataclasses.asdict(one) for one in shown], "all": len(found), "problem": problem}
        )
    else:
        table = _table("turn", "turns", "tokens", "in DRAM", "on SSD", "saved", "last hit")
        for one in shown:
            table.add_row(
                one.turn_key[:_SHOWN_DIGITS],
                *(f"{one.turns}", f"{one.tokens:,}"),
                _tier(one.dram_bytes, one.dram_tokens, one.kv_tokens),
                _tier(one.ssd_bytes, one.ssd_tokens, one.kv_tokens),
                *(_when(one.saved_s), _when(one.last_hit_s)),
            )
        console = _results()
        console.print(table)
        more = f", {len(shown)} shown" if len(shown) < len(found) else ""
        console.print(
            f"{len(found)} conversations{more}. A hit: loaded from the store since the kvdaemon started.", style="dim"
        )
    if problem:
        _warn(f"the SSD tier is away, this is what is in memory: {problem}")


@app.command()
@with_settings(*_LINKS)
def stat(settings: Settings, turn: MaybeKey = None, as_json: AsJson = False) -> None:
    """Show the store's state, or of one turn the turns around it and where each of its chunks lies."""
    if turn is None:
        _stat_store(settings, as_json)
    else:
        _stat_turn(settings, turn, as_json)


def _stat_store(settings: Settings, as_json: bool) -> None:
    async def work() -> tuple[StoreStatus, StoreDescription]:
        async with StoreClient(settings) as store:
            return await store.ask(GetStatus(), StoreStatus), await store.ask(DescribeStore(), StoreDescription)

    status, description = asyncio.run(work())
    if as_json:
        _print_json(dataclasses.asdict(status) | dataclasses.asdict(description))
        return
    console = _results()
    console.print(f"{status.state}{f': {status.reason}' if status.reason else ''}\n", markup=False)
    table = _table("tier", "chunks", "used", "capacity")
    for name, tier in (("DRAM", status.dram), ("SSD", status.ssd)):
        table.add_row(name, f"{tier.chunks:,}", format_size(tier.used_bytes), format_size(tier.capacity_bytes))
    console.print(table, "")
    console.print(f"{status.leases:,} leases, {status.reserved_slots:,} slots being filled")
    if description.geometry is not None:
        console.print(f"chunks of {_shape(Geometry.from_message(description.geometry))}")
    console.print(f"namespaces: {', '.join(one.hex() for one in description.namespaces) or '-'}")


def _stat_turn(settings: Settings, turn: str, as_json: bool) -> None:
    async def work() -> tuple[Manifest, list[tuple[Relation, ManifestEntry]], tuple[ChunkPlace, ...]]:
        async with StoreClient(settings) as store:
            manifest = await store.manifest(turn)
            with _spinner("reading", quiet=as_json):
                related = await _related(store, manifest)
            return manifest, related, await store.locate(manifest.chunk_ids)

    manifest, related, places = asyncio.run(work())
    tokens = len(manifest.token_ids) // 4
    if as_json:
        turns = [
            {
                "relation": kind.value,
                "turn_key": entry.turn_key,
                "tokens": len(entry.token_ids) // 4,
                "stored_tokens": entry.stored_tokens,
                "saved_s": entry.saved_s,
                "last_hit_s": entry.last_hit_s,
            }
            for kind, entry in related
        ]
        chunks = [
            {"chunk_id": chunk_id, **dataclasses.asdict(place)}
            for chunk_id, place in zip(manifest.chunk_ids, places, strict=True)
        ]
        _print_json(
            {
                "turn_key": manifest.turn_key,
                "namespace": manifest.namespace,
                "tokens": tokens,
                "kv_tokens": manifest.kv_tokens,
                "kept": kept_ranges(tokens, manifest.truncations),
                "text_characters": len(manifest.text),
                "turns": turns,
                "chunks": chunks,
            }
        )
        return
    console = _results()
    console.print(f"turn {manifest.turn_key.hex()}\nnamespace {manifest.namespace.hex()}")
    console.print(f"{tokens:,} tokens, {manifest.kv_tokens:,} with KV, {len(manifest.text):,} characters of text")
    if manifest.truncations:
        kept = ", ".join(f"{start:,}-{end:,}" for start, end in kept_ranges(tokens, manifest.truncations))
        console.print(f"truncated; in the context are the tokens {kept}")
    console.print("")
    table = _table("turn", "", "tokens", "stored", "saved", "last hit")
    for kind, entry in related:
        table.add_row(
            entry.turn_key.hex()[:_SHOWN_DIGITS],
            "this one" if kind is Relation.SAME else kind.value,
            *(f"{len(entry.token_ids) // 4:,}", f"{entry.stored_tokens:,}"),
            *(_when(entry.saved_s), _when(entry.last_hit_s)),
        )
    console.print(table, "")
    table = _table("chunk", "id", "tokens", "in DRAM", "on SSD", "leases")
    for number, (chunk_id, place) in enumerate(zip(manifest.chunk_ids, places, strict=True), start=1):
        sizes = (format_size(size) if size else "-" for size in (place.dram_bytes, place.ssd_bytes))
        table.add_row(
            f"{number}", chunk_id.hex()[:_SHOWN_DIGITS], f"{place.tokens or '-'}", *sizes, f"{place.leases or '-'}"
        )
    console.print(table)


async def _related(store: StoreClient, manifest: Manifest) -> list[tuple[Relation, ManifestEntry]]:
    """The turns of the conversations that go through this one, itself included, shortest first."""
    related = []
    async for entry in store.entries():
        kind = relation(entry, manifest)
        if kind is not Relation.OTHER:
            related.append((kind, entry))
    return sorted(related, key=lambda item: len(item[1].token_ids))


# -- verify ----------------------------------------------------------------------------------------------------


@app.command()
@with_settings(*_LINKS)
def verify(settings: Settings, as_json: AsJson = False) -> int:
    """Read all that is stored and compare it with its checksums. Damaged KV is discarded; exit code 1 where any was."""

    async def work() -> ScrubReport:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        async with StoreClient(settings) as store:
            with _progress(*columns, TimeElapsedColumn(), quiet=as_json) as bars:
                tasks = {tier: bars.add_task(tier, total=None, visible=False) for tier in ("dram", "ssd", "manifests")}
                async for part in store.stream(ScrubStore(), _SCRUB_S, _SCRUB_IDLE_S):
                    if isinstance(part, ScrubReport):
                        return part
                    assert isinstance(part, ScrubProgress)
                    bars.update(tasks[part.tier], completed=part.done, total=part.total, visible=True)
        raise PeerError("the daemon gave no report")

    report = asyncio.run(work())
    found_damage = report.dram_damaged or report.ssd_damaged or report.manifests_damaged
    if as_json:
        _print_json(dataclasses.asdict(report))
    else:
        table = _table("", "verified", "KV", "damaged")
        for name, count, size, found in (
            ("chunks in DRAM", report.dram_chunks, format_size(report.dram_bytes), report.dram_damaged),
            ("chunks on SSD", report.ssd_chunks, format_size(report.ssd_bytes), report.ssd_damaged),
            ("contexts on SSD", report.manifests, "", report.manifests_damaged),
        ):
            table.add_row(name, f"{count:,}", size, f"[bold red]{len(found)}[/]" if found else "0")
        console = _results()
        console.print(table)
        if report.skipped:
            console.print(f"{report.skipped} chunks were on their way in or out of DRAM; who moves them verifies them.")
        for what, damaged in (
            ("chunk in DRAM", report.dram_damaged),
            ("chunk on SSD", report.ssd_damaged),
            ("context on SSD", report.manifests_damaged),
        ):
            for one in damaged:
                name = "an unreadable block of the database" if one == ROOT else f"{what} {one.hex()}"
                console.print(f"damaged, never to be used: {name}")
    if report.problem:
        _warn(f"the SSD tier was not read to its end: {report.problem}")
    return 1 if found_damage or report.problem else 0


# -- export and import -----------------------------------------------------------------------------------------


@app.command("export")
@with_settings(*_LINKS)
def export_conversation(
    settings: Settings,
    turn: Key,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write one conversation, up to a turn, to a file that proves itself. It holds its text: keep it safe."""
    if file.exists() and not file.is_file():
        raise InvalidRequest(f"{file} is not a regular file")
    if file.exists() and not force:
        raise InvalidRequest(f"{file} is there already; --force replaces it")

    async def work() -> tuple[Contents, int]:
        async with StoreClient(settings) as store:
            manifest = await store.manifest(turn)
            geometry = (await store.ask(DescribeStore(), StoreDescription)).geometry
            if geometry is None:
                raise InvalidRequest("no model has opened the store yet; start inference first")
            contents = Contents(Geometry.from_message(geometry), manifest)
            await store.open(contents.geometry)
            with ArchiveWriter(file, contents) as archive, _bar("export", len(manifest.chunk_ids), as_json) as advance:
                async with contextlib.aclosing(store.load(contents)) as chunks:
                    async for layers in chunks:
                        await asyncio.to_thread(archive.add, layers)
                        advance()
                return contents, await asyncio.to_thread(archive.finish)

    contents, size = asyncio.run(work())
    _tell_moved("exported", contents, file, size, as_json)


@app.command("import")
@with_settings(*_LINKS)
def import_conversation(
    settings: Settings,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What `export` wrote.", show_default=False)],
    as_json: AsJson = False,
) -> int:
    """Bring a conversation from a file back into the store: its next turn hits. All of the file is verified first."""

    async def work() -> tuple[Contents, int]:
        async with StoreClient(settings) as store:
            with _spinner("verifying", quiet=as_json):
                archive = await asyncio.to_thread(ArchiveReader, file)
            with archive:
                contents = archive.contents
                _check_fits(contents, await store.ask(DescribeStore(), StoreDescription), file)
                await store.open(contents.geometry)
                there = await store.locate(contents.manifest.chunk_ids)
                chunks = archive.chunks()
                with _bar("import", len(there), as_json) as advance:
                    for index, place in enumerate(there):
                        layers = await asyncio.to_thread(next, chunks)
                        if not (place.dram_bytes or place.ssd_bytes):
                            await store.save(contents, index, layers)
                        advance()
            await store.save_manifest(contents)
            places = await store.locate(contents.manifest.chunk_ids)
            return contents, sum(place.tokens for place in places if place.dram_bytes or place.ssd_bytes)

    contents, stored = asyncio.run(work())
    _tell_moved("imported", contents, file, file.stat().st_size, as_json)
    missing = contents.manifest.kv_tokens - stored
    if missing:
        _warn(f"{missing:,} of its tokens are not in the store any more: it is too small for all of them")
    return 1 if missing else 0


def _check_fits(contents: Contents, store: StoreDescription, file: Path) -> None:
    """Raises InvalidRequest: the store is of another geometry. Warns where it holds nothing of the file's namespace."""
    if store.geometry is not None and store.geometry != contents.geometry.to_message():
        raise InvalidRequest(
            f"{file} holds KV of another model: chunks of {_shape(contents.geometry)}; the store's have"
            f" {_shape(Geometry.from_message(store.geometry))}"
        )
    if store.namespaces and contents.manifest.namespace not in store.namespaces:
        _warn(
            f"the store holds nothing else of namespace {contents.manifest.namespace.hex()}: if {file} was made with"
            " another model, by another installation or for another tenant, no turn will hit it"
        )


def _shape(geometry: Geometry) -> str:
    return (
        f"{geometry.chunk_tokens} tokens, {geometry.layers} layers of"
        f" {geometry.key_bytes} + {geometry.value_bytes} bytes a token"
    )


def _tell_moved(what: str, contents: Contents, file: Path, size: int, as_json: bool) -> None:
    manifest = contents.manifest
    if as_json:
        _print_json(
            {
                "turn_key": manifest.turn_key,
                "file": str(file),
                "file_bytes": size,
                "chunks": len(manifest.chunk_ids),
                "kv_tokens": manifest.kv_tokens,
                "kv_bytes": contents.kv_bytes,
            }
        )
    else:
        print(
            f"{what} {manifest.turn_key.hex()}: {manifest.kv_tokens:,} tokens in {len(manifest.chunk_ids)} chunks,"
            f" {format_size(contents.kv_bytes)} of KV; {file} has {format_size(size)}"
        )


# -- erase -----------------------------------------------------------------------------------------------------


@app.command()
@with_settings(*_LINKS)
def erase(
    settings: Settings,
    turn: Key,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> int:
    """Remove a turn, what continues it and what only leads to it, from DRAM and SSD.

    Prints a receipt; exit code 1 if it has gaps.

    The gateway's journal keeps the messages, and inference keeps KV of its latest turns while it has room for it.
    """

    async def look() -> tuple[bytes, Counter[Relation]]:
        async with StoreClient(settings) as store:
            turn_key = await store.resolve(turn)
            if yes:
                return turn_key, Counter()
            with _spinner("reading", quiet=as_json):
                manifest = await store.manifest(turn_key.hex())
                return turn_key, Counter(kind for kind, _ in await _related(store, manifest))

    async def work(turn_key: bytes) -> ErasureReceipt:
        async with StoreClient(settings) as store:
            with _spinner("erasing; it goes on if you leave, and the kvdaemon logs it", quiet=as_json):
                return await store.ask(Erase(turn_key), ErasureReceipt, _ERASE_S)

    turn_key, related = asyncio.run(look())
    if not yes:  # between two connections: a prompt may wait for long, and is left by Ctrl-C
        later, earlier = related[Relation.LATER], related[Relation.EARLIER]
        typer.confirm(
            f"Erase turn {turn_key.hex()}, {later} that continue it, and those of {earlier} earlier ones that nothing"
            " else continues, for good?",
            abort=True,
            err=True,
        )
    receipt = asyncio.run(work(turn_key))
    if as_json:
        _print_json(dataclasses.asdict(receipt))
        return 1 if receipt.left else 0
    console = _results()
    for turn_key in receipt.turn_keys:
        console.print(f"erased turn {turn_key.hex()}")
    table = _table("from", "chunks", "KV", "contexts")
    table.add_row("DRAM", f"{len(receipt.dram_chunks):,}", format_size(receipt.dram_bytes), "")
    table.add_row("SSD", f"{len(receipt.ssd_chunks):,}", format_size(receipt.ssd_bytes), f"{receipt.ssd_manifests:,}")
    console.print("", table, "", sep="\n")
    console.print(
        f"DRAM: {format_size(receipt.wiped_bytes)} overwritten with zeros, memory in no use included;"
        f" {receipt.leases_revoked} leases revoked."
    )
    before, after = format_size(receipt.ssd_physical_before), format_size(receipt.ssd_physical_after)
    console.print(f"SSD: destroyed where it lay, compacted; the tier's files took {before} before, {after} after.")
    if receipt.shared_chunks:
        console.print(f"{receipt.shared_chunks} chunks stay: other conversations begin with the same text.")
    if receipt.deferred_slots:
        console.print(
            f"Slots in the hands of inference: {receipt.deferred_slots}. What earlier chunks left in them is"
            " overwritten when they come back."
        )
    for left in receipt.left:
        _warn(f"left: {left}")
    return 1 if receipt.left else 0


# -- output ----------------------------------------------------------------------------------------------------


def _print_json(document: object) -> None:
    print(json.dumps(document, indent=2, default=bytes.hex))  # ids are the only bytes there are


def _results() -> Console:
    """Lines and tables that a pipe gets whole."""
    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else _PIPE_COLUMNS)


def _errors() -> Console:
    """For what is no result: progress and warnings."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def _warn(message: str) -> None:
    console = _errors()
    console.print("[bold yellow]warning[/] ", end="")
    console.print(message, markup=False)


def _table(*columns: str) -> Table:
    """A table whose first column is a name that is never cut, to be copied; most others are numbers."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for number, column in enumerate(columns):
        is_text = number == 0 or column in _TEXT_COLUMNS
        table.add_column(column, justify="left" if is_text else "right", no_wrap=number == 0)
    return table


def _tier(size: int, tokens: int, of_tokens: int) -> str:
    """How much of a context's KV is in a tier."""
    if not size:
        return "-"
    return format_size(size) if tokens == of_tokens else f"{format_size(size)} ({tokens / of_tokens:.0%})"


def _when(wall_s: float) -> str:
    """How long ago that is; "-" for 0."""
    if not wall_s:
        return "-"
    seconds = max(0, int(time.time() - wall_s))
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size}{unit} ago"
    return f"{seconds}s ago"


@contextlib.contextmanager
def _spinner(what: str, *, quiet: bool) -> Iterator[None]:
    if quiet:
        yield
        return
    with _errors().status(what):
        yield


def _progress(*columns: ProgressColumn, quiet: bool) -> Progress:
    console = _errors()
    return Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)


@contextlib.contextmanager
def _bar(what: str, total: int, quiet: bool) -> Iterator[Callable[[], None]]:
    """Chunks done of all; call what it gives for each."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with _progress(*columns, quiet=quiet) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)
