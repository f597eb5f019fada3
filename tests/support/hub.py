"""A hub on this machine: the part of the Hugging Face hub's HTTP API that uploads and downloads small files."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "a" * 40


class Hub:
    """The repositories of a hub: name -> its files, and whether it is private."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.url = ""

    def info(self, repo: str) -> dict[str, Any]:
        return {
            "id": repo,
            "sha": COMMIT,
            "private": self.private[repo],
            "siblings": [{"rfilename": name} for name in self.files[repo]],
            "tags": [],
        }


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def send(self, value: Any, status: int = 200) -> None:
            self.send_body(json.dumps(value).encode(), {"Content-Type": "application/json"}, status)

        def send_body(self, body: bytes, headers: dict[str, str], status: int = 200) -> None:
            self.send_response(status)
            for name, text in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, text)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def read_body(self) -> bytes:
            if "chunked" not in self.headers.get("Transfer-Encoding", ""):
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def do_POST(self) -> None:
            body = self.read_body()
            parts = self.path.strip("/").split("/")
            if parts[:3] == ["api", "repos", "create"]:
                values = json.loads(body)
                repo = "/".join(filter(None, [values.get("organization"), values["name"]]))
                if repo in hub.files:
                    self.send({"error": "exists", "url": f"{hub.url}/{repo}"}, 409)
                    return
                hub.files[repo], hub.private[repo] = {}, values.get("private", values.get("visibility") == "private")
                self.send({"url": f"{hub.url}/{repo}"})
            elif parts[:2] == ["api", "validate-yaml"]:
                self.send({"errors": [], "warnings": []})
            elif parts[4] == "preupload":
                names = [file["path"] for file in json.loads(body)["files"]]
                self.send({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
            elif parts[4] == "commit":
                repo = "/".join(parts[2:4])
                for line in body.splitlines():
                    entry = json.loads(line)
                    if entry["key"] == "file":
                        hub.files[repo][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
                self.send({"commitUrl": f"{hub.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})
            else:
                self.send({"error": self.path}, 404)

        def do_GET(self) -> None:
            parts = self.path.partition("?")[0].strip("/").split("/")
            repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
            if repo not in hub.files:
                self.send_body(b"", {"X-Error-Code": "RepoNotFound"}, 404)
            elif parts[0] == "api" and parts[4:5] == ["tree"]:
                files = hub.files[repo].items()
                self.send([{"type": "file", "path": name, "size": len(b), "oid": _oid(b)} for name, b in files])
            elif parts[0] == "api":
                self.send(hub.info(repo))
            elif parts[2] == "resolve" and (body := hub.files[repo].get("/".join(parts[4:]))) is not None:
                self.send_body(body, {"ETag": f'"{_oid(body)}"', "X-Repo-Commit": COMMIT})
            else:
                self.send_body(b"", {"X-Error-Code": "EntryNotFound"}, 404)

        do_HEAD = do_GET

    return Handler


def _oid(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@contextmanager
def hub_server() -> Iterator[Hub]:
    """Run a hub without repositories."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
