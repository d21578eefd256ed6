"""Our engine beside its peers: the same weights, the same conversations, the same cores, in one run.

    python -m benchmarks.engine [--peers llama,vllm,transformers] [--dtype bfloat16] [--json FILE]
    python -m benchmarks.engine --install llama,vllm

All engines of a scenario are up, and one plays at a time: a request of a conversation, or a crowd of clients, then the
next engine the same, when the one before has come to rest. In each round they are started anew, in another order. A
peer that is not installed is said to be so, and the rest runs. Ratios are of medians.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from benchmarks.engine import environments, weights
from benchmarks.engine.load import client
from benchmarks.engine.report import agreement, figures, results
from benchmarks.engine.scenarios import Played, Scenario, Sizes, crowd, turns, warm_up
from benchmarks.engine.servers import (
    Dtype,
    LlamaServer,
    Ours,
    OursRetaining,
    Server,
    Setting,
    Transformers,
    TransformersBatching,
    Vllm,
    running,
)
from benchmarks.store.figures import Section, table
from benchmarks.turns import _cpu

MIB = 2**20
PEERS = ("llama", "vllm", "transformers")
SCENARIOS = ("turns", "scarce", "crowd")
TINY = Sizes(conversations=2, turns=2, user=40, answer=6, cold=1, clients=(2,), bursts=1, stream=96, prefills=1)
_PLENTY_BYTES = 512 * MIB  # of KV: more than everything that is said
_WIDTH = 150  # of tables in a file
_OVER = object()  # no piece is left
_SCARCE = 0.6  # of the KV of all conversations


def engines(scenario: str, peers: list[str]) -> dict[str, type[Server]]:
    """What runs in a scenario, by its name in the report."""
    theirs: dict[str, type[Server]] = {"llama": LlamaServer, "vllm": Vllm, "transformers": Transformers}
    ours: dict[str, type[Server]] = {"ours": OursRetaining, "ours, dram": Ours}
    if scenario == "scarce":
        ours = {"ours": Ours}
    if scenario == "crowd":
        ours, theirs["transformers"] = {"ours": OursRetaining}, TransformersBatching
    return ours | {name: theirs[name] for name in peers}


def settings(scenario: str, model: Path, dtype: Dtype, cores: int, sizes: Sizes) -> dict[str, Setting]:
    """What the engines are given in a scenario, by its name in the report."""
    plenty = Setting(model, dtype, cores, sizes.context, _PLENTY_BYTES, running=1)
    if scenario == "crowd":
        return {f"crowd of {clients}": replace(plenty, running=clients) for clients in sizes.clients}
    if scenario == "scarce":
        said = sizes.conversations * (sizes.last_prompt + sizes.answer) * weights.kv_token_bytes(model, dtype)
        return {"scarce": replace(plenty, kv_bytes=max(1, int(_SCARCE * said / MIB)) * MIB)}
    return {"turns": plenty}


@dataclass
class _Playing:
    """An engine in a round: up, and some way into the scenario."""

    server: Server
    pieces: AsyncIterator[None]


class Contest:
    """What each engine does in one scenario. A peer that fails is left out; ours must not."""

    def __init__(
        self,
        scenario: Scenario,
        kinds: dict[str, type[Server]],
        setting: Setting,
        sizes: Sizes,
        step: Callable[[str], None] = lambda name: None,
    ) -> None:
        """step: told whose piece begins."""
        self.played = {name: Played() for name in kinds}
        self.failed: dict[str, str] = {}  # why, by name
        self._scenario = scenario
        self._kinds = kinds
        self._setting = setting
        self._sizes = sizes
        self._step = step
        self._playing: dict[str, _Playing] = {}

    def run(self, rounds: int) -> None:
        """Raises RuntimeError: our engine failed."""
        names = list(self._kinds)
        for number in range(rounds):
            shift = number % len(names)
            asyncio.run(self._round(number, [*names[shift:], *names[:shift]]))

    async def _round(self, number: int, names: list[str]) -> None:
        """Starts all engines one after another, then lets them play their pieces in turn."""
        self._playing = {}
        async with contextlib.AsyncExitStack() as stack:

            async def start(name: str) -> bool:
                server, start_s = stack.enter_context(running(self._kinds[name], self._setting))
                http, played = await stack.enter_async_context(client(server.url)), self.played[name]
                pieces = self._scenario(http, server, self._sizes, f"{number}", played)
                self._playing[name] = _Playing(server, pieces)
                played.start_s.append(start_s)
                await warm_up(http, self._sizes, f"{number}")
                return True

            left = [name for name in names if name not in self.failed and await self._tried(name, start)]
            while left:
                left = [name for name in left if await self._tried(name, self._piece)]

    async def _piece(self, name: str) -> bool:
        """Whether there may be more."""
        return await anext(self._playing[name].pieces, _OVER) is not _OVER

    async def _tried(self, name: str, action: Callable[[str], Awaitable[bool]]) -> bool:
        """Whether the engine plays on after this. It has come to rest then."""
        self._step(name)
        plays_on = False
        try:
            plays_on = await action(name)
        except* RuntimeError as errors:
            if issubclass(self._kinds[name], Ours):
                raise
            self.failed[name] = _reason(errors, self._playing.get(name))
            del self.played[name]
        if name in self._playing:
            await self._playing[name].server.rest()
        return plays_on


def _reason(errors: BaseExceptionGroup, playing: _Playing | None) -> str:
    """Why an engine failed, with the end of its log where it died."""
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if playing is not None and playing.server.has_died:
        return f"{playing.server.log()[-3000:]}\n{error}"
    return str(error)


def main(
    peers: Annotated[str, typer.Option(help="By comma; the engines to compare with.", metavar="LIST")] = ",".join(
        PEERS
    ),
    only: Annotated[str, typer.Option(help="Scenarios, by comma.", metavar="LIST")] = ",".join(SCENARIOS),
    dtype: Annotated[Dtype, typer.Option(help="Of weights and KV.")] = "bfloat16",
    conversations: Annotated[int, typer.Option(min=1)] = Sizes.conversations,
    turns_each: Annotated[int, typer.Option("--turns", min=2, help="Turns of each conversation.")] = Sizes.turns,
    rounds: Annotated[int, typer.Option(min=1, help="How often each engine is started and played on.")] = 3,
    cores: Annotated[int, typer.Option(min=1, help="CPU cores for the engine and the load.")] = 2,
    quick: Annotated[bool, typer.Option(help="Tiny sizes: proves that it runs; its figures mean nothing.")] = False,
    install: Annotated[str, typer.Option(help="Make the environments of these peers and stop.", metavar="LIST")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all figures there.")] = None,
) -> None:
    """Compare our engine with its peers."""
    if install:
        for peer in _listed(install, environments.INSTALLABLE, "--install"):
            environments.install(peer)
        return
    wanted, chosen = _listed(peers, PEERS, "--peers"), _listed(only, SCENARIOS, "--only")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])  # what is started inherits it
    sizes = TINY if quick else Sizes(conversations, turns_each)
    model = weights.tiny() if quick else weights.bench()
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    absent = {peer: environments.problem(peer) for peer in wanted}
    section = Section("engine", f"{model.name}, {dtype}, {cores} cores", facts={k: v for k, v in absent.items() if v})
    found: dict[str, dict[str, Played]] = {}
    for scenario in chosen:
        kinds = engines(scenario, [peer for peer in wanted if not absent[peer]])
        for title, setting in settings(scenario, model, dtype, cores, sizes).items():
            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            with Progress(*columns, console=console, transient=True) as progress:
                task = progress.add_task(title, total=None)
                contest = Contest(
                    crowd if scenario == "crowd" else turns,
                    kinds,
                    setting,
                    sizes,
                    lambda name: progress.update(task, description=f"{title}: {name}"),  # noqa: B023
                )
                contest.run(1 if quick else rounds)
            found[title], failed = contest.played, contest.failed
            section.facts |= {f"{title}, {name}": reason for name, reason in failed.items()}
            if agreed := agreement(found[title]):
                section.facts |= {f"{title}, answers": agreed}
            console.print(results(f"{title} ({dtype})", found[title], failed))
    section.figures += figures(found)
    console.print(table(section))
    for name, fact in section.facts.items():
        console.print(f"{name}: {fact}")
    if json_file is not None:
        record = {
            "command": " ".join(["python -m benchmarks.engine", *sys.argv[1:]]),
            "machine": {"cpu": _cpu(), "python": platform.python_version(), "kernel": platform.release()},
            "quick": quick,
            "dtype": dtype,
            "sizes": asdict(sizes),
            "played": {t: {name: p.to_json() for name, p in by_name.items()} for t, by_name in found.items()},
            **section.to_json(),
        }
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(record, indent=1) + "\n")


def _listed(given: str, known: tuple[str, ...], hint: str) -> list[str]:
    names = [name for name in given.split(",") if name]
    if unknown := [name for name in names if name not in known]:
        raise typer.BadParameter(f"{', '.join(unknown)}; choose from {', '.join(known)}", param_hint=hint)
    return names


if __name__ == "__main__":
    typer.run(main)
