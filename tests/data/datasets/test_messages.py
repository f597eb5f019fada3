from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from normtune.data.datasets import messages
from normtune.data.summary import summarize, summary_text
from normtune.errors import InputError
from tests.support.dataset_samples import png_bytes, write_image, write_jsonl, write_parquet
from tests.support.report_samples import llava_med_row, messages_row

PAIRS = (("What is shown?", "A CT."), ("Is the liver normal?", "Yes."), ("Where is it?", "Left."))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "images/c.jpg"):
        write_image(tmp_path / name)
    return tmp_path


def read_error(root: Path, *rows: object) -> str:
    with pytest.raises(InputError) as caught:
        messages.read(write_jsonl(root / "bad.jsonl", *rows))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_each_pair_of_llava_meds_instruct_json_becomes_an_example(root: Path) -> None:
    file = root / "llava_med_instruct.json"
    file.write_text(json.dumps([llava_med_row("c", *PAIRS)]))
    dataset = messages.read(file)
    assert [(e.id, e.kind, e.images, e.split) for e in dataset.examples] == [
        ("c", "open", ("c.jpg",), "train"),
        ("c-turn2", "closed", ("c.jpg",), "train"),
    ]
    assert dataset.examples[0].meta == {"modality": "ct_scan"}
    assert dataset.open_image("c.jpg").size == (4, 4)  # below images/
    assert [e.id for e in dataset.skipped] == ["c-turn3"]
    assert [str(p) for p in dataset.problems] == [
        "llava_med_instruct.json, row 1, turn 3: refers back to earlier turns. "
        "Skipped. Write a question that needs no earlier turn, or give --history."
    ]


def test_the_notes_count_pairs_and_skipped_pairs(root: Path) -> None:
    write_jsonl(root / "train.jsonl", llava_med_row("c", *PAIRS))
    text = summary_text(summarize(messages.read(root)))
    assert "1 conversations with 3 question-answer pairs: each pair is one question about its image" in text
    assert "  1 pairs skipped, as they refer back to earlier turns" in text
    assert "liver" not in text


def test_with_history_each_pair_carries_the_turns_before_it(root: Path) -> None:
    write_jsonl(root / "train.jsonl", llava_med_row("c", *PAIRS))
    dataset = messages.read(root, history=True)
    assert [(e.id, e.question, e.history) for e in dataset.examples] == [
        ("c", "What is shown?", ()),
        ("c-turn2", "Is the liver normal?", PAIRS[:1]),
        ("c-turn3", "Where is it?", PAIRS[:2]),
    ]
    assert not dataset.problems and not dataset.skipped
    assert "3 question-answer pairs: each pair is one question about its image, answered after the turns before it" in (
        summary_text(summarize(dataset))
    )
    assert dataset.split("train").rows()[2]["history"] == [list(pair) for pair in PAIRS[:2]]


