"""The parts of normtune that the GPU benchmark uses, behind functions that keep their names.

This is the only module of the benchmark that imports the package (besides `record`, which all benchmarks
share): if a module of normtune moves or a name changes, only this file has to be edited. None of the imports
needs pydantic or another package that a bare GPU machine lacks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

# --- every import of normtune -------------------------------------------------------------------------------
from normtune.adapters.multi.bank import AdapterBank, build_bank
from normtune.adapters.multi.rows import RowAdapters
from normtune.data.groups import Group, Segment
from normtune.methods.adapt import TunedModel, adapt, restore_base
from normtune.models.families.gemma3 import Gemma3Family
from normtune.models.families.idefics3 import Idefics3Family
from normtune.models.families.llava import LlavaFamily
from normtune.models.families.qwen_vl import QwenVLFamily
from normtune.models.norm_kinds import norms
from normtune.models.quantization import allow_gradients_through, quantised_linears
from normtune.runtime.files import read_json
from normtune.training.layer_wrapping import MemoryTier, checkpoint_activations, compile_layers
from normtune.training.memory_plan.quantized import insert_placeholders
from normtune.training.saved_activations import save_fewer_activations

# ------------------------------------------------------------------------------------------------------------

__all__ = [
    "Adapters",
    "Group",
    "MemoryTier",
    "Segment",
    "TrainingStep",
    "answer_groups",
    "build_family",
    "collate",
    "image_features",
    "linears_to_quantize",
    "loss_per_token",
    "model_config",
    "norm_names",
    "one_adapter",
    "optimizer_step",
    "pass_gradients",
    "quantize_int8",
    "several_adapters",
    "stock_attention",
    "training_step",
    "tuned_parameters",
]

FAMILIES: dict[str, Any] = {
    "llava": LlavaFamily,
    "gemma3": Gemma3Family,
    "idefics3": Idefics3Family,
    "qwen2_5_vl": QwenVLFamily,
}
INT8_STD = 74  # about the standard deviation of uniform integers in -127..127, by which weights are scaled


def model_config(name: str) -> dict[str, Any]:
    """The config of a well-known model that comes with the package, such as "llava-med-7b"."""
    values: dict[str, Any] = read_json(Path(str(files("normtune.models"))) / "shapes" / f"{name}.json")
    return values


def build_family(kind: str, model: Any, image_prefix: tuple[int, ...], end_token: int) -> Any:
    """Normtune's family around a model that has no tokenizer: prompts are token ids from the start.

    Args:
        kind: a key of `FAMILIES`.
        image_prefix: the tokens before the questions of one image, its image tokens among them.
        end_token: the token that ends an answer.
    """

    base: Any = FAMILIES[kind]

    class TokenFamily(base):  # type: ignore[misc]
        def prompt_format(self) -> None:
            return None

        def image_text(self, pixels: Any) -> str:
            return "<image>" * image_prefix.count(self.image_token_id)

        def group_prefixes(self, groups: Sequence[Group], pixels: Any) -> Any:
            return groups, [image_prefix] * len(groups), pixels

    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=end_token, convert_ids_to_tokens=lambda token: "<image>")
    processor = SimpleNamespace(tokenizer=tokenizer, chat_template="", image_token="<image>")
    model.generation_config.eos_token_id = end_token
    return TokenFamily(model.eval(), processor)


@contextmanager
def stock_attention(family: Any) -> Iterator[Any]:
    """Inside, the language model attends as stock transformers does; yields the model for a peer."""
    decoder = family.decoder
    implementation = decoder.config._attn_implementation
    decoder.set_attn_implementation("sdpa")
    try:
        yield family.model
    finally:
        decoder.set_attn_implementation(implementation)
        family.model.requires_grad_(False)


def norm_names(model: nn.Module) -> list[str]:
    """The names of all norms of a model."""
    return list(norms(model))


def collate(family: Any, groups: Sequence[Group], pixels: Any, device: torch.device) -> dict[str, Any]:
    """A grouped training batch on `device`."""
    batch: dict[str, Any] = to_device(family.collate(groups, pixels), device)
    return batch


def image_features(family: Any, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
    """The image encoder's features of one image, on the CPU, to be given in place of its pixels."""
    features: dict[str, Tensor] = family.encode_image(pixels)
    return features


