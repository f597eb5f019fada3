"""Keys, rates and the memory that requests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from normtune.data.tasks import MAX_ANSWER_TOKENS, MAX_REPORT_TOKENS
from normtune.errors import InputError
from normtune.serving.http.errors import RequestRefused
from normtune.serving.http.limits import ApiKeys, Budget, Rates, read_keys
from normtune.serving.http.paths import adapters_below, named_adapters
from normtune.serving.http.state import Settings
from normtune.serving.http.uploads import Uploads

ONE, TWO = "a" * 16, "b" * 32


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\nward:{ONE}\n\n{TWO}\n")
    keys = read_keys(file, {"NORMTUNE_API_KEYS": f"lab:{'c' * 16},"})
    assert [keys.owner(key) for key in (ONE, TWO, "c" * 16, "d" * 16, "")] == [
        "ward",
        "key-2",
        "lab",
        None,
        None,
    ]
    assert keys.cookie_owner(keys.cookie(ONE)) == "ward" and keys.owner(keys.cookie(ONE)) is None
    assert keys and not read_keys(None, {}) and ApiKeys().owner("") is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("short", "line 1"),
        (f"x:{ONE}\ny:{ONE}", "line 2"),
        (f"x:{ONE}\nx:{TWO}", "line 2"),
        ("# none", "no key"),
    ],
)
def test_bad_keys_name_their_line_and_not_themselves(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(InputError, match=told) as refused:
        read_keys(tmp_path / "keys", {})
    assert ONE not in str(refused.value)


def test_a_rate_fills_again_and_says_when() -> None:
    now = [0.0]
    rates = Rates(per_minute=30, burst=2, now=lambda: now[0])
    rates.take("a")
    rates.take("a")
    with pytest.raises(RequestRefused) as refused:
        rates.take("a")
    assert (refused.value.status, refused.value.retry_after) == (429, 2)
    rates.take("b")
    now[0] = 2.0
    rates.take("a")


def test_a_budget_gives_what_it_has() -> None:
    budget = Budget(10)
    budget.take(7)
    with pytest.raises(RequestRefused):
        budget.take(4)
    budget.give(7)
    budget.take(10)


def test_uploads_are_forgotten_by_age_number_and_size() -> None:
    now = [0.0]
    held = Uploads(count=3, total_bytes=10, seconds=60, now=lambda: now[0])
    ids = [held.add("a", b"1234", 1, 1).id for _ in range(3)]
    assert [one.id for one in held.of("a")] == ids[1:] and held.size == 8
    with pytest.raises(RequestRefused):
        held.get("b", ids[2])
    now[0] = 61.0
    assert held.of("a") == [] and held.size == 0
    assert held.add("a", b"1" * 50, 1, 1) in held.of("a")  # one is always held


def test_adapters_are_named_on_the_command_line_or_by_their_folders(tmp_path: Path) -> None:
    for name in ("knee", "hip", ".hidden", "notes"):
        (tmp_path / name).mkdir()
        if name != "notes":
            (tmp_path / name / "adapter.json").write_text("{}")
    assert adapters_below(tmp_path) == {name: tmp_path / name for name in ("hip", "knee")}
    assert named_adapters(["a=x=y", "b.1=z"]) == {"a": Path("x=y"), "b.1": Path("z")}
    for bad in (["a"], ["a="], ["../a=b"], ["a=b", "a=c"]):
        with pytest.raises(InputError, match="--adapter"):
            named_adapters(bad)


def test_answers_have_the_room_that_evaluations_give_them() -> None:
    settings = Settings(base="nano")
    assert (settings.question_tokens, settings.report_tokens) == (MAX_ANSWER_TOKENS, MAX_REPORT_TOKENS)
