"""Metrics for Prometheus: counts, sizes and durations, but no content of requests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from normtune.serving.http.state import Service

CONTENT_TYPE = prometheus_client.exposition.CONTENT_TYPE_PLAIN_0_0_4
# Upper bounds of the histogram's buckets, in seconds.
BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)

# name of a value: (metric without prefix; with _total it is a counter, else a gauge, and its help text)
_VALUES = {
    "queued": ("queue_length", "Requests in the queue."),
    "running": ("running", "Requests of the current batch."),
    "batches": ("batches_total", "Batches run."),
    "requests": ("answers_total", "Requests answered by the engine."),
    "failed": ("failed_total", "Requests that failed in the engine."),
    "cancelled": ("cancelled_total", "Requests that were cancelled."),
    "refused": ("refused_total", "Requests refused because the queue was full."),
    "prompt_tokens": ("prompt_tokens_total", "Tokens of prompts and images."),
    "completion_tokens": ("completion_tokens_total", "Tokens of answers."),
    "questions_cut": ("questions_cut_total", "Requests answered with a question that was cut."),
    "abstained": ("abstained_total", "Requests with an answer whose confidence was too low."),
    "images_computed": ("images_computed_total", "Images encoded."),
    "images_reused": ("images_reused_total", "Encoded images found in the cache."),
    "registered": ("adapters_registered", "Adapters registered."),
    "loaded": ("adapters_loaded", "Adapters loaded."),
    "loads": ("adapter_loads_total", "Adapters read from disk."),
    "seconds_loading": ("adapter_load_seconds_total", "Seconds spent reading adapters."),
    "evictions": ("adapter_evictions_total", "Adapters evicted to free a slot."),
    "adapter_bytes": ("adapter_bytes", "Bytes of loaded adapters."),
    "image_bytes": ("image_bytes", "Bytes of cached encoded images."),
    "seconds_busy": ("busy_seconds_total", "Seconds spent on batches."),
    "upload_bytes": ("upload_bytes", "Bytes of uploaded images."),
    "shared_bytes_left": ("shared_bytes_left", "Bytes available for request bodies and images."),
}

prometheus_client.disable_created_metrics()  # no series with the time at which each other series began


class ServerMetrics(Collector):
    """The metrics of one server."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "normtune_http_requests",
            "Requests by route and status.",
            ("method", "route", "status"),
            registry=self._registry,
        )
        self._seconds = Histogram(
            "normtune_http_request_seconds",
            "Seconds from a request's headers to the end of its response.",
            ("route",),
            buckets=BOUNDS,
            registry=self._registry,
        )
        self._registry.register(self)

    def count_request(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request.

        Args:
            route: the route's pattern, such as `/v1/files/{id}`; never the requested URL, which may contain
                a name.
        """
        self._requests.labels(method, route, status).inc()
        self._seconds.labels(route).observe(seconds)

    def describe(self) -> Iterator[Metric]:
        """Return no names, so that registration does not read the engine's state."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        """Yield the values of the engine and of the server's memory."""
        service = self._service
        values = asdict(service.engine.stats())
        values |= {"upload_bytes": service.uploads.size, "shared_bytes_left": service.budget.available}
        for key, (name, help_text) in _VALUES.items():
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield family(f"normtune_{name}", help_text, value=values[key])

    def text(self) -> bytes:
        """Return the response to `/metrics`, in Prometheus' text format 0.0.4."""
        return prometheus_client.generate_latest(self._registry)
