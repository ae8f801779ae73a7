"""Monitoring of the endpoint: metrics of the dashboard, and traces."""

import http.server
import json
import re
import threading

import pytest
import yaml
from opentelemetry.sdk.trace import TracerProvider
from ray.serve.schema import ServeDeploySchema

from serve.monitoring import EndpointMetrics, ModelMetrics
from tests.conftest import REPOSITORY

SUFFIXES = {"Counter": ("_total",), "Gauge": ("",), "Histogram": ("_bucket", "_sum", "_count")}


def exported() -> dict[str, set[str]]:
    """Return the names of our metrics in Prometheus, with their labels."""
    found = {}
    for metrics in (EndpointMetrics(), ModelMetrics()):
        for metric in vars(metrics).values():
            if info := getattr(metric, "info", None):
                for suffix in SUFFIXES[type(metric).__name__]:
                    labels = set(info["tag_keys"]) | {"application", "deployment", "replica", "le"}
                    found[f"ray_{info['name']}{suffix}"] = labels
    return found


def test_dashboard_uses_existing_metrics_and_labels():
    dashboard = json.loads((REPOSITORY / "infra/grafana/mellow.json").read_text())
    known, shown = exported(), set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            for name, selector in re.findall(r"(ray_mellow_\w+)(?:\{([^}]*)\})?", target["expr"]):
                assert name in known, f"{panel['title']}: {name}"
                labels = set(re.findall(r"(\w+)=", selector)) | {
                    label.strip() for by in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in by.split(",")
                }
                assert labels <= known[name], f"{panel['title']}: {labels - known[name]}"
                shown.add(name.rsplit("_", 1)[0] if known[name] and name.endswith(("_bucket", "_total")) else name)
    every = {
        name.removesuffix("_total").removesuffix("_bucket") for name in known if not name.endswith(("_sum", "_count"))
    }
    assert shown == every  # the dashboard shows every metric


def test_spans_reach_collector(monkeypatch: pytest.MonkeyPatch):
    received: list[tuple[str, bytes]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        from serve.tracing import exporter

        provider = TracerProvider()
        for processor in exporter():
            provider.add_span_processor(processor)
        with provider.get_tracer("test").start_as_current_span("a question about a sound"):
            pass
        provider.shutdown()
    finally:
        server.shutdown()
    assert [path for path, _ in received] == ["/v1/traces"]
    assert b"a question about a sound" in received[0][1]


def test_tracing_section_is_valid():
    text = (REPOSITORY / "serve/config.yaml").read_text()
    switched_on = re.sub(r"(?m)^# (tracing_config:|  (?:enabled|exporter_import_path|sampling_ratio):)", r"\1", text)
    tracing = ServeDeploySchema(**yaml.safe_load(switched_on)).tracing_config
    assert tracing and tracing.enabled
    module, _, function = tracing.exporter_import_path.partition(":")
    assert callable(getattr(__import__(module, fromlist=[function]), function))
