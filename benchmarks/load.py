"""The server under twice the load that it can serve: statuses, latencies, memory, and shutdown by SIGTERM.

    python benchmarks/load.py --minutes 5 --out benchmarks/load.json

`normtune serve nano` runs as a user runs it, in its own process on loopback, with norm adapters of random
values. A closed loop (--clients clients, each of which sends its next request after its answer) measures the
capacity. An open loop then sends --times as many requests per second, at random times that do not depend on
answers. Each request names an adapter and has a phantom as a data URL; every fourth request streams. Expected
are status 200 with a complete answer, and status 429. Under this load the server receives SIGTERM, and must
answer all requests that it has accepted. To check this, the statuses that the clients received are compared
with those in the server's log: a request in the log without a client that received its answer is lost. A
refused connection is not in the log. Load generator and server share the cores.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from record import record
from serving import RECIPES, write_adapters

from normtune.data.phantom import phantom_dataset
from normtune.models.loading import load
from normtune.runtime.memory import read_status_bytes
from normtune.runtime.text_table import markdown_table

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]

# outcomes of a request besides the status codes
REFUSED, UNREAD, CUT, WRONG = "connection refused", "closed before it was read", "cut short", "not an answer"
EXPECTED = {"200", "429"}
EXPECTED_AT_SHUTDOWN = EXPECTED | {"503", REFUSED, UNREAD}  # after SIGTERM
TIMEOUT_S = 150.0  # the server's limits are 120 s per answer, and 10 s more at shutdown
LOAD_AFTER_SIGTERM_S = 2.0  # requests are still sent for this time after SIGTERM
MAX_CONNECTIONS = 1_500  # of the open loop; requests beyond are not sent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file; the table is written next to it as .md")
    parser.add_argument("--minutes", type=float, default=5.0, help="of the open loop (default %(default)s)")
    parser.add_argument("--warm-seconds", type=float, default=5.0, help="seconds before anything is measured")
    parser.add_argument("--capacity-seconds", type=float, default=15.0, help="seconds of the closed loop")
    parser.add_argument("--clients", type=int, default=64, help="of the closed loop (default %(default)s)")
    parser.add_argument(
        "--times",
        type=float,
        default=2.0,
        help="rate of the open loop, as a multiple of the capacity (default %(default)s)",
    )
    parser.add_argument("--adapters", type=int, default=16, help="number of adapters (default %(default)s)")
    parser.add_argument("--images", type=int, default=64, help="number of phantoms (default %(default)s)")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two samples of the memory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "adapters"
        write_adapters(load("nano"), RECIPES["miss"], options.adapters, root)
        results = asyncio.run(measure(options, root, Path(directory) / "log"))
    text = table(results)
    print("\n" + text)
    if options.out:
        rows = results.pop("rows")
        names = ("clients", "times", "adapters", "images")
        settings = {name: getattr(options, name) for name in names}
        record(options.out, "load", rows, model="nano", recipe=RECIPES["miss"], **settings, **results)
        options.out.with_suffix(".md").write_text(text, encoding="utf-8")
    if results["wrong"] or results["lost"] or results["exit_status"]:
        raise SystemExit(
            f"load: {results['wrong']} answers that were neither 200 nor 429, {results['lost']} lost, exit "
            f"status {results['exit_status']}."
        )


# --- clients ------------------------------------------------------------------------------------------------


@dataclass
class RequestLog:
    """The outcomes of the requests of one phase."""

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)  # by outcome: from sending to the last byte
    late: list[float] = field(default_factory=list)  # seconds by which requests were sent too late

    def add(self, outcome: str, seconds: float) -> None:
        self.outcomes[outcome] += 1
        self.seconds.setdefault(outcome, []).append(seconds)


@dataclass
class Clients:
    """Connections to the server, kept open for further requests; outcomes go to the current `log`."""

    host: str
    port: int
    log: RequestLog = field(default_factory=RequestLog)
    idle: deque[Connection] = field(default_factory=deque)

    async def send(self, request: bytes) -> str:
        """Send a request, read its answer, and write the outcome to the log that is current when it ends."""
        start = time.perf_counter()
        outcome = await self._outcome(request)
        self.log.add(outcome, time.perf_counter() - start)
        return outcome

    def _idle_connection(self) -> Connection | None:
        """An idle connection that the server has not closed."""
        while self.idle:
            connection = self.idle.pop()
            if not connection[0].at_eof():
                return connection
            connection[1].close()
        return None

    async def _outcome(self, request: bytes) -> str:
        """The status code of the answer, or one of the outcomes above."""
        try:
            connection = self._idle_connection() or await asyncio.open_connection(self.host, self.port)
        except OSError:
            return REFUSED
        reader, writer = connection
        reusable, head = False, b""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                body, reusable = await read_body(reader, head)
        except asyncio.IncompleteReadError as error:
            return CUT if head or error.partial else UNREAD
        except TimeoutError:  # it is a subclass of OSError
            return "no answer in time"
        except OSError:
            return CUT if head else UNREAD
        finally:
            if reusable:
                self.idle.append(connection)
            else:
                writer.close()
        status = head[9:12].decode()
        return WRONG if status == "200" and not is_answer(head, body) else status


async def read_body(reader: asyncio.StreamReader, head: bytes) -> tuple[bytes, bool]:
    """(body, whether the connection can be used for another request)."""
    lower = head.lower()
    reusable = b"connection: close" not in lower
    if (length := re.search(rb"content-length: (\d+)", lower)) is not None:
        return await reader.readexactly(int(length[1])), reusable
    chunks = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        chunks.append((await reader.readexactly(size + 2))[:-2])
    await reader.readexactly(2)
    return b"".join(chunks), reusable


def is_answer(head: bytes, body: bytes) -> bool:
    """Whether a body is a complete answer with a text."""
    if b"text/event-stream" in head:
        return body.endswith(b"data: [DONE]\n\n") and b'"error"' not in body and b'"finish_reason": "' in body
    return isinstance(json.loads(body)["choices"][0]["message"]["content"], str)


def encode_requests(names: Sequence[str], images: int, netloc: str) -> list[bytes]:
    """The bytes of the requests: every image with every adapter, in random order."""
    phantoms = phantom_dataset("b", images)
    encoded = []
    by_image = {example.images[0]: example for example in phantoms.split("train")}
    for number, example in enumerate(by_image.values()):
        buffer = io.BytesIO()
        phantoms.open_image(example.images[0]).save(buffer, "PNG")
        url = f"data:image/png;base64,{b64encode(buffer.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": example.question}]
        for adapter_number, name in enumerate(names):
            fields = {"model": name, "messages": [{"role": "user", "content": content}]}
            body = json.dumps(fields | {"stream": (number + adapter_number) % 4 == 0}).encode()
            head = (
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: {netloc}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            encoded.append(head.encode() + body)
    random.Random(0).shuffle(encoded)
    return encoded


# --- phases -------------------------------------------------------------------------------------------------


async def closed_loop(clients: Clients, encoded: Sequence[bytes], count: int, warm: float, seconds: float) -> float:
    """Answers per second of `count` clients that send one request after the other, after a warm-up."""
    end = time.perf_counter() + warm + seconds

    async def client(number: int) -> None:
        while time.perf_counter() < end:
            await clients.send(encoded[number % len(encoded)])
            number += count

    tasks = [asyncio.ensure_future(client(number)) for number in range(count)]
    await asyncio.sleep(warm)  # the server encodes the images and loads the adapters
    clients.log = RequestLog()
    start = time.perf_counter()
    await asyncio.sleep(seconds)
    rate = clients.log.outcomes["200"] / (time.perf_counter() - start)
    await asyncio.gather(*tasks)
    return rate


class OpenLoop:
    """Sends `rate` requests per second at random times (a Poisson process), whatever the answers."""

    def __init__(self, clients: Clients, encoded: Sequence[bytes], rate: float) -> None:
        self.clients, self.requests, self.rate = clients, encoded, rate
        self.sent, self.dropped = 0, 0
        self.running: set[asyncio.Task[str]] = set()
        self._random = random.Random(1)

    async def run(self) -> None:
        """Send requests until the task is cancelled."""
        due = time.perf_counter()
        while True:
            due += self._random.expovariate(self.rate)
            if (wait_s := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            if len(self.running) >= MAX_CONNECTIONS:
                self.dropped += 1
                continue
            self.clients.log.late.append(max(0.0, time.perf_counter() - due))
            task = asyncio.ensure_future(self.clients.send(self.requests[self.sent % len(self.requests)]))
            self.sent += 1
            self.running.add(task)
            task.add_done_callback(self.running.discard)


async def measure(options: argparse.Namespace, root: Path, log: Path) -> dict[str, Any]:
    """Start the server and run all phases: their rows, the server's memory, and the lost requests."""
    command = [sys.executable, "-m", "normtune", "serve", "nano", "--adapter-root", str(root), "--port", "0"]
    command += ["--per-minute", "10000000", "--json"]
    with log.open("wb") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as server:
        assert server.stdout is not None
        try:
            first_line = await asyncio.to_thread(server.stdout.readline)
            if not first_line:
                raise SystemExit(f"load: the server did not start: {log.read_text()[-2000:]}")
            server_info = json.loads(first_line)
            address = urlsplit(server_info["url"])
            clients = Clients(str(address.hostname), int(address.port or 80))
            encoded = encode_requests(server_info["adapters"], options.images, address.netloc)
            results = await run_phases(options, server, clients, encoded)
        finally:
            server.kill()
    return results | compare_logs(results.pop("books"), log.read_text())


