"""`python -m cli` is `cachedattention`: how `up` starts the services."""

from __future__ import annotations

from cli.main import run

run()
