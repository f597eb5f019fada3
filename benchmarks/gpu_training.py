"""The parts of the GPU benchmark that measure training steps; `gpu_parts` has the others and their order."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from gpu_models import NOTEBOOK, PEERS, Workbench, pack_nf4, peft_model, peft_step
from gpu_normtune import (
    MemoryTier,
    TrainingStep,
    linears_to_quantize,
    loss_per_token,
    pass_gradients,
    quantize_int8,
    stock_attention,
    training_step,
    tuned_parameters,
)
from gpu_timing import MIB, attempt, free_memory, host_waits, measure
from torch import Tensor, nn

Figures = dict[str, Any]
FIRST = "normtune ln"  # the measurement that the others are compared with
LEARNING_RATES = (1e-5, 3e-5, 1e-4, 3e-4)  # of the part "norm-precision"


def llava_step(bench: Workbench, figures: Figures) -> None:
    """A training step of LLaVA-Med 7B: questions grouped by image, and stock PEFT on separate rows."""
    figures[FIRST] = attempt(lambda: normtune_step(bench, "llava", count_waits=True))
    figures["build_s"] = bench.build_s
    for method in PEERS:
        figures[f"PEFT {method}"] = attempt(partial(_peft_measurement, bench, "llava", method))
    figures["normtune lora(r=16)"] = attempt(lambda: normtune_step(bench, "llava", "lora(r=16)"))
    figures["normtune ln, tight"] = attempt(lambda: normtune_step(bench, "llava", memory="tight"))
    _compare(figures)


def _compare(figures: Figures) -> None:
    """Add to each measurement the ratio of the first one's pairs per second to its own."""
    first = figures[FIRST].get("pairs_per_s")
    for row in figures.values():
        if first and isinstance(row, dict) and row.get("pairs_per_s"):
            row["ln_is_faster"] = round(first / row["pairs_per_s"], 2)


