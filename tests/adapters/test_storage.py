"""Saved adapters load to the bit, and adapters that are damaged or of another base are refused."""

from __future__ import annotations

import json
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normtune.adapters.fingerprint import fingerprint, same_base
from normtune.adapters.info import NOTICE, parse_info
from normtune.adapters.model_card import model_card
from normtune.adapters.storage import (
    CARD_FILE,
    INFO_FILE,
    TENSORS_FILE,
    load_adapter,
    read_adapter_info,
    read_tensors,
    save_adapter,
)
from normtune.methods.adapt import TunedModel, adapt
from normtune.methods.norms import TunedNorm
from normtune.methods.recipe import parse
from tests.support.base_models import KINDS, compute_logits, input_error, perturb_trained, tiny_base

RECIPES = (
    "ln",
    "bias",
    "attention",
    "ffn",
    "full",
    "lora(r=2)",
    "ia3",
    "vera(r=4)",
    "language=miss(columns=4)+ln",
    "road",
    "beft+ssf",
    "difffit",
    "prefix(n=3)",
    "ptuning(n=2)",
    "adapter(width=4)",
    "ln+bias",
    "ln[1:]",
    "vision=lora(r=2),language=ln+attention[:1]",
    "vision=ln,language=lora(r=3,alpha=4)+ln[-1:]",
    "vision=adapter(width=2),language=ia3+prefix(n=2)",
)
MIXTURES = RECIPES[-3:]  # together they have most methods


