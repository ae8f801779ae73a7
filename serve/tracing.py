"""Traces of requests by OpenTelemetry, from the proxy to the replica that answers; an option of serve/config.yaml.

pip install 'mellow-platform[otel]'       # and OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318 on every node

Proxies load this too, so the nodes have to have the code: the image has it, and `mellow cluster up --local` gives it.
"""

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor


def exporter() -> list[SpanProcessor]:
    """Return what sends spans to the collector that the standard OTEL_EXPORTER_OTLP_* variables name."""
    return [BatchSpanProcessor(OTLPSpanExporter())]
