"""The command line: its output, and bad input: one line on stderr, status 2, and no partial files."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from normtune.commands.app import app
from normtune.data.phantom import phantom_dataset

ROW = {"image": "a.png", "question": "Is it normal?", "answer": "yes"}


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(run_command: Run) -> Run:
    return run_command


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train an LN adapter of the tiny base."""
    from normtune.training.config import TrainConfig
    from normtune.training.train import train

    out = tmp_path_factory.mktemp("adapter") / "ln"
    train(TrainConfig(model=str(base), data="phantom-b:4", tune="ln", out=out, epochs=1, device="cpu"))
    return out


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "b.png"
    phantom_dataset("b", 1).open_image("b-000000").save(path)
    return path


@pytest.mark.parametrize(
    "command",
    [
        *("demo", "inspect", "data", "train", "evaluate", "ask", "describe", "merge", "mix", "export"),
        *("import-miss", "import-llava-med", "bench", "compare", "review", "export-predictions"),
    ],
)
def test_every_command_has_help(run: Run, command: str) -> None:
    status, out, err = run(command, "--help")
    assert status == 0 and "--json" in out and err == ""


def test_help_lists_all_commands_with_the_main_job_first(run: Run) -> None:
    status, out, _ = run("--help")
    commands = [line.split()[0] for line in out.partition("Commands:\n")[2].splitlines()]
    assert status == 0 and len(commands) == len(app.registered_commands)
    assert commands[:5] == ["demo", "inspect", "data", "train", "evaluate"]


def test_importing_the_cli_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, normtune.cli; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"


