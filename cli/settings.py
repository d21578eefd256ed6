"""Every option of every command, in one frozen type.

A value comes from the flag, else from the environment (CACHEDATTENTION_PORT for --port), else from the TOML file
of --config, else from the default. Whatever is unknown or impossible stops at start, by the name of its key.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cli.keys import load_keys
from cli.sizes import parse_size
from gateway.api_keys import load_api_keys
from gateway.config import GatewayConfig
from gateway.queue_policies import PolicyName as QueuePolicyName
from inference.config import InferenceConfig
from kvdaemon.config import KvDaemonConfig, PolicyName
from monitoring.logs import LogFormat
from protocol.errors import ConfigError
from protocol.rpc import Curve, check_endpoint

PREFIX = "CACHEDATTENTION_"
MIB = 1024**2
GIB = 1024**3
_LAST_PORT = 65_535
_WORKER_PORTS_APART = 10  # so that the default ports of workers leave room for those of other services


def _size(value: object) -> object:
    return parse_size(value) if isinstance(value, str) else value


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()


def _http_url(value: str | None) -> str | None:
    if value is not None and not value.startswith(("http://", "https://")):
        raise ValueError(f"{value!r} is no URL such as http://127.0.0.1:4318")
    return value


Size = Annotated[int, BeforeValidator(_size), Field(ge=0)]
Directory = Annotated[Path, AfterValidator(_absolute)]
Port = Annotated[int, Field(ge=0, le=_LAST_PORT)]


def default_data_dir() -> Path:
    home = os.environ.get("XDG_DATA_HOME")
    return (Path(home) if home else Path.home() / ".local" / "share") / "cachedattention"


def default_run_dir(data_dir: Path) -> Path:
    """One directory of shared memory for each user and data directory, with a path short enough for sockets."""
    tmpfs = Path("/dev/shm")
    name = f"cachedattention-{os.getuid()}-{blake2b(os.fsencode(data_dir), digest_size=4).hexdigest()}"
    return (tmpfs if tmpfs.is_dir() else Path("/tmp")) / name


def reachable(host: str) -> str:
    """Where to reach a server that listens on `host`, as a URL writes it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