def answer_groups(family: Any, groups: Sequence[Group], pixels: Any, new_tokens: int) -> int:
    """Answer every question greedily with at most `new_tokens` tokens; returns the tokens of all answers."""
    answers = family.generate_tokens(groups, pixels, max_new_tokens=new_tokens, beams=1)
    return sum(len(answer.tokens) for answer in answers)


def to_device(value: Any, device: torch.device) -> Any:
    """Tensors of a nested dict moved to `device`; other values stay as they are."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return value


# --- training -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingStep:
    """A training step that can be run any number of times, and the parameters that it trains."""

    run: Callable[[], Tensor]  # forward, backward, AdamW; returns the loss
    parameters: list[nn.Parameter]


def optimizer_step(
    loss: Callable[[], Tensor], parameters: Sequence[nn.Parameter], learning_rate: float
) -> Callable[[], Tensor]:
    """A step of AdamW on the loss, the same for Normtune and its peers; fused on a GPU."""
    fused = all(parameter.is_cuda for parameter in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0, fused=fused or None)

    def run() -> Tensor:
        value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return value.detach()

    return run


def loss_per_token(family: Any, batch: dict[str, Any]) -> Tensor:
    """The mean cross-entropy of the answer tokens of a batch: a scalar."""
    total, tokens = family.loss(batch)
    mean: Tensor = total / tokens
    return mean


@contextmanager
def training_step(
    family: Any,
    recipe: str,
    batch: dict[str, Any],
    *,
    memory: MemoryTier = "fast",
    learning_rate: float = 1e-4,
    compiled: bool = False,
) -> Iterator[TrainingStep]:
    """Inside, the family's model is trained with `recipe`; afterwards it is the base again."""
    tuned = adapt(family.model, recipe)
    try:
        with (
            save_fewer_activations(family.model),
            compile_layers(family.model, compiled),
            checkpoint_activations(family.model, memory),
        ):
            parameters = list(tuned.trained.values())
            run = optimizer_step(lambda: loss_per_token(family, batch), parameters, learning_rate)
            yield TrainingStep(run, parameters)
    finally:
        restore_base(tuned)


@contextmanager
def tuned_parameters(family: Any, recipe: str) -> Iterator[list[nn.Parameter]]:
    """Yields the parameters that `recipe` trains in the model, which is the base again afterwards."""
    with one_adapter(family, recipe) as tuned:
        yield list(tuned.trained.values())


# --- several adapters in one model --------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapters:
    """Norms that hold the values of several adapters."""

    bank: AdapterBank

    @contextmanager
    def assigned(self, adapter_of_row: Sequence[int]) -> Iterator[None]:
        """Inside, row i of the text uses the norms of adapter `adapter_of_row[i]`."""
        with self.bank.use(None, RowAdapters(adapter_of_row)):
            yield

    @property
    def value_bytes(self) -> int:
        """Bytes of the values of all adapters, which are fp32."""
        return 4 * self.bank.values.numel()


@contextmanager
def several_adapters(family: Any, recipe: str, count: int) -> Iterator[Adapters]:
    """Inside, the norms of the model hold `count` adapters; afterwards it is the base again."""
    tuned = adapt(family.model, recipe)
    try:
        bank = build_bank(tuned, count)
        family.active_text_rows = bank.text_rows
        yield Adapters(bank)
    finally:
        family.active_text_rows = None
        restore_base(tuned)


@contextmanager
def one_adapter(family: Any, recipe: str) -> Iterator[TunedModel]:
    """Inside, the model holds one adapter; afterwards it is the base again."""
    tuned = adapt(family.model, recipe)
    try:
        yield tuned
    finally:
        restore_base(tuned)


# --- quantised bases ----------------------------------------------------------------------------------------


def linears_to_quantize(model: nn.Module) -> list[str]:
    """The names of the linears that Normtune quantises: those of the language model's layers."""
    return quantised_linears(model)


def quantize_int8(model: nn.Module, names: Sequence[str], std: float = 0.02) -> None:
    """Replace linears by Normtune's product with 8-bit weights, of random values with this std.

    torchao packs the weights of a real run; here they are drawn, so that the package is not needed.
    """
    linears: list[Any] = [model.get_submodule(name) for name in names]
    insert_placeholders(linears, "int8")
    for linear in linears:
        linear.packed.random_(-127, 128)
        linear.scales.fill_(std / INT8_STD)


def pass_gradients(model: nn.Module) -> None:
    """Let gradients pass through 4-bit linears without a copy of their weights."""
    allow_gradients_through(model)
