"""The command `cachedattention`. Each command is a few lines here and a module of its name beside this one."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.simulator.names import Format, PolicyName
from cli import kv
from cli.child import die_with
from cli.keys import make_keys
from cli.options import with_settings
from cli.places import prepare
from cli.settings import Settings
from monitoring import logs
from protocol.errors import CachedAttentionError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Chat with a language model that never computes the same token twice.",
)

app.add_typer(kv.app, name="kv")

# Given by `up` to the services it starts.
Parent = Annotated[int, typer.Option("--parent", hidden=True)]
Url = Annotated[str | None, typer.Option("--url", metavar="URL", help="The server.", show_default="--host and --port")]

_LOGS = ("log_level", "log_format")
_LINKS = ("data_dir", "run_dir", "inference_endpoint", "workers", "kvdaemon_endpoint", "keys", *_LOGS)


@app.command()
@with_settings()
def up(
    settings: Settings,
    start_timeout: Annotated[float, typer.Option(metavar="SECONDS", min=1, help="How long a start may take.")] = 120.0,
    keep_arena: Annotated[
        bool, typer.Option("--keep-arena", help="Leave the DRAM tier in memory at the end, for the next start.")
    ] = False,
) -> int:
    """Start kvdaemon, inference and gateway, and keep them running until Ctrl-C."""
    from cli.up import run_up

    logs.configure("up", settings.log_level, settings.log_format)
    return run_up(settings, start_timeout_s=start_timeout, keep_arena=keep_arena)


@app.command()
@with_settings("host", "port", "queue_limit", "database_url", *_LINKS)
def gateway(settings: Settings, parent: Parent = 0) -> int:
    """Run the gateway alone: the REST API and the queue."""
    config = settings.gateway_config()
    _enter_service("gateway", settings, parent)
    from gateway.service import run as serve

    return serve(config)


@app.command()
@with_settings(
    *("model", "device", "dtype", "max_context", "chunk_tokens", "no_reuse", "working_kv", "retain"),
    *("max_running", "step_tokens", "step_stretch"),
    *("metrics_host", "metrics_port_inference", *_LINKS),
)
def inference(
    settings: Settings,
    worker: Annotated[int, typer.Option(metavar="K", help="Which of the --workers this is, from 1.")] = 1,
    parent: Parent = 0,
) -> int:
    """Run inference alone: the model."""
    config = settings.inference_config(worker)
    _enter_service(f"inference-{worker}" if settings.workers > 1 else "inference", settings, parent)
    from inference.openmp import ENVIRONMENT

    os.environ.update({**ENVIRONMENT, **os.environ})
    from inference.service import run as serve

    return serve(config)


@app.command()
@with_settings("dram", "ssd", "placement", "verify", "metrics_host", "metrics_port_kvdaemon", *_LINKS)
def kvdaemon(settings: Settings, parent: Parent = 0) -> int:
    """Run kvdaemon alone: the store of DRAM and SSD."""
    config = settings.kvdaemon_config()
    _enter_service("kvdaemon", settings, parent)
    from kvdaemon.service import run as serve

    return serve(config)


@app.command()
@with_settings("host", "port")
def chat(
    settings: Settings,
    url: Url = None,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Model to ask for; the server's own if not given.")
    ] = None,
    system: Annotated[str, typer.Option(metavar="TEXT", help="System message of the conversation.")] = "",
    max_tokens: Annotated[int | None, typer.Option(metavar="N", min=1, help="Longest answer, in tokens.")] = None,
    temperature: Annotated[float, typer.Option(metavar="T", min=0, help="0 is greedy.")] = 0.0,
) -> int:
    """Chat in the terminal with a running server."""
    from cli.chat import run_chat

    return run_chat(url or settings.url(), model=model, system=system, max_tokens=max_tokens, temperature=temperature)


@app.command()
@with_settings()
def doctor(
    settings: Settings, json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False
) -> int:
    """Check this machine, and say what to change."""
    from cli.doctor import run_doctor

    return run_doctor(settings, as_json=json)


@app.command()
def simulate(
    trace: Annotated[
        Path, typer.Option(metavar="FILE", exists=True, dir_okay=False, help="Recorded trace, gzip or not.")
    ],
    format: Annotated[Format, typer.Option(help="What the trace is written in.")],
    policy: Annotated[
        PolicyName,
        typer.Option(help="belady knows the future; what comes after it is what others do, without an SSD."),
    ],
    dram_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Size of the DRAM tier.")],
    ssd_tokens: Annotated[int, typer.Option(metavar="M", min=0, help="Size of the SSD tier.")] = 0,
    arrival_rate: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            help="Conversations that begin per second, at random.",
            show_default="agentic: 0.01, text: 1, mooncake: as recorded",
        ),
    ] = None,
    sessions: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Draw so many conversations from the trace.", show_default="each once"),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="Of arrivals and draws.")] = 1,
    warm_up: Annotated[int, typer.Option(metavar="N", min=0, help="Requests before counting begins.")] = 0,
    count: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Stop when so many are counted.", show_default="all")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures there.")] = None,
    belady: Annotated[bool, typer.Option(help="Show beside it what belady makes of the same turns.")] = True,
    chunk_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens per chunk; mooncake's are 512.")] = 256,
    bytes_per_token: Annotated[
        int, typer.Option(metavar="N", min=1, help="Of KV; Llama-3.1-8B's by default.")
    ] = 131_072,
    places: Annotated[int, typer.Option(metavar="N", min=1, help="Turns that run at once.")] = 16,
    prefill_rate: Annotated[
        float, typer.Option(metavar="R", help="Tokens per second and turn; inf: at once.")
    ] = 20_000,
    decode_rate: Annotated[float, typer.Option(metavar="R", help="Tokens per second and turn; inf: at once.")] = 50,
    ssd_read_rate: Annotated[float, typer.Option(metavar="R", help="Tokens per second; inf: at once.")] = 40_000,
    ssd_write_rate: Annotated[float, typer.Option(metavar="R", help="Tokens per second; inf: at once.")] = 40_000,
) -> int:
    """Replay a recorded trace through the queue and a placement policy, and count what hits."""
    from benchmarks.simulator.replay import Machine
    from cli.simulate import Options, run_simulate

    options = Options(
        trace=trace,
        format=format,
        policy=policy,
        dram_tokens=dram_tokens,
        ssd_tokens=ssd_tokens,
        arrival_rate=arrival_rate,
        sessions=sessions,
        seed=seed,
        chunk_tokens=chunk_tokens,
        bytes_per_token=bytes_per_token,
        machine=Machine(places, prefill_rate, decode_rate, ssd_read_rate, ssd_write_rate),
        warm_up=warm_up,
        count=count,
        with_belady=belady,
    )
    return run_simulate(options, json)


@app.command()
def keys(directory: Annotated[Path, typer.Argument(help="Where to write them.")]) -> None:
    """Make a pair of CURVE keys for services on several machines."""
    make_keys(directory)
    typer.echo(f"Copy {directory} to each machine, readable to the services only, and give them --keys {directory}.")


def _enter_service(name: str, settings: Settings, parent: int) -> None:
    if parent:
        die_with(parent)
    logs.configure(name, settings.log_level, settings.log_format)
    prepare(settings.data_dir, settings.run_dir)


def run() -> None:
    """Entry point: an error of ours is one clear line and exit code 2."""
    # Bytes that are no text (a prompt, a file name) must not end a command by being printed.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        code = app(standalone_mode=False)
    except CachedAttentionError as error:
        _complain(error.message)
        code = 2
    except typer.Abort:
        code = 130
    except Exception as error:
        # click's own errors know how to show themselves (usage, suggestions); anything else is our bug.
        show = getattr(error, "show", None)
        if show is None:
            raise
        show()
        code = getattr(error, "exit_code", 2)
    sys.exit(code if isinstance(code, int) else 0)


def _complain(message: str) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print("[bold red]error[/] ", end="")
    console.print(message, markup=False)
