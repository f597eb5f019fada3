"""Metrics in Prometheus' text format 0.0.4: counts, sizes and durations, but no content of requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from normtune.serving.engine.requests import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Upper bounds of the histogram's buckets, in seconds.
BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)

# field of EngineStats: (metric without prefix, kind, help text)
_ENGINE = {
    "queued": ("queue_length", "gauge", "Requests in the queue."),
    "running": ("running", "gauge", "Requests of the current batch."),
    "batches": ("batches_total", "counter", "Batches run."),
    "requests": ("answers_total", "counter", "Requests answered by the engine."),
    "failed": ("failed_total", "counter", "Requests that failed in the engine."),
    "cancelled": ("cancelled_total", "counter", "Requests that were cancelled."),
    "refused": ("refused_total", "counter", "Requests refused because the queue was full."),
    "prompt_tokens": ("prompt_tokens_total", "counter", "Tokens of prompts and images."),
    "completion_tokens": ("completion_tokens_total", "counter", "Tokens of answers."),
    "images_computed": ("images_computed_total", "counter", "Images encoded."),
    "images_reused": ("images_reused_total", "counter", "Encoded images found in the cache."),
    "registered": ("adapters_registered", "gauge", "Adapters registered."),
    "loaded": ("adapters_loaded", "gauge", "Adapters loaded."),
    "loads": ("adapter_loads_total", "counter", "Adapters read from disk."),
    "seconds_loading": ("adapter_load_seconds_total", "counter", "Seconds spent reading adapters."),
    "evictions": ("adapter_evictions_total", "counter", "Adapters evicted to free a slot."),
    "adapter_bytes": ("adapter_bytes", "gauge", "Bytes of loaded adapters."),
    "image_bytes": ("image_bytes", "gauge", "Bytes of cached encoded images."),
    "seconds_busy": ("busy_seconds_total", "counter", "Seconds spent on batches."),
}


class RequestCounts:
    """Counts requests and measures their durations. Not thread-safe: only the event loop uses it."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, int]] = Counter()
        self.buckets: Counter[tuple[str, float]] = Counter()  # (route, upper bound)
        self.seconds: Counter[str] = Counter()

    def add(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request.

        Args:
            route: the route's pattern, such as `/v1/files/{id}`; never the requested URL, which may contain
                a name.
        """
        self.requests[method, route, status] += 1
        self.seconds[route] += seconds  # type: ignore[assignment]
        bound = next((bound for bound in BOUNDS if seconds <= bound), float("inf"))
        self.buckets[route, bound] += 1


def metrics_text(stats: EngineStats, counts: RequestCounts, upload_bytes: int, shared_left: int) -> str:
    """Return the text of `/metrics`."""
    lines = [line for field in _ENGINE for line in _single(*_ENGINE[field], getattr(stats, field))]
    lines += _single("upload_bytes", "gauge", "Bytes of uploaded images.", upload_bytes)
    lines += _single("shared_bytes_left", "gauge", "Bytes available for request bodies and images.", shared_left)
    return "\n".join([*lines, *_requests(counts), *_durations(counts)]) + "\n"


def _head(name: str, kind: str, help_text: str) -> list[str]:
    return [f"# HELP normtune_{name} {help_text}", f"# TYPE normtune_{name} {kind}"]


def _single(name: str, kind: str, help_text: str, value: float) -> list[str]:
    return [*_head(name, kind, help_text), f"normtune_{name} {value:.17g}"]


def _requests(counts: RequestCounts) -> Iterator[str]:
    yield from _head("http_requests_total", "counter", "Requests by route and status.")
    for (method, route, status), number in sorted(counts.requests.items()):
        labels = f'method="{method}",route="{route}",status="{status}"'
        yield f"normtune_http_requests_total{{{labels}}} {number}"


def _durations(counts: RequestCounts) -> Iterator[str]:
    name = "http_request_seconds"
    yield from _head(name, "histogram", "Seconds from a request's headers to the end of its response.")
    for route in sorted(counts.seconds):
        total = 0  # buckets are cumulative in this format
        for bound in (*BOUNDS, float("inf")):
            total += counts.buckets[route, bound]
            label = "+Inf" if bound == float("inf") else f"{bound:g}"
            yield f'normtune_{name}_bucket{{route="{route}",le="{label}"}} {total}'
        yield f'normtune_{name}_sum{{route="{route}"}} {counts.seconds[route]:.6f}'
        yield f'normtune_{name}_count{{route="{route}"}} {total}'
