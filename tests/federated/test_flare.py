"""A server and sites as processes, over NVFlare's gRPC with TLS.

They take minutes: NORMTUNE_NVFLARE=1 runs them.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from normtune.federated.rounds import federate
from normtune.runtime.files import read_json
from tests.support.federated_sites import InProcess, federation, write_site
from tests.support.tolerance import assert_close, differ

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


Deploy = Callable[..., Participants]


@pytest.fixture
def deploy(tmp_path: Path) -> Iterator[Deploy]:
    """Starts a server and sites, each site with two pictures of its own; its rows have a word that nobody else has."""
    from normtune.federated.kits import prepare_kits

    started: list[Participants] = []

    def start(sites: Sequence[str], patches: dict[str, str] | None = None, **options: bool) -> Participants:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        written = prepare_kits(tmp_path / "kits", sites, "localhost", port, **options)
        kits = {name: Path(kit) for name, kit in written.items()}
        resources = kits["localhost"] / "local" / "resources.json"
        resources.write_text(resources.read_text().replace("/tmp/nvflare", str(tmp_path / "server")))
        for number, site in enumerate(sites):
            root = write_site(tmp_path / f"planted-{site}", range(2 * number, 2 * number + 2), text=f"planted{number}")
            (kits[site] / "local" / "site.yaml").write_text(f"data: jsonl\nroot: {root}\n")
        for name, patch in (patches or {}).items():
            (tmp_path / "patches" / name).mkdir(parents=True)
            (tmp_path / "patches" / name / "sitecustomize.py").write_text(PATCH_JOBS)
            (tmp_path / "patches" / name / "patched.py").write_text(patch)
        started.append(Participants(kits, tmp_path / "patches"))
        for name in ("localhost", *sites):
            started[-1].start(name)
        return started[-1]

    yield start
    for participants in started:
        participants.stop()


def federate_command(base: Path, participants: Participants, out: Path, *options: object) -> list[str]:
    command = [sys.executable, "-m", "normtune", "federate", base, "--kit", participants.kits["admin@normtune.org"]]
    command += [word for name in participants.processes if name != "localhost" for word in ("--site", name)]
    return [*map(str, [*command, "--local-steps", 1, "--device", "cpu", "--out", out, *options])]


def find_files_with(text: bytes, participants: Participants, tmp_path: Path) -> list[Path]:
    """The files of the server and of the administrator with this text."""
    searched = [participants.kits[name] for name in ("localhost", "admin@normtune.org")]
    searched += [tmp_path / "server", tmp_path / "out"]
    files = [path for part in searched for path in part.rglob("*") if path.is_file()]
    assert len(files) > 20
    return [path for path in [*files, *tmp_path.glob("*.txt")] if text in path.read_bytes()]


def test_a_site_and_the_server_die_and_a_site_is_hostile(deploy: Deploy, base: Path, tmp_path: Path) -> None:
    patches = {
        "site-c": SCALED,
        "site-b": KILLED.format(
            module="flare", name="train_at_site", marker=str(tmp_path / "site-killed"), number="arguments[0].round - 1"
        ),
        "localhost": KILLED.format(
            module="rounds", name="run_round", marker=str(tmp_path / "server-killed"), number="arguments[1] - 3"
        ),
    }
    participants = deploy(SITES, patches)
    kits = participants.kits
    broken = kits["site-c"] / "local" / "site.yaml"
    text = broken.read_text()
    broken.write_text(text.replace("planted-site-c", "planted-nowhere"))
    options = ["--rounds", 6, "--batch", 4, "--quorum", 1, "--deadline", 60]
    command = federate_command(base, participants, tmp_path / "out", *options)
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
    assert not find_files_with(b"planted", participants, tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("opacus") is None, reason="opacus is not installed")
def test_private_sites_count_what_they_spend_across_jobs(deploy: Deploy, base: Path, tmp_path: Path) -> None:
    participants = deploy(SITES[:2])
    options = ["--batch", 2, "--dp-epsilon", 4, "--dp-delta", 0.01, "--rounds"]
    command = federate_command(base, participants, tmp_path / "out", *options)
    first = subprocess.run([*command, "2"], capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    rounds = read_json(tmp_path / "out" / "federation.json")["rounds"]
    spent = {site: [entry["accepted"][site]["epsilon"] for entry in rounds] for site in SITES[:2]}
    accounts = {site: participants.kits[site] / "normtune" / "out" / "privacy.json" for site in spent}
    for site, epsilons in spent.items():
        assert 0 < epsilons[0] < epsilons[1] <= 1.01 * 4
        account = read_json(accounts[site])
        assert len(account["history"]) == 2 and account["privacy"]["epsilon"] == epsilons[1]
        assert rounds[-1]["accepted"][site]["loss"] is None
    # another job starts other processes, which read the account: there is nothing left for a third round
    before = [path.read_bytes() for path in accounts.values()]
    second = subprocess.run([*command, "3"], capture_output=True, text=True, check=False)
    assert second.returncode == 2 and "round 3: 0 of 2 sites sent a usable update" in second.stderr
    assert [path.read_bytes() for path in accounts.values()] == before
    assert "of 3 updates is above --dp-epsilon 4" in read_logs(participants.kits["site-a"])


@pytest.mark.skipif(importlib.util.find_spec("tenseal") is None, reason="TenSEAL is not installed")
def test_a_server_averages_what_it_cannot_read(deploy: Deploy, base: Path, tmp_path: Path) -> None:
    participants = deploy(SITES[:2], secure=True)
    kits = participants.kits
    options = ["--batch", 4, "--optimizer", "sgd", "--lr", 0.1, "--rounds", 2]
    command = federate_command(base, participants, tmp_path / "out", *options)
    ended = subprocess.run([*command, "--secure"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "the adapter is at the sites" in ended.stdout and not (tmp_path / "out" / "adapter.json").exists()
    adapters = [load_file(kits[site] / "normtune" / "out" / "adapter" / "adapter.safetensors") for site in SITES[:2]]
    # the sites have what a server that reads the updates would have averaged
    config = federation(base, tmp_path / "plain", batch=4, optimizer="sgd", lr=0.1, rounds=2)
    federate(config, SITES[:2], InProcess(config, {site: tmp_path / f"planted-{site}" for site in SITES[:2]}))
    plain = load_file(tmp_path / "plain" / "adapter.safetensors")
    start = load_file(tmp_path / "plain" / "start" / "adapter.safetensors")
    for name, value in plain.items():
        assert_close(adapters[0][name], value)
        assert torch.equal(adapters[0][name], adapters[1][name])
        if not torch.equal(value, start[name]):
            assert not find_files_with(adapters[0][name].numpy().tobytes(), participants, tmp_path), name
    assert any(differ(value, start[name]) for name, value in plain.items())
    assert not list(kits["localhost"].rglob("client_context*")) and not find_files_with(
        b"planted", participants, tmp_path
    )
    # an administrator cannot switch encryption off
    refused = subprocess.run([*command[:-1], "3", "--out", tmp_path / "other"], capture_output=True, text=True)
    assert refused.returncode == 2 and "the federation needs --secure" in refused.stderr


def read_logs(kit: Path) -> str:
    return "".join(path.read_text(errors="replace") for path in kit.rglob("*") if path.suffix in (".txt", ".log"))
