"""Files are written atomically, and invalid files are reported in one line."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normtune.errors import InputError
from normtune.runtime.files import (
    atomic_directory,
    atomic_write,
    make_directory,
    read_json,
    write_json,
    write_jsonl,
    write_text,
)
from tests.support.base_models import input_error


def write_and_fail(path: Path, failure: BaseException) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        raise failure


def test_a_write_creates_the_directories_and_replaces_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    message = input_error(lambda: write_and_fail(path, OSError(errno.ENOSPC, "No space left on device")))
    assert str(path) in message
    assert "No space left" in message
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(path, KeyboardInterrupt())
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_path_through_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot write" in input_error(lambda: write_text(tmp_path / "file" / "a.txt", "x"))
    assert "cannot write" in input_error(lambda: write_text(tmp_path, "x"))
    assert (tmp_path / "file").read_text() == ""


def test_a_directory_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    make_directory(tmp_path / "a" / "b")
    make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    assert "Not a directory. Choose another --out" in input_error(lambda: make_directory(tmp_path / "file" / "a"))
    assert "File exists" in input_error(lambda: make_directory(tmp_path / "file"))
    assert "File name too long" in input_error(lambda: make_directory(tmp_path / ("ü" * 200)))

    def enter() -> None:
        with atomic_directory(tmp_path / ("ü" * 200)):
            pass

    assert "File name too long" in input_error(enter)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
characters = st.characters(exclude_categories=())  # halves of surrogate pairs included


@settings(max_examples=50)
@given(value=values | st.text(characters))
def test_json_is_read_as_it_was_written(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value


@settings(max_examples=100)
@given(content=st.binary(max_size=30) | st.text(alphabet='[]{}",:0123e-. tfn\n').map(str.encode))
def test_any_bytes_are_json_or_an_input_error_that_names_the_file(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    try:
        read_json(path)
    except InputError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n"b"}', "line 2"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[" * 100_000, "nested too deep"),
        (b"1" * 5000, "not valid JSON"),
    ],
)
def test_invalid_json_is_reported_with_its_line(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert message in input_error(lambda: read_json(tmp_path / "a.json"))


def test_a_byte_order_mark_before_json_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"qid": 4}')
    assert read_json(tmp_path / "a.json") == {"qid": 4}


def test_a_missing_file_and_a_directory_are_reported(tmp_path: Path) -> None:
    assert "is missing" in input_error(lambda: read_json(tmp_path / "none.json"))
    assert "cannot read" in input_error(lambda: read_json(tmp_path))


def test_jsonl_has_one_object_per_line_for_any_text(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"a": "line\nbreak"}, {"a": "ß\u2028"}])
    lines = (tmp_path / "rows.jsonl").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    assert lines == ['{"a": "line\\nbreak"}', '{"a": "ß\u2028"}']


def test_a_directory_is_written_completely_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with atomic_directory(target) as building:
        (building / "a").write_text("x")
        assert not target.exists()
    assert (target / "a").read_text() == "x"

    def fail() -> None:
        with atomic_directory(tmp_path / "other") as building:
            (building / "a").write_text("x")
            raise OSError(errno.ENOSPC, "No space left on device")

    assert "No space left" in input_error(fail)
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert [path.name for path in target.parent.iterdir()] == ["out"]


def test_an_empty_directory_is_replaced_and_a_full_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with atomic_directory(tmp_path / "empty") as building:
        (building / "a").touch()
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["a"]

    def enter(path: Path) -> None:
        with atomic_directory(path):
            pass

    (tmp_path / "file").write_text("mine")
    assert "not an empty directory" in input_error(lambda: enter(tmp_path / "empty"))
    assert "not an empty directory" in input_error(lambda: enter(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_removing_a_failed_directory_does_not_change_linked_files(tmp_path: Path) -> None:
    (tmp_path / "base").write_text("weights")

    def fail() -> None:
        with atomic_directory(tmp_path / "out") as building:
            os.link(tmp_path / "base", building / "link")
            raise InputError("stop")

    assert input_error(fail) == "stop"
    assert (tmp_path / "base").read_text() == "weights"