async def run_phases(
    options: argparse.Namespace, server: subprocess.Popen[bytes], clients: Clients, encoded: Sequence[bytes]
) -> dict[str, Any]:
    """Run the closed loop, the open loop, and the shutdown under load."""
    memory, start = [], time.perf_counter()

    def sample_memory() -> None:
        memory.append(
            {"seconds": round(time.perf_counter() - start, 1), "bytes": read_status_bytes("VmRSS", server.pid) or 0}
        )

    sample_memory()
    client_logs = [clients.log]  # of the warm-up
    rate = await closed_loop(clients, encoded, options.clients, options.warm_seconds, options.capacity_seconds)
    capacity_log = clients.log
    sample_memory()
    clients.log = load_log = RequestLog()
    open_loop = OpenLoop(clients, encoded, options.times * rate)
    sending = asyncio.ensure_future(open_loop.run())
    end = time.perf_counter() + 60 * options.minutes
    load_seconds = time.perf_counter()
    while (remaining := end - time.perf_counter()) > 0:
        await asyncio.sleep(min(options.every, remaining))
        sample_memory()
    load_seconds = time.perf_counter() - load_seconds
    clients.log = shutdown_log = RequestLog()
    unanswered = len(open_loop.running)
    server.send_signal(signal.SIGTERM)
    sigterm_time = time.perf_counter()
    stopping = asyncio.ensure_future(asyncio.to_thread(server.wait, TIMEOUT_S))
    await asyncio.wait({stopping}, timeout=LOAD_AFTER_SIGTERM_S)
    sending.cancel()
    await asyncio.gather(*open_loop.running)
    status = await stopping
    for _, writer in clients.idle:
        writer.close()
    rows = [
        phase_row("capacity", capacity_log, options.capacity_seconds),
        phase_row("load", load_log, load_seconds) | {"offered_per_second": open_loop.rate, "of_capacity": None},
        phase_row("end", shutdown_log, time.perf_counter() - sigterm_time) | {"waiting_at_sigterm": unanswered},
    ]
    rows[1]["of_capacity"] = rows[1]["answered_per_second"] / rate
    return {
        "rows": rows,
        "memory": memory,
        "late_s": percentiles(load_log.late),
        "held_back": open_loop.dropped,
        "exit_status": status,
        "wrong": count_unexpected(capacity_log, EXPECTED)
        + count_unexpected(load_log, EXPECTED)
        + count_unexpected(shutdown_log, EXPECTED_AT_SHUTDOWN),
        "books": [*client_logs, capacity_log, load_log, shutdown_log],
    }


