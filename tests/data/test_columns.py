"""Work on columns gives what the definition gives on objects, for lists of examples and for memory-mapped tables."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from normtune.adapters.training_rows import hash_rows
from normtune.data.batches import EpochBatches, batches_of_pairs
from normtune.data.datasets import large_table, table
from normtune.data.examples import Example, Examples, is_in, repeated_rows
from normtune.data.groups import group_by_image
from normtune.data.preflight import preflight
from normtune.data.reading import blocks
from normtune.data.reading.cells import clean_text
from normtune.data.records import Dataset, Split
from normtune.data.row_table import RowTableWriter
from normtune.data.splits import share_of_images, with_groups
from normtune.errors import InputError
from normtune.training.config import TrainConfig

texts = st.sampled_from(["", "yes", "Yes.", "no ", "a  b", "nan", "<image> x", "Ä", "left lung"])
metas = st.dictionaries(st.sampled_from(["language", "patient_id", "study", "organ"]), st.sampled_from(["", "en", "2"]))
choices = st.lists(texts.filter(bool), min_size=2, max_size=4).flatmap(
    lambda options: st.tuples(
        st.just(("a",)),
        texts,
        st.sampled_from(options),
        st.just("choice"),
        st.sampled_from(["train", "test"]),
        metas,
        st.just(()),
        st.just(tuple(options)),
    )
)
rows = st.lists(
    choices
    | st.tuples(
        st.lists(st.sampled_from("abcd"), min_size=1, max_size=2).map(tuple),
        texts,
        texts,
        st.sampled_from(["open", "closed", "report"]),
        st.sampled_from(["train", "validate", "test"]),
        metas,
    ),
    min_size=1,
    max_size=30,
)


def examples_of(values: list[tuple]) -> list[Example]:  # type: ignore[type-arg]
    return [Example(f"r{number}", *fields) for number, fields in enumerate(values)]


def in_table(examples: list[Example], block: int = 7) -> Examples:
    writer = RowTableWriter()
    for start in range(0, len(examples), block):
        writer.add_examples(examples[start : start + block])
    return Examples(writer.finish())


def grey(key: str) -> Image.Image:
    return Image.new("RGB", (4, 4), (ord(key) % 250, 0, 0))


def datasets(examples: list[Example]) -> tuple[Dataset, Dataset]:
    """The same rows as a list and as a table."""
    return Dataset("made", Examples(examples), grey), Dataset("made", in_table(examples), grey)


def batches_on_objects(examples: list[Example], pairs: int, cap: int | None, seed: int, epoch: int) -> list:  # type: ignore[type-arg]
    """The batches as version 0.1 made them, on lists of examples."""

    def grouped(rng: random.Random | None) -> list[list[Example]]:
        by_image: dict[tuple[str, ...], list[Example]] = {}
        for example in examples:
            by_image.setdefault(example.images, []).append(example)
        groups = []
        for members in by_image.values():
            if rng is not None:
                rng.shuffle(members)
            size = cap or len(members)
            groups += [members[start : start + size] for start in range(0, len(members), size)]
        return groups

    rng = random.Random(f"{seed}-{epoch}")
    groups = grouped(rng)
    rng.shuffle(groups)
    count = len(batches_of_pairs([len(group) for group in grouped(None)], pairs))
    ends = [end * count for end in accumulate(map(len, groups))]
    cuts = [0]
    for batch in range(1, count):
        ideal = ends[-1] // count * batch
        nearest = min(range(len(ends)), key=lambda index: (abs(ends[index] - ideal), -index))
        cuts.append(min(max(nearest + 1, cuts[-1] + 1), len(groups) - (count - batch)))
    return [groups[start:stop] for start, stop in zip(cuts, [*cuts[1:], len(groups)], strict=True)]


@given(rows, st.integers(1, 9), st.none() | st.integers(1, 4), st.integers(0, 3))
def test_batches_are_those_of_version_0_1(values: list, pairs: int, cap: int | None, epoch: int) -> None:  # type: ignore[type-arg]
    examples = examples_of(values)
    expected = batches_on_objects(examples, pairs, cap, 3, epoch)
    for members in (Examples(examples), in_table(examples)):
        batches = EpochBatches(members, pairs, cap, 3)
        batches.set_epoch(epoch)
        assert list(batches) == expected
    assert group_by_image(in_table(examples), cap) == group_by_image(examples, cap)


@given(rows)
@settings(max_examples=50)
def test_a_table_has_the_counts_leaks_splits_and_digests_of_a_list(values: list) -> None:  # type: ignore[type-arg]
    of_list, of_table = datasets(examples_of(values))
    assert of_table.examples == of_list.examples and repr(of_table) == repr(of_list)
    assert [e.meta for e in of_table.examples] == [e.meta for e in of_list.examples]
    counts = [preflight(dataset).to_dict() | {"seconds": 0} for dataset in (of_list, of_table)]
    assert counts[0] == counts[1]
    assert str(of_list.summary()) == str(of_table.summary())
    shares = [share_of_images(dataset.examples, 0.5, 1) for dataset in (of_list, of_table)]
    assert list(shares[0]) == list(shares[1])
    digests = [hash_rows(dataset, dataset.examples) for dataset in (of_list, of_table)]
    assert digests[0].digest == digests[1].digest and (digests[0].rows == digests[1].rows).all()
    if any(example.meta.get("study") for example in of_list.examples):
        grouped = [with_groups(dataset, "study").examples for dataset in (of_list, of_table)]
        assert [e.meta for e in grouped[0]] == [e.meta for e in grouped[1]]


@given(rows)
@settings(max_examples=50)
def test_the_counts_of_texts_are_those_of_their_definition(values: list) -> None:  # type: ignore[type-arg]
    examples = examples_of(values)
    counts = preflight(datasets(examples)[0], open_pictures=False).texts

    def plain(text: str) -> str:
        return " ".join(text.lower().split()).rstrip(".")

    answers: dict[tuple[object, ...], Counter[str]] = {}
    for e in examples:
        context = e.split, e.images, plain(e.question), tuple(sorted(e.options))
        answers.setdefault(context, Counter())[plain(e.answer)] += 1
    trained = {plain(e.answer) for e in examples if e.split == "train"}
    assert counts["repeated"] == sum(counter.total() - len(counter) for counter in answers.values())
    assert counts["contradictions"] == sum(counter.total() for counter in answers.values() if len(counter) > 1)
    unseen = Counter(e.split for e in examples if trained and e.kind == "closed" and plain(e.answer) not in trained)
    assert counts["unseen"] == dict(unseen)
    assert counts["not_a_number"] == sum(plain(e.answer) == "nan" for e in examples)
    assert counts["languages"] == dict(Counter(e.meta["language"] for e in examples if "language" in e.meta))
    controls = sum("<image>" in e.question + e.answer for e in examples)
    assert counts["control_tokens"] == ({"<image>": controls} if controls else {})


def test_a_new_column_of_a_table_has_each_value_once_and_only_those_of_rows() -> None:
    """As `--split-ratio 80/20` gives no row to validate, and `--image-disjoint` names some splits twice."""
    examples = examples_of([(("a",), "q", str(row), "open", "train") for row in range(4)])
    values, codes = ["train", "validate", "test", "train"], np.array([2, 0, 3, 2], np.int32)
    for rows in (Examples(examples), in_table(examples)):
        changed = rows.with_column("split", codes, values)
        assert [example.split for example in changed] == ["test", "train", "train", "test"]
        assert changed.codes("split")[1] == ["test", "train"]


def test_rows_of_a_table_are_selected_without_objects() -> None:
    examples = examples_of([((key,), "q", str(n), "open", "train", {}) for n, key in enumerate("abcab" * 20)])
    split = Dataset("made", in_table(examples), grey).train
    assert isinstance(split[3:5], Split) and list(split[3:5]) == examples[3:5] and split[-1] == examples[-1]
    assert list(split.take(np.array([9, 2, 50]))) == [examples[9], examples[2], examples[50]]
    assert split[::-7] == examples[::-7] and split + examples[:1] == [*examples, examples[0]]
    assert list(split.where(split.flags("images", ("a",).__eq__)).texts("answer")) == [
        e.answer for e in examples if e.images == ("a",)
    ]
    assert TrainConfig(data="slake", model="m", out="o", limit=4).select(split) == examples[:4]
    with pytest.raises(IndexError):
        split[100]


LINES = [
    '{"image": "a.png", "question": "Is it?", "answer": "yes", "id": 7, "site": "x"}',
    '{"image": "b.png", "question": " Where? ", "answer": "left", "patient_id": "p"}',
    '{"image": ["a.png", "b.png"], "question": "Why?", "answer": "1", "kind": "open", "split": "val", "n": 1.5}',
    '{"image": "a.png", "question": "Which?", "answer": "b", "options": ["A. left", "B. right"]}',
]
ODD = [
    "",
    "no JSON",
    '{"image": "a.png", "question": "", "answer": "no"}',
    '{"image": "missing.png", "question": "Is it?", "answer": "no"}',
    '{"image": "a.png", "question": "Is it?", "answer": "yes", "id": "7"}',
    '{"image": "a.png", "question": "Is \\ud800 it?", "answer": "no"}',
    '{"image": "a.png", "question": "Is it?", "answer": 3, "id": "n"}',
    '{"image": "b.png", "question": "Which?", "answer": "left", "options": "left|right"}',
    '{"image": "b.png", "question": "Which?", "answer": 1, "options": {"A": "left", "B": "right"}}',
    '{"image": "b.png", "question": "Which?", "answer": "C", "kind": "choice", "options": ["left", "right"]}',
    '{"image": "b.png", "question": "Which?", "answer": "left", "kind": "choice"}',
]


@given(st.lists(st.sampled_from(LINES + ODD), min_size=1, max_size=12), st.integers(50, 400))
@settings(max_examples=60)
def test_a_large_file_is_read_as_a_small_one(lines: list[str], block: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        root = Path(folder)
        for name in ("a.png", "b.png"):
            grey("a").save(root / name)
        (root / "rows.jsonl").write_text("\n".join(lines))
        expected, actual = [], []
        for results, size in ((expected, 1 << 40), (actual, 0)):
            patch.setattr(large_table, "LARGE_BYTES", size)
            patch.setattr(blocks, "_BLOCK_BYTES", block)
            for strict in (True, False):
                try:
                    data = table.read(root / "rows.jsonl", format="jsonl", strict=strict)
                except InputError as error:
                    results.append(str(error).split(":")[0] if strict else str(error))
                else:
                    metas = [e.meta for e in data.examples]
                    results.append((list(data.examples), metas, sorted(map(str, data.problems)), data.dropped))
        assert actual == expected


CSV_LINES = [
    "a.png,Is it?,yes,x",
    'b.png, Where? ,"left, or right",',
    "./a.png,Why?,1,p",
    '"b.png","Two\nlines",No.,"é"',
    "a.png;b.png,Both?,yes,p",
    '"[""a.png""]",A list?,yes,p',
    "",
    ",,,",
    "a.png,,no,x",
    "missing.png,Is it?,no,x",
    "a.png,too few",
]


@given(st.lists(st.sampled_from(CSV_LINES), min_size=1, max_size=12), st.integers(1, 5), st.sampled_from([",", "\t"]))
@settings(max_examples=60)
def test_a_large_csv_file_is_read_as_a_small_one(lines: list[str], block: int, delimiter: str) -> None:
    import tempfile

    format = "csv" if delimiter == "," else "tsv"
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        root = Path(folder)
        for name in ("a.png", "b.png"):
            grey("a").save(root / name)
        text = "\n".join(["image,question,answer,site", *lines]).replace(",", delimiter)
        (root / f"rows.{format}").write_text(text, encoding="utf-8-sig")
        expected, actual = [], []
        for results, size in ((expected, 1 << 40), (actual, 0)):
            patch.setattr(large_table, "LARGE_BYTES", size)
            patch.setattr(blocks, "_BLOCK_ROWS", block)
            for strict in (True, False):
                try:
                    data = table.read(root / f"rows.{format}", format=format, strict=strict)
                except InputError as error:
                    results.append(str(error).split(":")[0] if strict else str(error))
                else:
                    metas = [e.meta for e in data.examples]
                    found = sorted(map(str, data.problems)), data.dropped, data.notes
                    results.append((list(data.examples), metas, *found))
        assert actual == expected


def test_plain_blocks_of_csv_files_make_no_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey("a").save(tmp_path / "a.png")
    rows = "".join(f"a.png,Is it {n}?,yes\n" for n in range(9))
    (tmp_path / "rows.csv").write_text("image,question,answer\n" + rows)
    monkeypatch.setattr(large_table, "LARGE_BYTES", 0)
    monkeypatch.setattr(blocks, "_BLOCK_ROWS", 4)
    monkeypatch.setattr(table.Rows, "add", None)  # a call would fail
    examples = table.read(tmp_path / "rows.csv", format="csv").examples
    assert repr(examples) == "<Examples: 9>" and examples[8].id == "rows-10"


def test_a_large_parquet_file_is_read_as_a_small_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    grey("a").save(tmp_path / "a.png")
    row = {"image": "a.png", "question": " Is it?", "answer": "yes", "answer_type": "CLOSED", "q_lang": "EN", "age": 3}
    made = [row | {"question": f"Is it {number}?"} for number in range(9)]
    made += [row | {"question": "Which?", "answer": n, "options": ["left", "right"]} for n in ("A", "B", "a")]
    pq.write_table(pa.Table.from_pylist(made), tmp_path / "test-0.parquet")
    expected = table.read(tmp_path, format="parquet")
    monkeypatch.setattr(large_table, "LARGE_BYTES", 0)
    monkeypatch.setattr(blocks, "_BLOCK_ROWS", 4)
    actual = table.read(tmp_path, format="parquet")
    assert actual.examples == expected.examples and actual.notes == expected.notes
    assert [e.meta for e in actual.examples] == [e.meta for e in expected.examples]
    assert json.dumps(actual.summary()) == json.dumps(expected.summary())


def test_a_parquet_file_is_large_by_its_rows_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"image": ["a.png"] * 4}), tmp_path / "train.parquet")
    (tmp_path / "train.jsonl").write_text("{}\n" * 4)
    assert not large_table.is_large(tmp_path, "parquet")
    monkeypatch.setattr(large_table, "_LARGE_ROWS", 4)
    assert large_table.is_large(tmp_path, "parquet") and not large_table.is_large(tmp_path, "jsonl")


def test_images_inside_a_large_parquet_file_are_not_read_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    image = {"bytes": b"not read", "path": "a.png"}
    pq.write_table(pa.Table.from_pylist([{"image": image, "question": "Is it?"}]), tmp_path / "train.parquet")
    monkeypatch.setattr(pq.ParquetFile, "iter_batches", None)  # a call would fail
    with pytest.raises(large_table.NotPlain):
        next(blocks.parquet_blocks(tmp_path / "train.parquet", "train.parquet", []))


@given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)))
def test_repeated_rows_and_hashes_among_others(numbers: list[int], others: list[int]) -> None:
    hashes = np.array(numbers, np.int64)
    assert repeated_rows(hashes).tolist() == [row for row, n in enumerate(numbers) if numbers.count(n) > 1]
    assert large_table._later_ones(hashes).tolist() == [row for row, n in enumerate(numbers) if n in numbers[:row]]
    assert is_in(hashes, np.array(others, np.int64)).tolist() == [number in others for number in numbers]


@pytest.mark.parametrize("text", ["", "plain", " blank before", "after ", "tab\tinside", "line\n", "é", "\x7f", "a  b"])
def test_texts_that_are_taken_over_unchanged(text: str) -> None:
    import pyarrow as pa

    if large_table._is_clean(pa.array([text, None, "plain"])):
        assert clean_text(text)[0] == text
    assert large_table._is_clean(pa.array(["plain", None, "", "a  b"]))


def test_compressed_lines_are_read_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grey("a").save(tmp_path / "a.png")
    lines = b"".join(b'{"image": "a.png", "question": "Is it %d?", "answer": "yes"}\n' % n for n in range(9))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines))
    monkeypatch.setattr(large_table, "LARGE_BYTES", 0)
    assert len(table.read(tmp_path / "rows.jsonl.gz", format="jsonl").examples) == 9
    assert len(table.read(tmp_path, format="jsonl").examples) == 9
