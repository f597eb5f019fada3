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
from importlib.util import find_spec
from typing import Any, Literal

import torch
from gpu_models import NOTEBOOK, PEERS, Workbench, pack_nf4, peft_model, peft_step
from gpu_normtune import (
    MemoryTier,
    TrainingStep,
    answer_groups,
    image_features,
    linears_to_quantize,
    one_adapter,
    pass_gradients,
    quantize_int8,
    several_adapters,
    stock_attention,
    training_step,
)
from gpu_timing import MIB, attempt, free_memory, host_waits, measure
from torch import Tensor, nn
from torch.nn import functional as F

from normtune.runtime.environment import package_version

Figures = dict[str, Any]
FIRST = "normtune ln"  # the measurement that the others are compared with
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


def llava_step(bench: Workbench, figures: Figures) -> None:
    """A training step of LLaVA-Med 7B: questions grouped by image, and stock PEFT on separate rows."""
    figures[FIRST] = attempt(lambda: _normtune_step(bench, "llava", count_waits=True))
    figures["build_s"] = bench.build_s
    for method in PEERS:
        figures[f"PEFT {method}"] = attempt(partial(_peft_measurement, bench, "llava", method))
    figures["normtune lora(r=16)"] = attempt(lambda: _normtune_step(bench, "llava", "lora(r=16)"))
    figures["normtune ln, tight"] = attempt(lambda: _normtune_step(bench, "llava", memory="tight"))
    _compare(figures)


def _compare(figures: Figures) -> None:
    """Add to each measurement the ratio of the first one's pairs per second to its own."""
    first = figures[FIRST].get("pairs_per_s")
    for row in figures.values():
        if first and isinstance(row, dict) and row.get("pairs_per_s"):
            row["ln_is_faster"] = round(first / row["pairs_per_s"], 2)


def _normtune_step(
    bench: Workbench,
    kind: str,
    recipe: str = "ln",
    *,
    images: int = 2,
    questions: int | None = None,
    memory: MemoryTier = "fast",
    attention: Literal["dense", "block"] = "dense",
    compiled: bool = False,
    count_waits: bool = False,
    **timing: Any,
) -> Figures:
    """Measure a training step of Normtune; `timing` are the options of `measure`."""
    _, family = bench.model(kind)
    family.attention = attention
    counts = [questions or bench.pairs_per_image] * images
    try:
        batch = bench.batch(kind, counts)
        with training_step(family, recipe, batch, memory=memory, compiled=compiled) as step:
            row = measure(step.run, sum(counts), **timing) | _sizes(batch, step)
            if count_waits:
                row["host_waits"] = host_waits(step.run)
            return row
    finally:
        family.attention = "auto"


def _peft_measurement(bench: Workbench, kind: str, method: str) -> Figures:
    """Measure a training step of stock PEFT; the batch is halved until it fits in memory."""
    shape, family = bench.model(kind)
    pairs = 2 if bench.tiny else 8
    with stock_attention(family) as model:
        tuned = peft_model(model, method)
        tuned.train()
        try:
            while True:
                try:
                    batch = shape.rows(pairs, bench.device)
                    step = peft_step(tuned, batch)
                    return measure(step.run, pairs) | _sizes(batch, step)
                except torch.OutOfMemoryError:
                    if pairs == 1:
                        raise
                batch, step = {}, None  # type: ignore[assignment]
                tuned.zero_grad(set_to_none=True)
                free_memory()
                pairs //= 2
        finally:
            tuned.unload()
            model.eval()


def _sizes(batch: dict[str, Any], step: TrainingStep) -> Figures:
    """Tokens of a batch, padding included, and the number of trained values."""
    return {"tokens": batch["input_ids"].numel(), "trained": sum(parameter.numel() for parameter in step.parameters)}


