"""Writes dashboards/cachedattention.json: run it after a change here. A test compares the file with this."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).parent / "dashboards" / "cachedattention.json"
_SOURCE = {"type": "prometheus", "uid": "prometheus"}
_WIDTH, _HEIGHT = 8, 8  # three panels to a row of 24

# title, unit, [(query, legend)]; "$rate" is the window of rates
_PANELS: list[tuple[str, str, list[tuple[str, str]]]] = [
    (
        "Share of prompt tokens by source",
        "percentunit",
        [
            (
                "sum by (source) (rate(cachedattention_prompt_tokens_total[$rate]))"
                " / ignoring(source) group_left sum(rate(cachedattention_prompt_tokens_total[$rate]))",
                "{{source}}",
            )
        ],
    ),
    (
        "Time to first token",
        "s",
        [
            (
                f"histogram_quantile({q}, sum by (le) (rate(cachedattention_ttft_seconds_bucket[$rate])))",
                f"p{q:.0%}"[:-1],
            )
            for q in (0.5, 0.95)
        ]
        + [
            (
                "histogram_quantile(0.5, sum by (le) (rate(cachedattention_prefill_seconds_bucket[$rate])))",
                "prefill p50",
            )
        ],
    ),
    (
        "Queue",
        "short",
        [("cachedattention_queue_depth", "waiting"), ("cachedattention_running_jobs", "running")],
    ),
    (
        "Prompt tokens by source",
        "short",
        [("sum by (source) (rate(cachedattention_prompt_tokens_total[$rate]))", "{{source}}")],
    ),
    (
        "Tokens missed, by reason",
        "short",
        [("sum by (reason) (rate(cachedattention_missed_tokens_total[$rate]))", "{{reason}}")],
    ),
    (
        "Fill of the tiers",
        "percentunit",
        [("cachedattention_bytes / cachedattention_capacity_bytes", "{{tier}}")],
    ),
    ("Chunks", "short", [("cachedattention_chunks", "{{tier}}")]),
    (
        "Evictions",
        "short",
        [("sum by (tier, reason) (rate(cachedattention_evictions_total[$rate]))", "{{tier}}: {{reason}}")],
    ),
    (
        "Time per output token",
        "s",
        [
            (
                f"histogram_quantile({q}, sum by (le) (rate(cachedattention_tpot_seconds_bucket[$rate])))",
                f"p{q:.0%}"[:-1],
            )
            for q in (0.5, 0.95)
        ],
    ),
    (
        "Load and save",
        "s",
        [
            (
                "histogram_quantile(0.95, sum by (le, job, tier) (rate(cachedattention_load_seconds_bucket[$rate])))",
                "load {{tier}} p95 ({{job}})",
            ),
            (
                "histogram_quantile(0.95, sum by (le, job) (rate(cachedattention_save_seconds_bucket[$rate])))",
                "save p95 ({{job}})",
            ),
        ],
    ),
    (
        "Computing time saved",
        "s",
        [("rate(cachedattention_prefill_seconds_saved_total[$rate])", "seconds saved each second")],
    ),
    (
        "Trouble",
        "short",
        [
            ("increase(cachedattention_corrupt_total[$rate])", "corrupt: {{where}}"),
            ("increase(cachedattention_lease_revoked_total[$rate])", "leases revoked"),
            ("increase(cachedattention_turn_retries_total[$rate])", "turns run again"),
            ("increase(cachedattention_ssd_worker_starts_total[$rate])", "starts of the SSD worker"),
        ],
    ),
]


def dashboard() -> dict[str, Any]:
    return {
        "uid": "cachedattention",
        "title": "CachedAttention",
        "timezone": "browser",
        "schemaVersion": 39,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "panels": [_panel(number, *panel) for number, panel in enumerate(_PANELS)],
    }


def _panel(number: int, title: str, unit: str, queries: list[tuple[str, str]]) -> dict[str, Any]:
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": title,
        "datasource": _SOURCE,
        "gridPos": {"x": number % 3 * _WIDTH, "y": number // 3 * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _SOURCE,
                "expr": expression.replace("$rate", "$__rate_interval"),
                "legendFormat": legend,
            }
            for index, (expression, legend) in enumerate(queries)
        ],
    }


def text() -> str:
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    DASHBOARD.write_text(text(), encoding="utf-8")
