"""`cachedattention up`, as three real services with the embedded model: start, heal, end, and what is in the way."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cli.up import restart_delay_s
from tests.cli.running import Up, cli, eventually, running_up, up_arguments


@given(st.lists(st.floats(0, 200), max_size=20))
def test_restarts_come_slower_until_a_minute_of_health(ran: list[float]) -> None:
    delay_s = 0.0
    for ran_s in ran:
        before_s, delay_s = delay_s, restart_delay_s(delay_s, ran_s)
        assert 0.5 <= delay_s <= 10.0
        if ran_s >= 60 or not before_s:
            assert delay_s == 0.5
        else:
            assert delay_s == min(2 * before_s, 10.0)


def leftovers(up: Up) -> list[str]:
    """What should not be there any more after the end of `up`."""
    locks = [path.name for path in up.data_dir.glob("*.lock")]
    runs = [str(path) for path in up.run_dir.rglob("*")] if up.run_dir.exists() else []
    return [*map(str, up.alive()), *locks, *runs]


def test_from_start_to_ctrl_c(tmp_path: Path) -> None:
    """What is printed works as printed, history is reused, and the end leaves nothing but the data directory."""
    with running_up(tmp_path / "data", "--load-or-compute", "load") as up:
        eventually(lambda: "Ctrl-C stops everything" in up.said(), "all is said")
        said = up.said()
        assert said.count("/metrics") == 3
        request = re.search(r"curl .*?}'", said, re.DOTALL)
        assert request is not None
        pasted = subprocess.run(
            ["bash", "-c", request[0].replace("curl", "curl --silent --fail", 1)], capture_output=True, check=False
        )
        assert pasted.returncode == 0, pasted.stderr
        assert b'"chat.completion"' in pasted.stdout
        assert json.loads(pasted.stdout)["choices"][0]["message"]["content"]
        command, *arguments = next(shlex.split(line) for line in said.splitlines() if " chat --url " in line)
        assert shutil.which(command) is not None
        assert arguments == ["chat", "--url", up.url]

        first = up.ask("Tell me something.")
        answer = first["choices"][0]["message"]["content"]  # type: ignore[index]
        second = up.ask("Tell me something.", answer, "And more.")
        cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]  # type: ignore[index]
        assert cached >= first["usage"]["total_tokens"] - 1  # type: ignore[index]

        for url in re.findall(r"http://\S+/metrics", said):
            assert "cachedattention_" in httpx.get(url, trust_env=False).text
        assert up.interrupt() == 0, up.said()
        assert leftovers(up) == []
        assert not up.run_dir.exists()
        assert "killed" not in up.said()


def test_what_was_said_survives_a_restart_of_everything(tmp_path: Path) -> None:
    with running_up(tmp_path / "data") as up:
        first = up.ask("Remember this.", max_tokens=24)
        assert up.interrupt(signal.SIGTERM) == 0
    answer = first["choices"][0]["message"]["content"]  # type: ignore[index]
    with running_up(tmp_path / "data", "--load-or-compute", "load") as up:
        second = up.ask("Remember this.", answer, "Do you?")
        usage = second["usage"]
        assert usage["cachedattention"]["ssd"] >= first["usage"]["total_tokens"] - 1, usage  # type: ignore[index]
        assert up.interrupt() == 0


@pytest.mark.parametrize("name", ["gateway", "inference", "kvdaemon"])
def test_a_killed_service_is_started_again(tmp_path: Path, name: str) -> None:
    with running_up(tmp_path / "data") as up:
        up.ask("Hello.")
        victim = up.service(name)
        assert victim is not None
        victim.kill()
        eventually(lambda: f"{name} ended (SIGKILL); starting it again in 0.5 s" in up.said(), "the visible line")

        def back() -> bool:
            service = up.service(name)
            if service is None or service.pid == victim.pid:
                return False
            try:
                state = httpx.get(f"{up.url}/ready", timeout=2, trust_env=False)
            except httpx.HTTPError:
                return False
            return state.status_code == 200 and state.json()["state"] == "ok"

        eventually(back, f"{name} is back")
        up.ask("Hello again.")
        assert up.interrupt() == 0, up.said()
        assert leftovers(up) == []


def test_two_workers(tmp_path: Path) -> None:
    """Each has its name, its metrics and its share of the cores; one that dies comes back, and nobody misses it."""
    with running_up(tmp_path / "data", "--workers", "2") as up:
        urls = re.findall(r"(http://\S+)/metrics +\((inference-\d)\)", up.said())
        assert [name for _, name in urls] == ["inference-1", "inference-2"]
        victim = up.service("inference-1")
        assert victim is not None
        victim.kill()
        for number in range(3):
            up.ask(f"Hello {number}.")
        eventually(lambda: "inference-1 ended (SIGKILL); starting it again" in up.said(), "the visible line")

        def state() -> str:
            return str(httpx.get(f"{up.url}/ready", timeout=2, trust_env=False).json()["state"])

        eventually(lambda: up.service("inference-1") not in (None, victim) and state() == "ok", "it is back")
        threads = {int(found) for found in re.findall(r"serving .*threads=(\d+)", up.said())}
        assert threads == {max(1, torch.get_num_threads() // 2)}
        for url, _ in urls:
            assert httpx.get(f"{url}/ready", trust_env=False).json()["state"] == "ok"
        assert up.interrupt() == 0, up.said()
        assert leftovers(up) == []
        assert "killed" not in up.said()


def test_kill_9_of_up_itself_leaves_no_process(tmp_path: Path) -> None:
    with running_up(tmp_path / "data") as up:
        up.note_processes()
        assert len(up.alive()) >= 3
        up.process.kill()
        up.process.wait()
        eventually(lambda: not up.alive(), "the services end with it", 60)
    # And nothing it left behind is in the way of the next one.
    with running_up(tmp_path / "data") as up:
        assert up.interrupt() == 0


def test_a_second_ctrl_c_hurries(tmp_path: Path) -> None:
    """A service that does not listen cannot hold up the end."""
    with running_up(tmp_path / "data") as up:
        stubborn = up.service("gateway")
        assert stubborn is not None
        stubborn.suspend()
        up.note_processes()
        up.process.send_signal(signal.SIGINT)
        status = Path(f"/proc/{up.process.pid}/status")
        # Of two that wait in the kernel it would see one.
        eventually(lambda: "ShdPnd:\t0000000000000000" in status.read_text(), "the first one is taken")
        up.process.send_signal(signal.SIGINT)
        assert up.process.wait(14) == 1  # with a second to spare before the gateway's time is over
        assert "gateway did not stop; killed" in up.said()
        assert leftovers(up) == []


def test_keep_arena(tmp_path: Path) -> None:
    with running_up(tmp_path / "data", "--keep-arena") as up:
        up.ask("Hello.")
        assert up.interrupt() == 0
        assert os.listdir(up.run_dir) == ["arena"]


def test_two_ups_on_one_data_directory(tmp_path: Path) -> None:
    with running_up(tmp_path / "data") as up:
        second = cli(*up_arguments(tmp_path / "data", tmp_path / "other"))
        assert second.returncode == 2
        assert second.stderr.startswith(b"error another cachedattention up is using")
        assert str(tmp_path / "data").encode() in second.stderr
        third = cli(*up_arguments(tmp_path / "other data", up.run_dir))
        assert third.returncode == 2
        assert str(up.run_dir).encode() in third.stderr
        up.ask("Still there?")
        doctor = cli("doctor", "--data-dir", str(tmp_path / "data"), "--port", up.url.rsplit(":", 1)[1])
        assert doctor.returncode == 1
        assert b"another cachedattention up" in doctor.stdout or b"another up is using" in doctor.stdout
        assert b"Address already in use" in doctor.stdout
        assert up.interrupt() == 0


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for option in ("--port", "--metrics-port-kvdaemon"):
            done = cli(*up_arguments(tmp_path / "data", tmp_path / "run"), option, port)
            assert done.returncode == 2
            assert f"port {port}: Address already in use; choose another {option}".encode() in done.stderr
            assert done.stderr.count(b"\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_service_that_cannot_start_is_shown_with_its_last_words(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "no such thing"}')
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    done = cli(*up_arguments(tmp_path / "data", tmp_path / "run"), "--model", str(model))
    assert done.returncode == 2
    assert b"inference ended at start" in done.stderr
    assert b"no such thing" in done.stderr
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    assert not (tmp_path / "run").exists()


def test_a_start_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    done = cli(*up_arguments(tmp_path / "data", tmp_path / "run"), "--start-timeout", "1")
    assert done.returncode == 2
    assert b"was not ready within 1 s" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_wrong_option_is_one_clear_line(tmp_path: Path) -> None:
    done = cli("up", "--dram", "plenty")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"error --dram: 'plenty' is no size; write 512MiB, 2GB or a number of bytes\n"


def test_what_a_service_would_refuse_is_refused_before_anything_runs(tmp_path: Path) -> None:
    done = cli(*up_arguments(tmp_path / "data", tmp_path / "run"), "--chunk-tokens", "5")
    assert done.returncode == 2
    assert done.stderr.startswith(b"error chunk_tokens must be at least 16")
    assert list(tmp_path.iterdir()) == []


def test_a_service_alone_reports_what_stops_it(tmp_path: Path) -> None:
    places = ("--data-dir", str(tmp_path / "data"), "--run-dir", str(tmp_path / "run"))
    done = cli("inference", *places, "--chunk-tokens", "5")
    assert done.returncode == 2
    assert b"chunk_tokens" in done.stderr
    assert list(tmp_path.iterdir()) == []
