"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "b": 1} | {
    letter + suffix: base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([a-z]*)", re.IGNORECASE)


def parse_size(text: str) -> int:
    """The bytes of "512MiB", "2GB", "1.5 GiB" or "1048576". Raises ValueError: none of these forms."""
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is no size; write 512MiB, 2GB or a number of bytes")
    # Whole numbers stay exact; a float has no more than 53 bits.
    return int(float(match[1]) * unit + 0.5) if "." in match[1] else int(match[1]) * unit


def format_size(count: float) -> str:
    """Three digits are enough: "8 GiB", "1.5 MiB", "17 B"."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        del units[0]
    return f"{count:.0f} {units[0]}" if count >= 99.95 else f"{count:.3g} {units[0]}"
