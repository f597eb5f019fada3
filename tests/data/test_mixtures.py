from __future__ import annotations

from pathlib import Path

import pytest

from normtune.data import mixtures
from normtune.data.formats import MixtureEntry, parse_mixture
from normtune.data.options import DataOptions
from normtune.data.registry import open_configured, open_dataset
from normtune.data.splits import find_leaks, group_columns
from normtune.errors import InputError
from tests.support.dataset_samples import slake_row, write_image, write_jsonl, write_slake


@pytest.fixture
def root(tmp_path: Path) -> Path:
    slake = tmp_path / "SLAKE"
    slake.mkdir()
    write_slake(slake, train=[slake_row(1, 1)], validate=[slake_row(2, 2)], test=[slake_row(3, 3)])
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        write_image(folder / "a.png", shade=60 if name == "first" else 90)
        row = {"image": "a.png", "question": "Is it dark?", "answer": "yes", "patient_id": "p1"}
        write_jsonl(folder / "rows.jsonl", row | {"id": "r1"}, row | {"id": "r2", "question": "What?", "split": "test"})
    return tmp_path


def test_entries_have_a_root_and_a_weight(tmp_path: Path) -> None:
    assert parse_mixture("slake=data/SLAKE:0.7, rows.csv:0.3") == [
        MixtureEntry("slake", Path("data/SLAKE"), 0.7),
        MixtureEntry("rows.csv", None, 0.3),
    ]
    assert parse_mixture("phantom-b:240/60/120:2,phantom-a:8:1")[0] == MixtureEntry("phantom-b:240/60/120", None, 2)
    assert parse_mixture("phantom-b:240") == parse_mixture("rows.csv") == parse_mixture("a,b") == []
    file = tmp_path / "a:1,b:2.csv"
    file.touch()
    assert parse_mixture(str(file)) == []
    for text in ("a.csv:1,b.csv", "a.csv:1,b.csv:0", "a.csv:1,b.csv:nan", "a.csv:1,:2"):
        with pytest.raises(InputError, match="need a weight above 0 each"):
            parse_mixture(text)


def test_rows_of_all_datasets_are_one_dataset(root: Path) -> None:
    data = f"slake={root / 'SLAKE'}:1,{root / 'first/rows.jsonl'}:2,{root / 'second/rows.jsonl'}:1"
    dataset = open_dataset(data)
    assert dataset.name == "mixture of slake, rows, rows-2"
    assert {name: part["weight"] for name, part in dataset.mixture.items()} == {"slake": 1, "rows": 2, "rows-2": 1}
    assert [part["name"] for part in dataset.mixture.values()] == ["slake", "jsonl", "jsonl"]
    assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [3, 1, 3]
    assert [example.id.partition("/")[0] for example in dataset.train] == ["slake", "rows", "rows-2"]
    assert dataset.train.codes("meta:dataset")[1] == ["slake", "rows", "rows-2"]
    pixels = [dataset.open_image(example.images[0]).getpixel((0, 0)) for example in dataset.train]
    assert pixels[1] != pixels[2]  # both are called a.png
    assert "slake: CC BY" in dataset.licence
    assert "weights apply to training only: slake 1, rows 2, rows-2 1" in dataset.notes


def test_a_mixture_is_opened_again_from_any_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    options = DataOptions(data="slake=SLAKE:1,first/rows.jsonl:2")
    stored = options.data_options()
    assert stored["data"] == f"slake={root.resolve() / 'SLAKE'}:1,jsonl={root.resolve() / 'first/rows.jsonl'}:2"
    assert open_dataset("slake=SLAKE:1,first/rows.jsonl:2").options["data"] == stored["data"]
    monkeypatch.chdir("/")
    assert open_configured(DataOptions(**stored)).mixture.keys() == {"slake", "rows"}


def test_patients_of_two_datasets_differ_unless_a_column_is_named(root: Path) -> None:
    data = f"{root / 'first/rows.jsonl'}:1,{root / 'second/rows.jsonl'}:1"
    dataset = open_dataset(data)
    assert {example.meta["patient_id"] for example in dataset.examples} == {"rows/p1", "rows-2/p1"}
    named = open_dataset(data, group_by="patient_id")
    assert {example.meta["patient_id"] for example in named.examples} == {"p1"}
    assert group_columns(named.examples) == ("the --group-by column",)
    assert any(leak.what == "patient" for leak in find_leaks(named))


def test_splits_of_a_mixture_are_made_of_all_rows(root: Path) -> None:
    data = f"{root / 'first/rows.jsonl'}:1,{root / 'second/rows.jsonl'}:1"
    dataset = open_dataset(data, split_ratio="50/0/50")
    assert {example.split for example in dataset.examples} == {"train", "test"}
    assert not find_leaks(dataset)


def test_large_mixtures_are_tables(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = f"slake={root / 'SLAKE'}:1,{root / 'first/rows.jsonl'}:2"
    rows = list(open_dataset(data).examples)
    monkeypatch.setattr(mixtures, "_MANY_ROWS", 1)
    monkeypatch.setattr(mixtures, "_ROWS_AT_ONCE", 2)
    examples = open_dataset(data).examples
    assert repr(examples) == "<Examples: 5>" and list(examples) == rows
    assert [example.meta for example in examples] == [row.meta for row in rows]


def test_what_cannot_be_mixed_is_refused(root: Path, tmp_path: Path) -> None:
    rows = root / "first/rows.jsonl"
    with pytest.raises(InputError, match="several datasets have a root each"):
        open_dataset(f"slake:1,{rows}:1", root=root)
    with pytest.raises(InputError, match="slake needs --root"):
        open_dataset(f"slake:1,{rows}:1")
    with pytest.raises(InputError, match="no such file or folder"):
        open_dataset(f"{tmp_path / 'missing.csv'}:1,{rows}:1")
    write_jsonl(tmp_path / "reports.jsonl", {"image": "first/a.png", "answer": "Clear.", "kind": "report"})
    with pytest.raises(InputError, match="reports has reports, the others have questions"):
        open_dataset(f"{tmp_path / 'reports.jsonl'}:1,{rows}:1")


def test_a_column_named_dataset_is_replaced_and_noted(root: Path) -> None:
    row = {"image": "a.png", "question": "What?", "answer": "lung", "dataset": "theirs"}
    write_jsonl(root / "first/other.jsonl", row)
    dataset = open_dataset(f"{root / 'first/other.jsonl'}:1,{root / 'second/rows.jsonl'}:1")
    assert dataset.train[0].meta["dataset"] == "other"
    assert "the column 'dataset' of other is replaced by the name of the dataset" in dataset.notes
