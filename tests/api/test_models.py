"""Models and adapters in Python: stock transformers models, the base afterwards, merge and export."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments

import normtune
from normtune.models.families.miss import MissFamily
from normtune.models.family import Family
from tests.support.tiny_models import TINY
from tests.support.tolerance import differ

RECIPE = "language=ln,vision=ln"


@pytest.fixture(scope="module")
def stock() -> tuple[LlavaForConditionalGeneration, list[dict[str, Tensor]]]:
    """A tiny random LLaVA without a processor, and batches of one question as transformers takes them."""
    config, processor = TINY["llava"]()
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    batches = []
    for question in ("Is there a fracture of the left rib?", "Which organ is abnormal in this image?"):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=[Image.new("RGB", (32, 32), "gray")], text=[f"{text} liver"], return_tensors="pt")
        batches.append({**inputs, "labels": inputs["input_ids"].clone()})
    return model, batches


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    result: Tensor = model.eval()(**batch).logits
    return result


def train_in_a_loop(tuned: normtune.TunedModel, batches: list[dict[str, Tensor]], folder: Path) -> None:
    """The loop of the documentation."""
    optimizer = torch.optim.AdamW(tuned.trained.values(), lr=1e-2)
    for batch in batches:
        loss = tuned.model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def train_with_trainer(tuned: normtune.TunedModel, batches: list[dict[str, Tensor]], folder: Path) -> None:
    options: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 1, "learning_rate": 1e-2}
    options |= {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    rows: Any = [{name: tensor[0] for name, tensor in batch.items()} for batch in batches]
    Trainer(tuned.model, TrainingArguments(str(folder / "trainer"), **options), train_dataset=rows).train()  # type: ignore[arg-type]


@pytest.mark.parametrize("train", [train_in_a_loop, train_with_trainer])
def test_a_stock_model_is_trained_saved_and_loaded(stock: Any, train: Any, tmp_path: Path) -> None:
    base, batches = stock
    before = logits(base, batches[0])
    tuned = normtune.adapt(copy.deepcopy(base), RECIPE)
    frozen = {name: p.clone() for name, p in tuned.model.named_parameters() if not p.requires_grad}
    assert frozen and tuned.trained
    train(tuned, batches, tmp_path)
    assert all(torch.equal(dict(tuned.model.named_parameters())[name], value) for name, value in frozen.items())
    after = logits(tuned.model, batches[0])
    assert differ(after, before)
    normtune.save_adapter(tuned, tmp_path / "adapter")
    loaded = normtune.load_adapter(copy.deepcopy(base), tmp_path / "adapter")
    assert torch.equal(logits(loaded.model, batches[0]), after)
    assert torch.equal(logits(normtune.restore_base(loaded), batches[0]), before)


def test_an_adapter_of_a_stock_model_is_refused_on_another_base(stock: Any, tmp_path: Path) -> None:
    base, _ = stock
    normtune.save_adapter(normtune.adapt(copy.deepcopy(base), RECIPE), tmp_path)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.lm_head.weight += 1
    with pytest.raises(normtune.InputError, match="was trained on 'LlavaForConditionalGeneration'"):
        normtune.load_adapter(other, tmp_path)


def snapshot(family: Family) -> dict[str, tuple[Tensor, bool, int]]:
    return {name: (p.detach().clone(), p.requires_grad, id(p)) for name, p in family.model.named_parameters()}


def assert_is_base(family: Family, before: dict[str, tuple[Tensor, bool, int]]) -> None:
    after = snapshot(family)
    assert after.keys() == before.keys() and family.adapter is None
    for name, (value, requires_grad, identity) in before.items():
        assert torch.equal(after[name][0], value), name
        assert after[name][1:] == (requires_grad, identity), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tune", ["ln", "full", "decoder=lora(r=2)", "attention+lora(r=2)", "prefix"])
def test_a_model_is_the_base_again_after_it_was_trained_evaluated_and_asked(
    base: Path, tune: str, dtype: str, tmp_path: Path
) -> None:
    model = normtune.load(base, dtype=dtype, device="cpu")
    data = normtune.open_dataset("phantom-b:2")
    before = snapshot(model)
    run = normtune.train(model, data, tune=tune, max_steps=1, lr=0.1, out=tmp_path / "run", progress=False)
    assert run.changed > 0
    assert_is_base(model, before)
    options: dict[str, Any] = {"limit": 4, "adapter": run.adapter, "progress": False}
    with_object = normtune.evaluate(model, data, **options)
    assert_is_base(model, before)
    with_name = normtune.evaluate(str(base), "phantom-b:2", dtype=dtype, device="cpu", **options)
    assert with_object.predictions == with_name.predictions
    image = data.open_image(data.test[0].images[0])
    answer = normtune.ask(model, image, data.test[0].question, adapter=run.adapter)
    assert answer.text == with_name.predictions[0].text
    assert_is_base(model, before)


def test_an_adapter_in_the_model_is_used_as_an_object(base: Path, tmp_path: Path) -> None:
    model, data = normtune.load(base, device="cpu"), normtune.open_dataset("phantom-b:2")
    tuned = normtune.adapt(model, "ln")
    with torch.no_grad():
        for parameter in tuned.trained.values():
            parameter += 0.5 * torch.randn_like(parameter)
    result = normtune.evaluate(model, data, adapter=tuned, limit=4, progress=False)
    assert (result.record["adapter"], result.record["setting"]) == (f"{tuned.recipe} (in memory)", "unknown")
    assert model.adapter is tuned and repr(model).endswith(f"adapter {tuned.recipe}>")
    with pytest.raises(normtune.InputError, match=r"has an adapter in it .* adapter=tuned"):
        normtune.evaluate(model, data, progress=False)
    with pytest.raises(normtune.InputError, match="has an adapter in it"):
        normtune.adapt(model, "ln")
    with pytest.raises(normtune.InputError, match="has an adapter in it"):
        normtune.train(model, data, out=tmp_path / "run", progress=False)
    with pytest.raises(normtune.InputError, match="not in this model"):
        normtune.evaluate(normtune.load(base, device="cpu"), data, adapter=tuned, progress=False)
    with pytest.raises(normtune.InputError, match="is in a loaded model"):
        normtune.evaluate(str(base), data, adapter=tuned, progress=False)
    normtune.restore_base(tuned)
    frozen = normtune.evaluate(model, data, limit=4, progress=False)
    assert frozen.record["setting"] == "zero-shot"
    with pytest.raises(normtune.InputError, match="not in this model"):
        normtune.ask(model, Image.new("RGB", (8, 8)), "why?", adapter=tuned)


def test_a_wrong_adapter_leaves_the_model_as_it_was(base: Path, tmp_path: Path) -> None:
    model = normtune.load(base, device="cpu")
    with torch.no_grad():
        next(model.model.parameters()).add_(1)
    tuned = normtune.adapt(str(base), "full")
    normtune.save_adapter(tuned, tmp_path)
    before = snapshot(model)
    with pytest.raises(normtune.InputError, match="has other values or parts"):
        normtune.ask(model, Image.new("RGB", (8, 8)), "why?", adapter=tmp_path)
    assert_is_base(model, before)


def test_merge_and_export_take_objects(base: Path, tmp_path: Path) -> None:
    model = normtune.load(base, device="cpu")
    tuned = normtune.adapt(model, "ln")
    merged = normtune.merge(model, adapter=tuned, out=tmp_path / "merged")
    assert merged.to_dict()["model"] == str(base) and "merged 'vision" in str(merged)
    assert isinstance(normtune.load(tmp_path / "merged", device="cpu"), MissFamily)
    normtune.save_adapter(tuned, tmp_path / "adapter")
    exported = normtune.export_peft(model, adapter=tmp_path / "adapter", out=tmp_path / "peft")
    assert exported.base == str(base) and (tmp_path / "peft" / "adapter_config.json").is_file()


def test_a_model_without_a_processor_cannot_be_asked(stock: Any) -> None:
    with pytest.raises(normtune.InputError, match="LlavaForConditionalGeneration is not a model with its processor"):
        normtune.ask(stock[0], Image.new("RGB", (8, 8)), "why?")


def test_an_adapter_without_a_known_base_is_not_saved(base: Path, tmp_path: Path) -> None:
    from normtune.methods.adapt import adapt

    with pytest.raises(normtune.InputError, match="fingerprint of the base is unknown"):
        normtune.save_adapter(adapt(normtune.load(base, device="cpu").model, "ln"), tmp_path)
