"""Every family with every method on a device that is not the CPU, on a machine without one.

`accel` is a device that exists for torch's dispatcher alone, and its tensors are fake: operations compute shapes,
not values. A tensor that stays on the CPU, a constant that is made there, or an operation that needs values in
the middle of a step raises an error, as it would stop or slow down a GPU. Only scalars of the CPU may take part.

`test_other_device.py` runs this file in a process of its own: torch's autograd counts the devices at its first
backward pass and does not know one that is registered later.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from normtune.adapters import storage
from normtune.adapters.fingerprint import fingerprint
from normtune.adapters.storage import load_adapter, save_adapter
from normtune.methods.adapt import TunedModel, adapt
from normtune.methods.registry import METHODS
from normtune.models.causal import answering
from normtune.models.loading import load
from normtune.training.saved_activations import save_fewer_activations
from tests.models.families.test_families import grouped
from tests.support.tiny_miss import tiny_miss
from tests.support.tiny_models import MORE, TINY, make_tiny

# every method, in as few runs as possible: the methods of a run train different tensors
RECIPES = ("ln+lora(r=2)", "attention+ffn", "bias+prefix(n=2)", "ptuning(n=2)", "ia3", "adapter(width=2)", "full")
RECIPES += ("vera(r=4)", "road", "miss(columns=4)", "beft", "ssf+gamma")
# torch's fake tensors multiply by experts in bf16 only
FAMILIES = [name for name in (*TINY, *MORE) if not name.endswith("moe")]
GROUPS = [[0, 1], [3]]
# transformers' code of these towers reads the sizes of images in the middle of its pass; they get encoded images
READ_SIZES = ("llava_next", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "idefics3", "smolvlm", *MORE)


@pytest.fixture(scope="module")
def accel() -> str:
    _setup_privateuseone_for_python_backend("accel")
    return "accel"


class DeviceMode(FakeTensorMode):
    """With it, `torch.tensor(..., device="accel")` makes a fake tensor, and no tensor of the device."""

    avoid_device_init = True


@cache
def base(name: str) -> Any:
    with TemporaryDirectory() as folder:
        family: Any = tiny_miss() if name == "miss" else load(str(make_tiny(name, folder)))
    if name != "miss":
        family.attention = "dense"
    return family


def copied(name: str) -> Any:
    """A family around a copy of its model."""
    family = copy.copy(base(name))
    family.model = copy.deepcopy(family.model)
    return family


def batch_of(name: str, family: Any, *, answered: bool = True) -> tuple[Any, Any]:
    groups, pixels = grouped(family, GROUPS, answered=answered)
    if name in READ_SIZES:
        pixels = [[family.encode_image(image) for image in images] for images in pixels]
    return groups, pixels


def moved(value: Any, mode: FakeTensorMode, device: str) -> Any:
    """Fake tensors on the device in place of the tensors of a batch."""
    if isinstance(value, Tensor):
        with mode:
            return torch.empty(value.shape, dtype=value.dtype, device=device)
    return {key: moved(item, mode, device) for key, item in value.items()} if isinstance(value, dict) else value


def move_model(model: nn.Module, mode: FakeTensorMode, device: str) -> dict[int, nn.Parameter]:
    """Fake parameters and buffers on the device; returns the new parameters by the ids of the old ones."""
    new: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in new:
                    new[id(parameter)] = nn.Parameter(moved(parameter, mode, device), parameter.requires_grad)
                module._parameters[key] = new[id(parameter)]
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = moved(buffer, mode, device)
    return new


# known to read values in the middle of a step, a few times in all
WAITS = {"qwen3_vl": "transformers selects image tokens by a mask in the first layers"}


def steps() -> Iterator[Any]:
    """Each family with each recipe."""
    for name in (*FAMILIES, "miss"):
        marks = [pytest.mark.xfail(raises=DynamicOutputShapeException, strict=True, reason=WAITS.get(name))]
        for recipe in RECIPES:
            # PaliGemma 2's attention has no prefix, and none fits all layers of Gemma 4
            if name not in ("paligemma2", "gemma4") or "n=2" not in recipe:
                yield pytest.param(name, recipe, marks=marks if name in WAITS else [])


@pytest.mark.parametrize(("name", "recipe"), [*steps()])
def test_a_step_stays_on_its_device(name: str, recipe: str, accel: str) -> None:
    family, mode = copied(name), DeviceMode()
    batch = family.collate(*batch_of(name, family))
    tuned = adapt(family.model, f"language?={recipe}" if name in READ_SIZES else recipe)
    with save_fewer_activations(family.model):
        new = move_model(family.model, mode, accel)
        trained = [new[id(parameter)] for parameter in tuned.trained.values()]
        batch = moved(batch, mode, accel)
        with mode:
            loss, tokens = family.loss(batch, label_smoothing=0.1)
            (loss / tokens).backward()
            gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
            torch.optim.AdamW(trained).step()
            log_probs = family.log_probs(batch)
    assert {loss.device.type, tokens.device.type, log_probs.device.type} == {accel}
    assert gradients and {gradient.device.type for gradient in gradients} == {accel}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in WAITS])
def test_decoding_stays_on_its_device(name: str, accel: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A saved adapter is loaded on the device; then the prompts' pass and two steps, after which a row leaves."""
    family, mode = copied(name), DeviceMode(allow_non_fake_inputs=True)
    groups, pixels = batch_of(name, family, answered=False)
    tuned = adapt(family.model, "language=ln+lora(r=2)")
    save_adapter(tuned, tmp_path, base_name=name, base_fingerprint=fingerprint(base(name).model), data={}, metrics={})
    family.model = copy.deepcopy(base(name).model)
    stored = {key: moved(value, mode, "cpu") for key, value in load_file(next(tmp_path.glob("*.safetensors"))).items()}
    monkeypatch.setattr(storage, "read_tensors", lambda *_: stored)
    attach = storage.attach_adapter

    def attach_on_device(model: nn.Module, *args: Any, **options: Any) -> TunedModel:
        """Adapting compares values, which fake tensors do not have."""
        with unset_fake_temporarily():
            loaded = attach(model, *args, **options)
        new = move_model(model, mode, accel)
        loaded.trained = {key: new[id(parameter)] for key, parameter in loaded.trained.items()}
        return loaded

    monkeypatch.setattr(storage, "attach_adapter", attach_on_device)
    logits: list[Tensor] = []

    def three_tokens(first: Tensor, step: Any, **_: Any) -> list[Any]:
        """In place of `generate`, which reads tokens on the host: those of fake tensors have no values."""
        rows = torch.tensor([0, 1]).to(accel)
        logits.extend((first, step(first.argmax(-1), None)))
        monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: [0, 1])
        logits.append(step(logits[-1].argmax(-1)[rows], rows))
        return []

    layout = family.layout(groups, pixels, "pad", keep_states=True)  # on the host
    family.layout = lambda *_, **__: layout
    monkeypatch.setattr(answering, "generate", three_tokens)
    monkeypatch.setattr(answering, "send_to_device", lambda batch, device, **_: moved(batch, mode, accel))
    with mode:
        load_adapter(family.model, tmp_path)
        # without inference mode, in which the placeholder cannot make tensors
        with torch.no_grad():
            type(family).generate_tokens.__wrapped__(family, groups, pixels, max_new_tokens=3, beams=1)
    assert {values.device.type for values in logits} == {accel} and [len(values) for values in logits] == [3, 3, 2]
    assert {parameter.device.type for parameter in family.model.parameters()} == {accel}


def test_every_method_is_tried() -> None:
    tried = set(re.findall(r"[a-z0-9]+(?![a-z0-9=])", re.sub(r"\(.*?\)", "", "+".join(RECIPES))))
    assert tried == set(METHODS) - {"frozen"}
