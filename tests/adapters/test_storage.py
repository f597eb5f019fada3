"""Deltas: what is saved comes back to the bit, what does not belong is refused, merging and its undoing."""

from __future__ import annotations

import json
import resource
import shutil
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
    merge_adapter,
    read_adapter_info,
    read_tensors,
    save_adapter,
    unmerge_adapter,
)
from normtune.methods.adapt import TunedModel, adapt
from normtune.methods.norms import TunedNorm
from normtune.methods.recipe import parse
from tests.support.base_models import KINDS, base, logits, outcome, train_a_little

RECIPES = (
    "ln",
    "bias",
    "attention",
    "ffn",
    "full",
    "lora(r=2)",
    "ia3",
    "prefix(n=3)",
    "ptuning(n=2)",
    "adapter(width=4)",
    "ln+bias",
    "ln[1:]",
    "vision=lora(r=2),language=ln+attention[:1]",
    "vision=ln,language=lora(r=3,alpha=4)+ln[-1:]",
    "vision=adapter(width=2),language=ia3+prefix(n=2)",
)
UNMERGEABLE = ("prefix", "ptuning", "adapter")
MIXTURES = RECIPES[-3:]  # between them they hold most methods


def saved(kind: str, recipe: str, directory: Path, dtype: torch.dtype = torch.float32) -> TunedModel:
    """A tuned base whose delta lies in `directory`."""
    model = base(kind, dtype)
    mark = fingerprint(model)
    tuned = adapt(model, recipe)
    train_a_little(tuned)
    save_adapter(
        tuned,
        directory,
        base_name=f"tiny-{kind}",
        base_fingerprint=mark,
        data={"name": "phantom-b", "split": "train", "licence": "CC0"},
        metrics={"closed": {"value": 0.5, "low": 0.4, "high": 0.6}, "training": {"loss": [[1, 2.0]]}},
    )
    return tuned


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [(recipe, torch.float32) for recipe in RECIPES] + [(recipe, torch.bfloat16) for recipe in MIXTURES],
)
def test_a_loaded_delta_gives_the_same_logits_to_the_bit(
    recipe: str, kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    tuned = saved(kind, recipe, tmp_path, dtype)
    before = logits(tuned.model)
    loaded = load_adapter(base(kind, dtype), tmp_path)
    assert torch.equal(logits(loaded.model), before)
    assert not torch.equal(before, logits(base(kind, dtype)))
    assert str(loaded.recipe) == str(tuned.recipe)
    for name, parameter in tuned.trained.items():
        assert torch.equal(loaded.trained[name], parameter)
        assert loaded.trained[name].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_delta_trained_on_an_fp32_base_fits_the_same_base_in_bf16(kind: str, tmp_path: Path) -> None:
    saved(kind, "ln", tmp_path)
    loaded = load_adapter(base(kind, torch.bfloat16), tmp_path)
    assert all(parameter.dtype == torch.float32 for parameter in loaded.trained.values())


def test_the_files_say_what_was_trained_on_what(tmp_path: Path) -> None:
    tuned = saved("miss", "vision=ln", tmp_path)
    found = json.loads((tmp_path / INFO_FILE).read_text())
    assert found["base"] == {"name": "tiny-miss", "fingerprint": fingerprint(base("miss"))}
    assert parse(found["recipe"]) == tuned.recipe
    assert found["data"] == {"name": "phantom-b", "split": "train", "licence": "CC0"}
    assert found["notice"] == NOTICE == "research use, not for diagnosis"
    assert found["tensors"]["visual_encoder.norm.weight"] == {
        "shape": [16],
        "part": "vision",
        "role": "norm",
        "method": "ln",
    }
    card = (tmp_path / CARD_FILE).read_text()
    assert card == model_card(read_adapter_info(tmp_path))
    assert "| closed | 0.5000 [0.4000, 0.6000] |" in card
    assert "| data: licence | CC0 |" in card
    assert f"{tuned.trainable:,} of {tuned.total:,} parameters" in card
    assert NOTICE in card
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((CARD_FILE, INFO_FILE, TENSORS_FILE))


def test_a_base_of_other_shapes_is_refused_by_name_and_shape(tmp_path: Path) -> None:
    saved("miss", "ln", tmp_path)
    wide = base("miss")
    wide.visual_encoder.norm = torch.nn.LayerNorm(24)
    message = outcome(lambda: load_adapter(wide, tmp_path))
    assert "visual_encoder.norm.weight (delta [16], model [24])" in message
    assert "tiny-miss" in message
    assert "(delta [16], model absent)" in outcome(lambda: load_adapter(base("llava"), tmp_path))


@pytest.mark.parametrize("recipe", ["ln", "lora(r=2)", "prefix(n=2)"])
def test_a_base_of_equal_shapes_and_other_values_is_refused_unless_allowed(
    recipe: str, tmp_path: Path
) -> None:
    saved("miss", recipe, tmp_path)
    other = base("miss")
    with torch.no_grad():
        other.text_decoder.bert.encoder.layer[0].attention.self.query.weight[0, 0] += 1
    assert "other values" in outcome(lambda: load_adapter(other, tmp_path))
    assert not any(isinstance(module, TunedNorm) for module in other.modules())
    load_adapter(other, tmp_path, allow_other_base=True)


def test_an_added_method_that_does_not_fit_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    saved("miss", "lora(r=2)", tmp_path)
    found = json.loads((tmp_path / INFO_FILE).read_text())
    found["recipe"] = found["recipe"].replace("r=2", "r=3")
    (tmp_path / INFO_FILE).write_text(json.dumps(found))
    other = base("miss")
    assert "lora_A (delta [2, 16], model [3, 16])" in outcome(lambda: load_adapter(other, tmp_path))
    assert torch.equal(logits(other), logits(base("miss")))


def test_the_fingerprint_tells_values_shapes_and_names_apart_but_not_precision() -> None:
    mark = fingerprint(base("miss"))
    assert fingerprint(base("miss")) == mark
    assert fingerprint(base("miss", torch.bfloat16)) == mark
    other = base("miss")
    with torch.no_grad():
        other.visual_encoder.norm.weight[0] += 0.1
    assert not same_base(fingerprint(other), mark)
    assert not same_base(fingerprint(base("llava")), mark)
    rest, linear = mark.split("-")
    assert same_base(f"{rest}-quantised", mark)
    assert not same_base(f"{linear}-quantised", mark)


@pytest.mark.parametrize("file", [INFO_FILE, TENSORS_FILE])
def test_a_delta_with_a_missing_file_is_refused(file: str, tmp_path: Path) -> None:
    saved("miss", "ln", tmp_path)
    (tmp_path / file).unlink()
    assert str(tmp_path) in outcome(lambda: load_adapter(base("miss"), tmp_path))


@pytest.mark.parametrize("file", [INFO_FILE, TENSORS_FILE])
@pytest.mark.parametrize("kept", [0.0, 0.3, 0.99])
def test_a_truncated_file_is_refused(file: str, kept: float, tmp_path: Path) -> None:
    saved("miss", "vision=ln", tmp_path)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: int(kept * len(whole))])
    assert file in outcome(lambda: load_adapter(base("miss"), tmp_path))


