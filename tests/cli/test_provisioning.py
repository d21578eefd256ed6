"""compose.yaml, Prometheus and Grafana say nothing that the program does not know."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import CollectorRegistry

from cli.settings import PREFIX, Settings
from monitoring.gateway_metrics import GatewayMetrics
from monitoring.inference_metrics import InferenceMetrics
from monitoring.kvdaemon_metrics import KvDaemonMetrics

ROOT = Path(__file__).parents[2]
DASHBOARDS = ROOT / "monitoring" / "grafana" / "dashboards"


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def exposed_names() -> set[str]:
    """Every series name that one of the three processes exposes."""
    names: set[str] = set()
    for make in (GatewayMetrics, InferenceMetrics, KvDaemonMetrics):
        registry = CollectorRegistry()
        metrics = make(registry)
        if isinstance(metrics, KvDaemonMetrics):
            metrics.watch_tier("dram", lambda: 0, lambda: 0, lambda: 0)
        for family in registry.collect():
            endings = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",)}.get(family.type, ("",))
            names |= {family.name + ending for ending in endings}
    return names


def test_dashboards_ask_for_metrics_that_exist() -> None:
    exposed = exposed_names()
    assert "cachedattention_ttft_seconds_bucket" in exposed
    for path in DASHBOARDS.glob("*.json"):
        panels = json.loads(path.read_text(encoding="utf-8"))["panels"]
        expressions = [target["expr"] for panel in panels for target in panel["targets"]]
        used = {name for expression in expressions for name in re.findall(r"cachedattention_\w+", expression)}
        assert used
        assert used <= exposed, used - exposed


def test_the_dashboard_shows_what_the_paper_is_about() -> None:
    text = (DASHBOARDS / "cachedattention.json").read_text(encoding="utf-8")
    for name in ("prompt_tokens_total", "ttft_seconds", "queue_depth", "missed_tokens_total", "capacity_bytes"):
        assert f"cachedattention_{name}" in text


def test_the_dashboard_is_what_its_script_writes() -> None:
    path = ROOT / "monitoring" / "grafana" / "make_dashboard.py"
    spec = importlib.util.spec_from_file_location("make_dashboard", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.text() == (DASHBOARDS / "cachedattention.json").read_text(encoding="utf-8")


def test_prometheus_scrapes_the_three_services_where_compose_runs_them() -> None:
    scrape = read_yaml(ROOT / "monitoring" / "prometheus" / "prometheus.yml")["scrape_configs"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in scrape}
    fields = Settings.model_fields
    assert targets == {
        "gateway": [f"gateway:{fields['port'].default}"],
        "inference": [f"inference:{fields['metrics_port_inference'].default}"],
        "kvdaemon": [f"kvdaemon:{fields['metrics_port_kvdaemon'].default}"],
    }
    services = read_yaml(ROOT / "compose.yaml")["services"]
    assert set(services) == {*targets, "prometheus", "grafana"}


def test_compose_listens_on_loopback_only_and_shares_one_tmpfs() -> None:
    compose = read_yaml(ROOT / "compose.yaml")
    assert "name" not in compose
    ports = [port for service in compose["services"].values() for port in service.get("ports", ())]
    assert ports == ["127.0.0.1:8000:8000", "127.0.0.1:9090:9090", "127.0.0.1:3000:3000"]
    for name in ("gateway", "inference", "kvdaemon"):
        service = compose["services"][name]
        assert service["command"] == [name]
        assert service["init"] is True
        assert "run:/run/cachedattention" in service["volumes"]
        assert service["healthcheck"]
        assert service["stop_grace_period"]
    assert compose["volumes"]["run"]["driver_opts"]["type"] == "tmpfs"


def test_variables_of_compose_and_image_are_options() -> None:
    """A variable that no option has would stop the container at its start."""
    compose = read_yaml(ROOT / "compose.yaml")
    set_here = {
        name
        for service in compose["services"].values()
        for name in service.get("environment", {})
        if name.startswith(PREFIX)
    }
    set_here |= set(re.findall(rf"{PREFIX}[A-Z_]+(?==)", (ROOT / "Dockerfile").read_text(encoding="utf-8")))
    assert set_here
    assert set_here <= {PREFIX + name.upper() for name in Settings.model_fields}


def test_what_compose_mounts_is_there() -> None:
    compose = read_yaml(ROOT / "compose.yaml")
    mounted = [
        volume.split(":")[0]
        for service in compose["services"].values()
        for volume in service.get("volumes", ())
        if volume.startswith("./")
    ]
    assert len(mounted) == 3
    assert all((ROOT / path).exists() for path in mounted)
    provider = read_yaml(ROOT / "monitoring" / "grafana" / "provisioning" / "dashboards" / "cachedattention.yml")
    assert provider["providers"][0]["options"]["path"] == "/var/lib/grafana/dashboards"
