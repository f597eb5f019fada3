"""The parts of the GPU benchmark, in order of importance, each with a time limit.

A part writes its figures into a dict as they come, so that those measured before its time limit are in the
record. Each measurement is a call of `attempt`: if it fails, its row holds the reason instead of figures, and
the part continues.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from gpu_models import Workbench
from gpu_normtune import answer_groups, image_features, one_adapter, several_adapters, stock_attention
from gpu_timing import MIB, attempt, host_waits, measure
from gpu_training import (
    Figures,
    attention_of,
    compiled_layers,
    gradients,
    largest_batch,
    llava_step,
    medgemma_step,
    norm_precision,
    normtune_step,
    quantized_bases,
)
from torch import Tensor
from torch.nn import functional as F

from normtune.runtime.environment import package_version

KERNELS = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
PACKAGES = ("triton", "peft", "accelerate", "bitsandbytes", "torchao", "liger-kernel", "pydantic")


@dataclass(frozen=True)
class Part:
    """A part of the benchmark; the first line of its function's docstring is its summary."""

    run: Callable[[Workbench, Figures], None]
    limit_s: float

    @property
    def summary(self) -> str:
        return (self.run.__doc__ or "").splitlines()[0]


def environment(bench: Workbench, figures: Figures) -> None:
    """The machine: packages, GPU, driver, and the speed of matrix products in bf16, fp32 and TF32."""
    figures["python"] = sys.version.split()[0]
    figures["cores"] = os.cpu_count()
    figures["packages"] = {name: package_version(name) for name in PACKAGES}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        figures |= {
            "gpu": torch.cuda.get_device_name(),
            "capability": list(torch.cuda.get_device_capability()),
            "free_mib": round(free / MIB),
            "total_mib": round(total / MIB),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver(),
        }
    figures["matmul_tflops"] = attempt(lambda: _matmul_tflops(bench))


def _driver() -> str | None:
    """The version of the NVIDIA driver; None if nvidia-smi does not report it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def _matmul_tflops(bench: Workbench) -> Figures:
    """TFLOP/s of square products, by dtype."""
    size = 256 if bench.tiny else 8192
    modes = (
        ("bf16", torch.bfloat16, "highest"),
        ("fp32", torch.float32, "highest"),
        ("fp32 as TF32", torch.float32, "high"),
    )
    before = torch.get_float32_matmul_precision()
    figures: Figures = {}
    try:
        for name, dtype, precision in modes:
            torch.set_float32_matmul_precision(precision)
            matrix = torch.randn(size, size, device=bench.device, dtype=dtype)
            step_ms = measure(partial(torch.matmul, matrix, matrix), 1, steps=8, seconds=2)["step_ms"]
            # the time is rounded to 0.01 ms and can be 0 for a tiny product
            figures[name] = round(2 * size**3 / (step_ms * 1e9), 1) if step_ms else None
    finally:
        torch.set_float32_matmul_precision(before)
    return figures


def attention_masks(bench: Workbench, figures: Figures) -> None:
    """Dense masks and FlexAttention's block masks, and the attention kernels that accept a dense mask."""
    images, questions = 2, bench.pairs_per_image
    size = f"{images} x {questions}"
    figures[f"dense, {size}"] = attempt(lambda: _masked_step(bench, images, questions, "dense"))
    if bench.device.type == "cpu":  # FlexAttention has no backward pass there
        figures[f"block, forward pass only, {size}"] = attempt(lambda: _block_forward(bench, images, questions))
    else:
        figures[f"block, {size}"] = attempt(lambda: _masked_step(bench, images, questions, "block"))
    figures["kernels"] = attempt(lambda: _attention_kernels(bench))


def _masked_step(bench: Workbench, images: int, questions: int, attention: Literal["dense", "block"]) -> Figures:
    """Measure a training step under one kind of mask, and the whole time with FlexAttention's compilation."""
    began = time.perf_counter()
    row = normtune_step(bench, "llava", images=images, questions=questions, attention=attention, steps=4, seconds=5)
    return row | {"with_compilation_s": round(time.perf_counter() - began, 1)}


def _block_forward(bench: Workbench, images: int, questions: int) -> Figures:
    """Measure one forward pass under block masks."""
    _, family = bench.model("llava")
    with attention_of(family, "block"), torch.no_grad():
        batch = bench.batch("llava", [questions] * images)
        return measure(lambda: family.loss(batch), images * questions, steps=1, warmup=0)


