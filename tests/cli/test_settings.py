"""Where options come from, and that whatever is wrong with one stops at start by its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from cli.keys import make_keys
from cli.options import with_settings
from cli.settings import PREFIX, Settings, default_run_dir, reachable
from cli.sizes import format_size, parse_size
from protocol.errors import ConfigError

MIB = 1024**2


def load(flags: dict[str, Any] | None = None, environment: dict[str, str] | None = None) -> Settings:
    return Settings.load(flags or {}, environment or {})


def config_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "config.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


# -- sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1048576", MIB),
        ("512MiB", 512 * MIB),
        ("512mib", 512 * MIB),
        (" 2GB ", 2 * 10**9),
        ("2 GB", 2 * 10**9),
        ("1.5GiB", 3 * 512 * MIB),
        ("7B", 7),
        ("3TiB", 3 * 1024**4),
        ("9007199254740993", 9007199254740993),  # more than a float can hold
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1XB", "1e9", "512M", "1.2.3GB", "１GB x", "0x10"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="write 512MiB, 2GB or a number of bytes"):
        parse_size(text)


@given(st.integers(0, 2**50))
def test_a_formatted_size_reads_back_within_half_a_percent(size: int) -> None:
    assert abs(parse_size(format_size(size)) - size) <= 0.005 * size


# -- sources -------------------------------------------------------------------------------------------------


def test_flag_over_environment_over_file_over_default(tmp_path: Path) -> None:
    config = config_file(tmp_path, "port = 1\nqueue-limit = 1\ndram = '1MiB'\n")
    settings = load({"config": config, "port": "3"}, {"CACHEDATTENTION_PORT": "2", "CACHEDATTENTION_QUEUE_LIMIT": "2"})
    assert (settings.port, settings.queue_limit, settings.dram, settings.host) == (3, 2, MIB, "127.0.0.1")


def test_the_configuration_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    config = config_file(tmp_path, "max_running = 3\nno-reuse = true\nssd = 1000\n")
    settings = load({}, {"CACHEDATTENTION_CONFIG": config})
    assert (settings.max_running, settings.no_reuse, settings.ssd) == (3, True, 1000)


def test_every_option_can_come_from_the_environment() -> None:
    """What `up` relies on to hand its settings to the services."""
    settings = load({"port": "9", "no_reuse": True, "max_context": "64", "dram": "5MiB", "data_dir": "/tmp/somewhere"})
    assert load({}, settings.to_environment()) == settings
    assert set(settings.to_environment()) <= {PREFIX + name.upper() for name in Settings.model_fields}


def test_an_empty_variable_counts_as_absent() -> None:
    assert load({}, {"CACHEDATTENTION_MAX_CONTEXT": "", "CACHEDATTENTION_PORT": ""}).port == 8000


def test_variables_of_others_are_no_concern_of_ours() -> None:
    assert load({}, {"PATH": "/bin", "CACHED": "1"}) == load()


@pytest.mark.parametrize(("flag", "kept"), [("--keep-system", True), ("--no-keep-system", False)])
def test_what_is_on_by_default_can_be_switched_off(flag: str, kept: bool) -> None:
    given: list[bool] = []
    app = typer.Typer()
    app.command()(with_settings("keep_system")(lambda settings: given.append(settings.keep_system)))
    result = CliRunner().invoke(app, [flag])
    assert result.exit_code == 0, result.output
    assert given == [kept]


# -- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "environment", "file", "param", "told"),
    [
        ({"port": "x"}, {}, "", "port", "--port: "),
        ({"port": "70000"}, {}, "", "port", "--port: "),
        ({"dram": "lots"}, {}, "", "dram", "--dram: 'lots' is no size"),
        ({"device": "tpu"}, {}, "", "device", "'cpu'"),
        ({"chunk_tokens": "0"}, {}, "", "chunk_tokens", "--chunk-tokens"),
        ({}, {"CACHEDATTENTION_PORT": "x"}, "", "port", "CACHEDATTENTION_PORT: "),
        ({}, {"CACHEDATTENTION_PROT": "1"}, "", "prot", "did you mean CACHEDATTENTION_PORT?"),
        ({}, {"CACHEDATTENTION_ZZZ": "1"}, "", "zzz", "unknown key CACHEDATTENTION_ZZZ"),
        ({}, {}, "prot = 1", "prot", "did you mean port?"),
        ({}, {}, "data-dri = 'x'", "data_dri", "did you mean data_dir"),
        ({}, {}, "port = 'x'", "port", "port: "),
        ({}, {}, "ssd = -1", "ssd", "ssd: "),
        ({}, {}, "port = ", "config", "is not TOML"),
        ({}, {}, "[gateway]\nport = 1", "gateway", "unknown key gateway"),
        ({"model": "./no/such/model"}, {}, "", "model", "is not a directory"),
        ({"kvdaemon_endpoint": "tcp://10.0.0.1:5"}, {}, "", "kvdaemon_endpoint", "CURVE"),
        ({"inference_endpoint": "http://x"}, {}, "", "inference_endpoint", "neither ipc"),
        ({"run_dir": "/" + "x" * 120}, {}, "", "inference_endpoint", "shorter --run-dir"),
        ({"workers": "0"}, {}, "", "workers", "--workers: "),
        ({"workers": "2", "inference_endpoint": "tcp://127.0.0.1:*"}, {}, "", "inference_endpoint", "no port to count"),
        ({"keys": "/no/such/keys"}, {}, "", "keys", "cachedattention keys"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, flags: dict[str, str], environment: dict[str, str], file: str, param: str, told: str
) -> None:
    if file:
        flags = {**flags, "config": config_file(tmp_path, file)}
    with pytest.raises(ConfigError) as caught:
        load(flags, environment)
    assert caught.value.param == param
    assert told in caught.value.message


def test_a_missing_configuration_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config: cannot read .*none\.toml: No such file"):
        load({"config": str(tmp_path / "none.toml")})


# -- what is made of them ------------------------------------------------------------------------------------


def test_configs_of_the_services(tmp_path: Path) -> None:
    settings = load(
        {"data_dir": str(tmp_path), "no_reuse": True, "dram": "5MiB", "ssd": "60MiB", "retain": "7MiB", "port": "0"}
        | {"ssd_write_budget": "1GiB"}
    )
    gateway, inference, kvdaemon = settings.gateway_config(), settings.inference_config(), settings.kvdaemon_config()
    assert (gateway.port, gateway.data_dir, gateway.database_url) == (0, tmp_path, None)
    assert (inference.reuse, inference.retain_bytes, inference.metrics_port) == (False, 7 * MIB, 9101)
    assert (kvdaemon.dram_bytes, kvdaemon.ssd_bytes, kvdaemon.metrics_port) == (5 * MIB, 60 * MIB, 9102)
    assert kvdaemon.ssd_write_budget_bytes == 1024 * MIB
    assert load({}).kvdaemon_config().ssd_write_budget_bytes is None
    assert gateway.inference_endpoints == (inference.endpoint,) == (f"ipc://{settings.run_dir}/inference.sock",)
    assert (inference.worker, inference.workers) == (1, 1)
    assert gateway.kvdaemon_endpoint == inference.kvdaemon_endpoint == kvdaemon.endpoint
    assert inference.run_dir == kvdaemon.run_dir == settings.run_dir


@pytest.mark.parametrize(
    ("endpoint", "numbered"),
    [
        ("ipc:///run/inference.sock", ("ipc:///run/inference-1.sock", "ipc:///run/inference-2.sock")),
        ("ipc:///run.sock/i", ("ipc:///run.sock/i-1", "ipc:///run.sock/i-2")),
        ("tcp://127.0.0.1:7000", ("tcp://127.0.0.1:7000", "tcp://127.0.0.1:7001")),
    ],
)
def test_workers_have_endpoints_of_their_own_that_the_gateway_knows(endpoint: str, numbered: tuple[str, ...]) -> None:
    settings = load({"workers": "2", "inference_endpoint": endpoint})
    assert settings.gateway_config().inference_endpoints == numbered
    for worker in (1, 2):
        config = settings.inference_config(worker)
        assert (config.endpoint, config.worker, config.workers) == (numbered[worker - 1], worker, 2)
    for worker in (0, 3):
        with pytest.raises(ConfigError, match=f"no worker {worker}; --workers is 2"):
            settings.inference_config(worker)


def test_ports_that_up_gives_workers() -> None:
    assert load({"workers": "3"}).worker_metrics_ports() == (9101, 9111, 9121)
    assert load({"workers": "3", "metrics_port_inference": "0"}).worker_metrics_ports() == (0, 0, 0)
    with pytest.raises(ConfigError, match="worker 2 would have 65540"):
        load({"workers": "2", "metrics_port_inference": "65530"}).worker_metrics_ports()


def test_run_directories_are_short_and_differ_by_data_directory(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 200)
    assert default_run_dir(tmp_path) != default_run_dir(deep)
    assert len(os.fsencode(default_run_dir(deep) / "inference.sock")) < 107
    assert load({"data_dir": str(deep)}).run_dir == default_run_dir(deep)


def test_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert load({"data_dir": "data"}).data_dir == tmp_path / "data"
    assert load({"data_dir": "~/data"}).data_dir == Path.home() / "data"


def test_keys_for_tcp_between_machines(tmp_path: Path) -> None:
    make_keys(tmp_path / "keys")
    with pytest.raises(ConfigError, match="holds keys already"):
        make_keys(tmp_path / "keys")
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in (tmp_path / "keys").iterdir())
    settings = load({"keys": str(tmp_path / "keys"), "kvdaemon_endpoint": "tcp://10.0.0.1:5"})
    curve = settings.kvdaemon_config().curve
    assert curve is not None
    assert curve.public == curve.server_public != curve.secret
    (tmp_path / "keys" / "curve.public").write_bytes(b"x" * 40)
    with pytest.raises(ConfigError, match="no pair"):
        settings.curve()


def test_where_to_reach_a_host() -> None:
    assert [reachable(host) for host in ("0.0.0.0", "::", "::1", "example.org")] == [
        "127.0.0.1",
        "[::1]",
        "[::1]",
        "example.org",
    ]
