"""`normtune serve`: its options, and the engine and server that it starts."""

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
from normtune.serving.http.state import Settings
from tests.support.test_server import call, chat_body, serving


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["normtune", "serve", *map(str, arguments)])
    monkeypatch.delenv("NORMTUNE_API_KEYS", raising=False)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--host", "0.0.0.0"), "--api-keys"),
        (("--adapter", "chest"), "NAME=DIR"),
        (("--adapter-root", "gone"), "--adapter-root"),
        (("--api-keys", "gone"), "--api-keys"),
        (("--reviews", "gone"), "--reviews"),
        (("--host", "192.0.2.1", "--without-keys"), "cannot listen"),
        (("--adapter", "nano=x"), "has the name of the base"),
        (("--adapter", "x=gone"), "gone"),
    ],
)
def test_invalid_options_print_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    options: tuple[str, ...],
    text: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, "nano", "--port", 0, *options) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and text in err


def test_serve_has_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    out = capsys.readouterr().out
    assert "--json" in out and "--api-keys" in out and "not for diagnosis" in out


def test_a_base_and_its_adapters_are_served(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    responses: list[Any] = []

    def serve_and_stop(engine: Any, settings: Settings, listening: Any, *, ready: Any, quiet: bool) -> None:
        ready()
        listening.close()
        with serving(engine, settings) as url:
            responses.append(call(url, "POST", "/v1/chat/completions", chat_body(model="nano")))
            responses.append(call(url, "POST", "/v1/chat/completions", chat_body(None, model="nano", stream=True)))
            long_request = chat_body(None, model="nano", max_tokens=100_000)
            assert call(url, "POST", "/v1/chat/completions", long_request).status == 200, "it gets the model's maximum"
            responses.append(call(url, "GET", "/metrics"))

    monkeypatch.setattr(server, "run", serve_and_stop)
    assert run(monkeypatch, "nano", "--port", 0, "--device", "cpu", "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["model"], info["adapters"], info["keys"]) == ("nano", [], False)
    answer, stream, metrics = responses
    assert answer.status == 200 and 0 < answer.json["normtune"]["confidence"] <= 1
    assert stream.status == 200 and stream.body.endswith(b"data: [DONE]\n\n")
    assert b"normtune_answers_total 3.0\n" in metrics.body


def test_adapters_below_the_root_that_cannot_be_served_are_skipped_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for recipe in ("ln", "decoder=attention[:1]"):
        model = load("nano").model
        base_fingerprint = fingerprint(model)
        out = tmp_path / recipe.partition("=")[0]
        save_adapter(adapt(model, recipe), out, base_name="nano", base_fingerprint=base_fingerprint)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "adapter.json").write_text("{")
    for name in ("ln-encoder+decoder", "nano", "of Jane Doe"):
        shutil.copytree(tmp_path / "ln", tmp_path / name)
    monkeypatch.setattr(server, "run", lambda *_, ready, **__: ready())
    options = ("nano", "--port", 0, "--device", "cpu", "--adapter-root", tmp_path)
    assert run(monkeypatch, *options, "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert info["adapters"] == ["ln", "ln-encoder+decoder"]
    assert [*info["left_out"]] == ["cut", "decoder", "nano", "of Jane Doe"]
    assert "by attention" in info["left_out"]["decoder"]
    assert run(monkeypatch, *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [f"skipped: {reason}" for reason in info["left_out"].values()]
    assert lines[-1].startswith("nano with 2 adapters at http")
    assert run(monkeypatch, *options[:5], "--adapter", f"decoder={tmp_path / 'decoder'}") == 2


def test_links_out_of_the_root_are_skipped_at_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "ward-7"
    model = load("nano").model
    base_fingerprint = fingerprint(model)
    save_adapter(adapt(model, "ln"), root / "run-3", base_name="nano", base_fingerprint=base_fingerprint)
    shutil.copytree(root / "run-3", elsewhere)
    (root / "latest").symlink_to(root / "run-3")
    (root / "borrowed").symlink_to(elsewhere)
    (root / "chosen").symlink_to(elsewhere)
    (tmp_path / "link to root").symlink_to(root)
    monkeypatch.setattr(server, "run", lambda *_, ready, **__: ready())
    options = ("nano", "--port", 0, "--device", "cpu", "--json", "--adapter", f"chosen={elsewhere}")
    assert run(monkeypatch, *options, "--adapter-root", tmp_path / "link to root") == 0
    info = json.loads(capsys.readouterr().out)
    assert info["adapters"] == ["chosen", "latest", "run-3"]
    assert [*info["left_out"]] == ["borrowed"] and "link out of --adapter-root" in info["left_out"]["borrowed"]
