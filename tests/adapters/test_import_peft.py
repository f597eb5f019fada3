"""Adapters that stock PEFT made give the same logits in Normtune as in PEFT."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from normtune.adapters.export_peft import export_peft
from normtune.adapters.info import CONFIG_FILE, WEIGHTS_FILE
from normtune.adapters.merge import merge_to_disk
from normtune.adapters.storage import load_adapter, read_adapter_info, save_adapter
from normtune.methods.adapt import restore_base
from normtune.serving.engine.adapter_slots import AdapterSlots
from tests.support.base_models import input_error
from tests.support.tiny_models import make_tiny
from tests.support.tolerance import assert_close, differ

pytestmark = [
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning"),
]
KINDS = ("llava", "internvl")


@cache
def _base(kind: str) -> nn.Module:
    with TemporaryDirectory() as directory:
        make_tiny(kind, directory)
        return AutoModelForImageTextToText.from_pretrained(directory).eval()


def base_model(kind: str) -> Any:
    return copy.deepcopy(_base(kind))


@torch.no_grad()
def text_logits(model: Any) -> Tensor:
    """The logits of two rows of text, the second of which is shorter."""
    ids = torch.randint(5, 36, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    logits = model(input_ids=ids, attention_mask=mask).logits
    return torch.cat([logits[0], logits[1, :5]])


def norm_names(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if "norm" in name.rpartition(".")[2] and "weight" in dict(module.named_parameters(recurse=False))
    ]


CONFIGS: dict[str, Callable[[nn.Module], PeftConfig]] = {
    "lora": lambda model: LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "v_proj"]),
    "lora with patterns": lambda model: LoraConfig(
        r=4, target_modules="all-linear", rank_pattern={"down_proj": 2}, alpha_pattern={"up_proj": 3}
    ),
    "rslora": lambda model: LoraConfig(r=3, target_modules=["q_proj", "o_proj"], use_rslora=True),
    "dora": lambda model: LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=True),
    "lora and biases": lambda model: LoraConfig(r=2, target_modules=["q_proj"], bias="all"),
    "ia3": lambda model: IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "ln": lambda model: LNTuningConfig(target_modules=norm_names(model)),
    "prefix": lambda model: PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix with projection": lambda model: PrefixTuningConfig(
        num_virtual_tokens=3, task_type="CAUSAL_LM", prefix_projection=True
    ),
}


def peft_adapter(kind: str, method: str, directory: Path) -> Tensor:
    """Write an adapter with stock PEFT, and return PEFT's logits with it."""
    model = base_model(kind)
    torch.manual_seed(0)
    wrapped: Any = get_peft_model(model, CONFIGS[method](model))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    wrapped.eval().save_pretrained(directory, save_embedding_layers=False)
    return text_logits(wrapped)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", CONFIGS)
