"""Stop strings in text that comes in pieces. Pure."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text on up to the first stop string, and nothing of that one.

    Where several could match, the one that completes first wins, and of those the one that begins first: what comes
    out does not depend on how the text was cut into pieces. Text is held back only while it could begin a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.is_met = False
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""  # the end of the text so far that begins some stop string

    def feed(self, piece: str) -> str:
        """Take more text. Returns what no later text can make part of a stop string; nothing once one was met."""
        if not self._stops:
            return piece
        if self.is_met:
            return ""
        text = self._held + piece
        # A stop string that began before the held text would have ended in it, or still be held.
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.is_met = True
            self._held = ""
            return text[: min(found)[1]]
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """No more text comes. Returns what was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How long an end of `text` is the beginning of `stop`, short of the whole."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
