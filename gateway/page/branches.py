"""The tree of a conversation's turns, as the page walks it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from gateway.journal.tables import Turn


def path_to(turns: Sequence[Turn], last: Turn | None) -> list[Turn]:
    """From the beginning to `last`."""
    by_id = {turn.id: turn for turn in turns}
    path = []
    while last is not None:
        path.append(last)
        last = by_id.get(last.parent_id) if last.parent_id else None
    return path[::-1]


def newest_end(turns: Sequence[Turn], under: Turn | None = None) -> Turn | None:
    """The newest turn, of those that continue `under` or are it. turns: oldest first, so parents come first."""
    if under is None:
        return turns[-1] if turns else None
    below, newest = {under.id}, under
    for turn in turns:
        if turn.parent_id in below:
            below.add(turn.id)
            newest = turn
    return newest


def siblings(turns: Sequence[Turn], turn: Turn) -> list[Turn]:
    """The turns with the same beginning, this one among them, oldest first."""
    return [other for other in turns if other.parent_id == turn.parent_id]
