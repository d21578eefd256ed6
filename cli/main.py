"""The command `cachedattention`. Each command is a few lines here and a module of its name beside this one."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
from monitoring import logs, traces
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

_LOGS = ("log_level", "log_format", "otlp_endpoint")
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
@with_settings(
    *(
        "host",
        "port",
        "api_keys",
        "api_key_hashes",
        "anonymous",
        "tls_certificate",
        "tls_key",
        "no_page",
        "cors_origins",
    ),
    *("queue_limit", "queue_policy", "turn_timeout", "max_body", "database_url", *_LINKS),
)
def gateway(settings: Settings, parent: Parent = 0) -> int:
    """Run the gateway alone: the REST API and the queue."""
    config = settings.gateway_config()
    _enter_service("gateway", settings, parent)
    with _for_good():
        from gateway.service import run as serve

    return serve(config)


@app.command()
@with_settings(
    *("model", "device", "dtype", "max_context", "chunk_tokens", "no_reuse", "working_kv", "paged", "retain"),
    *("no_cuda_graphs", "max_running", "step_tokens", "step_stretch", "stream_interval"),
    *("truncation_ratio", "keep_system", "keep_first", "overflow"),
    *("load_or_compute", "no_preload", "read_buffer", "save", "write_buffer", "link_bandwidth"),
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
    from inference.environment import for_torch

    with _for_good(), for_torch(worker, settings.workers):
        from inference.service import run as serve

    return serve(config)


@app.command()
@with_settings(
    "dram", "ssd", "ssd_write_budget", "placement", "verify", "metrics_host", "metrics_port_kvdaemon", *_LINKS
)
def kvdaemon(settings: Settings, parent: Parent = 0) -> int:
    """Run kvdaemon alone: the store of DRAM and SSD."""
    config = settings.kvdaemon_config()
    _enter_service("kvdaemon", settings, parent)
    with _for_good():
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
@with_settings("model", "dtype", "chunk_tokens")
def size(
    settings: Settings,
    conversations_per_hour: Annotated[float, typer.Option(metavar="N", help="That begin.")],
    turns: Annotated[int, typer.Option(metavar="N", help="Of a conversation.")] = 8,
    turn_tokens: Annotated[int, typer.Option(metavar="N", help="Question and answer, in tokens.")] = 400,
    think_time: Annotated[
        float, typer.Option(metavar="SECONDS", help="Between an answer and the next turn, mean.")
    ] = 60,
    dram_share: Annotated[float, typer.Option(help="Of the follow-ups that shall find their history in DRAM.")] = 0.95,
    keep: Annotated[float, typer.Option(metavar="HOURS", help="For which SSD keeps a conversation.")] = 24,
    max_context: Annotated[int, typer.Option(metavar="N", min=1, help="Longest context in tokens.")] = 131_072,
    kv_bytes_per_token: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Of all layers.", show_default="by the model's config.json")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say how much DRAM and SSD a load needs."""
    from cli.size import Load, as_json, plan_size, read_config, report, token_bytes

    load = Load(conversations_per_hour, turns, turn_tokens, think_time, dram_share, keep * 3600)
    kv_bytes = kv_bytes_per_token or token_bytes(read_config(settings.model), settings.dtype)
    need = plan_size(load, kv_bytes, max_context, settings.chunk_tokens)
    typer.echo(as_json(need, kv_bytes) if json else report(load, need, kv_bytes))


@app.command()
def keys(directory: Annotated[Path, typer.Argument(help="Where to write them.")]) -> None:
    """Make a pair of CURVE keys for services on several machines."""
    make_keys(directory)
    typer.echo(f"Copy {directory} to each machine, readable to the services only, and give them --keys {directory}.")


@app.command(name="api-key")
def api_key(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file of --api-keys; made if it is not there.")],
    name: Annotated[str, typer.Option(metavar="TEXT", help="Whose it is, for people.")],
    tenant: Annotated[str, typer.Option(metavar="TEXT", help="Whose conversations it sees.")] = "default",
    admin: Annotated[bool, typer.Option("--admin", help="May use /admin.")] = False,
) -> None:
    """Make an API key, show it once, and add its digest to a file."""
    from cli.keys import add_api_key

    typer.echo(add_api_key(file, name, tenant, admin=admin))
    typer.echo(f"It is shown only now. {file} holds its digest; restart the gateway with --api-keys {file}.", err=True)


def _enter_service(name: str, settings: Settings, parent: int) -> None:
    if parent:
        die_with(parent)
    logs.configure(name, settings.log_level, settings.log_format)
    traces.configure(name, settings.otlp_endpoint)
    prepare(settings.data_dir, settings.run_dir)


@contextmanager
def _for_good() -> Iterator[None]:
    """Import with the garbage collector off, and keep from it what is there then.

    Modules live as long as the process. The collector would walk through those of torch and transformers again and
    again: for a second while they come, for another at the end, and in full collections while turns run.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


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
