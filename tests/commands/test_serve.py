"""`normtune serve`: its options, and the engine that it makes of them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from normtune import cli
from normtune.adapters.fingerprint import fingerprint
from normtune.adapters.storage import save_adapter
from normtune.methods.adapt import adapt
from normtune.models.loading import load
from normtune.serving.http import server
from normtune.serving.http.state import EngineProtocol, Settings
from tests.support.test_server import call, question, serving


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["normtune", "serve", *map(str, arguments)])
    monkeypatch.delenv("NORMTUNE_API_KEYS", raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--host", "0.0.0.0"), "--api-keys"),
        (("--adapter", "chest"), "NAME=DIR"),
        (("--adapter-root", "gone"), "--adapter-root"),
        (("--api-keys", "gone"), "--api-keys"),
        (("--reviews", "gone"), "--reviews"),
        (("--host", "192.0.2.1", "--without-keys"), "cannot listen"),
        (("--adapter", "nano=x"), "called as the base"),
        (("--adapter", "x=gone"), "gone"),
    ],
)
def test_bad_options_are_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    options: tuple[str, ...],
    told: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "nano", "--port", 0, *options) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and told in err


def test_it_has_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert "--json" in out and "--api-keys" in out and "not for diagnosis" in out


def test_a_base_and_its_adapters_are_served(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def once(engine: EngineProtocol, settings: Settings, listening: Any, *, ready: Any, quiet: bool) -> None:
        ready()
        listening.close()
        with serving(engine, settings) as url:
            asked.append(call(url, "POST", "/v1/chat/completions", question(model="nano")))
            asked.append(call(url, "POST", "/v1/chat/completions", question(None, model="nano", stream=True)))
            long = question(None, model="nano", max_tokens=100_000)
            assert call(url, "POST", "/v1/chat/completions", long).status == 200, "as long as it can"
            asked.append(call(url, "GET", "/metrics"))

    monkeypatch.setattr(server, "run", once)
    assert run(monkeypatch, "nano", "--port", 0, "--device", "cpu", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["model"], told["adapters"], told["keys"]) == ("nano", [], False)
    answer, stream, metrics = asked
    assert answer.status == 200 and 0 < answer.json["normtune"]["confidence"] <= 1
    assert stream.status == 200 and stream.body.endswith(b"data: [DONE]\n\n")
    assert b"normtune_answers_total 3\n" in metrics.body


def test_what_lies_below_the_root_and_cannot_be_served_is_left_out_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for recipe in ("ln", "decoder=attention[:1]"):
        model = load("nano").model
        mark = fingerprint(model)
        out = tmp_path / recipe.partition("=")[0]
        save_adapter(adapt(model, recipe), out, base_name="nano", base_fingerprint=mark)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "adapter.json").write_text("{")
    for name in ("ln-encoder+decoder", "nano", "of Jane Doe"):
        shutil.copytree(tmp_path / "ln", tmp_path / name)
    monkeypatch.setattr(server, "run", lambda *_, ready, **__: ready())
    options = ("nano", "--port", 0, "--device", "cpu", "--adapter-root", tmp_path)
    assert run(monkeypatch, *options, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["adapters"] == ["ln", "ln-encoder+decoder"]
    assert [*told["left_out"]] == ["cut", "decoder", "nano", "of Jane Doe"]
    assert "by attention" in told["left_out"]["decoder"]
    assert run(monkeypatch, *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [f"left out: {reason}" for reason in told["left_out"].values()]
    assert lines[-1].startswith("nano with 2 adapters at http")
    assert run(monkeypatch, *options[:5], "--adapter", f"decoder={tmp_path / 'decoder'}") == 2
