"""API keys, rate limits, the memory budget, uploads, and adapter options."""

from __future__ import annotations

from pathlib import Path

import pytest

from normtune.errors import InputError
from normtune.serving.http.errors import RequestRefused
from normtune.serving.http.limits import ApiKeys, Budget, RateLimiter, read_keys
from normtune.serving.http.paths import find_adapters, parse_adapter_options
from normtune.serving.http.uploads import Uploads

ONE, TWO = "a" * 16, "b" * 32


def test_keys_are_read_from_a_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\nward:{ONE}\n\n{TWO}\n")
    keys = read_keys(file, {"NORMTUNE_API_KEYS": f"lab:{'c' * 16},"})
    assert [keys.owner(key) for key in (ONE, TWO, "c" * 16, "d" * 16, "")] == ["ward", "key-2", "lab", None, None]
    assert keys.cookie_owner(keys.cookie(ONE)) == "ward" and keys.owner(keys.cookie(ONE)) is None
    assert keys and not read_keys(None, {}) and ApiKeys().owner("") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [("short", "line 1"), (f"x:{ONE}\ny:{ONE}", "line 2"), (f"x:{ONE}\nx:{TWO}", "line 2"), ("# none", "no key")],
)
def test_errors_of_invalid_keys_name_the_line_but_not_the_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(InputError, match=message) as refused:
        read_keys(tmp_path / "keys", {})
    assert ONE not in str(refused.value)


def test_a_rate_limit_refills_and_returns_the_waiting_time() -> None:
    now = [0.0]
    rates = RateLimiter(per_minute=30, burst=2, now=lambda: now[0])
    rates.count_request("a")
    rates.count_request("a")
    with pytest.raises(RequestRefused) as refused:
        rates.count_request("a")
    assert (refused.value.status, refused.value.retry_after) == (429, 2)
    rates.count_request("b")
    now[0] = 2.0
    rates.count_request("a")


def test_a_budget_refuses_more_than_is_available() -> None:
    budget = Budget(10)
    budget.reserve(7)
    with pytest.raises(RequestRefused):
        budget.reserve(4)
    budget.release(7)
    budget.reserve(10)


def test_uploads_are_dropped_by_age_number_and_size() -> None:
    now = [0.0]
    uploads = Uploads(count=3, total_bytes=10, seconds=60, now=lambda: now[0])
    ids = [uploads.add("a", b"1234", 1, 1).id for _ in range(3)]
    assert [upload.id for upload in uploads.list_for("a")] == ids[1:] and uploads.size == 8
    with pytest.raises(RequestRefused):
        uploads.get("b", ids[2])
    now[0] = 61.0
    assert uploads.list_for("a") == [] and uploads.size == 0
    assert uploads.add("a", b"1" * 50, 1, 1) in uploads.list_for("a")  # the newest upload is always kept


def test_adapter_names_come_from_options_or_folders(tmp_path: Path) -> None:
    for name in ("knee", "hip", ".hidden", "notes"):
        (tmp_path / name).mkdir()
        if name != "notes":
            (tmp_path / name / "adapter.json").write_text("{}")
    assert find_adapters(tmp_path) == {name: tmp_path / name for name in ("hip", "knee")}
    assert parse_adapter_options(["a=x=y", "b.1=z"]) == {"a": Path("x=y"), "b.1": Path("z")}
    for bad in (["a"], ["a="], ["../a=b"], ["a=b", "a=c"]):
        with pytest.raises(InputError, match="--adapter"):
            parse_adapter_options(bad)