def normtune_step(
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
    counts = [questions or bench.pairs_per_image] * images
    with attention_of(family, attention):
        batch = bench.batch(kind, counts)
        with training_step(family, recipe, batch, memory=memory, compiled=compiled) as step:
            row = measure(step.run, sum(counts), **timing) | _sizes(batch, step)
            if count_waits:
                row["host_waits"] = host_waits(step.run)
            return row


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


@contextmanager
def attention_of(family: Any, backend: Literal["dense", "block"]) -> Iterator[None]:
    """Inside, the language model attends with this kind of mask."""
    family.attention = backend
    try:
        yield
    finally:
        family.attention = "auto"


def largest_batch(bench: Workbench, figures: Figures) -> None:
    """The largest batch of LLaVA-Med 7B that fits on the GPU: images with their questions, and rows of PEFT."""
    figures[FIRST] = attempt(lambda: _most_images(bench))
    figures[f"PEFT {PEERS[1]}"] = attempt(lambda: _most_rows(bench, PEERS[1]))


def _most_images(bench: Workbench) -> Figures:
    _, family = bench.model("llava")

    def step_of(images: int) -> Figures:
        with attention_of(family, "dense"):
            batch = bench.batch("llava", [bench.pairs_per_image] * images)
            with training_step(family, "ln", batch) as step:
                return _run_once(step, images * bench.pairs_per_image) | {"images": images}

    return _largest(step_of)


def _most_rows(bench: Workbench, method: str) -> Figures:
    shape, family = bench.model("llava")
    with stock_attention(family) as model:
        tuned = peft_model(model, method)
        tuned.train()

        def step_of(rows: int) -> Figures:
            tuned.zero_grad(set_to_none=True)
            return _run_once(peft_step(tuned, shape.rows(rows, bench.device)), rows)

        try:
            return _largest(step_of)
        finally:
            tuned.unload()
            model.eval()


def _run_once(step: TrainingStep, pairs: int) -> Figures:
    return measure(step.run, pairs, steps=1, warmup=0)


def _largest(step_of: Callable[[int], Figures]) -> Figures:
    """The figures of the largest n for which `step_of(n)` fits in memory, to about 3%.

    The memory of a step grows linearly: n = 1 and n = 2 give a first estimate, which then goes down until the
    step fits. Without a GPU there is no limit to find: n = 2.
    """
    first, second = step_of(1), step_of(2)
    if not torch.cuda.is_available():
        return second
    free_memory()
    slope = max(1, second["peak_mib"] - first["peak_mib"])
    size = int((0.99 * torch.cuda.mem_get_info()[1] / MIB - first["peak_mib"]) / slope) + 1
    while size > 2:
        try:
            return step_of(size)
        except torch.OutOfMemoryError:
            pass  # the frames of the failed step hold its tensors until here
        free_memory()
        size = min(size - 1, int(0.97 * size))
    return second


def gradients(bench: Workbench, figures: Figures) -> None:
    """Gradients of a grouped step against those of separate sequences by stock transformers, in fp32 and bf16."""
    _, family = bench.model("llava")
    counts = [2, 1] if bench.tiny else [3, 3]
    try:
        by_run: dict[str, list[Tensor]] = {}
        for dtype in (torch.bfloat16, torch.float32):
            family.model.to(dtype)
            name = "bf16" if dtype == torch.bfloat16 else "fp32"
            # torch lets cuDNN's convolutions round fp32 values to TF32, by default: about 1e-3
            with torch.backends.cudnn.flags(allow_tf32=False), tuned_parameters(family, "ln") as parameters:
                by_run[f"grouped {name}"] = _grouped_gradients(bench, counts, parameters)
                by_run[f"separate {name}"] = _separate_gradients(bench, counts, parameters, dtype)
        reference = by_run["separate fp32"]
        for name in ("grouped fp32", "grouped bf16", "separate bf16"):
            figures[f"{name} against separate fp32"] = {
                "relative_difference": _relative_difference(by_run[name], reference)
            }
        figures["grouped bf16 against separate bf16"] = {
            "relative_difference": _relative_difference(by_run["grouped bf16"], by_run["separate bf16"])
        }
    finally:
        bench.free()  # its weights are fp32


def _grouped_gradients(bench: Workbench, counts: Sequence[int], parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    _, family = bench.model("llava")
    with attention_of(family, "dense"):
        loss_per_token(family, bench.batch("llava", counts)).backward()
    return _take_gradients(parameters)


def _separate_gradients(
    bench: Workbench, counts: Sequence[int], parameters: Sequence[nn.Parameter], dtype: torch.dtype
) -> list[Tensor]:
    """Gradients of the mean over all answer tokens, one sequence at a time."""
    shape, family = bench.model("llava")
    rows = shape.rows(sum(counts), bench.device, questions_of_image=counts, dtype=dtype)
    answer_tokens = (rows["labels"] >= 0).sum(1).tolist()
    with stock_attention(family) as model:
        for number, tokens in enumerate(answer_tokens):
            row = {name: values[number : number + 1] for name, values in rows.items()}
            (model(**row).loss * tokens / sum(answer_tokens)).backward()
    return _take_gradients(parameters)


def _take_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """The gradients of the parameters, which are then cleared; zeros where the model does not use one."""
    taken = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return taken


def _relative_difference(values: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """|values - reference| / |reference|, norms over all values of all tensors, with three digits."""
    difference = sum(float((a - b).square().sum()) for a, b in zip(values, reference, strict=True))
    return float(f"{(difference / sum(float(b.square().sum()) for b in reference)) ** 0.5:.2e}")


def norm_precision(bench: Workbench, figures: Figures) -> None:
    """Share of norm values that change, by learning rate: fp32 norms (Normtune) and bf16 norms (PEFT)."""
    shape, family = bench.model("llava")
    steps = 2 if bench.tiny else 10
    pairs = min(4, bench.pairs_per_image)  # the same pairs of one image for both

    def fp32_norms(rate: float) -> Figures:
        with attention_of(family, "dense"):
            batch = bench.batch("llava", [pairs])
            with training_step(family, "ln", batch, learning_rate=rate) as step:
                return _norm_movement(step, steps)

    def bf16_norms(rate: float) -> Figures:
        with stock_attention(family) as model:
            tuned = peft_model(model, "LN_TUNING")
            try:
                return _norm_movement(peft_step(tuned, shape.rows(pairs, bench.device), rate), steps)
            finally:
                tuned.unload()  # the base's norms come back unchanged

    for rate in LEARNING_RATES:
        figures[f"fp32 norms (normtune ln), {rate:.0e}"] = attempt(partial(fp32_norms, rate))
        figures[f"bf16 norms (PEFT LN_TUNING), {rate:.0e}"] = attempt(partial(bf16_norms, rate))


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
    figures[FIRST] = attempt(lambda: normtune_step(bench, "gemma3"))
    figures["normtune ln, tight"] = attempt(lambda: normtune_step(bench, "gemma3", memory="tight"))
    for kind in ("int8", "nf4"):
        try:
            for images in (2, 1):  # the second for a GPU of 12 GB
                figures[f"normtune ln, {kind} base, {images} x {bench.pairs_per_image}"] = attempt(
                    partial(_quantized_step, bench, "gemma3", kind, images)
                )
        finally:
            bench.free()  # its weights are packed
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


def quantized_bases(bench: Workbench, figures: Figures) -> None:
    """Memory and time of a step with the language model in 8 and in 4 bits, norms trained."""
    bench.free()
    for kind in ("int8", "nf4"):
        try:
            figures[kind] = attempt(partial(_quantized_step, bench, "llava", kind))
        finally:
            bench.free()  # its weights are packed


def _quantized_step(bench: Workbench, model: str, kind: str, images: int = 2) -> Figures:
    """Measure a training step over a base of random weights in 8 bits, or packed by bitsandbytes."""
    _, family = bench.model(model)
    if names := linears_to_quantize(family.model):  # none if they are packed already
        if kind == "int8":
            quantize_int8(family.model, names)
        else:
            pack_nf4(family.model, names)
            pass_gradients(family.model)
    free_memory()
    row: Figures = {}
    if torch.cuda.is_available():
        row["weights_mib"] = round(torch.cuda.memory_allocated() / MIB)
    return normtune_step(bench, model, images=images, steps=3, seconds=6) | row


def compiled_layers(bench: Workbench, figures: Figures) -> None:
    """torch.compile of the language model's layers, off and on, and how many graphs it makes."""
    figures["compile off"] = attempt(lambda: normtune_step(bench, "llava", seconds=4))
    figures["compile on"] = attempt(lambda: _compiled_step(bench))


def _compiled_step(bench: Workbench) -> Figures:
    """Measure a compiled training step, the time with compilation, and the graphs that it makes."""
    import torch._dynamo.utils as dynamo

    _, family = bench.model("llava")
    torch._dynamo.reset()  # graphs of earlier parts, such as FlexAttention's, are not counted
    dynamo.counters.clear()
    began = time.perf_counter()
    row = normtune_step(bench, "llava", compiled=True, seconds=4, warmup=2)
    return row | {
        "with_compilation_s": round(time.perf_counter() - began, 1),
        # more graphs than kinds of layers: each layer is compiled anew
        "graphs": dynamo.counters["stats"].get("unique_graphs"),
        "layers": len(family.decoder.layers),
    }
