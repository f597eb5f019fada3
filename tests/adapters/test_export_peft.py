"""Exports: PEFT itself loads them onto the plain base, to the same logits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file

from normtune.adapters.export_peft import CONFIG_FILE, WEIGHTS_FILE, export_peft, export_text
from normtune.adapters.fingerprint import fingerprint
from normtune.adapters.storage import save_adapter
from normtune.methods.adapt import TunedModel, adapt
from tests.support.base_models import KINDS, base, logits, outcome, train_a_little

pytestmark = [  # PEFT's own, where it loads
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def saved(kind: str, recipe: str, directory: Path) -> TunedModel:
    model = base(kind)
    mark = fingerprint(model)
    tuned = adapt(model, recipe)
    train_a_little(tuned)
    tuned.model.eval()  # the dropout of a LoRA included
    save_adapter(tuned, directory, base_name=f"tiny-{kind}", base_fingerprint=mark, data={"licence": "CC0"})
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
        "ia3",
    ],
)
def test_peft_loads_the_export_to_the_same_logits(recipe: str, kind: str, tmp_path: Path) -> None:
    tuned = saved(kind, recipe, tmp_path / "delta")
    exported = export_peft(tmp_path / "delta", tmp_path / "peft")
    loaded = PeftModel.from_pretrained(base(kind), tmp_path / "peft").eval()
    assert not torch.allclose(logits(base(kind)), logits(tuned.model), atol=1e-3)
    torch.testing.assert_close(logits(loaded), logits(tuned.model), rtol=1e-6, atol=1e-6)
    assert exported.values == tuned.trainable
    assert exported.tensors == len(tuned.trained)
    assert str(tmp_path / "peft") in export_text(exported)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", ["ln", "lora(r=2)", "ia3"])
def test_every_tensor_of_the_export_lands_in_peft_and_none_is_left_out(
    recipe: str, kind: str, tmp_path: Path
) -> None:
    saved(kind, recipe, tmp_path / "delta")
    export_peft(tmp_path / "delta", tmp_path / "peft")
    loaded = PeftModel.from_pretrained(base(kind), tmp_path / "peft")
    held = {
        name.replace(".default", ""): tensor
        for name, tensor in loaded.state_dict().items()
        if re.search(r"ln_tuning_layers|lora_[AB]|ia3_l", name)
    }
    written = load_file(tmp_path / "peft" / WEIGHTS_FILE)
    assert held.keys() == written.keys()
    assert all(torch.equal(held[name], written[name]) for name in written)


def test_the_connector_and_the_language_norms_export_together(tmp_path: Path) -> None:
    tuned = saved("llava", "ln-connector", tmp_path / "delta")
    export_peft(tmp_path / "delta", tmp_path / "peft")
    loaded = PeftModel.from_pretrained(base("llava"), tmp_path / "peft").eval()
    torch.testing.assert_close(logits(loaded), logits(tuned.model), rtol=1e-6, atol=1e-6)


def test_the_config_names_the_base_and_exactly_the_modules(tmp_path: Path) -> None:
    tuned = saved("miss", "ln", tmp_path / "delta")
    export_peft(tmp_path / "delta", tmp_path / "own")
    export_peft(tmp_path / "delta", tmp_path / "named", model="somewhere/else")
    config = PeftConfig.from_pretrained(tmp_path / "own")
    assert config.base_model_name_or_path == "tiny-miss"
    assert config.inference_mode
    assert config.task_type is None
    names = [name for name, _ in base("miss").named_modules()]
    matched = {name for name in names if re.fullmatch(config.target_modules, name)}
    assert matched == {name.rpartition(".")[0] for name in tuned.trained}
    named = json.loads((tmp_path / "named" / CONFIG_FILE).read_text())
    assert named["base_model_name_or_path"] == "somewhere/else"
    assert "research use, not for diagnosis" in (tmp_path / "own" / "README.md").read_text()


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        (
            "vision=ln,language=lora(r=2)",
            ("part 'vision' (ln)", "part 'decoder' (lora)", "LoRA", "LN tuning"),
        ),
        ("vision=ia3,language=lora(r=2)", ("part 'vision' (ia3)", "IA3 holds")),
        ("language=prefix(n=2)", ("part 'encoder' was trained by prefix", "position")),
        ("adapter(width=2)", ("part 'vision' was trained by adapter", "bottleneck")),
        ("vision=full", ("part 'vision', full", "visual_encoder.", "normtune merge")),
        ("decoder=full", ("text_decoder.bert.embeddings", "tied")),
    ],
)
def test_what_peft_cannot_hold_is_refused_by_part_and_reason(
    recipe: str, told: tuple[str, ...], tmp_path: Path
) -> None:
    saved("miss", recipe, tmp_path / "delta")
    message = outcome(lambda: export_peft(tmp_path / "delta", tmp_path / "peft"))
    assert all(words in message for words in told), message
    assert not (tmp_path / "peft").exists()


def test_a_directory_in_use_and_a_broken_delta_are_refused(tmp_path: Path) -> None:
    saved("miss", "ln", tmp_path / "delta")
    assert "not an empty directory" in outcome(lambda: export_peft(tmp_path / "delta", tmp_path / "delta"))
    (tmp_path / "delta" / "adapter.safetensors").write_bytes(b"")
    assert "adapter.safetensors" in outcome(lambda: export_peft(tmp_path / "delta", tmp_path / "peft"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["delta"]
