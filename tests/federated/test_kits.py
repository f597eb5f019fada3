"""Startup kits of a deployment."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

from normtune.runtime.files import read_json
from tests.support.base_models import input_error

HAS_NVFLARE = importlib.util.find_spec("nvflare") is not None


@pytest.mark.skipif(not HAS_NVFLARE, reason="NVFlare is not installed")
def test_kits_allow_our_classes_alone_and_stream_no_logs(tmp_path: Path) -> None:
    from normtune.federated.kits import prepare_kits

    kits = prepare_kits(tmp_path / "kits", ["north"], "fed.example.org", 8002)
    assert kits.keys() == {"fed.example.org", "north", "admin@normtune.org"}
    for name in ("fed.example.org", "north"):
        local = Path(kits[name]) / "local"
        resources, default = (read_json(local / f"resources.json{end}") for end in ("", ".default"))
        added = set(resources["class_allow_list"]) - set(default["class_allow_list"])
        assert added == {f"normtune.federated.flare.{c}" for c in ("FederationController", "SiteExecutor")}
        assert resources["class_list_enforcement_mode"] == "enforce"
    assert resources["allow_log_streaming"] is False and default["allow_log_streaming"] is True
    assert not [part for part in resources["components"] if "log" in part["id"]]
    client = read_json(Path(kits["north"]) / "startup" / "fed_client.json")
    assert client["client"]["connection_security"] == "mtls"
    assert client["servers"][0]["service"] == {"target": "fed.example.org:8002", "scheme": "grpc"}
    assert "is not an empty directory" in input_error(lambda: prepare_kits(tmp_path / "kits", ["b"], "localhost", 1))


@pytest.mark.skipif(not HAS_NVFLARE, reason="NVFlare is not installed")
def test_the_secret_key_is_in_the_kits_of_sites_alone(tmp_path: Path) -> None:
    tenseal = pytest.importorskip("tenseal")
    from normtune.federated.kits import prepare_kits

    kits = prepare_kits(tmp_path / "kits", ["north", "south"], "localhost", 8002, secure=True)
    contexts = [
        Path(kit, "startup", "client_context.tenseal") for name, kit in kits.items() if name in ("north", "south")
    ]
    assert contexts[0].read_bytes() == contexts[1].read_bytes()  # sites can decrypt the same average
    assert tenseal.context_from(contexts[0].read_bytes()).has_secret_key()
    server = Path(kits["localhost"], "startup", "server_context.tenseal")
    assert not tenseal.context_from(server.read_bytes()).has_secret_key()
    keys = sorted(path.parents[1].name for path in (tmp_path / "kits").rglob("*.tenseal"))
    assert keys == ["localhost", "north", "south"]


@pytest.mark.skipif(HAS_NVFLARE, reason="NVFlare is installed")
def test_a_deployment_says_how_to_install_nvflare(
    tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    kits = ["federate-kits", "--site", "a", "--server", "localhost", "--out", tmp_path / "kits"]
    deployed = ["federate", "nano", "--site", "a", "--kit", tmp_path, "--out", tmp_path / "out"]
    for arguments in (kits, deployed):
        status, _, error = run_command(*arguments)
        assert status == 2 and "pip install normtune[federate]" in error