def test_the_logits_are_those_of_peft(method: str, kind: str, tmp_path: Path) -> None:
    expected = peft_adapter(kind, method, tmp_path)
    model = base_model(kind)
    before = text_logits(model)
    tuned = load_adapter(model, tmp_path, keep_base=True)
    assert_close(text_logits(model.eval()), expected)
    assert differ(before, expected)
    info = read_adapter_info(tmp_path)
    assert tuned.trained.keys() == info.tensors.keys() and tuned.trainable == info.trainable
    assert str(tuned.recipe) == info.recipe
    restore_base(tuned)
    assert torch.equal(text_logits(model), before)


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "ln", "lora and biases"])
def test_a_merged_checkpoint_has_the_logits_of_peft(method: str, tmp_path: Path) -> None:
    expected = peft_adapter("llava", method, tmp_path / "adapter")
    make_tiny("llava", tmp_path / "base")
    merge_to_disk(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert_close(text_logits(merged), expected)


OLD_NAMES = {  # name in a model -> name with transformers before 4.52
    "llava": {
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
    "qwen2_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
}


def use_old_names(kind: str, directory: Path) -> None:
    """Rename the tensors of an adapter, and the linears in its patterns, as older transformers did."""

    def old_name(name: str) -> str:
        for new, old in OLD_NAMES[kind].items():
            if new in name:
                return name.replace(new, old)
        return name

    weights = load_file(directory / WEIGHTS_FILE)
    save_file({old_name(key): value for key, value in weights.items()}, directory / WEIGHTS_FILE)
    config = json.loads((directory / CONFIG_FILE).read_text())
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            config[key] = {old_name(name): value for name, value in config[key].items()}
    (directory / CONFIG_FILE).write_text(json.dumps(config))


ONE_LINEAR = "model.language_model.layers.0.mlp.up_proj"
CONFIGS["lora with full names"] = lambda model: LoraConfig(
    r=4, target_modules="all-linear", rank_pattern={ONE_LINEAR: 2}, alpha_pattern={ONE_LINEAR: 3}
)


@pytest.mark.parametrize("kind", OLD_NAMES)
@pytest.mark.parametrize("method", ["lora", "lora with full names", "dora", "ia3", "ln", "lora and biases"])
def test_names_of_older_transformers_are_those_of_the_model(method: str, kind: str, tmp_path: Path) -> None:
    expected = peft_adapter(kind, method, tmp_path)
    names = set(read_adapter_info(tmp_path).tensors)
    use_old_names(kind, tmp_path)
    assert names.isdisjoint(read_adapter_info(tmp_path).tensors)
    model = base_model(kind)
    assert set(load_adapter(model, tmp_path).trained) == names
    assert_close(text_logits(model.eval()), expected)


def test_an_adapter_with_older_names_is_merged_and_served(tmp_path: Path) -> None:
    expected = peft_adapter("llava", "lora", tmp_path / "adapter")
    use_old_names("llava", tmp_path / "adapter")
    make_tiny("llava", tmp_path / "base")
    merge_to_disk(str(tmp_path / "base"), tmp_path / "adapter", tmp_path / "merged")
    assert_close(text_logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()), expected)
    slots = AdapterSlots(base_model("llava"), lora_rank=4)
    slots.register("old", tmp_path / "adapter")
    slot = slots.pin(slots.find("old"))
    assert slots.lora is not None and slots.lora.values[slot].any()
    slots.close()


def test_new_tensors_of_a_served_adapter_of_peft_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    peft_adapter("llava", "ln", tmp_path)
    slots = AdapterSlots(base_model("llava"))
    slots.register("foreign", tmp_path)
    slots.pin(slots.find("foreign"))
    weights = load_file(tmp_path / WEIGHTS_FILE)
    save_file({key: value + 1 for key, value in weights.items()}, tmp_path / WEIGHTS_FILE)
    slots.pin(slots.find("foreign"))
    assert "the files of adapter foreign changed: its tensors are others" in caplog.text
    slots.close()


@pytest.mark.parametrize(("method", "rank"), [("ln", 0), ("lora", 4)])
def test_norms_and_lora_of_queries_and_values_can_be_served(method: str, rank: int, tmp_path: Path) -> None:
    peft_adapter("llava", method, tmp_path)
    slots = AdapterSlots(base_model("llava"), lora_rank=rank)
    slots.register("foreign", tmp_path)
    slot = slots.pin(slots.find("foreign"))
    if method == "ln":
        values = load_file(tmp_path / WEIGHTS_FILE)
        for name, columns in slots.bank.columns.items():
            module, _, leaf = name.rpartition(".")
            stored = values[f"base_model.model.{module}.ln_tuning_layers.{leaf}"]
            assert torch.equal(slots.bank.values[slot, columns], stored)
    else:
        assert slots.lora is not None and slot in slots.lora.loaded
        stored = load_file(tmp_path / WEIGHTS_FILE)
        name = next(name for name in slots.lora.matrices if name.endswith(".lora_B"))
        served = slots.lora.values[slot, slots.lora.matrices[name].columns].view(slots.lora.matrices[name].shape)
        assert_close(served[:, :2], stored[f"base_model.model.{name}.weight"] * (5 / 2))
    slots.close()


def test_an_adapter_whose_rows_cannot_be_mixed_is_not_served(tmp_path: Path) -> None:
    peft_adapter("llava", "dora", tmp_path)
    slots = AdapterSlots(base_model("llava"), lora_rank=4)
    assert "Merge it (normtune merge)" in input_error(lambda: slots.register("foreign", tmp_path))
    slots.close()


def test_tensors_without_a_place_are_named_and_the_model_is_unchanged(tmp_path: Path) -> None:
    peft_adapter("llava", "lora", tmp_path)
    weights = load_file(tmp_path / WEIGHTS_FILE)
    other = {key.replace(".language_model.", ".other_model."): value for key, value in weights.items()}
    save_file(other, tmp_path / WEIGHTS_FILE)
    model = base_model("llava")
    message = input_error(lambda: load_adapter(model, tmp_path))
    assert "model.other_model.layers.0.self_attn.q_proj.lora_A (adapter [2, 32], model absent)" in message
    assert "more" in message
    assert [name for name, _ in model.named_modules()] == [name for name, _ in base_model("llava").named_modules()]


def test_wrong_shapes_and_tensors_that_are_missing_are_named(tmp_path: Path) -> None:
    peft_adapter("llava", "lora", tmp_path)
    weights = load_file(tmp_path / WEIGHTS_FILE)
    key = next(key for key in weights if "language_model" in key and key.endswith("lora_B.weight"))
    save_file({**weights, key: weights[key][:-1].clone()}, tmp_path / WEIGHTS_FILE)
    model = base_model("llava")
    assert re.search(r"lora_B \(adapter \[\d+, 2\], model", input_error(lambda: load_adapter(model, tmp_path)))
    del weights[key]
    save_file(weights, tmp_path / WEIGHTS_FILE)
    assert "lora_B (adapter absent" in input_error(lambda: load_adapter(base_model("llava"), tmp_path))
    assert torch.equal(text_logits(model), text_logits(base_model("llava")))


def test_what_is_not_supported_is_refused_with_its_name(tmp_path: Path) -> None:
    peft_adapter("llava", "lora", tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    for change, words in (
        ({"peft_type": "VERA"}, "of type VERA. Supported: LORA, IA3"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is not supported"),
    ):
        (tmp_path / CONFIG_FILE).write_text(json.dumps(config | change))
        assert words in input_error(lambda: load_adapter(base_model("llava"), tmp_path))
    (tmp_path / WEIGHTS_FILE).unlink()
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    assert f"{WEIGHTS_FILE} is missing" in input_error(lambda: read_adapter_info(tmp_path))


def test_a_prefix_on_a_model_with_other_positions_is_refused(tmp_path: Path) -> None:
    peft_adapter("qwen2_vl", "prefix", tmp_path)
    assert "language model of type 'qwen2_vl_text'" in input_error(
        lambda: load_adapter(base_model("qwen2_vl"), tmp_path)
    )


def test_another_name_of_the_base_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    peft_adapter("llava", "lora", tmp_path)
    model = base_model("llava")
    model.config.name_or_path = "owner/another"
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"base_model_name_or_path": "owner/base"}))
    with caplog.at_level(logging.WARNING):
        load_adapter(model, tmp_path)
    assert "names the base 'owner/base', and 'owner/another' is loaded" in caplog.text


def test_an_imported_adapter_is_neither_saved_nor_exported_again(tmp_path: Path) -> None:
    peft_adapter("llava", "lora", tmp_path / "peft")
    tuned = load_adapter(base_model("llava"), tmp_path / "peft")
    assert "made by PEFT" in input_error(lambda: save_adapter(tuned, tmp_path / "saved"))
    assert "an adapter of PEFT already" in input_error(lambda: export_peft(tmp_path / "peft", tmp_path / "out"))