def test_every_field_of_the_train_config_is_an_option(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from normtune.training.config import TrainConfig

    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = run("train", "--help")
    missing = [
        name for name in TrainConfig.model_fields if name != "model" and f"--{name.replace('_', '-')}" not in out
    ]
    assert missing == []


def test_train_evaluate_ask_and_describe_as_json(run: Run, base: Path, picture: Path, tmp_path: Path) -> None:
    options = ("--data", "phantom-b:4", "--device", "cpu", "--json")
    status, out, err = run("train", base, "--tune", "ln", "--epochs", 1, "--out", tmp_path / "ln", *options)
    trained = json.loads(out)
    assert (status, err) == (0, "") and trained["recipe"].startswith("vision?=ln") and trained["changed"] == 1.0
    status, out, err = run("evaluate", base, "--adapter", tmp_path / "ln", "--out", tmp_path / "scores", *options)
    evaluated = json.loads(out)
    assert (status, err) == (0, "") and evaluated["metrics"]["global_exact"]["rows"] == evaluated["rows"]
    assert evaluated["notice"] == "research use, not for diagnosis" and evaluated["licence"] == "Apache-2.0 (synthetic)"
    questions = ("--image", picture, "--question", "Is any disease shown?", "--question", "Which plane is shown?")
    status, out, err = run("ask", base, "--adapter", tmp_path / "ln", *questions, "--max-new-tokens", 1, "--json")
    answers = json.loads(out)["answers"]
    assert (status, err) == (0, "") and [row["finish_reason"] for row in answers] == ["length", "length"]
    assert [row["question_tokens_cut"] for row in answers] == [0, 0]
    status, out, err = run("ask", base, "--image", picture, "--question", "Why?", "--abstain-below", 1)
    assert (status, err) == (0, "") and "Why?  (abstained: confidence 0." in out
    status, out, err = run("ask", base, "--image", picture, "--question", "Is it a mass? " * 200)
    assert status == 0 and re.search(r"\(the last \d+ tokens of the question were not read\)$", out.strip())
    status, out, err = run("describe", base, "--image", picture, "--json")
    described = json.loads(out)
    assert (status, err) == (0, "") and isinstance(described["report"], str) and described["finish_reason"]


def test_inspect_counts_the_parameters_of_a_model_and_a_recipe(run: Run) -> None:
    status, out, _ = run("inspect", "miss-base", "--tune", "ln", "--json")
    report = json.loads(out)
    assert status == 0 and report["total"] == 361_478_972 and report["recipe"]["trainable"] == 153_600
    status, out, _ = run("inspect", "miss-base", "--tune", "ln")
    assert "trains 153,600 of 361,478,972 parameters = 0.0425%" in out


def test_data_summarises_a_dataset(run: Run) -> None:
    status, out, _ = run("data", "phantom-b:10", "--json")
    assert status == 0 and json.loads(out)["parts"]["train"]["images"] == 10


def test_score_joins_two_files_by_id(run: Run, tmp_path: Path) -> None:
    predictions = [{"id": "b", "prediction": "No effusion."}, {"id": "a", "prediction": "y"}]
    references = [{"id": "a", "reference": "x"}, {"id": "b", "reference": "No effusion."}]
    files = jsonl(tmp_path / "p", *predictions), jsonl(tmp_path / "r", *references)
    status, out, err = run("score", *files, "--json")
    assert (status, err) == (0, "") and json.loads(out)["metrics"]["rouge_l/none"]["value"] == 0.5
    status, out, err = run("score", *files, "--normalisation", "none")
    assert (status, err) == (0, "") and "rouge_l/none" in out
    assert "r2gen" not in out and "effusion." not in out


def test_merge_and_export_write_a_model_and_an_adapter(run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    status, out, err = run("merge", base, "--adapter", adapter, "--out", tmp_path / "merged", "--json")
    assert (status, err) == (0, "") and (tmp_path / "merged" / "config.json").is_file() and json.loads(out)
    status, out, err = run("export", "--adapter", adapter, "--out", tmp_path / "peft", "--json")
    assert (status, err) == (0, "") and (tmp_path / "peft" / "adapter_config.json").is_file() and json.loads(out)


def test_mix_writes_an_adapter_with_its_parents(run: Run, base: Path, adapter: Path, tmp_path: Path) -> None:
    status, out, err = run("mix", f"{adapter}:0.5", "-o", tmp_path / "half", "--json")
    assert (status, err) == (0, "") and json.loads(out)["base_weight"] == 0.5
    status, out, err = run("mix", f"{adapter}:0.25", f"{tmp_path / 'half'}:0.75", "--out", tmp_path / "both")
    assert (status, err) == (0, "") and f"0.25 x {adapter} + 0.75 x" in out
    card = (tmp_path / "both" / "README.md").read_text()
    assert f"adapter {adapter.name}, weight 0.2500" in card and "adapter half, weight 0.7500" in card
    for wrong in ("ln", "ln:", ":0.5", "ln:half", "ln:nan"):
        status, out, err = run("mix", wrong, "--out", tmp_path / "none")
        assert (status, out) == (2, "") and f"'{wrong}' has no weight" in err and err.count("\n") == 1
    status, out, err = run("mix", "ln:0.5", "ln:0.5", "--out", tmp_path / "none")
    assert status == 2 and "ln is given twice" in err


def jsonl(folder: Path, *rows: dict[str, Any] | str) -> Path:
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (48, 48), (90, 90, 90)).save(folder / "a.png")
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


BadInput = Callable[[Path, Path, Path, Path], list[object]]  # (base, adapter, folder, out) -> arguments


def train_on(make_file: Callable[[Path], Path]) -> BadInput:
    return lambda base, adapter, folder, out: [
        "train", base, "--data", "jsonl", "--root", make_file(folder), "--epochs", 1, "--out", out,
    ]  # fmt: skip


def missing_image(folder: Path) -> Path:
    return jsonl(folder, ROW, ROW | {"image": "gone.png"})


def corrupt_jpeg(folder: Path) -> Path:
    path = jsonl(folder, ROW, ROW | {"image": "torn.jpg"})
    Image.effect_noise((64, 64), 50).convert("RGB").save(folder / "whole.jpg")
    (folder / "torn.jpg").write_bytes((folder / "whole.jpg").read_bytes()[:400])
    return path


def corrupt_dicom(folder: Path) -> Path:
    path = jsonl(folder, ROW | {"image": "torn.dcm"})
    (folder / "torn.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\x02\0\0\0UL\x04\0" + b"\xff" * 40)
    return path


def of_another_base(base: Path, adapter: Path, folder: Path, out: Path) -> list[object]:
    from tests.support.tiny_miss import save_tiny_miss

    return ["merge", save_tiny_miss(folder / "other", seed=7), "--adapter", adapter, "--out", out]


def damaged_adapter(base: Path, adapter: Path, folder: Path, out: Path) -> list[object]:
    shutil.copytree(adapter, folder / "cut")
    content = (adapter / "adapter.safetensors").read_bytes()
    (folder / "cut" / "adapter.safetensors").write_bytes(content[:-100])
    return ["evaluate", base, "--adapter", folder / "cut", "--data", "phantom-b:4", "--out", out]


BAD: dict[str, tuple[BadInput, tuple[str, ...]]] = {
    "missing image": (train_on(missing_image), ("rows.jsonl, line 2", "gone.png", "missing")),
    "corrupt JPEG": (train_on(corrupt_jpeg), ("torn.jpg", "damaged or cut short", "Replace the file")),
    "corrupt DICOM": (train_on(corrupt_dicom), ("torn.dcm", "no image at all")),
    "wrong field": (
        train_on(lambda f: jsonl(f, ROW, {"image": "a.png", "qestion": "x", "answer": "y"})),
        ("rows.jsonl, line 2", "'question' is missing", "qestion"),
    ),
    "empty answer": (
        train_on(lambda f: jsonl(f, ROW, ROW, ROW | {"answer": " "})),
        ("rows.jsonl, line 3", "answer is empty", "Fill it in, or remove the row"),
    ),
    "not JSON": (train_on(lambda f: jsonl(f, ROW, "{")), ("rows.jsonl, line 2", "not valid JSON")),
    "unknown recipe word": (
        lambda b, a, f, o: ["train", b, "--data", "phantom-b:4", "--tune", "vision=nl", "--out", o],
        ("unknown method 'nl'", "did you mean 'ln'", "column 8"),
    ),
    "unknown part": (
        lambda b, a, f, o: ["train", b, "--data", "phantom-b:4", "--tune", "connector=ln", "--out", o],
        ("no part 'connector'", "vision, encoder, decoder", "connector?"),
    ),
    "adapter of another base": (of_another_base, ("was trained on", "other values")),
    "damaged adapter": (damaged_adapter, ("adapter.safetensors", "truncated")),
    "missing adapter": (
        lambda b, a, f, o: ["evaluate", b, "--adapter", f, "--data", "phantom-b:4", "--out", o],
        ("adapter.json is missing",),
    ),
    "unknown dataset": (
        lambda b, a, f, o: ["train", b, "--data", "slak", "--root", f, "--out", o],
        ("no dataset 'slak'", "did you mean 'slake'"),
    ),
    "wrong folder of SLAKE": (
        lambda b, a, f, o: ["train", b, "--data", "slake", "--root", f, "--out", o],
        ("not SLAKE's folder", "--root"),
    ),
    "unknown split": (
        lambda b, a, f, o: ["evaluate", b, "--data", "phantom-b:4", "--split", "tset", "--out", o],
        ("no split 'tset'", "did you mean 'test'"),
    ),
    "unknown model": (
        lambda b, a, f, o: ["train", "nanoo", "--data", "phantom-b:4", "--out", o],
        ("no model 'nanoo'", "did you mean 'nano'"),
    ),
    "directory without a model": (
        lambda b, a, f, o: ["train", f, "--data", "phantom-b:4", "--out", o],
        ("holds no config.json",),
    ),
    "invalid value": (
        lambda b, a, f, o: ["train", b, "--data", "phantom-b:4", "--batch", 0, "--out", o],
        ("--batch", "greater than 0"),
    ),
    "unknown device": (
        lambda b, a, f, o: ["train", b, "--data", "phantom-b:4", "--device", "cudaa", "--out", o],
        ("device 'cudaa'", "Use cpu"),
    ),
    "unknown tracker": (
        lambda b, a, f, o: ["train", b, "--data", "phantom-b:4", "--tracker", "wandbb", "--out", o],
        ("--tracker wandbb",),
    ),
    "unknown option": (
        lambda b, a, f, o: ["train", b, "--data", "phantom-b:4", "--epocs", 3, "--out", o],
        ("--epocs", "--epochs"),
    ),
    "repeated id": (
        lambda b, a, f, o: ["score", jsonl(f, *[{"id": 1, "prediction": ""}] * 2), f / "r"],
        ("rows.jsonl, line 2", "id '1' is also on line 1"),
    ),
    "predictions without a reference": (
        lambda b, a, f, o: [
            "score", jsonl(f / "p", {"id": 1, "prediction": "x"}), jsonl(f / "r", {"id": 2, "reference": "x"})
        ],
        ("p/rows.jsonl, line 1", "id '1' is not in", "r/rows.jsonl"),
    ),
    "missing result": (
        lambda b, a, f, o: ["compare", f / "ln", f / "full", "--out", o],
        ("ln/metrics.json is missing",),
    ),
    "unknown task": (
        lambda b, a, f, o: ["score", f / "p", f / "r", "--task", "vqaa"],
        ("--task vqaa", "did you mean 'vqa'"),
    ),
    "--out below a file": (
        lambda b, a, f, o: ["evaluate", b, "--data", "phantom-b:4", "--out", jsonl(f / "x", ROW) / "deeper"],
        ("cannot write", "Choose another --out"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    run: Run, base: Path, adapter: Path, tmp_path: Path, case: str
) -> None:
    arguments, expected_texts = BAD[case]
    (folder := tmp_path / "in").mkdir()
    out = tmp_path / "out"
    status, printed, err = run(*arguments(base, adapter, folder, out))
    assert status == 2 and printed == ""
    assert err.count("\n") == 1 and err.startswith("normtune: ")
    for text in expected_texts:
        assert text in err, err
    assert "Traceback" not in err
    files = [path for path in out.rglob("*") if path.is_file()] if out.exists() else []
    assert files == []


def test_a_full_disk_is_an_error_and_the_old_adapter_stays(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A limit on the file size simulates a full disk: writing fails in the middle of a file."""
    out = tmp_path / "out"
    shutil.copytree(adapter, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    command = [sys.executable, "-m", "normtune", "train", str(base), "--data", "phantom-b:4", "--tune", "ln"]
    process = subprocess.run(
        [*command, "--epochs", "1", "--device", "cpu", "--out", str(out), "--overwrite", "--json"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)),
    )
    assert process.returncode == 2 and process.stdout == ""
    moved, error = process.stderr.splitlines()
    assert "moved the earlier run" in moved and "cannot write" in error and "Free some space" in error
    moved_run = tmp_path / "out.old-1"
    assert {path.name: path.read_bytes() for path in moved_run.iterdir() if path.is_file()} == before
