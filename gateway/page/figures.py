"""The pictures of the machine, as HTML and SVG. Pure; whatever is a text of others is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from gateway.page.machine import Picture, Waiting
from gateway.turns import Account
from protocol.messages import TierStatus, TurnUsage, WorkingKv

_SOURCES = ("hbm", "dram", "ssd", "computed", "missed")
_NAMES = {"hbm": "HBM", "dram": "DRAM", "ssd": "SSD", "computed": "computed", "missed": "missed"}
_WIDTH, _HEIGHT = 300, 56


def seconds(value: float) -> str:
    sign, size = ("−" if value < 0 else ""), abs(value)
    if size < 0.9995:
        return f"{sign}{size * 1e3:.0f} ms"
    return f"{sign}{size:.1f} s" if size < 100 else f"{sign}{size / 60:.1f} min"


def binary(size: int) -> str:
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 10 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def cached(usage: TurnUsage) -> int:
    return usage.hbm + usage.dram + usage.ssd


def saved_s(usage: TurnUsage, prefill_s: float) -> float | None:
    """What the cache saved of a turn's TTFT, as estimated: less than nothing where it cost. None: not known."""
    if not cached(usage):
        return 0.0
    return usage.recompute_s - prefill_s if usage.recompute_s else None


def by_source(usage: TurnUsage) -> dict[str, int]:
    return {
        "hbm": usage.hbm,
        "dram": usage.dram,
        "ssd": usage.ssd,
        "computed": usage.computed,
        "missed": sum(usage.missed.values()),
    }


def legend() -> str:
    keys = "".join(f'<span class="key"><i class="src-{name}"></i>{_NAMES[name]}</span>' for name in _SOURCES)
    return f'<div class="legend">{keys}</div>'


def turn(number: int, usage: TurnUsage, ttft_s: float | None, prefill_s: float | None, longest: int) -> str:
    """A turn: its prompt by source, on the scale of the longest one, and its TTFT with and without the cache."""
    parts = {name: tokens for name, tokens in by_source(usage).items() if tokens}
    told = " · ".join(f"{_NAMES[name]} {tokens:,}" for name, tokens in parts.items())
    times = ""
    if ttft_s is not None and prefill_s is not None:
        saved = saved_s(usage, prefill_s)
        times = f"TTFT <b>{seconds(ttft_s)}</b>"
        if cached(usage) and saved is not None:
            without = seconds(max(0.0, ttft_s + saved))
            times += f' <span class="estimate" title="{_ESTIMATE}">without cache ≈ {without} (estimate)</span>'
    why = "".join(
        f'<div class="why">{tokens:,} missed: {escape(usage.explained.get(reason) or reason.replace("_", " "))}</div>'
        for reason, tokens in usage.missed.items()
    )
    share = 100 * usage.prompt_tokens / max(1, longest)
    return (
        f'<div class="turn" data-turn="{number}" data-cached="{cached(usage)}">'
        f'<div class="pair"><span>Turn {number}</span><span>{usage.prompt_tokens:,} tokens</span></div>'
        f'<div class="bar" role="img" aria-label="{escape(told)}" style="width:{max(share, 4):.1f}%">'
        f'{_segments(parts)}</div><div class="told">{told}</div><div class="told">{times}</div>{why}</div>'
    )


_ESTIMATE = "What computing the whole prompt would take at the measured rates, in place of this turn’s prefill"


def _segments(parts: dict[str, int]) -> str:
    return "".join(f'<i class="src-{name}" style="flex-grow:{tokens}"></i>' for name, tokens in parts.items() if tokens)


def tiers(picture: Picture) -> str:
    """How full each is; of a device, what finished turns have left there is paler."""
    store = picture.store
    devices = "".join(
        _device(_NAMES["hbm"] if len(picture.devices) == 1 else f"{_NAMES['hbm']} of {name}", kv)
        for name, kv in picture.devices.items()
    )
    if store is None:
        return f'{devices}<div class="quiet">The store does not answer; history is computed.</div>'
    note = "" if store.state == "ok" else f'<div class="why">{escape(store.reason)}</div>'
    return devices + _stored("dram", store.dram) + _stored("ssd", store.ssd) + note


def _device(label: str, kv: WorkingKv) -> str:
    retained = min(kv.retained_bytes, kv.used_bytes)
    parts = {"src-hbm": kv.used_bytes - retained, "src-hbm retained": retained}
    return _tier("hbm", label, parts, kv.capacity_bytes, f"{binary(retained)} retained")


