from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from normtune.data.reading.tables import csv_rows, file_bytes, find_table
from normtune.errors import InputError
from tests.support.report_samples import write_csv


def test_rows_have_cells_by_column_and_spreadsheet_row_numbers(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", ("id", "text"), (1, "two\nlines, and a comma"), (), (2, "b"))
    assert list(csv_rows(file, ("id",))) == [
        (2, {"id": "1", "text": "two\nlines, and a comma"}),
        (4, {"id": "2", "text": "b"}),
    ]


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"\xef\xbb\xbfid\n1\n")
    assert list(csv_rows(file, ("id",))) == [(2, {"id": "1"})]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a.csv is empty"),
        (b"id,x\n1\n", "a.csv, row 2: 1 cells for 2 columns"),
        (b'id,x\n1,"two\n', "a.csv, row 2: not valid CSV"),
        (b"\xff\xfe", "a.csv is not UTF-8 text"),
        (b"x,y\n", "a.csv, row 1: no column id; its columns are x, y."),
    ],
)
def test_errors_name_the_row_of_a_bad_file(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    with pytest.raises(InputError) as caught:
        list(csv_rows(tmp_path / "a.csv", ("id",)))
    assert message in str(caught.value)


def test_compressed_tables_are_found_and_decompressed(tmp_path: Path) -> None:
    write_csv(tmp_path / "a-2.0.0-split.csv.gz", ("id",), (1,))
    file = find_table(tmp_path, "a-*-split.csv")
    assert file is not None and len(list(csv_rows(file, ("id",)))) == 1
    assert find_table(tmp_path, "b.csv") is None


def test_a_damaged_archive_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.csv.gz"
    whole = gzip.compress(b"id\n1\n" * 100)
    for data in (b"", b"no archive", whole[:-4], whole[:15] + b"\xff" * 9 + whole[24:]):
        file.write_bytes(data)
        if data:
            with pytest.raises(InputError, match=r"cannot read .*a\.csv\.gz"):
                file_bytes(file)
    with pytest.raises(InputError, match="No such file"):
        file_bytes(tmp_path / "none.csv")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.text(max_size=6), min_size=2, max_size=2), max_size=5))
def test_csv_is_read_back_unchanged(tmp_path: Path, rows: list[list[str]]) -> None:
    rows = [[cell.encode("utf-8", "replace").decode().replace("\0", "") for cell in row] for row in rows]
    file = write_csv(tmp_path / "a.csv", ("x", "y"), *rows)
    assert [list(cells.values()) for _, cells in csv_rows(file, ("x", "y"))] == rows