def count_unexpected(log: RequestLog, expected: set[str]) -> int:
    """The number of outcomes that are not expected."""
    return sum(count for outcome, count in log.outcomes.items() if outcome not in expected)


def phase_row(name: str, log: RequestLog, seconds: float) -> dict[str, Any]:
    """The row of a phase: its rate, outcomes, and latencies by status."""
    return {
        "stretch": name,
        "seconds": seconds,
        "outcomes": dict(log.outcomes),
        "answered_per_second": log.outcomes["200"] / seconds,
        "latency_s": {status: percentiles(log.seconds.get(status, [])) for status in sorted(EXPECTED)},
    }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """The 50th, 95th and 99th percentile and the largest value; None without values."""
    if not values:
        return None
    result = {f"p{percent}": float(np.percentile(values, percent)) for percent in (50, 95, 99)}
    return result | {"most": max(values)}


def compare_logs(client_logs: Sequence[RequestLog], server_log: str) -> dict[str, Any]:
    """Count the lost requests: answered according to the server's log, but received by no client."""
    logged = Counter(re.findall(r"POST (?:/v1/chat/completions|-) (\d+) ", server_log))
    received = sum((client_log.outcomes for client_log in client_logs), Counter())
    received["200"] += received[WRONG] + received[CUT]  # a stream's status is sent before its end
    lost = sum(max(0, count - received[status]) for status, count in logged.items())
    return {"logged": dict(logged), "lost": lost + received[CUT]}


