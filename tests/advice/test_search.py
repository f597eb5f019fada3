"""A search on phantoms: its files, the same advice again and after an interruption, limits, and bad input."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import normtune
from normtune.advice import search as searching
from normtune.advice.config import AdviseConfig
from normtune.advice.search import search
from normtune.advice.trials import Workplace
from normtune.commands.app import app
from normtune.errors import InputError
from normtune.runtime.files import read_json

DATA = "phantom-b:3/6/1"
OPTIONS: dict[str, Any] = {"recipes": ["ln", "full"], "epochs": 0.3, "pairs": 36, "device": "cpu"}
CLOCK = {"seconds_per_pass", "estimated_seconds", "training_seconds", "fronts", "out", "adapter"}


def without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_clock(item) for key, item in value.items() if key not in CLOCK}
    return [without_clock(item) for item in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def advice(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("search") / "advice"
    return normtune.advise(str(base), DATA, out=out, progress=False, **OPTIONS)


def test_the_advice_names_a_recipe_of_the_last_round_with_its_adapter(advice: Any) -> None:
    assert advice.recommended in OPTIONS["recipes"] and advice.adapter.is_dir()
    assert [item["trials"] for item in advice.search["rounds"]] == [6, 2, 2]
    assert {len(item.rates) for item in advice.candidates} == {3}
    assert advice.candidate.estimate["low"] <= advice.candidate.estimate["value"] <= advice.candidate.estimate["high"]
    assert sum(advice.rows.values()) == len(normtune.open_dataset(DATA).split("validate"))
    assert read_json(Path(advice.out) / "advice.json") == advice.to_dict()
    assert advice.command in str(advice)


def test_the_command_repeats_the_training_of_the_recommended_adapter(advice: Any, tmp_path: Path) -> None:
    words = shlex.split(advice.command)
    options = dict(zip([word[2:].replace("-", "_") for word in words[3::2]], words[4::2], strict=True))
    options["out"] = str(tmp_path / "again")
    run = normtune.train(words[2], options.pop("data"), progress=False, **options)
    files = [(folder / "adapter.safetensors").read_bytes() for folder in (run.adapter, advice.adapter)]
    assert files[0] == files[1]


def test_the_page_shows_the_recommendation_and_loads_nothing(advice: Any) -> None:
    text = advice.page.read_text(encoding="utf-8")
    assert advice.command.replace('"', "&#34;") in text
    assert text.count("<svg") == 4  # score against three costs, and rates
    assert "<script" not in text and "src=" not in text and "://" not in text


def test_an_interrupted_search_gives_the_same_advice(
    advice: Any, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = Workplace.run, iter(range(100))

    def interrupted(*arguments: Any, **options: Any) -> Any:
        if next(calls) in (2, 7):
            raise KeyboardInterrupt
        return run(*arguments, **options)

    monkeypatch.setattr(Workplace, "run", interrupted)
    arguments: dict[str, Any] = {"out": tmp_path / "advice", "progress": False, **OPTIONS}
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            normtune.advise(str(base), DATA, **arguments)
    model = normtune.load(base, device="cpu")
    del arguments["device"]
    resumed = normtune.advise(model, normtune.open_dataset(DATA), **arguments).to_dict()
    expected = advice.to_dict()
    # of a loaded model the command names the dtype
    assert resumed.pop("command").replace(" --dtype float32", "") == expected.pop("command")
    assert without_clock(resumed) == without_clock(expected)


def test_other_options_are_refused_in_the_folder_of_a_search(advice: Any, base: Path) -> None:
    with pytest.raises(InputError, match="holds a search that differs in seed"):
        normtune.advise(str(base), DATA, out=advice.out, progress=False, seed=1, **OPTIONS)


def test_minutes_become_pairs_and_recipes_above_the_limits_are_left_out(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Planned(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Planned

    monkeypatch.setattr(searching, "_run_rounds", stop)
    options = OPTIONS | {"pairs": None, "minutes": 60, "max_trained": "50%"}
    with pytest.raises(Planned):
        search(AdviseConfig.checked(model=str(base), data=DATA, out=tmp_path, **options))
    assert "full is left out: it trains" in capsys.readouterr().err
    plan = read_json(tmp_path / "plan.json")
    assert [*plan["speeds"]] == ["ln"]
    assert [item["trials"] for item in plan["rounds"]] == [9, 3, 3] and plan["pairs"] > 0  # an hour is enough for all
    assert plan["start_seconds"] + plan["estimated_seconds"] <= 3600


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pairs", "9", "--minutes", "1"], "not both"),
        (["--recipes", "lnn"], "lnn"),
        (["--recipes", "ln", "--recipes", "all=ln"], "the same"),
        (["--max-trained", "much"], "a share such as 1%"),
        (["--validation-split", "nowhere"], "nowhere"),
        (["--recipes", "ln", "--metric", "beauty"], "beauty"),
    ],
)
def test_bad_input_is_one_error(
    options: list[str], message: str, base: Path, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    status, _, error = run_command("advise", base, "--data", DATA, "--out", tmp_path / "out", *options)
    assert status == 2 and message in error


def test_json_is_one_object(advice: Any, base: Path, run_command: Callable[..., tuple[int, str, str]]) -> None:
    recipes = [word for recipe in OPTIONS["recipes"] for word in ("--recipes", recipe)]
    options = ["--epochs", OPTIONS["epochs"], "--pairs", OPTIONS["pairs"], "--device", "cpu", "--json"]
    status, out, _ = run_command("advise", base, "--data", DATA, "--out", advice.out, *recipes, *options)
    assert status == 0 and without_clock(json.loads(out)) == without_clock(advice.to_dict())
    assert "advise" in {
        command.name or command.callback.__name__ for command in app.registered_commands if command.callback
    }
