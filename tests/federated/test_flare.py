"""A server and three sites as processes, over NVFlare's gRPC with TLS.

It takes minutes: NORMTUNE_NVFLARE=1 runs it.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from normtune.runtime.files import read_json
from tests.support.federated_sites import write_site

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("nvflare") is None, reason="NVFlare is not installed"),
    pytest.mark.skipif("NORMTUNE_NVFLARE" not in os.environ, reason="NORMTUNE_NVFLARE is not set"),
    pytest.mark.timeout(1200),
]

SITES = ("site-a", "site-b", "site-c")
# Python imports `sitecustomize` at its start: in the process of a job it changes what the participant does
PATCH_JOBS = """
import sys
if any("worker_process" in word or "runner_process" in word for word in sys.orig_argv):
    import patched
"""
SCALED = """
from normtune.federated import rules
make = rules.SiteUpdate.__init__
def scaled(self, *args, **fields):
    make(self, *args, **fields)
    for value in self.values.values():
        value *= 1000
rules.SiteUpdate.__init__ = scaled
"""
KILLED = """
import os
from normtune.federated import {module} as module
call = module.{name}
def killed(*arguments):
    marker, number = {marker!r}, {number}
    if number == 1 and not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getppid(), 9)
        os._exit(9)
    return call(*arguments)
module.{name} = killed
"""


class Participants:
    """The processes of the server and the sites, started again if they end."""

    def __init__(self, kits: dict[str, Path], patches: Path) -> None:
        self.kits, self.patches = kits, patches
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.restarts: list[str] = []

    def start(self, name: str) -> None:
        is_server = name == "localhost"
        role, file = ("server", "fed_server.json") if is_server else ("client", "fed_client.json")
        command = [
            sys.executable,
            "-u",
            "-m",
            f"nvflare.private.fed.app.{role}.{role}_train",
            "-m",
            str(self.kits[name]),
        ]
        command += ["-s", file, "--set", "secure_train=true", "org=normtune", "config_folder=config"]
        command += [] if is_server else [f"uid={name}"]
        paths = [str(self.patches / name), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        with open(self.kits[name] / "output.txt", "ab") as output:
            self.processes[name] = subprocess.Popen(
                command, stdout=output, stderr=output, env=environment, start_new_session=True
            )

    def restart_ended(self) -> None:
        for name, process in list(self.processes.items()):
            if process.poll() is not None:
                self.restarts.append(name)
                self.start(name)

    def stop(self) -> None:
        for process in self.processes.values():
            children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            for pid in [process.pid, *map(int, children)]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


@pytest.fixture
def participants(tmp_path: Path) -> Iterator[Participants]:
    from normtune.federated.kits import prepare_kits

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    kits = {name: Path(kit) for name, kit in prepare_kits(tmp_path / "kits", SITES, "localhost", port).items()}
    resources = kits["localhost"] / "local" / "resources.json"
    resources.write_text(resources.read_text().replace("/tmp/nvflare", str(tmp_path / "server")))
    patches = {
        "site-c": SCALED,
        "site-b": KILLED.format(
            module="flare", name="train_at_site", marker=str(tmp_path / "site-killed"), number="arguments[0].round - 1"
        ),
        "localhost": KILLED.format(
            module="rounds", name="run_round", marker=str(tmp_path / "server-killed"), number="arguments[1] - 3"
        ),
    }
    for name, patch in patches.items():
        (tmp_path / "patches" / name).mkdir(parents=True)
        (tmp_path / "patches" / name / "sitecustomize.py").write_text(PATCH_JOBS)
        (tmp_path / "patches" / name / "patched.py").write_text(patch)
    started = Participants(kits, tmp_path / "patches")
    for name in ("localhost", *SITES):
        started.start(name)
    yield started
    started.stop()


def test_a_site_and_the_server_die_and_a_site_is_hostile(
    participants: Participants, base: Path, tmp_path: Path
) -> None:
    kits = participants.kits
    for number, site in enumerate(SITES):
        root = write_site(tmp_path / f"planted-{site}", range(2 * number, 2 * number + 2), text=f"planted{number}")
        (kits[site] / "local" / "site.yaml").write_text(f"data: jsonl\nroot: {root}\n")
    broken = kits["site-c"] / "local" / "site.yaml"
    text = broken.read_text()
    broken.write_text(text.replace("planted-site-c", "planted-nowhere"))
    command = [sys.executable, "-m", "normtune", "federate", str(base), "--kit", str(kits["admin@normtune.org"])]
    command += [argument for site in SITES for argument in ("--site", site)]
    command += ["--rounds", "6", "--local-steps", "1", "--batch", "4", "--quorum", "1", "--deadline", "60"]
    command += ["--device", "cpu", "--out", str(tmp_path / "out")]
    with open(tmp_path / "federate.txt", "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        record = kits["localhost"] / "normtune" / "out" / "federation.json"
        while process.poll() is None:
            time.sleep(1)
            participants.restart_ended()
            if record.is_file():  # the first round is over
                broken.write_text(text)
    assert process.returncode == 0, (tmp_path / "federate.txt").read_text()
    assert sorted(participants.restarts) == ["localhost", "site-b"]
    rounds = read_json(tmp_path / "out" / "federation.json")["rounds"]
    assert [entry["round"] for entry in rounds] == [1, 2, 3, 4, 5, 6]
    assert rounds[0]["refused"]["site-c"] == "failed with InputError; its own log has the reason"
    assert any("no answer" in entry["refused"].get("site-b", "") for entry in rounds)
    assert set(rounds[-1]["accepted"]) == {"site-a", "site-b"}
    assert not any("site-c" in entry["accepted"] for entry in rounds)
    assert "times as large as the median" in rounds[-1]["refused"]["site-c"]
    # every site has the final adapter, but its text is nowhere else
    final = (tmp_path / "out" / "adapter.safetensors").read_bytes()
    for site in SITES:
        assert (kits[site] / "normtune" / "out" / "adapter" / "adapter.safetensors").read_bytes() == final
        assert "planted" in "".join(path.read_text(errors="replace") for path in kits[site].rglob("site.yaml"))
    searched = [kits["localhost"], kits["admin@normtune.org"], tmp_path / "server", tmp_path / "out"]
    files = [path for part in searched for path in part.rglob("*") if path.is_file()] + [tmp_path / "federate.txt"]
    assert len(files) > 20 and not [path for path in files if b"planted" in path.read_bytes()]
