"""Merging: plain transformers loads the result to the same logits, and the base's files do not change."""

from __future__ import annotations

import copy
import errno
import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from normtune.adapters import base_files, merge
from normtune.adapters.fingerprint import fingerprint
from normtune.adapters.merge import NEW_SHARD, ORIGIN_FILE, merge_to_disk
from normtune.adapters.storage import TENSORS_FILE, save_adapter
from normtune.methods.adapt import TunedModel, adapt
from normtune.methods.registry import INTRINSIC
from normtune.models.checkpoints.reader import INDEX_FILE, SINGLE_FILE, Checkpoint
from normtune.models.miss.model import MissForQuestionAnswering
from tests.support.base_models import KINDS, compute_logits, input_error, perturb_trained, save_base, tiny_base
from tests.support.tiny_models import MORE, TINY, make_tiny
from tests.support.tolerance import assert_close

RECIPES = (
    "ln",
    "bias",
    "attention",
    "ffn[1:]",
    "full",
    "lora(r=2)",
    "lora(r=2,dora=1)",
    "lora(r=4,rslora=1,targets=all-linear)",
    "ia3",
    "vision=ln,language=lora(r=2,alpha=5)+ln",
    "language=attention+lora(r=2)",
)


def trained_adapter(model: nn.Module, recipe: str, directory: Path) -> TunedModel:
    """Train a base a little and save its adapter to `directory`."""
    base_fingerprint = fingerprint(model)
    tuned = adapt(model, recipe)
    perturb_trained(tuned)
    metrics = {"closed": 0.5}
    save_adapter(tuned, directory, base_name="tiny", base_fingerprint=base_fingerprint, metrics=metrics)
    return tuned


def plain(kind: str, directory: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load a directory with plain transformers; no tensor may be missing or unexpected."""
    from transformers import AutoModelForImageTextToText

    loader: Any = MissForQuestionAnswering if kind == "miss" else AutoModelForImageTextToText
    model, report = loader.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


def digests(directory: Path) -> dict[str, str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("kind", "recipe"),
    [("miss", recipe) for recipe in RECIPES] + [("llava", recipe) for recipe in ("ln", "full", "lora(r=2)", "ia3")],
)
def test_plain_transformers_loads_the_merged_model_to_the_same_logits(kind: str, recipe: str, tmp_path: Path) -> None:
    directory = save_base(kind, tmp_path / "base")
    before = digests(directory)
    tuned = trained_adapter(tiny_base(kind), recipe, tmp_path / "adapter")
    merged = merge_to_disk(str(directory), tmp_path / "adapter", tmp_path / "out")
    loaded = plain(kind, tmp_path / "out")
    assert_close(compute_logits(loaded), compute_logits(tuned.model))
    for name, parameter in loaded.state_dict().items():
        if name in tuned.trained and "lora" not in recipe:
            assert torch.equal(parameter, tuned.trained[name])
    assert digests(directory) == before
    assert merged.linked == "hard link"
    assert merged.new_bytes == (tmp_path / "out" / NEW_SHARD).stat().st_size
    assert merged.linked_bytes == (directory / SINGLE_FILE).stat().st_size
    assert "never write into them" in str(merged)
    json.dumps(merged.__dict__)


def expected_shard(base_model: nn.Module, directory: Path, tuned: TunedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The new shard, computed from the loaded base and the trained values; keys are found by value."""
    stored = load_file(directory / SINGLE_FILE)
    old = dict(base_model.named_parameters(remove_duplicate=False))
    new = {name: p.detach() for name, p in tuned.trained.items() if tuned.methods[name] in INTRINSIC}
    trained_names = set(new)
    for addition in tuned.additions:
        for linear, layer in addition.layers.items():
            weight, bias = f"{linear}.weight", f"{linear}.bias"
            before = new.get(weight, old[weight]).float()
            (adapter,) = layer.active_adapters
            if hasattr(layer, "lora_A"):
                up, down = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
                new[weight] = (before + layer.scaling[adapter] * (up @ down)).detach()
                continue
            scale = layer.ia3_l[adapter].detach()
            new[weight] = before * scale
            if bias in old and not layer.is_feedforward:
                new[bias] = new.get(bias, old[bias]).float() * scale.flatten()
    shard = {}
    for name, tensor in new.items():
        (key,) = (key for key, value in stored.items() if value.shape == tensor.shape and torch.equal(value, old[name]))
        shard[key] = tensor.to(torch.float32 if name in trained_names else dtype).contiguous()
    return shard


# the base is loaded for mixtures of experts, which transformers joins
UNCHANGED = [name for name in (*TINY, *MORE) if not name.endswith("moe")]
MIXTURES = ("ln+lora(r=2,alpha=5)", "full", "attention+ia3")


@pytest.mark.parametrize(
    ("kind", "recipe", "dtype"),
    [("miss", recipe, torch.bfloat16) for recipe in MIXTURES]
    + [(kind, MIXTURES[i % 3], (torch.bfloat16, torch.float32)[i % 2]) for i, kind in enumerate(UNCHANGED)],
)
def test_the_new_shard_equals_that_of_a_loaded_model_but_the_base_is_not_loaded(
    kind: str, recipe: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "base"
    if kind == "miss":
        save_base(kind, directory, dtype)
    else:
        make_tiny(kind, directory)
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(directory / SINGLE_FILE).items()}
        save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})
    model = plain(kind, directory, dtype)
    tuned = trained_adapter(copy.deepcopy(model), recipe, tmp_path / "adapter")
    expected = expected_shard(model, directory, tuned, dtype)
    with one_tensor_in_memory(monkeypatch) as names_read:
        merge_to_disk(str(directory), tmp_path / "adapter", tmp_path / "out")
    assert set(names_read) == expected.keys()
    assert (tmp_path / "out" / NEW_SHARD).read_bytes() == save(expected, metadata={"format": "pt"})


