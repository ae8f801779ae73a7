"""OpenTelemetry traces of requests, from the proxy to the model's replica; an option of serve/config.yaml.

pip install 'mellow-platform[otel]'       # and OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4318 on every node

Proxies import this module too, so the code must be on the nodes, as in the image and with `mellow cluster up --local`.
"""

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor


def exporter() -> list[SpanProcessor]:
    """Return the span processor for the collector in the standard OTEL_EXPORTER_OTLP_* variables."""
    return [BatchSpanProcessor(OTLPSpanExporter())]
