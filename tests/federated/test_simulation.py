"""Sites in processes of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from normtune.adapters.storage import read_adapter_info
from tests.support.federated_sites import write_site


def test_the_command_trains_in_processes_and_names_a_site_that_cannot(
    base: Path, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    roots = [write_site(tmp_path / name, numbers) for name, numbers in (("a", range(2)), ("b", range(2, 4)))]
    sites = [f"a=jsonl:{roots[0]}", f"b=jsonl:{roots[1]}", f"c=jsonl:{tmp_path / 'missing'}"]
    options = ["--rounds", 1, "--local-steps", 1, "--device", "cpu", "--workers", 3, "--out", tmp_path / "out"]
    arguments = [argument for site in sites for argument in ("--site", site)]
    status, output, _ = run_command("federate", base, *arguments, *options, "--json")
    assert status == 0
    result = json.loads(output)
    assert sorted(result["rounds"][0]["accepted"]) == ["a", "b"]
    assert str(tmp_path / "missing") in result["refused"]["c"][0]
    assert read_adapter_info(tmp_path / "out").data["sites"] == {"a": 4, "b": 4}
    assert read_adapter_info(tmp_path / "out" / "sites" / "a" / "adapter").recipe == result["recipe"]
    assert not list((tmp_path / "out").rglob("checkpoint-*"))
