"""`cachedattention doctor`: it passes where the system would start, and names what to change where it would not."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from cli.doctor import Finding, examine
from cli.settings import Settings
from protocol.arena import exclusive
from tests.cli.running import cli


def findings(tmp_path: Path, **flags: str) -> dict[str, Finding]:
    ports = {"port": "0", "metrics_port_inference": "0", "metrics_port_kvdaemon": "0"}
    given = {"data_dir": str(tmp_path / "data"), "dram": "16MiB", "ssd": "16MiB", **ports, **flags}
    return {finding.check: finding for finding in examine(Settings.load(given, {}))}


def test_this_machine_can_run_it_and_nothing_is_left_behind(tmp_path: Path) -> None:
    found = findings(tmp_path)
    assert [finding for finding in found.values() if finding.verdict == "fail"] == []
    assert {"Python", "CPU", "memory", "room for --dram", "room for --ssd", "open files", "torch", "device"} <= set(
        found
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "check", "advice"),
    [
        ({"dram": "900TiB"}, "memory", "lower --dram"),
        ({"dram": "900TiB"}, "room for --dram", "remount,size="),
        ({"ssd": "900TiB"}, "room for --ssd", "lower --ssd"),
        ({"host": "203.0.113.1"}, "--port", "another --port"),
        ({"data_dir": f"{__file__}/data"}, "data-dir", "another --data-dir"),
    ],
)
def test_what_stops_it_is_named(tmp_path: Path, flags: dict[str, str], check: str, advice: str) -> None:
    finding = findings(tmp_path, **flags)[check]
    assert finding.verdict == "fail", finding
    assert advice in finding.advice


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        found = findings(tmp_path, port=str(taken.getsockname()[1]))
    assert found["--port"].verdict == "fail"
    assert "in use" in found["--port"].found


def test_a_data_directory_in_use(tmp_path: Path) -> None:
    with exclusive(tmp_path / "data" / "kvdaemon.lock", "kvdaemon"):
        found = findings(tmp_path)["data-dir"]
    assert found.verdict == "fail"
    assert "another kvdaemon" in found.found


def test_a_run_directory_on_disk_is_slow_not_wrong(tmp_path: Path) -> None:
    found = findings(tmp_path, run_dir=str(Path(__file__).parent))
    assert found["shared memory"].verdict == "warn"


def test_models(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    assert findings(tmp_path, model=str(model))["model"].verdict == "fail"
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "rope_theta": 1e4}))
    assert "safetensors" in findings(tmp_path, model=str(model))["model"].found
    (model / "model.safetensors").write_bytes(b"")
    assert findings(tmp_path, model=str(model))["model"].verdict == "ok"
    (model / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert findings(tmp_path, model=str(model))["model"].verdict == "warn"


def test_an_installation_without_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert findings(tmp_path)["model"].verdict == "ok"
    monkeypatch.setattr("cli.doctor.MODEL", tmp_path / "weights")
    finding = findings(tmp_path)["model"]
    assert finding.verdict == "fail"
    assert "has no weights" in finding.found


def test_as_a_command(tmp_path: Path) -> None:
    free = ["--port", "0", "--metrics-port-inference", "0", "--metrics-port-kvdaemon", "0"]
    places = ["--data-dir", str(tmp_path / "data"), "--dram", "16MiB", "--ssd", "16MiB"]
    good = cli("doctor", *free, *places, "--json")
    assert good.returncode == 0, good.stdout
    assert {finding["verdict"] for finding in json.loads(good.stdout)} <= {"ok", "warn"}
    bad = cli("doctor", *free, *places, "--ssd", "900TiB")
    assert bad.returncode == 1
    assert b"fail" in bad.stdout
    assert os.listdir(tmp_path) == []
