"""Writes docs/configuration.md from the settings: `python -m cli.reference`. A test compares the page to this."""

from __future__ import annotations

import inspect
from pathlib import Path

from pydantic_core import PydanticUndefined

from cli import main
from cli.options import metavar
from cli.settings import PREFIX, Settings
from cli.sizes import format_size

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
_SERVICES = ("gateway", "inference", "kvdaemon")
# What a directory depends on, in words.
_MADE = {
    "data_dir": "`$XDG_DATA_HOME/cachedattention`, else `~/.local/share/cachedattention`",
    "run_dir": "a directory of `/dev/shm` for each user and data directory",
    "inference_endpoint": "`ipc://` in `--run-dir`",
    "kvdaemon_endpoint": "`ipc://` in `--run-dir`",
}
_HEAD = """# Configuration

Written by `python -m cli.reference` from `cli/settings.py`; do not edit.

Each setting is an option of `cachedattention up`. It is taken from the flag, else from the environment variable, else
from the TOML file of `--config` (or `CACHEDATTENTION_CONFIG`), else it is the default. In a file the key is the flag
without its dashes:

```toml
dram = "4GiB"
max-context = 8192
```

Sizes are `512MiB`, `2GB` or a number of bytes. An unknown key, a bad value and a missing file stop the start, by name.
*Of* says which service reads it, where each is started alone.

| flag | variable | value | default | of | what |
| --- | --- | --- | --- | --- | --- |
"""


def text() -> str:
    """The whole page."""
    return _HEAD + "\n".join(_row(name) for name in Settings.model_fields) + "\n"


def _row(name: str) -> str:
    field = Settings.model_fields[name]
    flag = f"--{name.replace('_', '-')}"
    value = "switch" if field.annotation is bool else metavar(name).replace("|", ", ")
    services = [service for service in _SERVICES if name in _options_of(service)]
    of = "all" if len(services) == len(_SERVICES) else ", ".join(services)
    what = (field.description or "").replace("|", "\\|")
    return f"| `{flag}` | `{PREFIX}{name.upper()}` | {value} | {_default(name)} | {of} | {what} |"


def _options_of(service: str) -> set[str]:
    return set(inspect.signature(getattr(main, service)).parameters)


def _default(name: str) -> str:
    default = Settings.model_fields[name].default
    if default is PydanticUndefined:
        return _MADE[name]
    if default is None or default == "":
        return ""
    if default is False:
        return "off"
    if metavar(name) == "SIZE":
        return f"`{format_size(default).replace(' ', '')}`" if default else "`0`"
    return f"`{default}`"


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