def _stored(name: str, tier: TierStatus) -> str:
    return _tier(name, _NAMES[name], {f"src-{name}": tier.used_bytes}, tier.capacity_bytes, f"{tier.chunks:,} chunks")


def _tier(name: str, label: str, parts: Mapping[str, int], capacity: int, what: str) -> str:
    """parts: used bytes by how they look."""
    if not capacity:
        return f'<div class="tier"><div class="pair"><span>{label}</span><span>off</span></div></div>'
    used = sum(parts.values())
    filled = "".join(
        f'<i class="{look}" style="width:{100 * size / capacity:.2f}%"></i>' for look, size in parts.items() if size
    )
    return (
        f'<div class="tier" data-tier="{name}"><div class="pair"><span>{label}</span>'
        f"<span>{binary(used)} of {binary(capacity)} · {what}</span></div>"
        f'<div class="fill" role="img" aria-label="{min(100.0, 100 * used / capacity):.0f}% full">{filled}</div></div>'
    )


def queue(picture: Picture, tenant: bytes) -> str:
    """Who waits, head first, and how far the store looks ahead of them."""
    head = f"{picture.running} running · {picture.waiting} waiting"
    windows, store = "", picture.store
    if store is not None:
        fetch, keep = store.prefetch_window, store.eviction_window
        windows = (
            f'<div class="told">looks ahead: fetches for the first <b>{fetch:,}</b>,'
            f" keeps for the first <b>{keep:,}</b></div>"
        )
    else:
        fetch = keep = 0
    rows = "".join(
        _waiting(place, one, tenant, "fetch" if place < fetch else "keep" if place < keep else "")
        for place, one in enumerate(picture.queue)
    )
    return f'<div class="pair"><span>{head}</span></div>{windows}<div class="queue">{rows}</div>'


def _waiting(place: int, one: Waiting, tenant: bytes, window: str) -> str:
    whose = "yours" if one.tenant == tenant else "another’s"
    parts = {"dram": one.dram, "ssd": one.ssd, "computed": one.new}
    told = ", ".join(f"{_NAMES[name]} {tokens:,}" for name, tokens in parts.items() if tokens)
    return (
        f'<div class="waiting {window}"><span>{place + 1}</span>'
        f'<div class="bar" role="img" aria-label="{told}">{_segments(parts)}</div><span>{whose}</span></div>'
    )


def over_time(accounts: Sequence[Account]) -> str:
    """Hit rate of the last turns, and what the cache has saved of TTFT in all of them."""
    if not accounts:
        return '<div class="quiet">Nothing was asked since the gateway started.</div>'
    prompts = sum(account.usage.prompt_tokens for account in accounts)
    hits = sum(cached(account.usage) for account in accounts)
    total, sums = 0.0, []
    for account in accounts:
        total += saved_s(account.usage, account.prefill_s) or 0.0
        sums.append(total)
    rates = [cached(account.usage) / max(1, account.usage.prompt_tokens) for account in accounts]
    return (
        f'<div class="pair"><span>hit rate</span><span><b>{100 * hits / max(1, prompts):.0f}%</b> of prompt tokens,'
        f" {len(accounts):,} turns</span></div>{_line(rates, 0.0, 1.0, 'hit rate by turn')}"
        f'<div class="pair"><span>saved</span><span><b>≈ {seconds(total)}</b> (estimate)</span></div>'
        f"{_line(sums, min(0.0, *sums), max(1e-9, *sums), 'seconds saved, summed up')}"
    )


def _line(values: Sequence[float], low: float, high: float, what: str) -> str:
    """A line over the turns, oldest at the left."""
    points = list(_points(values, low, high))
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    area = f"{points[0][0]:.1f},{_HEIGHT} {path} {points[-1][0]:.1f},{_HEIGHT}"
    x, y = points[-1]
    return (
        f'<svg class="line" viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none" role="img"'
        f' aria-label="{what}"><polygon points="{area}"/><polyline points="{path}"/>'
        f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x:.1f}" y2="{y:.1f}"/></svg>'
    )


def _points(values: Sequence[float], low: float, high: float) -> Iterable[tuple[float, float]]:
    if len(values) == 1:
        values = [values[0], values[0]]
    for at, value in enumerate(values):
        yield (
            3 + at / (len(values) - 1) * (_WIDTH - 6),
            3 + (1 - (value - low) / (high - low)) * (_HEIGHT - 6),
        )