# --- tables -------------------------------------------------------------------------------------------------


def table(results: dict[str, Any]) -> str:
    """A Markdown table of the two loads, with a sentence on memory and one on the shutdown."""
    capacity_row, load_row, end_row = results["rows"]
    header = ["load", "offered/s", "answered/s", "200", "429", "other", "p50", "p95", "p99"]
    lines = []
    for name, row in (("as fast as it answers", capacity_row), ("open", load_row)):
        outcomes, latency = Counter(row["outcomes"]), row["latency_s"]["200"]
        other = sum(outcomes.values()) - outcomes["200"] - outcomes["429"]
        offered = row.get("offered_per_second")
        cells = [f"{offered:.0f}" if offered else "", f"{row['answered_per_second']:.0f}"]
        cells += [f"{count:,}" for count in (outcomes["200"], outcomes["429"], other)]
        cells += [f"{latency[share] * 1e3:.0f} ms" if latency else "" for share in ("p50", "p95", "p99")]
        lines.append([name, *cells])
    mib = [row["bytes"] / 2**20 for row in results["memory"]]
    ended = Counter(end_row["outcomes"])
    sentence = (
        f"Memory of the server: {mib[0]:.0f} MiB at its start, {mib[1]:.0f} when its capacity was known, "
        f"{mib[-1]:.0f} after {load_row['seconds'] / 60:.1f} minutes of load, {max(mib):.0f} at most. "
        f"SIGTERM with {end_row['waiting_at_sigterm']} requests unanswered and more coming: {ended['200']} "
        f"answered, {sum(ended.values()) - ended['200']} turned away, {results['lost']} lost; exit status "
        f"{results['exit_status']} after {end_row['seconds']:.1f} s."
    )
    return "\n".join([*markdown_table(header, lines), "", sentence]) + "\n"


if __name__ == "__main__":
    main()
