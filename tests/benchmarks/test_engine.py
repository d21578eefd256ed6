"""The engine's benchmark in its quick form beside transformers, and its report. No figure of a run is judged."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.engine import environments
from benchmarks.engine.__main__ import TINY, Contest
from benchmarks.engine.report import agreement, figures, results
from benchmarks.engine.scenarios import Played, turns
from benchmarks.engine.servers import Program, Setting
from benchmarks.engine.transformers_server import Caches


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.engine", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The JSON of a real quick run, ours beside transformers."""
    path = tmp_path_factory.mktemp("engine") / "found.json"
    fixed = ("--quick", "--dtype", "float32", "--only", "turns,crowd", "--peers", "transformers")
    done = run(*fixed, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def test_figures_of_a_run_are_numbers(record: dict[str, Any]) -> None:
    assert record["quick"] is True
    for figure in record["figures"]:
        assert math.isfinite(figure["value"]), figure
        assert figure["value"] > 0, figure


def test_turns(record: dict[str, Any]) -> None:
    """Conversations run on our engine and transformers': each reuses the whole history, and in float32 answers are
    equal; the report holds ours against theirs."""
    played = record["played"]["turns"]
    assert list(played) == ["ours", "ours, dram", "transformers"]
    for engine in played.values():
        # Cached: the first turn's prompt of 43 tokens, and its answer's 6 but the last, which was never computed.
        assert engine["prompt_tokens"] == [93, 93]
        assert engine["cached_tokens"] == [48, 48]
        assert len(engine["cold_ttft_s"]) == len(engine["memory_bytes"]) == len(engine["start_s"]) == 1
    assert record["facts"]["turns, answers"] == "ours, dram 4 of 4 equal, transformers 4 of 4 equal"
    assert {figure["name"] for figure in record["figures"]} >= {"turn with cached history, TTFT", "start"}


def test_crowd(record: dict[str, Any]) -> None:
    """Many clients at once run on our engine and on transformers' continuous batching."""
    played = record["played"]["crowd of 2"]
    assert list(played) == ["ours", "transformers"]
    for engine in played.values():
        assert engine["tokens_per_s"][0] > 0
        assert engine["gaps_s"]
    crowd = [figure["against_name"] for figure in record["figures"] if figure["name"].startswith("crowd")]
    assert crowd == ["transformers", "its median"]


class Broken(Program):
    """A peer that dies when it starts."""

    def command(self) -> list[str]:
        return [sys.executable, "-c", "raise SystemExit('there is no memory')"]


class Silent(Program):
    """A peer that says it is ready and breaks off every answer."""

    def command(self) -> list[str]:
        server = (
            "import http.server as h\n"
            "class Half(h.BaseHTTPRequestHandler):\n"
            "    def do_GET(self): self.send_response(200); self.end_headers()\n"
            "    def do_POST(self): self.connection.close()\n"
            f"h.HTTPServer(('127.0.0.1', {self.port}), Half).serve_forever()"
        )
        return [sys.executable, "-c", server]


def test_a_peer_that_fails_is_said_to(tmp_path: Path) -> None:
    """One that dies at its start, and one whose answers break off, end nothing but their own row."""
    setting = Setting(tmp_path, "float32", 1, 512, 2**20, 1)
    contest = Contest(turns, {"broken": Broken, "silent": Silent}, setting, TINY)
    contest.run(1)
    assert contest.played == {}
    assert "there is no memory" in contest.failed["broken"]
    assert "the connection broke" in contest.failed["silent"]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(results("crowd", contest.played, contest.failed))
    assert "failed: there is no memory" in console.export_text()


def test_report_holds_ours_against_the_best_peer() -> None:
    """The best of the peers that ran is chosen, memory is held against vLLM's alone, and answers are compared."""
    ours = Played([9.0], [100], [0.1], [0.5], [0.01], answers=["a", "b"])
    vllm = Played([30.0], [300], [0.2], [0.4], [0.02], answers=["a", "c"])
    llama = Played([1.0], [50], [0.05], [0.8], [0.03], answers=["a", "b"])
    found = {f.name: f for f in figures({"turns": {"ours": ours, "vllm": vllm, "llama": llama}})}
    cached = found["turn with cached history, TTFT"]
    assert (cached.against_name, cached.ratio, cached.is_met) == ("llama", 2.0, False)
    new = found["turn that is all new, TTFT"]
    assert (new.against_name, new.ratio, new.is_met) == ("vllm", 1.25, False)
    assert (found["memory"].against_name, found["memory"].is_met) == ("vllm", True)
    assert found["start"].is_met
    assert agreement({"ours": ours, "vllm": vllm, "llama": llama}) == "vllm 1 of 2 equal, llama 2 of 2 equal"


def test_caches_of_transformers_are_bounded() -> None:
    """A cache serves prompts that go on from it, once until it is given back; the least recently used leave first."""
    caches = Caches(limit=6)
    first, second, third = [1, 2, 3], [4, 5, 6], [7, 8, 9]
    for ids in (first, second):
        _, cache = caches.take([*ids, 0])
        caches.keep(ids, cache)
    assert caches.take([1, 2])[0] == 0
    tokens, cache = caches.take([*first, 0])
    assert tokens == 3
    assert caches.take([*first, 0])[0] == 0
    caches.keep(first, cache)
    caches.keep(third, cache)
    assert [caches.take([*ids, 0])[0] for ids in (first, second, third)] == [3, 0, 3]


@pytest.mark.parametrize(
    "arguments", [["--peers", "llama,tgi"], ["--only", "turns,tape"], ["--install", "transformers"]]
)
def test_unknown_names_are_refused(arguments: list[str]) -> None:
    assert run(*arguments).returncode == 2


def test_what_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a peer's environment is missing, the way to make it is named; transformers needs none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "--install vllm" in environments.problem("vllm")
    assert "--install llama" in environments.problem("llama")
    assert environments.problem("transformers") == ""
