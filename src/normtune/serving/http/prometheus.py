"""What the server tells Prometheus, in its text format 0.0.4: counts and sizes, nothing of a request."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from normtune.serving.engine.requests import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)  # seconds

# field of EngineStats: (name, kind, help)
_ENGINE = {
    "queued": ("queue_length", "gauge", "Requests that wait."),
    "running": ("running", "gauge", "Requests of the batch at work."),
    "batches": ("batches_total", "counter", "Batches run."),
    "requests": ("answers_total", "counter", "Requests answered by the engine."),
    "failed": ("failed_total", "counter", "Requests that failed in the engine."),
    "cancelled": ("cancelled_total", "counter", "Requests that were cancelled."),
    "refused": ("refused_total", "counter", "Requests that met a full queue."),
    "prompt_tokens": ("prompt_tokens_total", "counter", "Tokens of prompts and images."),
    "completion_tokens": ("completion_tokens_total", "counter", "Tokens written."),
    "images_computed": ("images_computed_total", "counter", "Images that the encoder was given."),
    "images_reused": ("images_reused_total", "counter", "Images whose result was there."),
    "registered": ("adapters_registered", "gauge", "Adapters known."),
    "loaded": ("adapters_loaded", "gauge", "Adapters in memory."),
    "loads": ("adapter_loads_total", "counter", "Adapters read from disk."),
    "seconds_loading": ("adapter_load_seconds_total", "counter", "Seconds spent reading adapters."),
    "evictions": ("adapter_evictions_total", "counter", "Adapters that made room."),
    "adapter_bytes": ("adapter_bytes", "gauge", "Bytes of loaded adapters."),
    "image_bytes": ("image_bytes", "gauge", "Bytes of image states held."),
    "seconds_busy": ("busy_seconds_total", "counter", "Seconds spent on batches."),
}


class Counts:
    """Requests by route and status, and how long they took; used from the event loop's thread alone."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str, int]] = Counter()
        self.within: Counter[tuple[str, float]] = Counter()  # (route, upper bound)
        self.seconds: Counter[str] = Counter()

    def add(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count a request; `route` is a pattern of ours, never the address that was asked for."""
        self.requests[method, route, status] += 1
        self.seconds[route] += seconds  # type: ignore[assignment]
        bound = next((bound for bound in BOUNDS if seconds <= bound), float("inf"))
        self.within[route, bound] += 1


def exposition(stats: EngineStats, counts: Counts, upload_bytes: int, shared_left: int) -> str:
    """The page that Prometheus reads."""
    lines = [line for field in _ENGINE for line in _single(*_ENGINE[field], getattr(stats, field))]
    lines += _single("upload_bytes", "gauge", "Bytes of uploaded images held.", upload_bytes)
    lines += _single("shared_bytes_left", "gauge", "Bytes left for bodies and images.", shared_left)
    return "\n".join([*lines, *_requests(counts), *_durations(counts)]) + "\n"


def _head(name: str, kind: str, told: str) -> list[str]:
    return [f"# HELP normtune_{name} {told}", f"# TYPE normtune_{name} {kind}"]


def _single(name: str, kind: str, told: str, value: float) -> list[str]:
    return [*_head(name, kind, told), f"normtune_{name} {value:.17g}"]


def _requests(counts: Counts) -> Iterator[str]:
    yield from _head("http_requests_total", "counter", "Requests by route and status.")
    for (method, route, status), number in sorted(counts.requests.items()):
        labels = f'method="{method}",route="{route}",status="{status}"'
        yield f"normtune_http_requests_total{{{labels}}} {number}"


def _durations(counts: Counts) -> Iterator[str]:
    name = "http_request_seconds"
    yield from _head(name, "histogram", "Seconds from a request's head to the end of its answer.")
    for route in sorted(counts.seconds):
        total = 0
        for bound in (*BOUNDS, float("inf")):
            total += counts.within[route, bound]
            shown = "+Inf" if bound == float("inf") else f"{bound:g}"
            yield f'normtune_{name}_bucket{{route="{route}",le="{shown}"}} {total}'
        yield f'normtune_{name}_sum{{route="{route}"}} {counts.seconds[route]:.6f}'
        yield f'normtune_{name}_count{{route="{route}"}} {total}'
