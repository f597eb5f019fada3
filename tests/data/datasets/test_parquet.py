from __future__ import annotations

import io
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from normtune.data.datasets import table
from normtune.errors import InputError
from tests.support.dataset_samples import png_bytes, write_image, write_parquet

read_parquet = partial(table.read, format="parquet")


def row(shade: int, **changes: Any) -> dict[str, Any]:
    image = {"bytes": png_bytes(shade), "path": None}
    return {"image": image, "question": f"How bright, {shade}?", "answer": str(shade)} | changes


def shade_of(dataset: Any, key: str) -> int:
    return int(np.asarray(dataset.open_image(key))[0, 0, 0])


def test_files_named_as_on_the_hub_give_their_splits(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", [row(1), row(2, answer="Yes")])
    write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", [row(3)])
    write_parquet(tmp_path / "test/0000.parquet", [row(4)])
    dataset = read_parquet(tmp_path)
    assert [(e.split, e.kind) for e in dataset.examples] == [
        ("train", "open"),
        ("train", "closed"),
        ("validate", "open"),
        ("test", "open"),
    ]
    assert len({e.id for e in dataset.examples}) == 4


def test_equal_images_have_one_key_across_row_groups_and_files(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [row(1), row(2), row(1, question="Again?")], group=1)
    write_parquet(tmp_path / "test.parquet", [row(2, question="And here?")])
    dataset = read_parquet(tmp_path)
    by_question = {e.question: e.images[0] for e in dataset.examples}
    assert by_question["Again?"] == by_question["How bright, 1?"]
    assert by_question["And here?"] == by_question["How bright, 2?"]
    assert [shade_of(dataset, key) for key in dict.fromkeys(by_question.values())] == [2, 1]


def test_images_are_read_again_after_they_were_dropped_from_memory(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [row(shade) for shade in range(20)], group=5)
    dataset = read_parquet(tmp_path)
    dataset.open_image.memory_bytes = 1  # type: ignore[attr-defined]
    keys = {e.answer: e.images[0] for e in dataset.examples}
    order = np.random.default_rng(0).permutation(40) % 20
    assert [shade_of(dataset, keys[str(shade)]) for shade in order] == order.tolist()
    assert dataset.open_image._cached_bytes <= len(png_bytes(0)) + 20  # type: ignore[attr-defined]


def test_workers_get_a_copy_with_an_empty_cache(tmp_path: Path) -> None:
    dataset = read_parquet(write_parquet(tmp_path / "train.parquet", [row(9)]))
    key = dataset.examples[0].images[0]
    dataset.open_image(key)
    copy = pickle.loads(pickle.dumps(dataset.open_image))
    assert copy._cache == {}
    assert np.asarray(copy(key))[0, 0, 0] == 9


def test_columns_of_ids_kinds_splits_and_meta_are_read(tmp_path: Path) -> None:
    stated = row(1, qid=12, answer_type="CLOSED", split="validation", modality="CT", image_organ="chest", more="x")
    (example,) = read_parquet(write_parquet(tmp_path / "x.parquet", [stated])).examples
    assert (example.id, example.kind, example.split) == ("parquet-12", "closed", "validate")
    assert example.meta == {"modality": "CT", "organ": "chest", "more": "x"}


def test_plain_bytes_and_paths_are_images_too(tmp_path: Path) -> None:
    write_image(tmp_path / "pictures/a.png", 77)
    write_parquet(tmp_path / "bytes.parquet", [row(5, image=png_bytes(5))])
    write_parquet(tmp_path / "paths.parquet", [row(6, image="pictures/a.png"), row(7, image="pictures/no.png")])
    dataset = read_parquet(tmp_path)
    assert [shade_of(dataset, e.images[0]) for e in dataset.examples] == [5, 77]
    assert [str(p) for p in dataset.problems] == [
        "pictures/no.png: image is missing. Rows skipped: 1. Put the image there."
    ]


@pytest.mark.parametrize("image", ["../scan.png", "/data/scan.png", {"bytes": None, "path": "../scan.png"}])
def test_an_image_path_outside_the_folder_is_refused(tmp_path: Path, image: object) -> None:
    write_image(tmp_path / "scan.png")
    file = write_parquet(tmp_path / "inner/train.parquet", [row(1, image=image)])
    with pytest.raises(InputError, match=r"train\.parquet, row 0: the image's path is outside the dataset's folder"):
        read_parquet(file)


def test_rows_without_image_question_or_answer_are_skipped_and_listed(tmp_path: Path) -> None:
    rows = [row(1), row(2, image=None), row(3, question=None), row(4, answer=""), row(5)]
    dataset = read_parquet(write_parquet(tmp_path / "train.parquet", rows))
    assert len(dataset.examples) == 2
    assert [(p.row, p.what) for p in dataset.problems] == [
        ("1", "image is empty"),
        ("2", "question is empty"),
        ("3", "answer is empty"),
    ]


def test_errors_name_a_missing_column_and_the_existing_ones(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [{"image": b"x", "ask": "?", "answer": "y"}])
    with pytest.raises(InputError, match="has no column for the question; its columns are image, ask, answer"):
        read_parquet(tmp_path)


def test_errors_name_damaged_files(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "train.parquet", [row(1)])
    whole = file.read_bytes()
    for data in (b"", b"PAR1", whole[: len(whole) // 2], b"x" + whole[1:-4] + b"abcd"):
        file.write_bytes(data)
        with pytest.raises(InputError, match=r"train\.parquet is not a parquet file, or is damaged"):
            read_parquet(tmp_path)


def test_a_file_deleted_after_reading_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "train.parquet", [row(1)])
    dataset = read_parquet(file)
    file.unlink()
    with pytest.raises(InputError, match="changed or damaged since it was opened"):
        dataset.open_image(dataset.examples[0].images[0])


def test_errors_name_the_file_and_row_of_a_damaged_image(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    broken = row(1, image={"bytes": buffer.getvalue()[:1000], "path": None})
    dataset = read_parquet(write_parquet(tmp_path / "train.parquet", [row(2), broken]))
    with pytest.raises(InputError, match=r"train\.parquet, image of row 1: the image is damaged"):
        dataset.open_image(dataset.examples[1].images[0])


def test_a_folder_without_parquet_and_an_invalid_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no \*\.parquet file"):
        read_parquet(tmp_path)
    with pytest.raises(InputError, match="Give --root a parquet file, a folder, or a hub name"):
        read_parquet(tmp_path / "no" / "such")


def test_a_hub_dataset_is_downloaded_and_a_failure_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "data/train-0.parquet", [row(1)])
    requests = []

    def snapshot(name: str, **options: Any) -> str:
        requests.append((name, options["repo_type"]))
        if name == "owner/gone":
            raise OSError("offline")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert len(read_parquet(Path("owner/name")).examples) == 1
    assert requests == [("owner/name", "dataset")]
    with pytest.raises(InputError, match="owner/gone is not a local folder, and its download from the hub failed"):
        read_parquet(Path("owner/gone"))
