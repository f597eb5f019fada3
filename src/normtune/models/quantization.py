"""A frozen base in 8 or 4 bits: which linears are quantised, and how gradients pass through them.

The linears of the language model's layers are quantised while the checkpoint is read, so that there are never
two copies in memory. Image encoder, connector, embeddings, norms and heads are not quantised: they are a
small part of the values, and recipes train parameters there, above all norms.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from normtune.errors import InputError
from normtune.models.parts import find_parts
from normtune.runtime.tensors import clone_while_compiling

PACKAGES: dict[str, str] = {"int8": "torchao", "nf4": "bitsandbytes"}  # kind -> package that implements it
SAMPLES = 64  # values of each tensor that the fingerprint of a base reads
NF4_BLOCK = 64  # values that share one scale (Dettmers et al. 2023, arXiv 2305.14314)
_TEXT_PARTS = ("language", "encoder", "decoder")


def check_installed(kind: str) -> None:
    """Check that the package of a kind of quantisation can be imported.

    Raises:
        InputError: it is not installed, or there is no such kind.
    """
    if kind not in PACKAGES:
        raise InputError(f"--quantize {kind}: unknown. Known: {', '.join(PACKAGES)}.")
    if find_spec(PACKAGES[kind]) is None:
        raise InputError(
            f"--quantize {kind} needs {PACKAGES[kind]}, which is not installed: "
            "pip install 'normtune[quantize]', or leave --quantize out."
        )


def quantised_linears(model: nn.Module) -> list[str]:
    """Names of the linears to quantise: the linears of attentions and feed-forwards in the text parts."""
    names = []
    for parameter in find_parts(model).parameters:
        name, _, attribute = parameter.name.rpartition(".")
        in_text_layer = parameter.part in _TEXT_PARTS and parameter.role in ("attention", "ffn")
        if in_text_layer and attribute == "weight" and type(model.get_submodule(name)) is nn.Linear:
            names.append(name)
    return names


def quantization_config(model: nn.Module, kind: str, dtype: torch.dtype) -> Any:
    """The config with which transformers' `from_pretrained` quantises a model while reading it.

    Call `check_installed` first.

    Args:
        model: the model's modules, on any device, including meta.
        kind: "int8" or "nf4".
        dtype: the dtype in which nf4 computes.

    Raises:
        InputError: the model has no linear to quantise.
    """
    linears = quantised_linears(model)
    if not linears:
        raise InputError("--quantize finds no linear layer in the model's text parts. Leave it out.")
    skipped = _modules_to_skip(model, set(linears))
    if kind == "int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False), modules_to_not_convert=skipped)
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skipped,  # despite its name also for 4 bits
    )


@dataclass(frozen=True)
class UnquantisedSamples:
    """Some values of a linear's weight before it was quantised, which identify the base."""

    shape: tuple[int, ...]  # of the weight
    values: Tensor  # at the `sampled_indices`


def sampled_indices(count: int) -> range:
    """Indices of the values that identify a tensor of `count` values, at equal distances."""
    step = max(1, count // SAMPLES)
    return range(0, min(count, step * SAMPLES), step)


def keep_unquantised_samples(model: nn.Module, structure: Any, source: str, dtype: torch.dtype) -> None:
    """Read some values of each quantised linear from the checkpoint's files, for the fingerprint of the base.

    They become the attribute `unquantised_samples` of the linear, an `UnquantisedSamples`. Nothing is kept of a
    checkpoint without safetensors, or of tensors that loading makes from others.

    Args:
        model: the quantised model.
        structure: the same model on the meta device, not quantised.
        source: its local directory or hub name.
        dtype: the dtype in which it was loaded.
    """
    from huggingface_hub import snapshot_download

    from normtune.models.checkpoints.parameter_map import map_parameters
    from normtune.models.checkpoints.reader import Checkpoint

    try:
        directory = source if Path(source).is_dir() else snapshot_download(source, local_files_only=True)
        checkpoint = Checkpoint(Path(directory))
    except (OSError, ValueError, InputError):  # no files on this machine, or none in safetensors
        return
    keys = map_parameters(structure, checkpoint)
    for name in quantised_linears(structure):
        shape = tuple(structure.get_submodule(name).weight.shape)
        if keys.get(f"{name}.weight"):
            values = checkpoint.read_values(keys[f"{name}.weight"][0], sampled_indices(math.prod(shape)))
            linear: Any = model.get_submodule(name)
            linear.unquantised_samples = UnquantisedSamples(shape, values.to(dtype))


def _modules_to_skip(model: nn.Module, quantised: set[str]) -> list[str]:
    """Names of the largest modules that contain linears, but none that is to be quantised.

    The packages take names of modules to skip, not of modules to quantise.
    """

    def walk(name: str, module: nn.Module) -> Iterator[str]:
        linears = [path for path, child in module.named_modules(prefix=name) if isinstance(child, nn.Linear)]
        if quantised.isdisjoint(linears):
            if linears:
                yield name
            return
        for child_name, child in module.named_children():
            yield from walk(f"{name}.{child_name}" if name else child_name, child)

    return list(walk("", model))


@contextmanager
def quiet_quantization() -> Iterator[None]:
    """Silence torchao's and bitsandbytes' messages about kernels for other devices and coming versions."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _Int8LinearFunction(torch.autograd.Function):
    """x @ q.T * scale, which saves the 8-bit q for the backward pass.

    torchao's own kernel converts q.T to x's dtype before autograd records the product. Autograd then saves
    the weights of every layer in full precision until the backward pass: more memory than quantisation saves.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, scale)
        ctx.dtype = x.dtype
        # [..., in] @ [in, out], then one scale for each output; the converted q is freed at once
        out = (x @ q.to(x.dtype).T).mul_(scale.to(x.dtype).flatten())
        return clone_while_compiling(out if bias is None else out.add_(bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        q, scale = ctx.saved_tensors
        # the gradient of x only, since q, scale and bias are frozen: [..., out] @ [out, in]
        return (grad * scale.to(ctx.dtype).flatten()) @ q.to(ctx.dtype), None, None, None


class Int8Linear(nn.Linear):
    """A frozen linear with a torchao weight of 8 bits a value, and one fp32 scale for each row (output)."""

    def forward(self, input: Tensor) -> Tensor:
        """input [..., in] -> [..., out] in the input's dtype."""
        weight: Any = self.weight
        return int8_linear(input, weight.qdata, weight.scale, self.bias)


def int8_linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in], q [out, in] int8, scale [out] or [out, 1], bias [out] -> [..., out] in x's dtype."""
    return _Int8LinearFunction.apply(x, q, scale, bias)


def allow_gradients_through(model: nn.Module) -> None:
    """Make gradients pass through the quantised linears of a loaded model without saving full weights."""
    for module in model.modules():
        if not isinstance(module, nn.Linear):
            continue
        weight: Any = module.weight
        if hasattr(weight, "qdata"):
            module.__class__ = Int8Linear
        elif hasattr(weight, "quant_state"):
            # In passes without gradients, bitsandbytes would repack the weights for a CPU kernel that has no
            # gradients.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