def test_context_that_is_not_learnt_is_history(root: Path) -> None:
    row = messages_row("<image>What is shown?", "A CT.", "a.png")
    row["messages"][-1]["weight"] = 0
    row["messages"] += [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Left."}]
    write_jsonl(root / "train.jsonl", row)
    dataset = messages.read(root, history=True)
    assert [e.history for e in dataset.examples] == [(("What is shown?", "A CT."),)]
    assert [(e.question, e.history) for e in dataset.skipped] == [("What is shown?", ())]


def test_messages_with_images_are_read_from_every_kind_of_file(root: Path) -> None:
    row = messages_row("<image>Is it?", "no", "a.png", modality="CT", kind="open")
    write_jsonl(root / "train.jsonl", row)
    (root / "val.json").write_text(json.dumps([messages_row("What?", "Lung", "b.png", id="seven")]))
    (root / "dataset_info.json").write_text("{}")
    image = {"bytes": png_bytes(9), "path": None}
    write_parquet(root / "data/test-00000-of-00001.parquet", [messages_row("What?", "Heart", image, image)])
    dataset = messages.read(root)
    by_split = {e.split: e for e in dataset.examples}
    assert (by_split["train"].id, by_split["train"].kind, by_split["train"].meta) == (
        "train-1",
        "open",
        {"modality": "CT"},
    )
    assert (by_split["validate"].id, by_split["validate"].images) == ("seven", ("b.png",))
    assert by_split["test"].images[0] == by_split["test"].images[1]
    assert [str(p) for p in dataset.problems] == ["dataset_info.json: holds no list of rows. Not read."]
    copy = pickle.loads(pickle.dumps(dataset.open_image))
    for example in dataset.examples:
        assert copy(example.images[0]).size == (4, 4)


def test_several_images_in_a_parquet_cell_have_their_own_keys(tmp_path: Path) -> None:
    images = [{"bytes": png_bytes(shade), "path": None} for shade in (10, 20, 30)]
    rows = [messages_row("<image><image>Which?", "x", *images[:2]), messages_row("What?", "y", images[2])]
    dataset = messages.read(write_parquet(tmp_path / "train.parquet", rows, group=1))
    shades = [[int(np.asarray(dataset.open_image(k))[0, 0, 0]) for k in e.images] for e in dataset.examples]
    assert shades == [[10, 20], [30]]


def test_conversations_in_parquet_are_read_too(tmp_path: Path) -> None:
    row = llava_med_row("c", *PAIRS[:1], image={"bytes": png_bytes(5), "path": None})
    (example,) = messages.read(write_parquet(tmp_path / "train.parquet", [row])).examples
    assert (example.id, example.question, example.meta) == ("c", "What is shown?", {"modality": "ct_scan"})


def test_rows_with_no_image_or_a_missing_one_are_skipped_and_listed(root: Path) -> None:
    rows = [messages_row("What?", "x", "a.png"), messages_row("Who?", "me"), messages_row("What?", "x", "no.png")]
    dataset = messages.read(write_jsonl(root / "train.jsonl", *rows))
    assert len(dataset.examples) == 1
    assert [(p.file, p.row, p.what) for p in dataset.problems] == [
        ("no.png", "", "image is missing"),
        ("train.jsonl", "2", "image is empty"),
    ]
    assert len(messages.read(root / "train.jsonl", text_only=True).examples) == 2


def test_repeated_ids_get_a_number(root: Path) -> None:
    rows = [messages_row("What?", "x", "a.png", id="a"), messages_row("Where?", "y", "a.png", id="a")]
    dataset = messages.read(write_jsonl(root / "train.jsonl", *rows))
    assert [e.id for e in dataset.examples] == ["a", "a-2"]
    assert [p.what for p in dataset.problems] == ["its id is used by an earlier row"]


def test_absolute_paths_inside_the_folder_are_accepted_and_others_refused(root: Path) -> None:
    row = messages_row("What?", "x", str(root / "a.png"))
    assert messages.read(write_jsonl(root / "train.jsonl", row)).examples[0].images == ("a.png",)
    assert "is outside the image folder" in read_error(root, messages_row("What?", "x", "/etc/hosts"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "not valid JSON"),
        ([1], "not a JSON object"),
        ({"question": "x"}, "no list 'messages' or 'conversations'"),
        (messages_row("What?", "x", "../a.png"), "the path of image 1 is outside the image folder"),
        (messages_row("What?", "x", "https://a.org/b.png"), "image 1 is a URL, not a file"),
        (messages_row("What?", "x", "data:image/png;base64," + "QUJD" * 900), "image 1 is a data URL, not a file"),
        (messages_row("What?", "x", "iVBORw0KGgo/" * 400), "image 1 is not a path"),
        (messages_row("What?", "x", 5), "image 1 is not a path"),
        (messages_row("What?", "x \udfff", "a.png"), "a text contains half of a surrogate pair"),
        (messages_row("What?", "x", "a.png", split="tset"), "split is unknown, did you mean 'test'?"),
        (messages_row("What?", "x", "a.png", kind="opne"), "kind is unknown, did you mean 'open'?"),
        (messages_row("<image><image>?", "x", "a.png"), "2 <image> marks for 1 images"),
    ],
)
def test_errors_name_the_file_and_row_of_a_bad_row_and_the_fix(root: Path, row: Any, message: str) -> None:
    text = read_error(root, messages_row("What?", "x", "a.png"), row)
    assert text.startswith("bad.jsonl, row 2: ")
    assert message in text
    assert len(text) < 300
    assert len(messages.read(root / "bad.jsonl", strict=False).skipped) == 1


def test_errors_name_the_row_of_a_json_list_with_half_of_a_surrogate_pair(root: Path) -> None:
    rows = [messages_row("What?", "x", "a.png"), messages_row("Which \ud83e?", "x", "a.png")]
    (root / "bad.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=r"bad\.json, row 2: a text contains half of a surrogate pair"):
        messages.read(root / "bad.json")


def test_other_files_are_refused(root: Path) -> None:
    (root / "one.json").write_text("{}")
    with pytest.raises(InputError, match=r"one\.json holds no list of rows"):
        messages.read(root / "one.json")
    (root / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"x\.parquet is not a parquet file, or is damaged"):
        messages.read(root / "x.parquet")
    with pytest.raises(InputError, match=r"holds no \*\.jsonl, \*\.json or \*\.parquet file"):
        messages.read(root / "images")


def test_tool_calls_and_answers_not_to_be_learnt_are_skipped_and_counted(root: Path) -> None:
    tool = messages_row("What?", "Lung", "a.png")
    tool["messages"].insert(2, {"role": "tool", "content": "{}"})
    context = messages_row("What?", "wrong", "a.png")
    context["messages"][2]["weight"] = 0
    good = messages_row("What?", "Lung\r\nLeft", f"file://{root}/images/c.jpg")
    dataset = messages.read(write_jsonl(root / "rows.jsonl", tool, context, good))
    (example,) = dataset.examples
    assert (example.images, example.answer) == (("images/c.jpg",), "Lung\nLeft")
    assert dataset.dropped == {"turn 3 is of a tool": 1, "marked as not to be learnt": 1}
