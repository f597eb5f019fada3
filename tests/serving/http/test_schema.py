"""The server is what its OpenAPI schema says: schemathesis asks for everything in it, and for what is not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from normtune.serving.http.limits import ApiKeys, Limits
from normtune.serving.http.state import Settings
from tests.support.fake_engine import FakeEngine
from tests.support.test_server import call, serving

ROOT = Path(__file__).parents[3]
KEY = "k" * 20
EXAMPLES = 2  # of each address, valid and not; besides some 450 that follow from the schema


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("adapters")
    (root / "knee").mkdir()
    (root / "knee" / "adapter.json").write_text("{}")
    limits = Limits(per_minute=600_000, burst=600_000)
    settings = Settings(base="nano", limits=limits, keys=ApiKeys({"ward": KEY}), adapter_root=root)
    with serving(FakeEngine(), settings) as found:
        yield found


@pytest.mark.slow
@pytest.mark.skipif(find_spec("schemathesis") is None, reason="schemathesis is not installed")
def test_every_answer_is_as_the_schema_says_and_what_it_forbids_is_refused(url: str, tmp_path: Path) -> None:
    """All its checks: no 500; statuses, types, headers, bodies; methods; keys; what was deleted is gone."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", "all"]
    command += ["--max-examples", str(EXAMPLES), "--generation-deterministic", "--request-timeout", "10"]
    command += ["--header", f"Authorization: Bearer {KEY}"]
    hooks = {
        "SCHEMATHESIS_HOOKS": "tests.support.schema_hooks",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}",
    }
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | hooks, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    addresses = len(operations(url))
    assert f"Selected: {addresses}/{addresses}" in done.stdout
    passed = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert passed is not None and int(passed[2]) > 400, done.stdout


def operations(url: str) -> dict[str, Any]:
    """What the schema tells of each method and address."""
    paths = call(url, "GET", "/openapi.json").json["paths"]
    return {f"{method} {path}": told for path, methods in paths.items() for method, told in methods.items()}


def test_the_schema_tells_shapes_refusals_and_the_key(url: str) -> None:
    found = operations(url)
    for address, told in found.items():
        below = " /v1/" in address
        assert ("401" in told["responses"]) == ("security" in told) == below, address
        assert "422" not in told["responses"] and "429" in told["responses"], address
        success = next(one for status, one in told["responses"].items() if status < "300")
        for content in success.get("content", {}).values():
            assert content.get("schema") or content.get("itemSchema"), address
    responses = found["post /v1/chat/completions"]["responses"]
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    assert {"400", "404", "503", "504"} <= set(responses) and "Retry-After" in responses["429"]["headers"]


def test_without_keys_the_schema_asks_for_none() -> None:
    with serving(FakeEngine()) as url:
        for address, told in operations(url).items():
            assert "security" not in told and "401" not in told["responses"], address
            assert ("403" in told["responses"]) == (" /v1/" in address and not address.startswith("get"))