def norm_precision(bench: Workbench, figures: Figures) -> None:
    """Share of norm values that change at a learning rate of 1e-4: fp32 (Normtune) and bf16 (PEFT)."""
    shape, family = bench.model("llava")
    steps = 2 if bench.tiny else 10
    pairs = min(4, bench.pairs_per_image)  # the same pairs of one image for both

    def fp32_norms() -> Figures:
        family.attention = "dense"
        try:
            batch = bench.batch("llava", [pairs])
            with training_step(family, "ln", batch) as step:
                return _norm_movement(step, steps)
        finally:
            family.attention = "auto"

    def bf16_norms() -> Figures:
        with stock_attention(family) as model:
            tuned = peft_model(model, "LN_TUNING")
            try:
                return _norm_movement(peft_step(tuned, shape.rows(pairs, bench.device)), steps)
            finally:
                tuned.unload()

    figures["fp32 norms (normtune ln)"] = attempt(fp32_norms)
    figures["bf16 norms (PEFT LN_TUNING)"] = attempt(bf16_norms)


def _norm_movement(step: TrainingStep, steps: int) -> Figures:
    """Train for some steps on one batch: the share of gains and of biases that changed, in percent."""
    before = [parameter.detach().clone() for parameter in step.parameters]
    losses = [step.run() for _ in range(steps)]
    figures: Figures = {"dtype": str(step.parameters[0].dtype).removeprefix("torch."), "steps": steps}
    changes = [(old, new.detach()) for old, new in zip(before, step.parameters, strict=True)]
    # LLaVA's norms begin with gains of 1 and biases of 0
    is_gain = [bool(old.float().abs().mean() > 0.5) for old in before]
    for name, select_gains in (("gains", True), ("biases", False)):
        pairs = [pair for pair, gain in zip(changes, is_gain, strict=True) if gain == select_gains]
        values = sum(old.numel() for old, _ in pairs)
        moved = sum(int((old != new).sum()) for old, new in pairs)
        figures[name] = {"values": values, "moved_percent": round(100 * moved / max(1, values), 2)}
    return figures | {"first_loss": round(float(losses[0]), 4), "last_loss": round(float(losses[-1]), 4)}


def medgemma_step(bench: Workbench, figures: Figures) -> None:
    """A training step of MedGemma 4B: grouped LN tuning, and the recipe of Google's public notebook."""
    figures[FIRST] = attempt(lambda: _normtune_step(bench, "gemma3"))
    figures["normtune ln, tight"] = attempt(lambda: _normtune_step(bench, "gemma3", memory="tight"))
    nf4 = find_spec("bitsandbytes") is not None
    base = "nf4 base" if nf4 else "bf16 base, since bitsandbytes is not installed"
    try:
        figures[f"PEFT {NOTEBOOK} ({base})"] = attempt(lambda: _notebook_step(bench, nf4))
    finally:
        bench.free()  # its linears are packed and its layers checkpointed
    _compare(figures)


def _notebook_step(bench: Workbench, nf4: bool) -> Figures:
    """The notebook's QLoRA with gradient checkpointing, four pairs a step."""
    shape, family = bench.model("gemma3")
    pairs = 2 if bench.tiny else 4
    if nf4:
        linears = [
            name for name, module in family.model.named_modules() if type(module) is nn.Linear and "lm_head" not in name
        ]
        pack_nf4(family.model, linears)
        family.model.is_loaded_in_4bit = True  # PEFT chooses its LoRA layers by it
    with stock_attention(family) as model:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        tuned = peft_model(model, NOTEBOOK)
        tuned.enable_input_require_grads()
        tuned.train()
        batch = shape.rows(pairs, bench.device)
        step = peft_step(tuned, batch, learning_rate=2e-4)
        return measure(step.run, pairs) | _sizes(batch, step)


def attention_masks(bench: Workbench, figures: Figures) -> None:
    """Dense masks and FlexAttention's block masks, and the attention kernels that accept a dense mask."""
    k = bench.pairs_per_image
    for images, questions in [(1, k), (1, k + 1)] if bench.tiny else [(1, k), (2, k), (1, 48)]:
        size = f"{images} x {questions}"
        figures[f"dense, {size}"] = attempt(partial(_masked_step, bench, images, questions, "dense"))
        if bench.device.type == "cpu":  # FlexAttention has no backward pass there
            figures[f"block, forward pass only, {size}"] = attempt(partial(_block_forward, bench, images, questions))
        else:
            figures[f"block, {size}"] = attempt(partial(_masked_step, bench, images, questions, "block"))
    figures["kernels"] = attempt(lambda: _attention_kernels(bench))


