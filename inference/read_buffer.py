"""The read buffer: how far the loading of waiting jobs reaches ahead of their computation (section 3.2.1). Pure.

The paper's buffer is device memory of its own. Ours is the waiting job's working KV, so what is bounded is not
memory but how much of the link waiting jobs may take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def read_buffer_bytes(history_bytes: int, load_s: float, compute_s: float) -> int:
    """How much of a history must be there when computing begins, so that computing never waits for the rest.

    S_buf = B * (T_load * L_hist - T_pref * L_new), where positive; B * T_load * L_hist are the history's bytes.
    load_s: of the whole history; compute_s: of the new tokens.
    """
    return int(history_bytes * max(0.0, 1.0 - compute_s / load_s)) if load_s > 0 else 0


@dataclass(frozen=True)
class Waiting:
    """A history whose job does not compute yet."""

    layers: int
    layer_bytes: int
    wanted_bytes: int  # read_buffer_bytes


def layers_ahead(waiting: Sequence[Waiting], capacity_bytes: int | None) -> list[int]:
    """How many leading layers of each history may be loaded now, first come, first served.

    capacity_bytes: of the whole buffer; None: as much as each job wants. A layer is computed once all of it is there,
    so each gets one layer more than the formula says, which is about bytes that flow.
    """
    allowed = []
    for history in waiting:
        layers = history.layers
        if capacity_bytes is None:
            layers = min(layers, -(-history.wanted_bytes // max(1, history.layer_bytes)) + 1)
        else:
            layers = min(layers, capacity_bytes // max(1, history.layer_bytes))
            capacity_bytes -= layers * history.layer_bytes
        allowed.append(layers)
    return allowed