class Settings(BaseModel):
    """Field names are keys of the TOML file; flags and environment variables are made from them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field("embedded", min_length=1, description="'embedded', a directory, or a hub id")
    host: str = Field("127.0.0.1", min_length=1, description="address of the REST API")
    port: Port = Field(8000, description="port of the REST API; 0 takes any")
    data_dir: Directory = Field(default_factory=default_data_dir, description="for SSD tier, journal and secret")
    run_dir: Directory = Field(
        default_factory=lambda known: default_run_dir(known["data_dir"]),
        description="directory on tmpfs for DRAM tier and sockets",
    )
    dram: Size = Field(GIB, description="size of the DRAM tier, such as 512MiB")
    ssd: Size = Field(8 * GIB, description="size of the SSD tier; 0 switches it off")
    ssd_write_budget: Size | None = Field(
        None, description="bytes that may be written to the SSD in a day, such as 200GiB; no limit if not given"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="number format of weights and KV")
    max_context: int | None = Field(None, ge=1, description="longest context in tokens; the model's own if not given")
    chunk_tokens: int = Field(256, ge=1, description="tokens in a chunk, the unit of storage")
    truncation_ratio: float = Field(
        0.5, gt=0, le=1, description="a full context loses so much of --max-context, its oldest part, by whole chunks"
    )
    keep_system: bool = Field(True, description="a full context never loses the system messages at its beginning")
    keep_first: int = Field(0, ge=0, description="a full context never loses so many tokens at its beginning")
    overflow: Literal["keep", "recompute"] = Field(
        "keep", description="KV of what a full context does not lose; recompute is a baseline for measurements"
    )
    workers: int = Field(1, ge=1, le=64, description="inference processes that serve the model together")
    no_reuse: bool = Field(False, description="recompute all history: the baseline of comparisons")
    working_kv: Size | None = Field(
        None, description="KV on the device, of running and finished turns; half of the free memory if not given"
    )
    paged: bool = Field(False, description="keep working KV in pages on the CPU, too, as on CUDA; slower, for tests")
    no_cuda_graphs: bool = Field(False, description="on CUDA, launch the operations of decode steps one by one")
    retain: Size = Field(512 * MIB, description="KV of finished turns kept on the device, as part of --working-kv")
    max_running: int = Field(32, ge=1, description="turns that run at once, if there is memory for them")
    step_tokens: int = Field(512, ge=1, description="most tokens computed in one step")
    step_stretch: float = Field(
        2.5, gt=1, description="a step with prompts takes so many times as long as one in which all turns decode"
    )
    stream_interval: float = Field(
        0.02,
        ge=0,
        le=1,
        description="seconds for which tokens of a streamed answer are gathered; the first, and slow ones, go at once",
    )
    load_or_compute: Literal["auto", "load"] = Field(
        "auto", description="compute history again where that is sooner done than loading it, or always load"
    )
    no_preload: bool = Field(False, description="load all history before computing: the baseline of comparisons")
    read_buffer: Size | None = Field(
        None, description="KV loaded ahead for waiting turns, such as 64MiB; by measured rates if not given"
    )
    save: Literal["async", "sync"] = Field("async", description="save while computing, or before a turn is done")
    write_buffer: Size = Field(GIB, description="KV of finished turns that are not saved yet; further turns end later")
    link_bandwidth: Size = Field(
        0,
        description="slow the link between arena and device to so many bytes per second, for measurements; 0: no limit",
    )
    placement: PolicyName = Field(
        "anticipating", description="what stays in DRAM and on SSD when they are full; scheduler-aware is the paper's"
    )
    verify: Literal["sample", "always"] = Field("sample", description="which loads from DRAM check their checksums")
    queue_limit: int = Field(256, ge=1, description="turns that may wait; further ones are answered 429")
    queue_policy: QueuePolicyName = Field("fcfs", description="which of the waiting turns is next")
    turn_timeout: float = Field(600.0, gt=0, description="most seconds from a request's arrival to its last token")
    max_body: Size = Field(4 * MIB, description="largest request, such as 4MiB")
    api_keys: Directory | None = Field(None, description="file of API keys; see `cachedattention api-key`")
    api_key_hashes: str = Field("", description="API keys as NAME=SHA256[=admin], separated by commas")
    anonymous: bool = Field(False, description="without API keys, serve other machines too")
    tls_certificate: Directory | None = Field(None, description="PEM file of the API's certificate and its chain")
    tls_key: Directory | None = Field(None, description="PEM file of its key")
    no_page: bool = Field(False, description="do not serve the web page at /")
    cors_origins: str = Field("", description="origins whose pages may use the API, separated by commas; * is all")
    database_url: str | None = Field(None, description="SQLAlchemy URL of the journal; SQLite in data-dir if not given")
    metrics_host: str = Field("127.0.0.1", min_length=1, description="address of the services' /metrics and /ready")
    metrics_port_inference: Port = Field(
        9101,
        description="port of inference's /metrics; 0 takes any; up gives each further worker one that is 10 higher",
    )
    metrics_port_kvdaemon: Port = Field(9102, description="port of kvdaemon's /metrics; 0 takes any")
    inference_endpoint: str = Field(
        default_factory=lambda known: f"ipc://{known['run_dir']}/inference.sock",
        description="ZeroMQ endpoint of inference; of several workers, what theirs are made from",
    )
    kvdaemon_endpoint: str = Field(
        default_factory=lambda known: f"ipc://{known['run_dir']}/kvdaemon.sock",
        description="ZeroMQ endpoint of kvdaemon",
    )
    keys: Directory | None = Field(None, description="directory of CURVE keys, for tcp endpoints between machines")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severity to log")
    log_format: LogFormat = Field("text", description="form of log lines")
    otlp_endpoint: Annotated[str | None, AfterValidator(_http_url)] = Field(
        None, description="OTLP/HTTP collector that gets traces, such as http://127.0.0.1:4318; none if not given"
    )

    @classmethod
    def load(cls, flags: Mapping[str, Any], environment: Mapping[str, str]) -> Self:
        """Put the sources together. `flags`: only those given; "config" names the TOML file.

        Raises ConfigError: an unknown key, a bad value or a missing file, with the key and where it came from.
        """
        variables = _from_environment(environment)
        config = flags.get("config") or variables.pop("config", None)
        document = _from_file(Path(config)) if config else {}
        given = {name: value for name, value in flags.items() if name != "config"}
        try:
            settings = cls(**{**document, **variables, **given})
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            key = str(first["loc"][0])
            raise ConfigError(f"{_name(key, given, variables)}: {_plain(first)}", param=key) from error
        settings._check_together()
        return settings

    def _check_together(self) -> None:
        """What one field alone cannot tell. Raises ConfigError."""
        curve = self.curve()
        endpoints = [("inference_endpoint", endpoint) for endpoint in self.inference_endpoints()]
        for key, endpoint in (*endpoints, ("kvdaemon_endpoint", self.kvdaemon_endpoint)):
            try:
                check_endpoint(endpoint, curve)
            except ConfigError as error:
                raise ConfigError(f"{key}: {error.message}", param=key) from error
        looks_local = self.model.startswith((".", "/", "~")) or self.model.count("/") > 1
        if looks_local and not Path(self.model).expanduser().is_dir():
            raise ConfigError(f"model: {self.model} is not a directory", param="model")

    def curve(self) -> Curve | None:
        """Raises ConfigError: the key files are missing or damaged."""
        return load_keys(self.keys) if self.keys is not None else None

    def url(self) -> str:
        """Where to reach the gateway."""
        scheme = "http" if self.tls_certificate is None else "https"
        return f"{scheme}://{reachable(self.host)}:{self.port}"

    def inference_endpoints(self) -> tuple[str, ...]:
        """One for each worker. Raises ConfigError: the configured one cannot be numbered."""
        if self.workers == 1:
            return (self.inference_endpoint,)
        return tuple(_numbered(self.inference_endpoint, number) for number in range(1, self.workers + 1))

    def worker_metrics_ports(self) -> tuple[int, ...]:
        """What `up` gives the workers; 0: any. Raises ConfigError: there are not so many."""
        first = self.metrics_port_inference
        ports = tuple(first and first + _WORKER_PORTS_APART * number for number in range(self.workers))
        if ports[-1] > _LAST_PORT:
            raise ConfigError(
                f"metrics_port_inference: worker {self.workers} would have {ports[-1]}, and {_LAST_PORT} is the last",
                param="metrics_port_inference",
            )
        return ports

    def to_environment(self) -> dict[str, str]:
        """These settings as environment variables: how `up` hands them to the services."""
        values = self.model_dump()
        return {PREFIX + name.upper(): str(value) for name, value in values.items() if value is not None}

    # -- what each service needs to know -----------------------------------------------------------------------

    def gateway_config(self) -> GatewayConfig:
        return GatewayConfig(
            host=self.host,
            port=self.port,
            data_dir=self.data_dir,
            inference_endpoints=self.inference_endpoints(),
            kvdaemon_endpoint=self.kvdaemon_endpoint,
            database_url=self.database_url,
            queue_limit=self.queue_limit,
            queue_policy=self.queue_policy,
            api_keys=load_api_keys(self.api_keys, self.api_key_hashes),
            api_key_file=self.api_keys,
            api_key_hashes=self.api_key_hashes,
            anonymous=self.anonymous,
            tls_certificate=self.tls_certificate,
            tls_key=self.tls_key,
            page=not self.no_page,
            cors_origins=tuple(filter(None, (origin.strip() for origin in self.cors_origins.split(",")))),
            max_body_bytes=self.max_body,
            turn_timeout_s=self.turn_timeout,
            curve=self.curve(),
        )

    def inference_config(self, worker: int = 1) -> InferenceConfig:
        """worker: which of them, from 1. Raises ConfigError: there are not so many."""
        if not 1 <= worker <= self.workers:
            raise ConfigError(f"there is no worker {worker}; --workers is {self.workers}", param="worker")
        return InferenceConfig(
            model=self.model,
            run_dir=self.run_dir,
            endpoint=self.inference_endpoints()[worker - 1],
            kvdaemon_endpoint=self.kvdaemon_endpoint,
            device=self.device,
            dtype=self.dtype,
            max_context=self.max_context,
            chunk_tokens=self.chunk_tokens,
            truncation_ratio=self.truncation_ratio,
            keep_system=self.keep_system,
            keep_first=self.keep_first,
            overflow=self.overflow,
            reuse=not self.no_reuse,
            working_kv_bytes=self.working_kv,
            paged=self.paged,
            cuda_graphs=not self.no_cuda_graphs,
            retain_bytes=self.retain,
            max_running=self.max_running,
            step_tokens=self.step_tokens,
            step_stretch=self.step_stretch,
            stream_interval_s=self.stream_interval,
            load_or_compute=self.load_or_compute,
            preload=not self.no_preload,
            read_buffer_bytes=self.read_buffer,
            save=self.save,
            write_buffer_bytes=self.write_buffer,
            link_bandwidth=self.link_bandwidth,
            metrics_host=self.metrics_host,
            metrics_port=self.metrics_port_inference,
            curve=self.curve(),
            worker=worker,
            workers=self.workers,
        )

    def kvdaemon_config(self) -> KvDaemonConfig:
        return KvDaemonConfig(
            run_dir=self.run_dir,
            data_dir=self.data_dir,
            endpoint=self.kvdaemon_endpoint,
            dram_bytes=self.dram,
            ssd_bytes=self.ssd,
            policy=self.placement,
            ssd_write_budget_bytes=self.ssd_write_budget,
            verify=self.verify,
            metrics_host=self.metrics_host,
            metrics_port=self.metrics_port_kvdaemon,
            curve=self.curve(),
        )


def _numbered(endpoint: str, number: int) -> str:
    """The endpoint of worker `number`: inference.sock becomes inference-1.sock; a tcp port counts up from the first."""
    if endpoint.startswith("tcp://"):
        host, _, port = endpoint.rpartition(":")
        if not port.isdigit():
            raise ConfigError(f"inference_endpoint: {endpoint} has no port to count from", param="inference_endpoint")
        return f"{host}:{int(port) + number - 1}"
    stem = endpoint.removesuffix(".sock")
    return f"{stem}-{number}{endpoint[len(stem) :]}"


def _from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Our variables, by key. An empty one counts as absent: compose cannot leave one out."""
    found = {}
    for variable, value in environment.items():
        if not variable.startswith(PREFIX):
            continue
        key = variable.removeprefix(PREFIX).lower()
        if key == "api_key":  # a client's, not a setting; see chat.py
            continue
        if key not in Settings.model_fields and key != "config":
            raise _unknown(variable, key, [PREFIX + name.upper() for name in _matches(key)])
        if value:
            found[key] = value
    return found


def _from_file(path: Path) -> dict[str, Any]:
    try:
        document = tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config: cannot read {path}: {error.strerror}", param="config") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {path} is not TOML: {error}", param="config") from error
    values = {}
    for written, value in document.items():
        key = written.replace("-", "_")  # as on the command line
        if key not in Settings.model_fields:
            raise _unknown(f"{written} in {path}", key, _matches(key))
        values[key] = value
    return values


def _matches(key: str) -> list[str]:
    return difflib.get_close_matches(key, Settings.model_fields, n=2, cutoff=0.6)


def _unknown(what: str, key: str, matches: list[str]) -> ConfigError:
    hint = f"; did you mean {' or '.join(matches)}?" if matches else ""
    return ConfigError(f"unknown key {what}{hint}", param=key)


def _name(key: str, flags: Mapping[str, Any], variables: Mapping[str, str]) -> str:
    """A key as its source writes it."""
    if key in flags:
        return f"--{key.replace('_', '-')}"
    return PREFIX + key.upper() if key in variables else key


def _plain(error: Any) -> str:
    """What pydantic says of a value, without its own vocabulary."""
    message = str(error["msg"]).removeprefix("Value error, ")
    return message if repr(error["input"]) in message else f"{message}, not {error['input']!r}"