def test_files_of_two_deltas_are_refused(tmp_path: Path) -> None:
    saved("miss", "ln", tmp_path / "one")
    saved("miss", "vision=ln", tmp_path / "two")
    shutil.copy(tmp_path / "one" / TENSORS_FILE, tmp_path / "two" / TENSORS_FILE)
    assert "is not the file that adapter.json describes" in outcome(
        lambda: read_adapter_info(tmp_path / "two")
    )


def test_tensors_that_the_json_does_not_name_are_refused(tmp_path: Path) -> None:
    saved("miss", "vision=ln", tmp_path)
    found = json.loads((tmp_path / INFO_FILE).read_text())
    del found["tensors"]["visual_encoder.norm.bias"]
    (tmp_path / INFO_FILE).write_text(json.dumps(found))
    message = outcome(lambda: read_tensors(tmp_path, read_adapter_info(tmp_path)))
    assert "visual_encoder.norm.bias" in message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)


@pytest.fixture(scope="module")
def good_info(tmp_path_factory: pytest.TempPathFactory) -> dict:
    directory = tmp_path_factory.mktemp("delta")
    saved("miss", "vision=ln[:1]", directory)
    return json.loads((directory / INFO_FILE).read_text())


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_fault_in_the_json_is_an_input_error_or_harmless(good_info: dict, data: st.DataObject) -> None:
    found = dict(good_info)
    found[data.draw(st.sampled_from(sorted(found)))] = data.draw(json_values)
    from normtune.errors import InputError

    try:
        info = parse_info(found, Path(INFO_FILE))
    except InputError as error:
        assert INFO_FILE in str(error)
    else:
        assert info.to_json().keys() == good_info.keys()
        model_card(info)


def test_a_missing_entry_is_named(good_info: dict) -> None:
    for entry in good_info.keys() - {"format", "base"}:
        less = {name: value for name, value in good_info.items() if name != entry}
        assert f"entry {entry}:" in outcome(lambda less=less: parse_info(less, Path(INFO_FILE)))
    less = {**good_info, "base": {"name": "x"}}
    assert "entry base.fingerprint:" in outcome(lambda: parse_info(less, Path(INFO_FILE)))


