"""Which tests may run beside others (`make test`)."""

from __future__ import annotations

from pathlib import Path

import pytest

_STACKS = ("cli", "end_to_end", "faults", "page")


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.path.relative_to(Path(__file__).parent).parts[0] in _STACKS:
        item.add_marker(pytest.mark.stack)