def _masked_step(bench: Workbench, images: int, questions: int, attention: Literal["dense", "block"]) -> Figures:
    """Measure a training step under one kind of mask, and the whole time with FlexAttention's compilation."""
    began = time.perf_counter()
    row = _normtune_step(bench, "llava", images=images, questions=questions, attention=attention, steps=4, seconds=5)
    return row | {"with_compilation_s": round(time.perf_counter() - began, 1)}


def _block_forward(bench: Workbench, images: int, questions: int) -> Figures:
    """Measure one forward pass under block masks."""
    _, family = bench.model("llava")
    family.attention = "block"
    try:
        batch = bench.batch("llava", [questions] * images)
        with torch.no_grad():
            return measure(lambda: family.loss(batch), images * questions, steps=1, warmup=0)
    finally:
        family.attention = "auto"


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

    family.attention = "dense"
    F.scaled_dot_product_attention = note
    try:
        with torch.no_grad():
            family.loss(bench.batch("llava", [bench.pairs_per_image] * 2))
    finally:
        F.scaled_dot_product_attention = original
        family.attention = "auto"
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

    family.attention = "dense"
    try:
        _check_length(run(), sum(counts) * tokens)
        return measure(run, sum(counts), steps=3) | {"host_waits": host_waits(run)}
    finally:
        family.attention = "auto"


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


def quantized_bases(bench: Workbench, figures: Figures) -> None:
    """Memory and time of a step with the language model in 8 and in 4 bits, norms trained."""
    for kind in ("int8", "nf4"):
        try:
            figures[kind] = attempt(partial(_quantized_step, bench, kind))
        finally:
            bench.free()  # its weights are packed


def _quantized_step(bench: Workbench, kind: str) -> Figures:
    """Measure a training step over a base of random weights in 8 bits, or packed by bitsandbytes."""
    bench.free()
    _, family = bench.model("llava")
    names = linears_to_quantize(family.model)
    if kind == "int8":
        quantize_int8(family.model, names)
    else:
        pack_nf4(family.model, names)
        pass_gradients(family.model)
    free_memory()
    row: Figures = {}
    if torch.cuda.is_available():
        row["weights_mib"] = round(torch.cuda.memory_allocated() / MIB)
    return _normtune_step(bench, "llava", steps=3, seconds=6) | row


def compiled_layers(bench: Workbench, figures: Figures) -> None:
    """torch.compile of the language model's layers, off and on, and how many graphs it makes."""
    figures["compile off"] = attempt(lambda: _normtune_step(bench, "llava", seconds=4))
    figures["compile on"] = attempt(lambda: _compiled_step(bench))


def _compiled_step(bench: Workbench) -> Figures:
    """Measure a compiled training step, the time with compilation, and the graphs that it makes."""
    import torch._dynamo.utils as dynamo

    _, family = bench.model("llava")
    torch._dynamo.reset()  # graphs of earlier parts, such as FlexAttention's, are not counted
    dynamo.counters.clear()
    began = time.perf_counter()
    row = _normtune_step(bench, "llava", compiled=True, seconds=4, warmup=2)
    return row | {
        "with_compilation_s": round(time.perf_counter() - began, 1),
        # more graphs than kinds of layers: each layer is compiled anew
        "graphs": dynamo.counters["stats"].get("unique_graphs"),
        "layers": len(family.decoder.layers),
    }


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

    family.attention = "dense"
    try:
        if adapters == 1:
            with one_adapter(family, ADAPTER_RECIPE):
                return measure(run, requests, steps=3, seconds=6)
        with several_adapters(family, ADAPTER_RECIPE, adapters) as bank:

            def run_assigned() -> None:
                with bank.assigned([row % adapters for row in range(requests)]):
                    run()

            row = measure(run_assigned, requests, steps=3, seconds=6)
            return row | {"adapters_mib": round(bank.value_bytes / MIB, 1)}
    finally:
        family.attention = "auto"


PARTS: dict[str, Part] = {
    "environment": Part(environment, 30),
    "llava-step": Part(llava_step, 110),
    "norm-precision": Part(norm_precision, 45),
    "medgemma-step": Part(medgemma_step, 90),
    "attention": Part(attention_masks, 90),
    "answering": Part(answering, 60),
    "quantized": Part(quantized_bases, 60),
    "compile": Part(compiled_layers, 90),
    "adapters": Part(adapters_in_one_pass, 60),
}
