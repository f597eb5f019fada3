"""The server conforms to its OpenAPI schema, as valid and invalid requests of schemathesis show."""

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
EXAMPLES = 2  # random requests per operation, besides about 450 that the schema determines


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    root = tmp_path_factory.mktemp("adapters")
    (root / "knee").mkdir()
    (root / "knee" / "adapter.json").write_text("{}")
    limits = Limits(per_minute=600_000, burst=600_000)
    settings = Settings(base="nano", limits=limits, keys=ApiKeys({"ward": KEY}), adapter_root=root)
    with serving(FakeEngine(), settings) as server_url:
        yield server_url


@pytest.mark.slow
@pytest.mark.skipif(find_spec("schemathesis") is None, reason="schemathesis is not installed")
def test_responses_conform_to_the_schema_and_invalid_requests_are_refused(url: str, tmp_path: Path) -> None:
    """All of its checks: no 500; statuses, types, headers, bodies; methods; keys; use after deletion."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--checks", "all"]
    command += ["--max-examples", str(EXAMPLES), "--generation-deterministic", "--request-timeout", "10"]
    command += ["--header", f"Authorization: Bearer {KEY}"]
    hooks = {"SCHEMATHESIS_HOOKS": "tests.support.schema_hooks", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
    process = subprocess.run(command, cwd=tmp_path, env=os.environ | hooks, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stdout + process.stderr
    operation_count = len(operations(url))
    assert f"Selected: {operation_count}/{operation_count}" in process.stdout
    passed = re.search(r"(\d+) generated, (\d+) passed", process.stdout)
    assert passed is not None and int(passed[2]) > 400, process.stdout


def operations(url: str) -> dict[str, Any]:
    """Return the schema of each operation, by method and path."""
    paths = call(url, "GET", "/openapi.json").json["paths"]
    return {f"{method} {path}": operation for path, methods in paths.items() for method, operation in methods.items()}


def test_the_schema_has_response_models_errors_and_the_key(url: str) -> None:
    all_operations = operations(url)
    for name, operation in all_operations.items():
        is_v1 = " /v1/" in name
        assert ("401" in operation["responses"]) == ("security" in operation) == is_v1, name
        assert "422" not in operation["responses"] and "429" in operation["responses"], name
        success = next(response for status, response in operation["responses"].items() if status < "300")
        for content in success.get("content", {}).values():
            assert content.get("schema") or content.get("itemSchema"), name
    responses = all_operations["post /v1/chat/completions"]["responses"]
    assert set(responses["200"]["content"]) == {"application/json", "text/event-stream"}
    assert {"400", "404", "503", "504"} <= set(responses) and "Retry-After" in responses["429"]["headers"]


def test_without_keys_the_schema_requires_none() -> None:
    with serving(FakeEngine()) as url:
        for name, operation in operations(url).items():
            assert "security" not in operation and "401" not in operation["responses"], name
            assert ("403" in operation["responses"]) == (" /v1/" in name and not name.startswith("get"))
