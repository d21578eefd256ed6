"""The benchmark of one device in its quick form, on the CPU. No figure of a run is judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_a_quick_run_tells_all_figures(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--quick", "--device", "cpu", "--repeats", "1"]
    done = subprocess.run(
        [*command, "--arena-dir", str(tmp_path), "--json", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert found["settings"]["device"] == "cpu"
    assert [turn["history"] for turn in found["turns"]] == [256, 1024]
    assert [decoding["jobs"] for decoding in found["decoding"]] == [1, 4]
    for row in found["turns"] + found["decoding"]:
        assert all(value >= 0 for value in row.values())
        assert all(value > 0 for name, value in row.items() if name.endswith("_s"))
