"""The server under twice the load that it can carry: statuses, latencies, memory, and its end by SIGTERM.

    python benchmarks/load.py --minutes 5 --out benchmarks/load.json

`normtune serve nano` runs as a user runs it, a process of its own on loopback, with norm adapters of random
gains. A closed loop (so many clients, each asking again once it is answered) finds its capacity; an open loop
then offers --times as many requests a second, at random times that do not wait for answers. Requests name an
adapter and carry a phantom as a data URL; every fourth streams. Right are 200, with a whole answer, and 429.
While the load goes on the server gets SIGTERM: what it took must be answered. Whether it did is told by two
books: the statuses that the clients read, and those of the server's own log. A request that the log has and
no client got is lost; one that met a closed door is not in the log. Generator and server share the cores.
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
from serving import TUNE, written

from normtune.data.phantom import dataset
from normtune.models.loading import load
from normtune.runtime.memory import status_bytes

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]

REFUSED, UNREAD, CUT, WRONG = "connection refused", "closed before it was read", "cut short", "not an answer"
RIGHT = {"200", "429"}
AT_THE_END = RIGHT | {"503", REFUSED, UNREAD}  # once the server goes down
PATIENCE_S = 150.0  # the server's own are 120 s an answer, and 10 more at its end
AFTER_S = 2.0  # so long requests are still offered after SIGTERM
CONNECTIONS = 1_500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file; the table goes beside it")
    parser.add_argument("--minutes", type=float, default=5.0, help="of the open loop (default %(default)s)")
    parser.add_argument("--warm-seconds", type=float, default=5.0, help="before anything is measured")
    parser.add_argument("--capacity-seconds", type=float, default=15.0, help="of the closed loop")
    parser.add_argument("--clients", type=int, default=64, help="of the closed loop (default %(default)s)")
    parser.add_argument("--times", type=float, default=2.0, help="of the capacity (default %(default)s)")
    parser.add_argument("--adapters", type=int, default=16, help="default %(default)s")
    parser.add_argument("--images", type=int, default=64, help="phantoms (default %(default)s)")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between looks at the memory")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "adapters"
        written(load("nano"), TUNE["miss"], options.adapters, root)
        found = asyncio.run(measured(options, root, Path(folder) / "log"))
    text = table(found)
    print("\n" + text)
    if options.out:
        rows = found.pop("rows")
        names = ("clients", "times", "adapters", "images")
        asked = {name: getattr(options, name) for name in names}
        record(options.out, "load", rows, model="nano", recipe=TUNE["miss"], **asked, **found)
        options.out.with_suffix(".md").write_text(text, encoding="utf-8")
    if found["wrong"] or found["lost"] or found["exit_status"]:
        raise SystemExit(
            f"load: {found['wrong']} answers that were neither 200 nor 429, {found['lost']} lost, exit "
            f"status {found['exit_status']}."
        )


# --- one client ---------------------------------------------------------------------------------------------


@dataclass
class Book:
    """What became of the requests of a stretch of time."""

    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, list[float]] = field(default_factory=dict)  # by outcome, from sending to the last byte
    late: list[float] = field(default_factory=list)  # how far behind their times requests were sent

    def add(self, outcome: str, seconds: float) -> None:
        self.outcomes[outcome] += 1
        self.seconds.setdefault(outcome, []).append(seconds)


@dataclass
class Clients:
    """Connections to the server, kept for the next request; `book` is the one that is written in now."""

    host: str
    port: int
    book: Book = field(default_factory=Book)
    idle: deque[Connection] = field(default_factory=deque)

    async def ask(self, request: bytes) -> str:
        """Send a request and read its answer; the outcome is booked where it ends."""
        began = time.perf_counter()
        outcome = await self._outcome(request)
        self.book.add(outcome, time.perf_counter() - began)
        return outcome

    def _held(self) -> Connection | None:
        """An idle connection that the server has not closed."""
        while self.idle:
            opened = self.idle.pop()
            if not opened[0].at_eof():
                return opened
            opened[1].close()
        return None

    async def _outcome(self, request: bytes) -> str:
        try:
            opened = self._held() or await asyncio.open_connection(self.host, self.port)
        except OSError:
            return REFUSED
        reader, writer = opened
        keep, head = False, b""
        try:
            async with asyncio.timeout(PATIENCE_S):
                writer.write(request)
                head = await reader.readuntil(b"\r\n\r\n")
                body, keep = await body_of(reader, head)
        except asyncio.IncompleteReadError as error:
            return CUT if head or error.partial else UNREAD
        except TimeoutError:  # it is an OSError, too
            return "no answer in time"
        except OSError:
            return CUT if head else UNREAD
        finally:
            if keep:
                self.idle.append(opened)
            else:
                writer.close()
        status = head[9:12].decode()
        return WRONG if status == "200" and not is_answer(head, body) else status


async def body_of(reader: asyncio.StreamReader, head: bytes) -> tuple[bytes, bool]:
    """(body, whether the connection takes another request)."""
    lower = head.lower()
    keep = b"connection: close" not in lower
    if (length := re.search(rb"content-length: (\d+)", lower)) is not None:
        return await reader.readexactly(int(length[1])), keep
    pieces = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        pieces.append((await reader.readexactly(size + 2))[:-2])
    await reader.readexactly(2)
    return b"".join(pieces), keep


def is_answer(head: bytes, body: bytes) -> bool:
    """Whether a body is a whole answer with a text."""
    if b"text/event-stream" in head:
        return body.endswith(b"data: [DONE]\n\n") and b'"error"' not in body and b'"finish_reason": "' in body
    return isinstance(json.loads(body)["choices"][0]["message"]["content"], str)


def requests(names: Sequence[str], images: int, netloc: str) -> list[bytes]:
    """Requests as they are sent: every image with every adapter, in a random order."""
    phantoms = dataset("b", images)
    made = []
    for number, example in enumerate({one.images[0]: one for one in phantoms.split("train")}.values()):
        out = io.BytesIO()
        phantoms.open_image(example.images[0]).save(out, "PNG")
        url = f"data:image/png;base64,{b64encode(out.getvalue()).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": example.question},
        ]
        for other, name in enumerate(names):
            asked = {"model": name, "messages": [{"role": "user", "content": content}]}
            body = json.dumps(asked | {"stream": (number + other) % 4 == 0}).encode()
            head = (
                f"POST /v1/chat/completions HTTP/1.1\r\nHost: {netloc}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            made.append(head.encode() + body)
    random.Random(0).shuffle(made)
    return made


# --- loads --------------------------------------------------------------------------------------------------


async def closed_loop(
    clients: Clients, asked: Sequence[bytes], count: int, warm: float, seconds: float
) -> float:
    """Answers a second of so many clients that ask again and again; the book begins after the warm-up."""
    end = time.perf_counter() + warm + seconds

    async def client(number: int) -> None:
        while time.perf_counter() < end:
            await clients.ask(asked[number % len(asked)])
            number += count

    running = [asyncio.ensure_future(client(number)) for number in range(count)]
    await asyncio.sleep(warm)  # images and adapters are seen for the first time
    clients.book = Book()
    began = time.perf_counter()
    await asyncio.sleep(seconds)
    rate = clients.book.outcomes["200"] / (time.perf_counter() - began)
    await asyncio.gather(*running)
    return rate


class OpenLoop:
    """Requests at random times, so many a second (Poisson), whatever becomes of them."""

    def __init__(self, clients: Clients, asked: Sequence[bytes], rate: float) -> None:
        self.clients, self.asked, self.rate = clients, asked, rate
        self.sent, self.held_back = 0, 0
        self.running: set[asyncio.Task[str]] = set()
        self._random = random.Random(1)

    async def run(self) -> None:
        """Until it is cancelled."""
        due = time.perf_counter()
        while True:
            due += self._random.expovariate(self.rate)
            if (left := due - time.perf_counter()) > 0:
                await asyncio.sleep(left)
            if len(self.running) >= CONNECTIONS:
                self.held_back += 1
                continue
            self.clients.book.late.append(max(0.0, time.perf_counter() - due))
            task = asyncio.ensure_future(self.clients.ask(self.asked[self.sent % len(self.asked)]))
            self.sent += 1
            self.running.add(task)
            task.add_done_callback(self.running.discard)


async def measured(options: argparse.Namespace, root: Path, log: Path) -> dict[str, Any]:
    """Rows of the three stretches, the server's memory, and what was lost."""
    command = [sys.executable, "-m", "normtune", "serve", "nano", "--adapter-root", str(root), "--port", "0"]
    command += ["--per-minute", "10000000", "--json"]
    with (
        log.open("wb") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as server,
    ):
        assert server.stdout is not None
        try:
            line = await asyncio.to_thread(server.stdout.readline)
            if not line:
                raise SystemExit(f"load: the server did not start: {log.read_text()[-2000:]}")
            told = json.loads(line)
            address = urlsplit(told["url"])
            clients = Clients(str(address.hostname), int(address.port or 80))
            asked = requests(told["adapters"], options.images, address.netloc)
            found = await stretches(options, server, clients, asked)
        finally:
            server.kill()
    return found | balance(found.pop("books"), log.read_text())


