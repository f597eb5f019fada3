"""PEFT loads exported adapters onto the plain base and gives the same logits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file

from normtune.adapters.export_peft import export_peft
from normtune.adapters.fingerprint import fingerprint
from normtune.adapters.info import CONFIG_FILE, WEIGHTS_FILE
from normtune.adapters.storage import save_adapter
from normtune.methods.adapt import TunedModel, adapt
from tests.support.base_models import KINDS, compute_logits, input_error, perturb_trained, tiny_base
from tests.support.tolerance import assert_close, differ

pytestmark = [  # warnings that PEFT raises while it loads
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def saved(kind: str, recipe: str, directory: Path) -> TunedModel:
    """Train a base a little and save its adapter to `directory`."""
    model = tiny_base(kind)
    base_fingerprint = fingerprint(model)
    tuned = adapt(model, recipe)
    perturb_trained(tuned)
    tuned.model.eval()  # also the dropout of a LoRA
    save_adapter(tuned, directory, base_name=f"tiny-{kind}", base_fingerprint=base_fingerprint, data={"licence": "CC0"})
    return tuned


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "recipe",
    [
        "ln",
        "ln[1:]+bias",
        "attention+ffn[:1]",
        "lora(r=2)",
        "vision=lora(r=2,alpha=3),language=lora(r=4,alpha=32,dropout=0.1)[:1]",
        "vision=lora(r=2,dora=1),language=lora(r=4,dora=1,targets=all-linear)",
        "vision=lora(r=2,targets=fc1+mlp.fc2),language=lora(r=2,targets=all-linear)[1:]",
        "lora(r=4,rslora=1)",
        "ia3",
    ],
)
def test_peft_loads_the_export_to_the_same_logits(recipe: str, kind: str, tmp_path: Path) -> None:
    tuned = saved(kind, recipe, tmp_path / "adapter")
    exported = export_peft(tmp_path / "adapter", tmp_path / "peft")
    loaded = PeftModel.from_pretrained(tiny_base(kind), tmp_path / "peft").eval()
    assert differ(compute_logits(tiny_base(kind)), compute_logits(tuned.model))
    assert_close(compute_logits(loaded), compute_logits(tuned.model))
    assert exported.values == tuned.trainable
    assert exported.tensors == len(tuned.trained)
    assert str(tmp_path / "peft") in str(exported)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ["ln", "lora(r=2)", "ia3"])
def test_peft_loads_every_tensor_of_the_export_and_no_other(recipe: str, kind: str, tmp_path: Path) -> None:
    saved(kind, recipe, tmp_path / "adapter")
    export_peft(tmp_path / "adapter", tmp_path / "peft")
    loaded = PeftModel.from_pretrained(tiny_base(kind), tmp_path / "peft")
    peft_tensors = {
        name.replace(".default", ""): tensor
        for name, tensor in loaded.state_dict().items()
        if re.search(r"ln_tuning_layers|lora_[AB]|ia3_l", name)
    }
    written = load_file(tmp_path / "peft" / WEIGHTS_FILE)
    assert peft_tensors.keys() == written.keys()
    assert all(torch.equal(peft_tensors[name], written[name]) for name in written)


def test_the_connector_and_the_language_norms_export_together(tmp_path: Path) -> None:
    tuned = saved("llava", "ln-connector", tmp_path / "adapter")
    export_peft(tmp_path / "adapter", tmp_path / "peft")
    loaded = PeftModel.from_pretrained(tiny_base("llava"), tmp_path / "peft").eval()
    assert_close(compute_logits(loaded), compute_logits(tuned.model))


def test_the_config_names_the_base_and_exactly_the_modules(tmp_path: Path) -> None:
    tuned = saved("miss", "ln", tmp_path / "adapter")
    export_peft(tmp_path / "adapter", tmp_path / "default")
    export_peft(tmp_path / "adapter", tmp_path / "named", model="somewhere/else")
    config = PeftConfig.from_pretrained(tmp_path / "default")
    assert config.base_model_name_or_path == "tiny-miss"
    assert config.inference_mode
    assert config.task_type is None
    names = [name for name, _ in tiny_base("miss").named_modules()]
    matched = {name for name in names if re.fullmatch(config.target_modules, name)}
    assert matched == {name.rpartition(".")[0] for name in tuned.trained}
    named = json.loads((tmp_path / "named" / CONFIG_FILE).read_text())
    assert named["base_model_name_or_path"] == "somewhere/else"
    assert "research use, not for diagnosis" in (tmp_path / "default" / "README.md").read_text()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("vision=ln,language=lora(r=2)", ("part 'vision' (ln)", "part 'decoder' (lora)", "LoRA", "LN tuning")),
        ("vision=ia3,language=lora(r=2)", ("part 'vision' (ia3)", "IA3 for")),
        ("language=prefix(n=2)", ("part 'encoder' was trained by prefix", "position")),
        ("adapter(width=2)", ("part 'vision' was trained by adapter", "bottleneck")),
        ("vision=full", ("part 'vision', full", "visual_encoder.", "normtune merge")),
        ("decoder=full", ("text_decoder.bert.embeddings", "tied")),
    ],
)
def test_what_peft_cannot_hold_is_refused_with_part_and_reason(
    recipe: str, words: tuple[str, ...], tmp_path: Path
) -> None:
    saved("miss", recipe, tmp_path / "adapter")
    message = input_error(lambda: export_peft(tmp_path / "adapter", tmp_path / "peft"))
    assert all(word in message for word in words), message
    assert not (tmp_path / "peft").exists()


def test_a_directory_in_use_and_a_damaged_adapter_are_refused(tmp_path: Path) -> None:
    saved("miss", "ln", tmp_path / "adapter")
    assert "not an empty directory" in input_error(lambda: export_peft(tmp_path / "adapter", tmp_path / "adapter"))
    (tmp_path / "adapter" / "adapter.safetensors").write_bytes(b"")
    assert "adapter.safetensors" in input_error(lambda: export_peft(tmp_path / "adapter", tmp_path / "peft"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]