@contextmanager
def one_tensor_in_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Fail if the base is loaded inside, or if one of its tensors is read while another is in memory.

    Yields the list to which the names of the tensors are added.
    """

    def refuse(*_: object) -> None:
        raise AssertionError("the base was loaded")

    alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
    names: list[str] = []
    get_tensor = Checkpoint.get_tensor

    def get_single_tensor(self: Checkpoint, name: str) -> Tensor:
        assert not alive, f"{name} is read while another tensor is in memory"
        tensor = get_tensor(self, name).clone()
        alive.add(tensor.untyped_storage())
        names.append(name)
        return tensor

    with monkeypatch.context() as patch:
        patch.setattr(base_files, "_load", refuse)
        patch.setattr(Checkpoint, "get_tensor", get_single_tensor)
        yield names
    assert not alive


@pytest.mark.parametrize("kind", KINDS)
def test_the_index_maps_every_tensor_and_the_base_is_linked_not_copied(kind: str, tmp_path: Path) -> None:
    directory = save_base(kind, tmp_path / "base")
    tuned = trained_adapter(tiny_base(kind), "ln", tmp_path / "adapter")
    merge_to_disk(str(directory), tmp_path / "adapter", tmp_path / "out")
    out = tmp_path / "out"
    index = json.loads((out / INDEX_FILE).read_text())
    with safe_open(directory / SINGLE_FILE, "pt") as handle:
        assert index["weight_map"].keys() == set(handle.keys())
        size = sum(handle.get_tensor(key).nbytes for key in handle.keys())  # noqa: SIM118
    assert index["metadata"]["total_size"] == size
    with safe_open(out / NEW_SHARD, "pt") as handle:
        new = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    assert {key for key, file in index["weight_map"].items() if file == NEW_SHARD} == new.keys()
    assert len(new) == len(tuned.trained)
    assert all(tensor.dtype == torch.float32 for tensor in new.values())
    (link,) = set(index["weight_map"].values()) - {NEW_SHARD}
    assert (out / link).stat().st_ino == (directory / SINGLE_FILE).stat().st_ino
    assert not (out / SINGLE_FILE).exists()
    assert (out / "config.json").read_bytes() == (directory / "config.json").read_bytes()
    assert (out / "config.json").stat().st_ino != (directory / "config.json").stat().st_ino
    assert (out / "vocab.txt").read_text() == "a\nb\n"
    assert json.loads((out / ORIGIN_FILE).read_text())["merged"]["recipe"] == str(tuned.recipe)


@pytest.mark.parametrize("kind", KINDS)
def test_norms_are_fp32_on_a_bf16_base_and_the_rounding_of_a_bf16_load_is_reported(kind: str, tmp_path: Path) -> None:
    directory = save_base(kind, tmp_path / "base", torch.bfloat16)
    model = tiny_base(kind, torch.bfloat16)
    base_fingerprint = fingerprint(model)
    tuned = adapt(model, "ln")
    names = list(tuned.trained)
    with torch.no_grad():  # one value changes by less than bf16's spacing, one by more
        tuned.trained[names[0]][0] += 1e-5
        tuned.trained[names[0]][1] += 1.0
    save_adapter(tuned, tmp_path / "adapter", base_name="tiny", base_fingerprint=base_fingerprint)
    merged = merge_to_disk(str(directory), tmp_path / "adapter", tmp_path / "out")
    assert merged.rounded_away == 0.5
    assert "50.0% of the changes are lost" in str(merged)
    exact = plain(kind, tmp_path / "out").state_dict()
    assert all(torch.equal(exact[name], parameter) for name, parameter in tuned.trained.items())
    rounded = plain(kind, tmp_path / "out", torch.bfloat16).state_dict()
    assert torch.equal(rounded[names[0]], tuned.trained[names[0]].bfloat16())


def test_lora_changes_its_weights_only_in_the_bases_dtype(tmp_path: Path) -> None:
    directory = save_base("llava", tmp_path / "base", torch.bfloat16)
    model = tiny_base("llava").to(torch.bfloat16)
    tuned = trained_adapter(model, "language=lora(r=2)", tmp_path / "adapter")
    merge_to_disk(str(directory), tmp_path / "adapter", tmp_path / "out")
    with safe_open(tmp_path / "out" / NEW_SHARD, "pt") as handle:
        new = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118
    assert len(new) == len(tuned.additions[0].layers) == 4
    assert all(tensor.dtype == torch.bfloat16 for tensor in new.values())
    assert all(key.endswith(("q_proj.weight", "v_proj.weight")) for key in new)


def test_a_base_of_several_shards_and_one_that_was_merged_before_can_be_merged(tmp_path: Path) -> None:
    directory = tmp_path / "base"
    tiny_base("llava").save_pretrained(directory, max_shard_size="40KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    trained_adapter(tiny_base("llava"), "ln", tmp_path / "first")
    merge_to_disk(str(directory), tmp_path / "first", tmp_path / "once")
    tuned = trained_adapter(plain("llava", tmp_path / "once"), "ln+attention[:1]", tmp_path / "second")
    merge_to_disk(str(tmp_path / "once"), tmp_path / "second", tmp_path / "twice")
    assert torch.equal(compute_logits(plain("llava", tmp_path / "twice")), compute_logits(tuned.model))
    once = plain("llava", tmp_path / "once").state_dict()
    assert once.keys() == tuned.model.state_dict().keys()


def test_shards_with_names_that_sort_after_the_new_shard_are_renamed(tmp_path: Path) -> None:
    directory = save_base("miss", tmp_path / "base")
    (directory / SINGLE_FILE).rename(directory / "weights.safetensors")
    with safe_open(directory / "weights.safetensors", "pt") as handle:
        weight_map = dict.fromkeys(handle.keys(), "weights.safetensors")
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    tuned = trained_adapter(tiny_base("miss"), "ln", tmp_path / "adapter")
    merge_to_disk(str(directory), tmp_path / "adapter", tmp_path / "out")
    assert_close(compute_logits(plain("miss", tmp_path / "out")), compute_logits(tuned.model))


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    directory = save_base("miss", tmp_path / "base")
    tuned = trained_adapter(tiny_base("miss"), "decoder=full", tmp_path / "adapter")
    merge_to_disk(str(directory), tmp_path / "adapter", tmp_path / "out")
    loaded = plain("miss", tmp_path / "out")
    words = loaded.text_decoder.bert.embeddings.word_embeddings.weight
    assert loaded.text_decoder.cls.predictions.decoder.weight is words
    assert_close(compute_logits(loaded), compute_logits(tuned.model))


@pytest.mark.parametrize("recipe", ["language=prefix(n=2)", "adapter(width=2)"])
def test_methods_that_cannot_be_merged_are_refused_and_nothing_is_written(recipe: str, tmp_path: Path) -> None:
    directory = save_base("miss", tmp_path / "base")
    trained_adapter(tiny_base("miss"), recipe, tmp_path / "adapter")
    message = input_error(lambda: merge_to_disk(str(directory), tmp_path / "adapter", tmp_path / "out"))
    assert "cannot be merged" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_adapter_of_another_base_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    directory = save_base("miss", tmp_path / "base")
    trained_adapter(tiny_base("llava"), "ln", tmp_path / "adapter")
    message = input_error(lambda: merge_to_disk(str(directory), tmp_path / "adapter", tmp_path / "out"))
    assert "does not fit this model" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_output_directory_in_use_is_refused_and_an_empty_one_accepted(tmp_path: Path) -> None:
    directory = save_base("miss", tmp_path / "base")
    trained_adapter(tiny_base("miss"), "ln", tmp_path / "adapter")
    assert "not an empty directory" in input_error(
        lambda: merge_to_disk(str(directory), tmp_path / "adapter", directory)
    )
    (tmp_path / "out").mkdir()
    merge_to_disk(str(directory), tmp_path / "adapter", tmp_path / "out")
    plain("miss", tmp_path / "out")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda directory: (directory / SINGLE_FILE).unlink(), "only safetensors can be merged"),
        (lambda directory: (directory / SINGLE_FILE).write_bytes(b"\x01"), "no safetensors file"),
        (lambda directory: (directory / "config.json").unlink(), "config.json"),
    ],
)
def test_a_damaged_base_is_refused(damage: Any, words: str, tmp_path: Path) -> None:
    directory = save_base("miss", tmp_path / "base")
    trained_adapter(tiny_base("miss"), "ln", tmp_path / "adapter")
    damage(directory)
    assert words in input_error(lambda: merge_to_disk(str(directory), tmp_path / "adapter", tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_a_base_with_converted_tensors_is_loaded_and_these_tensors_are_not_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.core_model_loading import Transpose, WeightConverter

    def transpose_queries(*_: object, **__: object) -> list[WeightConverter]:
        return [WeightConverter("query.weight", "query.weight", [Transpose(0, 1)])]

    directory = save_base("miss", tmp_path / "base")
    for module in ("normtune.models.checkpoints.parameter_map", "transformers.modeling_utils"):
        monkeypatch.setattr(f"{module}.get_model_conversion_mapping", transpose_queries)
    for recipe in ("ln", "lora(r=2)"):
        trained_adapter(plain("miss", directory), recipe, tmp_path / recipe)
    merge_to_disk(str(directory), tmp_path / "ln", tmp_path / "out")
    new = load_file(tmp_path / "out" / NEW_SHARD)
    trained = load_file(tmp_path / "ln" / TENSORS_FILE)
    assert new.keys() == trained.keys() and all(torch.equal(new[key], trained[key]) for key in trained)
    message = input_error(lambda: merge_to_disk(str(directory), tmp_path / "lora(r=2)", tmp_path / "other"))
    assert "query.weight has no tensor of its own in the checkpoint" in message
    assert not (tmp_path / "other").exists()


def test_norms_but_no_lora_merge_into_a_quantised_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = save_base("llava", tmp_path / "base")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 8}}))
    tensors = load_file(directory / SINGLE_FILE)
    packed = {
        name: tensor.to(torch.int8 if "_proj.weight" in name else tensor.dtype) for name, tensor in tensors.items()
    }
    save_file(packed, directory / SINGLE_FILE, metadata={"format": "pt"})

    def quantised(*_: object) -> nn.Module:
        model = tiny_base("llava")
        for name, module in model.named_modules():
            if name.endswith("_proj"):
                module.weight = nn.Parameter(module.weight.to(torch.int8), False)
        return model

    monkeypatch.setattr(base_files, "_load", quantised)
    tuned = trained_adapter(quantised(), "ln", tmp_path / "ln")
    merge_to_disk(str(directory), tmp_path / "ln", tmp_path / "out")
    assert len(load_file(tmp_path / "out" / NEW_SHARD)) == len(tuned.trained)
    trained_adapter(tiny_base("llava"), "lora(r=2)", tmp_path / "lora")
    message = input_error(lambda: merge_to_disk(str(directory), tmp_path / "lora", tmp_path / "other"))
    assert "_proj is quantised: nothing can be merged into it" in message


def test_tied_tensors_that_differ_in_the_file_are_two_parameters_as_in_transformers(tmp_path: Path) -> None:
    directory = save_base("miss", tmp_path / "base")
    tensors = load_file(directory / SINGLE_FILE)
    words, head = "text_decoder.bert.embeddings.word_embeddings", "text_decoder.cls.predictions.decoder"
    tensors = {
        **{name: tensor.clone() for name, tensor in tensors.items()},
        f"{words}.weight": torch.randn(40, 16),
        f"{head}.weight": torch.randn(40, 16),
    }
    save_file(tensors, directory / SINGLE_FILE, metadata={"format": "pt"})
    tuned = trained_adapter(plain("miss", directory), "decoder=full", tmp_path / "adapter")
    assert {f"{words}.weight", f"{head}.weight"} <= tuned.trained.keys()
    merge_to_disk(str(directory), tmp_path / "adapter", tmp_path / "out")
    new = load_file(tmp_path / "out" / NEW_SHARD)
    assert new.keys() == tuned.trained.keys()
    assert all(torch.equal(new[name], parameter) for name, parameter in tuned.trained.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_fp16_base_with_fp32_norms_matches_in_either_precision_of_training(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    directory = save_base("miss", tmp_path / "base", torch.float16)
    trained_adapter(plain("miss", directory), "ln", tmp_path / "first")
    merge_to_disk(str(directory), tmp_path / "first", tmp_path / "once")
    model = plain("miss", tmp_path / "once", dtype)
    loads = [plain("miss", tmp_path / "once", precision) for precision in (torch.float32, torch.float16)]
    assert len(set(map(fingerprint, loads))) == 2  # fp32 -> bf16 rounds once, fp32 -> fp16 -> bf16 twice
    tuned = trained_adapter(model, "ln", tmp_path / "second")
    merge_to_disk(str(tmp_path / "once"), tmp_path / "second", tmp_path / "twice")
    new = load_file(tmp_path / "twice" / NEW_SHARD)
    assert all(torch.equal(new[name], parameter) for name, parameter in tuned.trained.items())


def test_shards_are_copied_if_they_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    directory = save_base("miss", tmp_path / "base")
    tuned = trained_adapter(tiny_base("miss"), "ln", tmp_path / "adapter")
    monkeypatch.setattr(os, "link", refuse)
    merged = merge_to_disk(str(directory), tmp_path / "adapter", tmp_path / "out")
    assert merged.linked in ("copy", "reflink")
    shutil.rmtree(directory)
    loaded = plain("miss", tmp_path / "out")
    assert_close(compute_logits(loaded), compute_logits(tuned.model))


def test_a_full_disk_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    directory = save_base("miss", tmp_path / "base")
    trained_adapter(tiny_base("miss"), "ln", tmp_path / "adapter")
    monkeypatch.setattr(merge, "write_safetensors", refuse)
    message = input_error(lambda: merge_to_disk(str(directory), tmp_path / "adapter", tmp_path / "out"))
    assert "No space left on device" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_files_of_other_formats_and_hidden_ones_are_not_copied(tmp_path: Path) -> None:
    directory = save_base("miss", tmp_path / "base")
    (directory / ".git").mkdir()
    (directory / "pytorch_model.bin").write_bytes(b"0")
    (directory / "templates").mkdir()
    (directory / "templates" / "chat.jinja").write_text("{{ x }}")
    trained_adapter(tiny_base("miss"), "ln", tmp_path / "adapter")
    merge_to_disk(str(directory), tmp_path / "adapter", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {".git", "pytorch_model.bin"}
    assert (tmp_path / "out" / "templates" / "chat.jinja").read_text() == "{{ x }}"