async def stretches(
    options: argparse.Namespace, server: subprocess.Popen[bytes], clients: Clients, asked: Sequence[bytes]
) -> dict[str, Any]:
    """The closed loop, the open loop, and the end under load."""
    memory, began = [], time.perf_counter()

    def look() -> None:
        memory.append(
            {
                "seconds": round(time.perf_counter() - began, 1),
                "bytes": status_bytes("VmRSS", server.pid) or 0,
            }
        )

    look()
    books = [clients.book]  # of the warm-up
    rate = await closed_loop(clients, asked, options.clients, options.warm_seconds, options.capacity_seconds)
    capacity = clients.book
    look()
    clients.book = loaded = Book()
    loop = OpenLoop(clients, asked, options.times * rate)
    sending = asyncio.ensure_future(loop.run())
    end = time.perf_counter() + 60 * options.minutes
    loading = time.perf_counter()
    while (left := end - time.perf_counter()) > 0:
        await asyncio.sleep(min(options.every, left))
        look()
    loading = time.perf_counter() - loading
    clients.book = ending = Book()
    waiting = len(loop.running)
    server.send_signal(signal.SIGTERM)
    told = time.perf_counter()
    stopping = asyncio.ensure_future(asyncio.to_thread(server.wait, PATIENCE_S))
    await asyncio.wait({stopping}, timeout=AFTER_S)
    sending.cancel()
    await asyncio.gather(*loop.running)
    status = await stopping
    for _, writer in clients.idle:
        writer.close()
    rows = [
        row("capacity", capacity, options.capacity_seconds),
        row("load", loaded, loading) | {"offered_per_second": loop.rate, "of_capacity": None},
        row("end", ending, time.perf_counter() - told) | {"waiting_at_sigterm": waiting},
    ]
    rows[1]["of_capacity"] = rows[1]["answered_per_second"] / rate
    return {
        "rows": rows,
        "memory": memory,
        "late_s": percentiles(loaded.late),
        "held_back": loop.held_back,
        "exit_status": status,
        "wrong": unexpected(capacity, RIGHT) + unexpected(loaded, RIGHT) + unexpected(ending, AT_THE_END),
        "books": [*books, capacity, loaded, ending],
    }


