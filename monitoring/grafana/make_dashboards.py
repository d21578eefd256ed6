"""Writes dashboards/*.json with Grafana's own builders: run it after a change here. A test compares the files to this.

`$rate` stands for the window of rates that Grafana computes from the scrape interval.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import prometheus, stat, timeseries
from grafana_foundation_sdk.builders.common import (
    ReduceDataOptions,
    StackingConfig,
    VizLegendOptions,
    VizTooltipOptions,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import StackingMode, TooltipDisplayMode
from grafana_foundation_sdk.models.dashboard import (
    Dashboard,
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    GridPos,
)

DASHBOARDS = Path(__file__).parent / "dashboards"
_SOURCE = DataSourceRef(type_val="prometheus", uid="prometheus")
_TAG = "cachedattention"
_COLUMNS, _HEIGHT, _STAT_HEIGHT = 24, 8, 4
_PREFIX = "cachedattention_"

Queries = Sequence[tuple[str, str]]  # (expression, legend)


@dataclass(frozen=True)
class Graph:
    """Values over time, three to a row. stacked: parts of a whole."""

    title: str
    unit: str
    queries: Queries
    about: str = ""
    stacked: bool = False
    width: int = 8
    height: int = _HEIGHT


@dataclass(frozen=True)
class Now:
    """One figure, the latest."""

    title: str
    unit: str
    queries: Queries
    about: str = ""
    width: int = 4
    height: int = _STAT_HEIGHT


@dataclass(frozen=True)
class Board:
    uid: str
    title: str
    panels: Sequence[Graph | Now]


def _quantiles(metric: str, *by: str, quantiles: Sequence[float] = (0.5, 0.95, 0.99)) -> Queries:
    """Of a histogram; a series for each value of the labels `by`."""
    labels = ", ".join(("le", *by))
    names = " ".join(f"{{{{{label}}}}}" for label in by)
    return [
        (
            f"histogram_quantile({q}, sum by ({labels}) (rate({_PREFIX}{metric}_bucket[$rate])))",
            f"{names} p{q * 100:g}".strip(),
        )
        for q in quantiles
    ]


def _rates(metric: str, *by: str) -> Queries:
    names = ": ".join(f"{{{{{label}}}}}" for label in by)
    return [(f"sum by ({', '.join(by)}) (rate({_PREFIX}{metric}[$rate]))", names)]


_BY_SOURCE = (
    "sum by (source) (rate(cachedattention_prompt_tokens_total[$rate]))"
    " / ignoring (source) group_left () sum(rate(cachedattention_prompt_tokens_total[$rate]))"
)
_FILL = "cachedattention_bytes / (cachedattention_capacity_bytes > 0)"

BOARDS = (
    Board(
        "cachedattention",
        "CachedAttention: overview",
        [
            Now(
                "Hit rate", "percentunit", [("cachedattention:hit_ratio:rate5m", "")], "Of all prompt tokens, 5 minutes"
            ),
            Now(
                "Reuse of what was computed",
                "percentunit",
                [("cachedattention:reuse_ratio:rate5m", "")],
                "Of prompt tokens that some turn had computed before; 100 %: the store lost nothing",
            ),
            Now("TTFT p50", "s", [("cachedattention:ttft_seconds:p50_rate5m", "")]),
            Now("TTFT p95", "s", [("cachedattention:ttft_seconds:p95_rate5m", "")]),
            Now("Turns that wait", "short", [("cachedattention_queue_depth", "")]),
            Now("Turns that run", "short", [("cachedattention_running_jobs", "")]),
            Graph("Prompt tokens by source", "percentunit", [(_BY_SOURCE, "{{source}}")], stacked=True),
            Graph("Time to first token", "s", _quantiles("ttft_seconds"), "From the request's arrival, queue included"),
            Graph(
                "Turns",
                "ops",
                _rates("turns_total", "status"),
                stacked=True,
            ),
            Graph("Fill of the tiers", "percentunit", [(_FILL, "{{tier}}")], "Both are meant to be full"),
            Graph(
                "Computing time saved",
                "s",
                [("sum(rate(cachedattention_prefill_seconds_saved_total[$rate]))", "saved each second")],
                "At the measured prefill rate, less the time of loading",
            ),
            Graph(
                "What is up",
                "short",
                [
                    ("cachedattention_inference_connected", "inference workers"),
                    ("cachedattention_kvdaemon_connected", "kvdaemon"),
                    ("1 - cachedattention_degraded", "all tiers"),
                ],
            ),
        ],
    ),
    Board(
        "cachedattention-cache",
        "CachedAttention: cache",
        [
            Graph("Prompt tokens by source", "short", _rates("prompt_tokens_total", "source"), stacked=True, width=12),
            Graph(
                "Tokens computed again, by reason",
                "short",
                _rates("missed_tokens_total", "reason"),
                "Some turn had computed them before",
                stacked=True,
                width=12,
            ),
            Graph("Chunks", "short", [("cachedattention_chunks", "{{tier}}")]),
            Graph("Evictions", "ops", _rates("evictions_total", "tier", "reason")),
            Graph(
                "Prefetch on hints",
                "ops",
                _rates("prefetch_total", "outcome"),
                "Chunks fetched from SSD for waiting turns: what was used came in time",
            ),
            Graph("Bytes handed out", "Bps", _rates("reused_bytes_total", "tier"), stacked=True),
            Graph(
                "Histories: loaded or computed",
                "ops",
                _rates("load_or_compute_total", "choice"),
                "What was done with histories found in the store",
                stacked=True,
            ),
            Graph(
                "Load or compute: estimated TTFT",
                "s",
                [
                    (
                        "sum by (option) (rate(cachedattention_load_or_compute_estimated_seconds_total[$rate]))"
                        " / ignoring (option) group_left () sum(rate(cachedattention_load_or_compute_total[$rate]))",
                        "{{option}}",
                    )
                ],
                "As chosen, had all been loaded, had all been computed",
            ),
            Graph(
                "Working KV",
                "bytes",
                [
                    ("cachedattention_working_kv_bytes", "in use"),
                    ("cachedattention_retained_bytes", "of it retained"),
                    ("cachedattention_write_buffer_bytes", "of it not saved"),
                    ("cachedattention_working_kv_capacity_bytes", "bound"),
                ],
            ),
            Graph(
                "Full contexts cut",
                "short",
                [
                    ("sum(rate(cachedattention_context_truncations_total[$rate]))", "cuts"),
                    ("sum(rate(cachedattention_dropped_tokens_total[$rate]))", "tokens dropped"),
                ],
                "Conversations that outgrew the context lost their oldest part",
            ),
            Graph("Saved contexts in memory", "short", [("cachedattention_manifests", "contexts")]),
            Graph("Conversations", "short", [("cachedattention_conversations", "in the journal")]),
            Graph(
                "Leases and slots being filled",
                "short",
                [("cachedattention_leases", "leases"), ("cachedattention_reserved_slots", "slots")],
            ),
        ],
    ),
    Board(
        "cachedattention-latency",
        "CachedAttention: latency",
        [
            Graph("Time to first token", "s", _quantiles("ttft_seconds"), "From the request's arrival, queue included"),
            Graph("Prefill", "s", _quantiles("prefill_seconds"), "From admission to the first token: the paper's TTFT"),
            Graph("Time per output token", "s", _quantiles("tpot_seconds")),
            Graph("Wait in the queue", "s", _quantiles("queue_wait_seconds")),
            Graph("Wait for working KV", "s", _quantiles("admission_seconds")),
            Graph(
                "Turns by place",
                "short",
                [
                    ("cachedattention_queue_depth", "queue"),
                    ("sum(cachedattention_admission_waiting_jobs)", "waiting for working KV"),
                    ("sum(cachedattention_engine_running_jobs)", "engine"),
                ],
            ),
            Graph("Step of the engine", "s", _quantiles("engine_step_seconds", "kind", quantiles=(0.5, 0.95))),
            Graph("Tokens computed", "short", _rates("engine_step_tokens_total", "phase"), stacked=True),
            Graph("Preemptions", "ops", [("sum(rate(cachedattention_preemptions_total[$rate]))", "turns")]),
            Graph(
                "Loading of history",
                "s",
                [
                    (
                        "histogram_quantile(0.95, sum by (le, job, tier)"
                        " (rate(cachedattention_load_seconds_bucket[$rate])))",
                        "{{job}} {{tier}} p95",
                    )
                ],
                "inference: to working KV, by the slowest tier; kvdaemon: from SSD to DRAM",
            ),
            Graph(
                "Loading that ran under computation",
                "percentunit",
                [
                    (
                        "sum(rate(cachedattention_overlap_ratio_sum[$rate]))"
                        " / sum(rate(cachedattention_overlap_ratio_count[$rate]))",
                        "mean",
                    )
                ],
            ),
            Graph("Answers of kvdaemon", "s", _quantiles("rpc_seconds", "method", quantiles=(0.95,))),
        ],
    ),
    Board(
        "cachedattention-storage",
        "CachedAttention: storage and wear",
        [
            Graph(
                "Bytes in the tiers",
                "bytes",
                [("cachedattention_bytes", "{{tier}}"), ("cachedattention_ssd_physical_bytes", "ssd on the disk")],
            ),
            Graph("Fill of the tiers", "percentunit", [(_FILL, "{{tier}}")]),
            Graph(
                "Not on SSD yet",
                "short",
                [
                    ("cachedattention_write_behind_queue", "chunks"),
                    ("cachedattention_manifest_queue", "contexts"),
                    ("sum(cachedattention_save_backlog)", "finished turns in the write buffer"),
                ],
            ),
            Graph("KV written", "Bps", _rates("written_bytes_total", "tier")),
            Graph(
                "Written to the disk",
                "Bps",
                [
                    ("rate(cachedattention_ssd_disk_written_bytes_total[$rate])", "written"),
                    ("rate(cachedattention_declined_bytes_total[$rate])", "declined by the budget"),
                ],
                "KV, records, logs, and files rewritten",
            ),
            Graph(
                "Written per byte that was used",
                "short",
                [("cachedattention_ssd_written_bytes_per_reused_byte < +Inf or on () vector(0)", "bytes")],
                "Bytes written to the SSD for each one that came back from it: what the wear buys",
            ),
            Now(
                "Written in a day",
                "bytes",
                [("cachedattention:ssd_disk_written_bytes:increase1d", "")],
                "Times the days of the drive's warranty, this is to stay below its TBW",
                width=8,
                height=_HEIGHT,
            ),
            Graph("Time to save a chunk", "s", _quantiles("save_seconds", "job", quantiles=(0.5, 0.95))),
            Graph("Read by the scrub", "Bps", _rates("scrubbed_bytes_total", "tier")),
        ],
    ),
    Board(
        "cachedattention-tenants",
        "CachedAttention: tenants",
        [
            Graph("Turns by tenant", "ops", _rates("tenant_turns_total", "tenant"), stacked=True, width=12),
            Graph(
                "Prompt tokens by tenant",
                "short",
                [
                    (
                        'sum by (tenant) (rate(cachedattention_tenant_tokens_total{kind!="generated"}[$rate]))',
                        "{{tenant}}",
                    )
                ],
                stacked=True,
                width=12,
            ),
            Graph(
                "Hit rate by tenant",
                "percentunit",
                [
                    (
                        'sum by (tenant) (rate(cachedattention_tenant_tokens_total{kind="cached"}[$rate]))'
                        ' / sum by (tenant) (rate(cachedattention_tenant_tokens_total{kind!="generated"}[$rate]))',
                        "{{tenant}}",
                    )
                ],
                width=12,
            ),
            Graph(
                "Tokens generated by tenant",
                "short",
                [
                    (
                        'sum by (tenant) (rate(cachedattention_tenant_tokens_total{kind="generated"}[$rate]))',
                        "{{tenant}}",
                    )
                ],
                stacked=True,
                width=12,
            ),
            Graph(
                "Turns that did not end well, by tenant",
                "ops",
                [
                    (
                        'sum by (tenant, status) (rate(cachedattention_tenant_turns_total{status!="done"}[$rate]))'
                        " or on () vector(0)",
                        "{{tenant}}: {{status}}",
                    )
                ],
                width=12,
            ),
        ],
    ),
    Board(
        "cachedattention-errors",
        "CachedAttention: errors",
        [
            Graph("HTTP answers by status", "ops", _rates("requests_total", "code"), stacked=True),
            Graph(
                "Requests refused or failed, by route",
                "ops",
                [
                    (
                        'sum by (route, code) (rate(cachedattention_requests_total{code=~"[45].."}[$rate]))'
                        " or on () vector(0)",
                        "{{route}}: {{code}}",
                    )
                ],
            ),
            Graph(
                "Turns that did not end well",
                "short",
                [
                    ('sum by (status) (increase(cachedattention_turns_total{status!="done"}[$rate]))', "{{status}}"),
                    ("sum(increase(cachedattention_turn_retries_total[$rate]))", "run again"),
                ],
            ),
            Graph("Damage found", "short", [("increase(cachedattention_corrupt_total[$rate])", "{{where}}")]),
            Graph(
                "Histories that did not arrive",
                "short",
                [("sum by (reason) (increase(cachedattention_load_failures_total[$rate]))", "{{reason}}")],
            ),
            Graph(
                "Given up",
                "short",
                [
                    ("sum(increase(cachedattention_unsaved_turns_total[$rate]))", "saves"),
                    ("increase(cachedattention_lease_revoked_total[$rate])", "leases"),
                ],
            ),
            Graph("Store degraded", "short", [("cachedattention_degraded", "a tier is missing")]),
            Graph(
                "Starts of the SSD worker",
                "short",
                [("increase(cachedattention_ssd_worker_starts_total[$rate])", "starts")],
            ),
            Graph(
                "Alerts that fire",
                "short",
                [('sum by (alertname) (ALERTS{alertstate="firing"}) or on () vector(0)', "{{alertname}}")],
            ),
            Graph("Resident memory", "bytes", [("process_resident_memory_bytes", "{{job}}")]),
            Graph("CPU", "short", [("rate(process_cpu_seconds_total[$rate])", "{{job}}")], "Cores in use"),
            Graph("Open files", "short", [("process_open_fds", "{{job}}")]),
        ],
    ),
)


def build(board: Board) -> Dashboard:
    """Panels in rows, from left to right, as wide as they ask to be."""
    built = (
        builders.Dashboard(board.title)
        .uid(board.uid)
        .tags([_TAG])
        .readonly()
        .timezone("browser")
        .refresh("5s")
        .time("now-15m", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .link(
            builders.DashboardLink("CachedAttention")
            .type(DashboardLinkType.DASHBOARDS)
            .tags([_TAG])
            .as_dropdown(True)
            .keep_time(True)
        )
    )
    x = y = row_height = 0
    for number, panel in enumerate(board.panels, 1):
        if x + panel.width > _COLUMNS:
            x, y, row_height = 0, y + row_height, 0
        built.with_panel(_panel(panel).id(number).grid_pos(GridPos(h=panel.height, w=panel.width, x=x, y=y)))
        x, row_height = x + panel.width, max(row_height, panel.height)
    return built.build()


def _panel(panel: Graph | Now) -> timeseries.Panel | stat.Panel:
    built: timeseries.Panel | stat.Panel
    if isinstance(panel, Now):
        built = stat.Panel().reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
    else:
        built = (
            timeseries.Panel()
            .min(0)
            .fill_opacity(30 if panel.stacked else 0)
            .legend(VizLegendOptions().show_legend(True))
            .tooltip(VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
        )
        if panel.stacked:
            built.stacking(StackingConfig().mode(StackingMode.NORMAL))
    built.title(panel.title).description(panel.about).unit(panel.unit).datasource(_SOURCE)
    for index, (expression, legend) in enumerate(panel.queries):
        query = prometheus.Dataquery().expr(expression.replace("$rate", "$__rate_interval")).legend_format(legend)
        built.with_target(query.ref_id(chr(ord("A") + index)).datasource(_SOURCE))
    return built


def texts() -> dict[str, str]:
    """File names and what the files hold."""
    return {f"{board.uid}.json": _text(build(board)) for board in BOARDS}


def _text(dashboard: Dashboard) -> str:
    fields = dashboard.to_json()
    del fields["style"]  # of older Grafanas; today's types do not know it
    return json.dumps(fields, cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    for name, text in texts().items():
        (DASHBOARDS / name).write_text(text, encoding="utf-8")