def _attention_kernels(bench: Workbench) -> Figures:
    """Milliseconds of one layer's attention, forward and backward, by each kernel that supports its mask."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query, key, value, mask, options = _attention_arguments(bench)

    def attend() -> None:
        F.scaled_dot_product_attention(query, key, value, mask, **options).sum().backward()

    figures: Figures = {
        "query": list(query.shape),
        "key": list(key.shape),
        "mask": list(mask.shape),
        "mask_dtype": str(mask.dtype).removeprefix("torch."),
        "mask_mib": round(mask.untyped_storage().nbytes() / MIB, 2),
        "default_ms": measure(attend, 1, seconds=2)["step_ms"],
    }
    for name in KERNELS:
        try:
            with sdpa_kernel(getattr(SDPBackend, name)):
                figures[f"{name}_ms"] = measure(attend, 1, seconds=2)["step_ms"]
        except RuntimeError as error:  # the kernel does not support this mask, dtype or device
            figures[f"{name}_ms"] = None
            figures[f"{name}_reason"] = str(error).splitlines()[0][:120]
    return figures


def _attention_arguments(bench: Workbench) -> tuple[Tensor, Tensor, Tensor, Tensor, Figures]:
    """(query, key, value, mask, options) of the first attention with a mask in a grouped forward pass."""
    _, family = bench.model("llava")
    calls: list[tuple[Tensor, Tensor, Tensor, Tensor, Figures]] = []
    original = F.scaled_dot_product_attention

    def note(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, *args: Any, **options: Any) -> Any:
        if attn_mask is not None and not calls:
            calls.append((query, key, value, attn_mask, options))
        return original(query, key, value, attn_mask, *args, **options)

    F.scaled_dot_product_attention = note
    try:
        with attention_of(family, "dense"), torch.no_grad():
            family.loss(bench.batch("llava", [bench.pairs_per_image] * 2))
    finally:
        F.scaled_dot_product_attention = original
    assert calls, "the language model attends under a mask"
    query, key, value, mask, options = calls[0]
    query, key, value = (tensor.detach().requires_grad_() for tensor in (query, key, value))
    return query, key, value, mask, options


def answering(bench: Workbench, figures: Figures) -> None:
    """Generated answers: questions grouped by image; generate() on single questions and on a batch."""
    tokens = 3 if bench.tiny else 16
    figures["new_tokens"] = tokens
    more = 2 if bench.tiny else 4
    figures["grouped, 1 image"] = attempt(lambda: _grouped_answers(bench, 1, tokens))
    figures[f"grouped, {more} images"] = attempt(lambda: _grouped_answers(bench, more, tokens))
    figures["generate(), one question"] = attempt(lambda: _stock_answers(bench, 1, tokens))
    figures["generate(), questions of 1 image"] = attempt(lambda: _stock_answers(bench, bench.pairs_per_image, tokens))


def _grouped_answers(bench: Workbench, images: int, tokens: int) -> Figures:
    """Measure Normtune's greedy answers, questions grouped by image."""
    shape, family = bench.model("llava")
    counts = [bench.pairs_per_image] * images
    groups, pixels = shape.groups(counts, answers=False)

    def run() -> int:
        return answer_groups(family, groups, pixels, tokens)

    with attention_of(family, "dense"):
        _check_length(run(), sum(counts) * tokens)
        return measure(run, sum(counts), steps=3) | {"host_waits": host_waits(run)}


def _check_length(generated: int, expected: int) -> None:
    """Refuse a comparison in which Normtune's answers end early: generate() is made to write every token."""
    if generated != expected:
        raise RuntimeError(f"answers have {generated} tokens in all instead of {expected}: times do not compare")


def _stock_answers(bench: Workbench, pairs: int, tokens: int) -> Figures:
    """Measure transformers' generate(), each question with its own copy of the image."""
    shape, family = bench.model("llava")
    with stock_attention(family) as model, torch.inference_mode():
        inputs = shape.rows(pairs, bench.device, answers=False)
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        return measure(lambda: model.generate(**inputs, **options), pairs, steps=3)


def adapters_in_one_pass(bench: Workbench, figures: Figures) -> None:
    """Answers of 64 adapters and of one in a batch."""
    many = 4 if bench.tiny else 64
    figures["answers, 1 adapter"] = attempt(lambda: _adapter_answers(bench, many, 1))
    figures[f"answers, {many} adapters"] = attempt(lambda: _adapter_answers(bench, many, many))


ADAPTER_RECIPE = "language=ln"  # the image encoder is the same for all adapters


@torch.no_grad()
def _adapter_answers(bench: Workbench, requests: int, adapters: int) -> Figures:
    """Requests with one image each; the image features are given, to time the language model."""
    shape, family = bench.model("llava")
    tokens = 2 if bench.tiny else 8
    groups, pixels = shape.groups([1] * requests, answers=False)
    features = [[image_features(family, images[0])] for images in pixels]

    def run() -> None:
        _check_length(answer_groups(family, groups, features, tokens), requests * tokens)

    if adapters == 1:
        with attention_of(family, "dense"), one_adapter(family, ADAPTER_RECIPE):
            return measure(run, requests, steps=3, seconds=6)
    with attention_of(family, "dense"), several_adapters(family, ADAPTER_RECIPE, adapters) as bank:

        def run_assigned() -> None:
            with bank.assigned([row % adapters for row in range(requests)]):
                run()

        row = measure(run_assigned, requests, steps=3, seconds=6)
        return row | {"adapters_mib": round(bank.value_bytes / MIB, 1)}


PARTS: dict[str, Part] = {
    "environment": Part(environment, 30),
    "llava-step": Part(llava_step, 110),
    "norm-precision": Part(norm_precision, 45),
    "medgemma-step": Part(medgemma_step, 90),
    "gradients": Part(gradients, 40),
    "largest-batch": Part(largest_batch, 60),
    "attention": Part(attention_masks, 60),
    "answering": Part(answering, 60),
    "quantized": Part(quantized_bases, 60),
    "compile": Part(compiled_layers, 90),
    "adapters": Part(adapters_in_one_pass, 60),
}