def unexpected(book: Book, right: set[str]) -> int:
    """How many outcomes are others."""
    return sum(count for outcome, count in book.outcomes.items() if outcome not in right)


def row(name: str, book: Book, seconds: float) -> dict[str, Any]:
    """A stretch's rates, outcomes, and latencies by status."""
    return {
        "stretch": name,
        "seconds": seconds,
        "outcomes": dict(book.outcomes),
        "answered_per_second": book.outcomes["200"] / seconds,
        "latency_s": {status: percentiles(book.seconds.get(status, [])) for status in sorted(RIGHT)},
    }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    found = {f"p{share}": float(np.percentile(values, share)) for share in (50, 95, 99)}
    return found | {"most": max(values)}


def balance(books: Sequence[Book], log: str) -> dict[str, Any]:
    """The server's log against what the clients read: what it answered and nobody got is lost."""
    logged = Counter(re.findall(r"POST (?:/v1/chat/completions|-) (\d+) ", log))
    read = sum((one.outcomes for one in books), Counter())
    read["200"] += read[WRONG] + read[CUT]  # a stream has its status before it ends
    lost = sum(max(0, count - read[status]) for status, count in logged.items())
    return {"logged": dict(logged), "lost": lost + read[CUT]}


# --- tables -------------------------------------------------------------------------------------------------


def table(found: dict[str, Any]) -> str:
    """The two loads, and a line each on memory and on the end."""
    capacity, loaded, end = found["rows"]
    lines = [
        "| load | offered/s | answered/s | 200 | 429 | other | p50 | p95 | p99 |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, one in (("as fast as it answers", capacity), ("open", loaded)):
        outcomes, latency = Counter(one["outcomes"]), one["latency_s"]["200"]
        other = sum(outcomes.values()) - outcomes["200"] - outcomes["429"]
        offered = one.get("offered_per_second")
        cells = [f"{offered:.0f}" if offered else "", f"{one['answered_per_second']:.0f}"]
        cells += [f"{count:,}" for count in (outcomes["200"], outcomes["429"], other)]
        cells += [f"{latency[share] * 1e3:.0f} ms" if latency else "" for share in ("p50", "p95", "p99")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    held = [one["bytes"] / 2**20 for one in found["memory"]]
    ended = Counter(end["outcomes"])
    told = (
        f"Memory of the server: {held[0]:.0f} MiB at its start, {held[1]:.0f} when its capacity was known, "
        f"{held[-1]:.0f} after {loaded['seconds'] / 60:.1f} minutes of load, {max(held):.0f} at most. "
        f"SIGTERM with {end['waiting_at_sigterm']} requests unanswered and more coming: {ended['200']} "
        f"answered, {sum(ended.values()) - ended['200']} turned away, {found['lost']} lost; exit status "
        f"{found['exit_status']} after {end['seconds']:.1f} s."
    )
    return "\n".join([*lines, "", told]) + "\n"


if __name__ == "__main__":
    main()