def test_a_full_disk_leaves_the_old_delta_and_no_other_file(tmp_path: Path) -> None:
    tuned = saved("miss", "ln", tmp_path)
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    train_a_little(tuned)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        message = outcome(lambda: save_adapter(tuned, tmp_path, base_name="b", base_fingerprint="f"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write" in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_between_the_renames_leaves_a_whole_delta_or_one_that_is_refused(
    renames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    import os

    rename, done = os.replace, []

    def dying(source: Path, target: Path) -> None:
        if len(done) == renames:
            raise Killed
        done.append(target)
        rename(source, target)

    tuned = saved("miss", "ln", tmp_path)
    old = {name: parameter.detach().clone() for name, parameter in tuned.trained.items()}
    train_a_little(tuned)
    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(Killed):
        save_adapter(tuned, tmp_path, base_name="b", base_fingerprint=fingerprint(base("miss")))
    monkeypatch.undo()
    if renames < 2:
        loaded = load_adapter(base("miss"), tmp_path)
        assert all(torch.equal(loaded.trained[name], one) for name, one in old.items())
    else:
        assert "is not the file" in outcome(lambda: load_adapter(base("miss"), tmp_path))


MERGEABLE = [recipe for recipe in RECIPES if not any(name in recipe for name in UNMERGEABLE)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", MERGEABLE)
def test_a_merged_model_is_the_plain_model_with_equal_logits(recipe: str, kind: str) -> None:
    plain = base(kind)
    tuned = adapt(base(kind), recipe)
    train_a_little(tuned)
    before = logits(tuned.model)
    merged = merge_adapter(tuned)
    assert [(name, type(module)) for name, module in merged.named_modules()] == [
        (name, type(module)) for name, module in plain.named_modules()
    ]
    assert {name: p.shape for name, p in merged.state_dict().items()} == {
        name: p.shape for name, p in plain.state_dict().items()
    }
    assert not any(module.training for module in merged.modules())
    if "lora" in recipe or "ia3" in recipe or "ln" in recipe:
        torch.testing.assert_close(logits(merged), before, rtol=1e-6, atol=2e-6)
    else:
        assert torch.equal(logits(merged), before)


@pytest.mark.parametrize(
    ("kind", "dtype", "recipe"),
    [("llava", torch.bfloat16, recipe) for recipe in MERGEABLE]
    + [("miss", torch.bfloat16, recipe) for recipe in ("full", "language=attention+lora(r=2)+ln")]
    + [("miss", torch.float32, recipe) for recipe in ("ln", "vision=lora(r=2),language=ia3")],
)
def test_unmerging_gives_the_tuned_model_back_to_the_bit(kind: str, dtype: torch.dtype, recipe: str) -> None:
    tuned = adapt(base(kind, dtype), recipe)
    train_a_little(tuned)
    before = logits(tuned.model)
    state = {name: value.clone() for name, value in tuned.model.state_dict().items()}
    parameters = {id(parameter) for parameter in tuned.model.parameters()}
    merge_adapter(tuned)
    assert all(p.dtype == dtype for p in tuned.model.parameters())
    logits(tuned.model)
    assert unmerge_adapter(tuned) is tuned.model
    again = tuned.model.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())
    assert torch.equal(logits(tuned.model), before)
    assert {id(parameter) for parameter in tuned.model.parameters()} == parameters
    assert {id(p) for p in tuned.model.parameters() if p.requires_grad} == {
        id(p) for p in tuned.trained.values()
    }


def test_trained_norms_merge_to_the_bit() -> None:
    tuned = adapt(base("miss"), "ln")
    train_a_little(tuned)
    merged = merge_adapter(tuned).state_dict()
    assert all(torch.equal(merged[name], parameter) for name, parameter in tuned.trained.items())


@pytest.mark.parametrize("recipe", ["prefix(n=2)", "language=ptuning(n=2)+ln", "adapter(width=2)"])
def test_what_no_weight_can_stand_for_is_not_merged(recipe: str) -> None:
    tuned = adapt(base("miss"), recipe)
    train_a_little(tuned)
    before = logits(tuned.model)
    assert "cannot be merged" in outcome(lambda: merge_adapter(tuned))
    assert torch.equal(logits(tuned.model), before)


def test_merging_twice_and_unmerging_what_is_not_merged_are_refused() -> None:
    tuned = adapt(base("miss"), "ln")
    assert "not merged" in outcome(lambda: unmerge_adapter(tuned))
    merge_adapter(tuned)
    assert "merged already" in outcome(lambda: merge_adapter(tuned))


def test_a_merged_model_saves_the_delta_that_it_was_merged_from(tmp_path: Path) -> None:
    tuned = saved("miss", "ln", tmp_path / "before")
    merge_adapter(tuned)
    save_adapter(tuned, tmp_path / "merged", base_name="b", base_fingerprint=fingerprint(base("miss")))
    assert (tmp_path / "merged" / TENSORS_FILE).read_bytes() == (
        tmp_path / "before" / TENSORS_FILE
    ).read_bytes()
