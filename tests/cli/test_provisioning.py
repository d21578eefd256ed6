"""compose.yaml, Prometheus and Grafana say nothing that the program does not know."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import CollectorRegistry

from cli.settings import PREFIX, Settings
from kvdaemon.service import KvDaemon
from monitoring.gateway_metrics import GatewayMetrics
from monitoring.inference_metrics import InferenceMetrics

ROOT = Path(__file__).parents[2]
DASHBOARDS = ROOT / "monitoring" / "grafana" / "dashboards"


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def exposed_names() -> set[str]:
    """Every series name that one of the three processes exposes."""
    registries = [CollectorRegistry(), CollectorRegistry()]
    GatewayMetrics(registries[0])
    InferenceMetrics(registries[1])
    registries.append(KvDaemon(Settings.load({}, {}).kvdaemon_config()).metrics.registry)
    names: set[str] = set()
    for registry in registries:
        for family in registry.collect():
            endings = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",)}.get(family.type, ("",))
            names |= {family.name + ending for ending in endings}
    return names


def recorded_names() -> set[str]:
    groups = read_yaml(ROOT / "monitoring" / "prometheus" / "rules" / "recording.yml")["groups"]
    return {rule["record"] for group in groups for rule in group["rules"]}


def test_dashboards_ask_for_metrics_that_exist() -> None:
    exposed = exposed_names()
    assert "cachedattention_ttft_seconds_bucket" in exposed
    for path in DASHBOARDS.glob("*.json"):
        panels = json.loads(path.read_text(encoding="utf-8"))["panels"]
        expressions = [target["expr"] for panel in panels for target in panel["targets"]]
        used = {name for expression in expressions for name in re.findall(r"cachedattention_\w+", expression)}
        assert used
        assert used <= exposed, used - exposed
        asked = {name for expression in expressions for name in re.findall(r"cachedattention:[\w:]+", expression)}
        assert asked <= recorded_names(), asked - recorded_names()


def test_the_dashboards_show_what_the_paper_is_about() -> None:
    text = (DASHBOARDS / "cachedattention.json").read_text(encoding="utf-8")
    for name in ("prompt_tokens_total", "ttft_seconds", "queue_depth", "capacity_bytes", "prefill_seconds_saved_total"):
        assert f"cachedattention_{name}" in text


def test_the_dashboards_are_what_their_script_writes() -> None:
    path = ROOT / "monitoring" / "grafana" / "make_dashboards.py"
    spec = importlib.util.spec_from_file_location("make_dashboards", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # where its dataclasses look for their types
    spec.loader.exec_module(script)
    texts = script.texts()
    assert len(texts) == 6
    assert texts == {path.name: path.read_text(encoding="utf-8") for path in DASHBOARDS.iterdir()}


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


def test_containers_have_no_more_rights_and_resources_than_they_need() -> None:
    """Not root, nothing writable but volumes and /tmp, no capabilities, bounded; and whole when a process is killed."""
    text = (ROOT / "compose.yaml").read_text(encoding="utf-8")
    assert not text.startswith("# syntax=")
    compose = yaml.safe_load(text)
    for name, service in compose["services"].items():
        assert int(service["user"].split(":")[0]) > 0, name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["init"] is True, name
        assert service["restart"] == "unless-stopped", name
        assert service["mem_limit"], name
        assert service["pids_limit"], name
        assert service["healthcheck"]["test"], name
        for volume in service["volumes"]:
            source, _, options = volume.partition(":")
            assert source in compose["volumes"] or (source.startswith("./") and options.endswith(":ro")), volume


def test_the_gpu_file_changes_inference_only() -> None:
    compose, gpu = read_yaml(ROOT / "compose.yaml"), read_yaml(ROOT / "compose.gpu.yaml")
    assert "name" not in gpu
    assert set(gpu["services"]) == {"inference"}
    inference = gpu["services"]["inference"]
    assert inference["environment"]["CACHEDATTENTION_DEVICE"] == "cuda"
    assert "CACHEDATTENTION_DEVICE" in compose["services"]["inference"]["environment"]
    (device,) = inference["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert inference["ulimits"]["memlock"] == {"soft": -1, "hard": -1}


def test_prometheus_finds_its_rules_where_compose_mounts_them() -> None:
    services = read_yaml(ROOT / "compose.yaml")["services"]
    assert "./monitoring/prometheus:/etc/prometheus:ro" in services["prometheus"]["volumes"]
    assert "--config.file=/etc/prometheus/prometheus.yml" in services["prometheus"]["command"]
    config = read_yaml(ROOT / "monitoring" / "prometheus" / "prometheus.yml")
    assert config["rule_files"] == read_yaml(ROOT / "monitoring" / "prometheus" / "up.yml")["rule_files"]
    assert all(list((ROOT / "monitoring" / "prometheus").glob(pattern)) for pattern in config["rule_files"])


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
