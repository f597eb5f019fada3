"""Bad inputs of every reader and command: one line on stderr, exit status 2, and nothing written or overwritten."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from normtune import cli
from tests.support.dataset_samples import slake_row, vqa_rad_row, write_image, write_slake, write_vqa_rad
from tests.support.report_samples import medpix_row, write_medpix

COUNT = 300
ROW = {"image": "a.png", "question": "What?", "answer": "lung"}
CHAT = {"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "lung"}
JUNK: tuple[Any, ...] = (
    None,
    "",
    " ",
    [],
    {},
    True,
    [1],
    {"a": 1},
    "\ud800",
    "x" * 5000,
    "http://a/b.png",
    "../up.png",
)
# Values that an option of a command cannot have.
OPTIONS: dict[str, tuple[list[str], ...]] = {
    "data": (["--task", "both"], ["--sections", "all"], ["--group-by", "ward"], ["--model", "gone"]),
    "train": (["--epochs", "-1"], ["--tune", "lm=ln"], ["--batch", "0"], ["--share", "2"], ["--split", "tset"]),
    "evaluate": (
        ["--beams", "0"],
        ["--limit", "0"],
        ["--controls", "red"],
        ["--baseline", "best"],
        ["--adapter", "gone"],
    ),
}


def damaged(rng: random.Random, text: bytes) -> bytes:
    """The bytes of a file, cut short, or with other bytes in the middle, or of another kind altogether."""
    at = rng.randrange(1, len(text) - 1)
    return rng.choice([text[:at], b"\x00\xff" + text, b"", b"[1, 2", b"not a table", text[:at] + b"}\n{" + text[at:]])


def bad_rows(rng: random.Random, root: Path) -> list[str]:
    """A file of rows of which one is faulty: `data` must refuse it for own data."""
    cells: dict[str, Any] = dict(ROW)
    field = rng.choice(list(cells))
    cells[field] = rng.choice(JUNK[:-1] if field == "image" else JUNK[:9])
    kind = rng.choice(["jsonl", "messages"])
    if kind == "messages":
        turns: list[Any] = [dict(turn) for turn in CHAT]
        fault = rng.choice(
            [turns[:1], turns[::-1], [], "x", [*turns, turns[0]], [{"role": "critic", "content": "x"}, turns[1]]]
        )
        cells = {"messages": fault, "images": ["a.png"]}
    lines = [json.dumps(cells)] if rng.random() < 0.5 else [json.dumps(cells), json.dumps(cells)]
    (root / "rows.jsonl").write_text("\n".join(lines))
    return ["data", kind, "--root", str(root / "rows.jsonl")]


def bad_file(rng: random.Random, root: Path) -> list[str]:
    """A published dataset of which the only file is damaged, or has a row of another type."""
    name = rng.choice(["slake", "vqa-rad", "medpix", "openi", "mimic-cxr", "roco", "path-vqa", "parquet"])
    if name == "slake":
        write_slake(root, train=[slake_row(1, 1)])
        file = root / "train.json"
    elif name == "vqa-rad":
        write_vqa_rad(root, [vqa_rad_row(1, "a.jpg")])
        file = root / "VQA_RAD Dataset Public.json"
    elif name == "medpix":
        write_medpix(root, train=[medpix_row("1")])
        file = root / "train.jsonl"
    else:
        file = root / {"openi": "annotation.json", "mimic-cxr": "annotation.json", "parquet": "a.parquet"}.get(
            name, "x"
        )
        file.write_bytes(b'{"train": [{"id": 1}]}')
    content = rng.choice([b"{}", b"[]", b"[1]", b'{"train": 3}', b"\xff\xfe", damaged(rng, file.read_bytes())])
    file.write_bytes(content)
    return ["data", name, "--root", str(root)]


def bad_option(rng: random.Random, root: Path) -> list[str]:
    """Good data, and an option that cannot be."""
    command = rng.choice(list(OPTIONS))
    (root / "rows.jsonl").write_text(json.dumps(ROW))
    option = rng.choice(OPTIONS[command])
    data = ["jsonl"] if command == "data" else ["nano", "--data", "jsonl", "--out", str(root / "out")]
    split = ["--split", "train"] if command == "evaluate" else []
    return [command, *data, "--root", str(root / "rows.jsonl"), *split, *option]


def bad_picture(rng: random.Random, root: Path) -> list[str]:
    """A picture that cannot be decoded: training and evaluation stop before they begin."""
    image = root / "a.png"
    image.write_bytes(rng.choice([b"", b"text", image.read_bytes()[: rng.randrange(1, 60)]]))
    (root / "rows.jsonl").write_text(json.dumps(ROW))
    command = rng.choice([["train"], ["evaluate", "--split", "train"]])
    return [
        command[0],
        "nano",
        "--data",
        "jsonl",
        "--root",
        str(root / "rows.jsonl"),
        "--out",
        str(root / "out"),
        *command[1:],
    ]


def bad_folder(rng: random.Random, root: Path) -> list[str]:
    """A dataset, model or adapter that is not there, or a folder without it."""
    name = rng.choice(
        ["slake", "vqa-rad", "path-vqa", "openi", "mimic-cxr", "medpix", "roco", "jsonl", "messages", "none"]
    )
    missing = rng.choice([root / "gone", root / "empty"])
    (root / "empty").mkdir()
    return rng.choice(
        [
            ["data", name, "--root", str(missing)],
            ["ask", str(missing), str(root / "a.png"), "What?"],
            ["merge", "nano", str(missing), "--out", str(root / "out")],
            ["export", str(missing), "--out", str(root / "out")],
            ["compare", str(missing), str(root)],
            ["score", str(missing), str(root / "rows.jsonl")],
            ["inspect", str(missing)],
        ]
    )


def files_below(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def cases() -> Iterator[tuple[Callable[[random.Random, Path], list[str]], int]]:
    kinds = [(bad_rows, 110), (bad_file, 90), (bad_option, 40), (bad_picture, 15), (bad_folder, 45)]
    assert sum(count for _, count in kinds) == COUNT
    yield from kinds


@pytest.mark.parametrize(("make", "count"), tuple(cases()), ids=lambda value: getattr(value, "__name__", ""))
def test_bad_input_is_one_line_and_nothing_is_written(
    make: Callable[[random.Random, Path], list[str]],
    count: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = []
    for number in range(count):
        root = tmp_path / str(number)
        root.mkdir()
        write_image(root / "a.png")
        arguments = make(random.Random(f"{make.__name__}-{number}"), root)
        before = files_below(root)
        monkeypatch.setattr(sys, "argv", ["normtune", *arguments])
        status: Any = "traceback"
        try:
            cli.main()
        except SystemExit as ended:
            status = ended.code
        except Exception as error:
            status = repr(error)
        lines = capsys.readouterr().err.strip().splitlines()
        after = {name: data for name, data in files_below(root).items() if not name.endswith(".lock")}
        if status != 2 or len(lines) != 1 or after != before:
            wrong.append((arguments, status, lines[-2:], sorted(set(after) - set(before))))
    assert wrong == [], "\n".join(map(str, wrong))