def saved(kind: str, recipe: str, directory: Path, dtype: torch.dtype = torch.float32) -> TunedModel:
    """Train a base a little and save its adapter to `directory`."""
    model = tiny_base(kind, dtype)
    base_fingerprint = fingerprint(model)
    tuned = adapt(model, recipe)
    perturb_trained(tuned)
    save_adapter(
        tuned,
        directory,
        base_name=f"tiny-{kind}",
        base_fingerprint=base_fingerprint,
        data={"name": "phantom-b", "split": "train", "licence": "CC0"},
        metrics={"closed": {"value": 0.5, "low": 0.4, "high": 0.6}, "training": {"loss": [[1, 2.0]]}},
    )
    return tuned


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [(recipe, torch.float32) for recipe in RECIPES] + [(recipe, torch.bfloat16) for recipe in MIXTURES],
)
def test_a_loaded_adapter_gives_the_same_logits_to_the_bit(
    recipe: str, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    tuned = saved(kind, recipe, tmp_path, dtype)
    before = compute_logits(tuned.model)
    loaded = load_adapter(tiny_base(kind, dtype), tmp_path)
    assert torch.equal(compute_logits(loaded.model), before)
    assert not torch.equal(before, compute_logits(tiny_base(kind, dtype)))
    assert str(loaded.recipe) == str(tuned.recipe)
    for name, parameter in tuned.trained.items():
        assert torch.equal(loaded.trained[name], parameter)
        assert loaded.trained[name].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_trained_on_an_fp32_base_fits_the_same_base_in_bf16(kind: str, tmp_path: Path) -> None:
    saved(kind, "ln", tmp_path)
    loaded = load_adapter(tiny_base(kind, torch.bfloat16), tmp_path)
    assert all(parameter.dtype == torch.float32 for parameter in loaded.trained.values())


def test_the_files_record_base_recipe_data_and_tensors(tmp_path: Path) -> None:
    tuned = saved("miss", "vision=ln", tmp_path)
    info = json.loads((tmp_path / INFO_FILE).read_text())
    assert info["base"] == {"name": "tiny-miss", "fingerprint": fingerprint(tiny_base("miss"))}
    assert parse(info["recipe"]) == tuned.recipe
    assert info["data"] == {"name": "phantom-b", "split": "train", "licence": "CC0"}
    assert info["notice"] == NOTICE == "research use, not for diagnosis"
    assert info["tensors"]["visual_encoder.norm.weight"] == {
        "shape": [16],
        "part": "vision",
        "role": "norm",
        "method": "ln",
    }
    card = (tmp_path / CARD_FILE).read_text()
    assert card == model_card(read_adapter_info(tmp_path))
    assert "| closed | 0.5000 [0.4000, 0.6000] |" in card
    assert "| data: licence | CC0 |" in card
    rows = {"read": 12, "used": 7, "dropped": {"answer is empty": 5}}
    data = {"rows": rows, "losses": {}, "limits": {"prompt": None, "answer": 16}, "score_ceiling": {"all": 0.5}}
    card = model_card(replace(read_adapter_info(tmp_path), data=data))
    assert "| data: rows | read 12, used 7, dropped (answer is empty 5) |" in card
    assert "| data: losses | none |" in card and "| data: limits | prompt no limit, answer 16 |" in card
    assert "| data: score_ceiling | all 0.5000 |" in card
    assert f"{tuned.trainable:,} of {tuned.total:,} parameters" in card
    assert NOTICE in card
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((CARD_FILE, INFO_FILE, TENSORS_FILE))


def test_a_base_of_other_shapes_is_refused_with_name_and_shapes(tmp_path: Path) -> None:
    saved("miss", "ln", tmp_path)
    wide = tiny_base("miss")
    wide.visual_encoder.norm = torch.nn.LayerNorm(24)
    message = input_error(lambda: load_adapter(wide, tmp_path))
    assert "visual_encoder.norm.weight (adapter [16], model [24])" in message
    assert "tiny-miss" in message
    assert "(adapter [16], model absent)" in input_error(lambda: load_adapter(tiny_base("llava"), tmp_path))


@pytest.mark.parametrize("recipe", ["ln", "lora(r=2)", "prefix(n=2)"])
def test_a_base_of_equal_shapes_and_other_values_is_refused_unless_allowed(recipe: str, tmp_path: Path) -> None:
    saved("miss", recipe, tmp_path)
    other = tiny_base("miss")
    with torch.no_grad():
        other.text_decoder.bert.encoder.layer[0].attention.self.query.weight[0, 0] += 1
    assert "other values" in input_error(lambda: load_adapter(other, tmp_path))
    assert not any(isinstance(module, TunedNorm) for module in other.modules())
    load_adapter(other, tmp_path, allow_other_base=True)


def test_an_added_method_that_does_not_fit_leaves_the_base_unchanged(tmp_path: Path) -> None:
    saved("miss", "lora(r=2)", tmp_path)
    info = json.loads((tmp_path / INFO_FILE).read_text())
    info["recipe"] = info["recipe"].replace("r=2", "r=3")
    (tmp_path / INFO_FILE).write_text(json.dumps(info))
    other = tiny_base("miss")
    assert "lora_A (adapter [2, 16], model [3, 16])" in input_error(lambda: load_adapter(other, tmp_path))
    assert torch.equal(compute_logits(other), compute_logits(tiny_base("miss")))


def test_the_fingerprint_depends_on_values_shapes_and_names_but_not_on_precision() -> None:
    expected = fingerprint(tiny_base("miss"))
    assert fingerprint(tiny_base("miss")) == expected
    assert fingerprint(tiny_base("miss", torch.bfloat16)) == expected
    other = tiny_base("miss")
    with torch.no_grad():
        other.visual_encoder.norm.weight[0] += 0.1
    assert not same_base(fingerprint(other), expected)
    assert not same_base(fingerprint(tiny_base("llava")), expected)
    rest, linear = expected.split("-")
    assert same_base(f"{rest}-quantised", expected)
    assert not same_base(f"{linear}-quantised", expected)


@pytest.mark.parametrize("file", [INFO_FILE, TENSORS_FILE])
def test_an_adapter_with_a_missing_file_is_refused(file: str, tmp_path: Path) -> None:
    saved("miss", "ln", tmp_path)
    (tmp_path / file).unlink()
    assert str(tmp_path) in input_error(lambda: load_adapter(tiny_base("miss"), tmp_path))


@pytest.mark.parametrize("file", [INFO_FILE, TENSORS_FILE])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_refused(file: str, share: float, tmp_path: Path) -> None:
    saved("miss", "vision=ln", tmp_path)
    contents = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(contents[: int(share * len(contents))])
    assert file in input_error(lambda: load_adapter(tiny_base("miss"), tmp_path))


def test_files_of_two_adapters_are_refused(tmp_path: Path) -> None:
    saved("miss", "ln", tmp_path / "one")
    saved("miss", "vision=ln", tmp_path / "two")
    shutil.copy(tmp_path / "one" / TENSORS_FILE, tmp_path / "two" / TENSORS_FILE)
    assert "is not the file that adapter.json describes" in input_error(lambda: read_adapter_info(tmp_path / "two"))


def test_tensors_that_the_json_does_not_list_are_refused(tmp_path: Path) -> None:
    saved("miss", "vision=ln", tmp_path)
    info = json.loads((tmp_path / INFO_FILE).read_text())
    del info["tensors"]["visual_encoder.norm.bias"]
    (tmp_path / INFO_FILE).write_text(json.dumps(info))
    message = input_error(lambda: read_tensors(tmp_path, read_adapter_info(tmp_path)))
    assert "visual_encoder.norm.bias" in message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def good_info(tmp_path_factory: pytest.TempPathFactory) -> dict:
    directory = tmp_path_factory.mktemp("adapter")
    saved("miss", "vision=ln[:1]", directory)
    return json.loads((directory / INFO_FILE).read_text())


@settings(max_examples=60)
@given(data=st.data())
def test_a_wrong_entry_in_the_json_is_an_input_error_or_harmless(good_info: dict, data: st.DataObject) -> None:
    contents = dict(good_info)
    contents[data.draw(st.sampled_from(sorted(contents)))] = data.draw(json_values)
    from normtune.errors import InputError

    try:
        info = parse_info(contents, Path(INFO_FILE))
    except InputError as error:
        assert INFO_FILE in str(error)
    else:
        assert info.to_json().keys() == good_info.keys()
        model_card(info)


def test_a_missing_entry_is_named(good_info: dict) -> None:
    for entry in good_info.keys() - {"format", "base"}:
        incomplete = {name: value for name, value in good_info.items() if name != entry}
        message = input_error(lambda contents=incomplete: parse_info(contents, Path(INFO_FILE)))
        assert f"entry {entry}:" in message
    incomplete = {**good_info, "base": {"name": "x"}}
    assert "entry base.fingerprint:" in input_error(lambda: parse_info(incomplete, Path(INFO_FILE)))


def test_a_full_disk_leaves_the_old_adapter_and_no_other_file(tmp_path: Path) -> None:
    tuned = saved("miss", "ln", tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    perturb_trained(tuned)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        message = input_error(lambda: save_adapter(tuned, tmp_path, base_name="b", base_fingerprint="f"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write" in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_between_the_renames_leaves_a_complete_adapter_or_one_that_is_refused(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    import os

    rename, done = os.replace, []

    def rename_until_killed(source: Path, target: Path) -> None:
        if len(done) == renames:
            raise Killed
        done.append(target)
        rename(source, target)

    tuned = saved("miss", "ln", tmp_path)
    old = {name: parameter.detach().clone() for name, parameter in tuned.trained.items()}
    perturb_trained(tuned)
    monkeypatch.setattr(os, "replace", rename_until_killed)
    with pytest.raises(Killed):
        save_adapter(tuned, tmp_path, base_name="b", base_fingerprint=fingerprint(tiny_base("miss")))
    monkeypatch.undo()
    if renames < 2:
        loaded = load_adapter(tiny_base("miss"), tmp_path)
        assert all(torch.equal(loaded.trained[name], value) for name, value in old.items())
    else:
        assert "is not the file" in input_error(lambda: load_adapter(tiny_base("miss"), tmp_path))
