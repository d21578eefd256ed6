"""The environment that LMCache runs in: its own, beside a CPU torch, without what LMCache needs for GPUs and remotes.

    python -m benchmarks.store.lmcache_environment

LMCache is installed without its dependencies (they include CUDA packages); of those, what its storage manager imports
is installed by name. Everything goes to build/lmcache; delete it to be rid of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

HOME = Path(__file__).resolve().parents[2] / "build" / "lmcache"
LMCACHE = "0.5.6"
_IMPORTED = (
    *("aiofile", "aiofiles", "aiohttp", "blake3", "cachetools", "cryptography", "msgspec", "numba", "numpy"),
    *("nvtx", "prometheus_client", "psutil", "py-cpuinfo", "pyyaml", "pyzmq", "requests", "safetensors"),
    *("sortedcontainers", "transformers"),
)


def python() -> Path:
    """Its interpreter; may not exist yet."""
    return HOME / "bin" / "python"


def environment() -> dict[str, str]:
    """Variables to run it with: no report of its use to anybody, nothing from a hub, and little to say."""
    return {
        **os.environ,
        "LMCACHE_TRACK_USAGE": "false",
        "LMCACHE_LOG_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }


def problem() -> str:
    """Why LMCache's storage manager cannot run; empty where it can."""
    if not python().exists():
        return "not installed: python -m benchmarks.store.lmcache_environment"
    check = "from lmcache.v1.storage_backend.storage_manager import StorageManager"
    done = subprocess.run([python(), "-c", check], capture_output=True, text=True, env=environment())
    return done.stderr.strip().splitlines()[-1] if done.returncode else ""


def make() -> None:
    """Raises subprocess.CalledProcessError: something could not be installed."""
    subprocess.run([sys.executable, "-m", "venv", str(HOME)], check=True)
    pip = [str(python()), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, f"torch=={version('torch').partition('+')[0]}", *_IMPORTED], check=True)
    subprocess.run([*pip, "--no-deps", f"lmcache=={LMCACHE}"], check=True)


if __name__ == "__main__":
    make()
    sys.exit(problem() or None)
