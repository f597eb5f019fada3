"""Splits by ratio, folds and columns: nothing is shared, every kind has its share, and a file keeps them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from normtune import cli
from normtune.data.examples import Example, Examples
from normtune.data.options import DataOptions
from normtune.data.records import Dataset
from normtune.data.registry import open_configured, open_dataset
from normtune.data.split_files import divide, make_split_file, parse_ratio, read_split_file, write_split_file
from normtune.data.splits import find_leaks
from normtune.errors import InputError
from normtune.evaluation.config import EvaluateConfig
from normtune.studies.spec import Data
from tests.support.own_data import FORMATS, make_rows

Rows = list[tuple[int, int, str]]  # picture, patient and kind of each row


def dataset(rows: Rows) -> Dataset:
    examples = [
        Example(str(n), (f"i{picture}",), "?", "x", kind, "train", {"patient": f"p{patient}"})  # type: ignore[arg-type]
        for n, (picture, patient, kind) in enumerate(rows)
    ]
    return Dataset("made", Examples(examples), lambda key: Image.new("L", (1, 1), hash(key) % 251))


def opener(data: Dataset) -> Dataset:
    """The dataset with pictures that all differ."""
    keys = {key: number for number, key in enumerate(sorted({k for e in data.examples for k in e.images}))}
    data.open_image = lambda key: Image.new("RGB", (1 + keys[key], 1))
    return data


def by_id(data: Dataset, codes: np.ndarray) -> dict[str, int]:
    return dict(zip((example.id for example in data.examples), codes.tolist(), strict=True))


rows_of = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 30), st.sampled_from(["open", "closed"])), min_size=30, max_size=80
)


@settings(max_examples=25)
@given(rows_of, st.integers(2, 3), st.integers(0, 3))
def test_no_picture_and_no_patient_is_in_two_parts(rows: Rows, parts: int, seed: int) -> None:
    data = opener(dataset(rows))
    try:
        part_of = by_id(data, divide(data, [1 / parts] * parts, seed))
    except InputError as error:
        assert "are too few for" in str(error)
        return
    for what in (lambda e: e.images, lambda e: e.meta["patient"]):
        parts_of: dict[object, set[int]] = {}
        for example in data.examples:
            parts_of.setdefault(what(example), set()).add(part_of[example.id])
        assert all(len(numbers) == 1 for numbers in parts_of.values())
    assert set(part_of.values()) == set(range(parts))
    reversed_rows = Dataset("made", data.examples[::-1], data.open_image)
    assert by_id(reversed_rows, divide(reversed_rows, [1 / parts] * parts, seed)) == part_of


def test_each_part_has_its_share_of_pictures_and_of_every_kind() -> None:
    # 200 pictures, of which every fourth has three closed questions, the others one open question each
    rows = [(n, n, "closed") for n in range(0, 200, 4) for _ in range(3)]
    rows += [(n, n, "open") for n in range(200) if n % 4]
    data = opener(dataset(rows))
    part_of = by_id(data, divide(data, parse_ratio("70/10/20"), 0))
    kinds = Counter((part_of[e.id], e.kind) for e in data.examples)
    for part, share in enumerate((0.7, 0.1, 0.2)):
        assert abs(kinds[part, "closed"] - share * 150) <= 3  # one picture
        assert abs(kinds[part, "open"] - share * 150) <= 1
    assert by_id(data, divide(data, parse_ratio("70/10/20"), 1)) != part_of


def test_equal_pictures_under_several_names_stay_together() -> None:
    data = dataset([(n, n, "open") for n in range(20)])
    data.open_image = lambda key: Image.new("L", (1 + int(key[1:]) % 10, 1))
    part_of = by_id(data, divide(data, [0.5, 0.5], 0))
    assert all(part_of[str(n)] == part_of[str(n + 10)] for n in range(10))


@pytest.mark.parametrize(
    ("text", "shares"),
    [("80/10/10", (0.8, 0.1, 0.1)), ("8/2", (0.8, 0.0, 0.2)), ("1/0/0", (1.0, 0.0, 0.0)), ("0.5/0.5", (0.5, 0.0, 0.5))],
)
def test_a_ratio_is_two_or_three_numbers(text: str, shares: tuple[float, ...]) -> None:
    assert parse_ratio(text) == shares


@pytest.mark.parametrize("text", ["80", "80/10/5/5", "a/b", "-1/2", "0/0", "nan/1", "inf/1", ""])
def test_other_ratios_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="write train/validate/test"):
        parse_ratio(text)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return FORMATS["csv"](tmp_path, make_rows(tmp_path))


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["normtune", *arguments])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return int(exit.value.code or 0)


@pytest.mark.parametrize("ending", ["json", "csv"])
def test_the_command_writes_a_file_that_other_commands_read(
    file: Path, ending: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = file.parent / f"splits.{ending}"
    command = ["split", str(file), "--split-ratio", "60/20/20", "--split-seed", "3", "--out", str(out), "--json"]
    assert run(monkeypatch, *command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["seed"], printed["ratio"], printed["grouped_by"]) == (3, "60/20/20", ["picture", "patient_id"])
    patients = {split: row["patients"] for split, row in printed["counts"].items()}
    assert patients == {"train": 6, "validate": 2, "test": 2}
    data = open_dataset(file, splits=out)
    direct = open_dataset(file, split_ratio="60/20/20", split_seed=3)
    assert [e.split for e in data.examples] == [e.split for e in direct.examples]
    assert data.notes == [f"splits of {out.name}"]
    assert not [leak for leak in find_leaks(data) if leak.what in ("image", "patient")]
    assert open_configured(DataOptions.checked(**data.options)).examples == data.examples
    assert DataOptions.checked(**data.options).data_options()["splits"] == str(out)
    assert run(monkeypatch, *command) == 0  # the same splits again
    assert run(monkeypatch, *command[:5], "4", "--out", str(out)) == 2
    assert "exists and is different" in capsys.readouterr().err


def test_each_fold_is_the_test_split_once(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = file.parent / "folds.json"
    assert run(monkeypatch, "split", str(file), "--folds", "5", "--out", str(out)) == 0
    assert "folds: 5" in capsys.readouterr().out
    folds = read_split_file(out)["splits"]
    tested: Counter[str] = Counter()
    for fold in range(5):
        data = open_dataset(file, splits=out, fold=fold)
        assert {e.id for e in data.test} == {id for id, number in folds.items() if number == fold}
        assert {e.id for e in data.validation} == {id for id, number in folds.items() if number == (fold + 1) % 5}
        tested.update(e.id for e in data.test)
    assert tested == Counter(folds.keys())
    for options, message in (
        ({"splits": out}, "holds folds 0 to 4. Choose the test fold with --fold"),
        ({"splits": out, "fold": 5}, "--fold 5: splits of folds.json has folds 0 to 4"),
        ({"splits": out, "split_ratio": "1/1"}, "--splits contains the splits"),
        ({"splits": out, "fold": 1, "image_disjoint": True}, "--image-disjoint makes splits of its own"),
        ({"split_ratio": "1/1", "fold": 1}, "holds no folds"),
    ):
        with pytest.raises(InputError, match=message):
            open_dataset(file, **options)


def test_a_column_can_name_splits_and_folds(file: Path) -> None:
    made = enumerate(make_rows(file.parent))
    rows = [row | {"site": ("train", "val", "test")[n % 3], "part": n % 4} for n, row in made]
    for format in ("csv", "parquet"):
        table = FORMATS[format](file.parent, rows)
        assert [e.split for e in open_dataset(table, split_column="site").examples][:3] == ["train", "validate", "test"]
        assert {e.id for e in open_dataset(table, split_column="part", fold=2).test} == {
            e.id for n, e in enumerate(open_dataset(table).examples) if n % 4 == 2
        }
    with pytest.raises(InputError, match="--split-column: no row has a column 'stie', did you mean 'site'"):
        open_dataset(table, split_column="stie")


def test_a_file_that_does_not_fit_is_refused(file: Path) -> None:
    out = file.parent / "splits.json"
    data = open_dataset(file)
    made = make_split_file(data)
    fewer = made | {"splits": {id: split for id, split in made["splits"].items() if id != "r7"}}
    write_split_file(out, fewer)
    with pytest.raises(InputError, match=r"1 of 40 rows of csv are not in it \(first: r7\)"):
        open_dataset(file, splits=out)
    out.write_text(json.dumps(made | {"digest": "00"}))
    assert "was made of other rows" in open_dataset(file, splits=out).notes[-1]
    for text in ("{}", "[]", "x", '{"splits": {}}', '{"splits": {"a": []}}'):
        out.write_text(text)
        with pytest.raises(InputError):
            open_dataset(file, splits=out)
    table = out.with_suffix(".csv")
    for text in ("", "a,b\n1,2\n", "# {\nid,split\n", "id,split\nr1\n"):
        table.write_text(text)
        with pytest.raises(InputError, match="normtune split"):
            open_dataset(file, splits=table)
    with pytest.raises(InputError):
        open_dataset(file, splits=file.parent / "gone.json")


@pytest.mark.parametrize("name", ["val", "validation", "Valid", "dev", "validate"])
def test_options_take_the_other_names_of_splits(name: str) -> None:
    assert EvaluateConfig.checked(model="nano", data="slake", out=None, split=name).split == "validate"
    assert Data.checked(data="slake", validate_split=name).validate_split == "validate"
    assert EvaluateConfig.checked(model="nano", data="slake", out=None, split="Fold-3").split == "Fold-3"
