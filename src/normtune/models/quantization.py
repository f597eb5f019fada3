"""A frozen base in 8 or 4 bits: which of its linears are quantised, and how gradients pass through them.

The linears of the language model's layers are quantised while the checkpoint is read, so that two copies are
never held. Image encoder, connector, embeddings, norms and heads stay as they are: they are a small part of
the values, and what a recipe trains of the base is there, norms above all.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from normtune.errors import InputError
from normtune.models.parts import find_parts
from normtune.runtime.tensors import clone_while_compiling

Quantisation = Literal["int8", "nf4"]
PACKAGES: dict[str, str] = {"int8": "torchao", "nf4": "bitsandbytes"}
NF4_BLOCK = 64  # values that share one scale (Dettmers et al. 2023, arXiv 2305.14314)
_TEXT_PARTS = ("language", "encoder", "decoder")


def check_installed(kind: str) -> None:
    """See to it that the package behind `kind` can be imported.

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
    """Names of the linears that are quantised: those of attentions and feed-forwards in the text parts."""
    found = []
    for place in find_parts(model).parameters:
        name, _, attribute = place.name.rpartition(".")
        inside = place.part in _TEXT_PARTS and place.role in ("attention", "ffn")
        if inside and attribute == "weight" and type(model.get_submodule(name)) is nn.Linear:
            found.append(name)
    return found


def quantization_config(model: nn.Module, kind: str, dtype: torch.dtype) -> Any:
    """What transformers' `from_pretrained` takes to quantise `model` (on any device) while it is read.

    Raises:
        InputError: the package is not installed, or the model has no linear to quantise.
    """
    check_installed(kind)
    wanted = quantised_linears(model)
    if not wanted:
        raise InputError("--quantize finds no linear layer in the model's text parts. Leave it out.")
    kept = _others(model, set(wanted))
    with quiet():
        if kind == "int8":
            from torchao.quantization import Int8WeightOnlyConfig
            from transformers import TorchAoConfig

            return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False), modules_to_not_convert=kept)
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=kept,  # of 4 bits too
        )


def loading_options(quantization: Any, device: str | torch.device) -> dict[str, Any]:
    """The arguments of `from_pretrained` that quantise while reading; none without a config of it."""
    if quantization is None:
        return {}
    return {"quantization_config": quantization, "device_map": {"": torch.device(device)}}


def _others(model: nn.Module, wanted: set[str]) -> list[str]:
    """The largest modules that hold linears and none of the wanted ones."""

    def walk(name: str, module: nn.Module) -> Iterator[str]:
        linears = [one for one, child in module.named_modules(prefix=name) if isinstance(child, nn.Linear)]
        if wanted.isdisjoint(linears):
            if linears:
                yield name
            return
        for child_name, child in module.named_children():
            yield from walk(f"{name}.{child_name}" if name else child_name, child)

    return list(walk("", model))


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, torchao and bitsandbytes do not tell of kernels for other devices and of their own futures."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _ThroughInt8(torch.autograd.Function):
    """x @ q.T * scale, which keeps the 8-bit q for the backward pass.

    torchao's own kernel makes q.T in x's dtype before autograd sees the product, so that the weights of every
    layer are kept in full between the forward and the backward pass: more than was saved.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, scale)
        ctx.dtype = x.dtype
        out = (x @ q.to(x.dtype).T).mul_(scale.to(x.dtype).flatten())
        return clone_while_compiling(out if bias is None else out.add_(bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        q, scale = ctx.saved_tensors
        return (grad * scale.to(ctx.dtype).flatten()) @ q.to(ctx.dtype), None, None, None


class Int8Linear(nn.Linear):
    """A linear whose weight torchao holds in 8 bits, one fp32 scale a row; frozen."""

    def forward(self, input: Tensor) -> Tensor:
        """input: [..., in]; returns [..., out] in its dtype."""
        weight: Any = self.weight
        return int8_linear(input, weight.qdata, weight.scale, self.bias)


def int8_linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x: [..., in], q: [out, in] int8, scale: [out] or [out, 1] -> [..., out] in x's dtype."""
    return _ThroughInt8.apply(x, q, scale, bias)


def frozen_linears(model: nn.Module) -> Sequence[str]:
    """Let gradients pass through the quantised linears of a loaded model at the cost of their bits.

    Returns their names.
    """
    names = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        weight: Any = module.weight
        if hasattr(weight, "qdata"):
            module.__class__ = Int8Linear
        elif hasattr(weight, "quant_state"):
            # without gradients bitsandbytes would pack weights anew for a CPU kernel that has none
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
        else:
            continue
        names.append(name)
    return names
