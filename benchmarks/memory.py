"""Memory kept for the backward pass, of a LLaMA block in bf16 and of a SLAKE image with its questions.

    python benchmarks/memory.py --slake DIR --out benchmarks/memory.json

1. A LLaMA block: bytes per token and layer that are alive after the forward pass, with stock transformers and
   PEFT, and with each of Normtune's memory tiers; and the time of a training step (fp32, interleaved rounds).
2. A whole training step on groups of SLAKE (LLaVA's shape, 576 image tokens, fp32): the peak bytes of live
   tensors per pair, compared with PEFT LoRA on all linears and one row per question.

Weights are not counted; gradients and all results of operations are
(`normtune.training.memory_plan.live_bytes`).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from record import record
from shape_llava import LlavaShape
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from normtune.data.groups import group_by_image
from normtune.data.records import Dataset, Example
from normtune.data.registry import open_dataset
from normtune.methods.adapt import adapt
from normtune.models.image_cache import ImageCache
from normtune.models.norm_kinds import norms
from normtune.runtime.text_table import markdown_table
from normtune.training.collator import Collator
from normtune.training.layer_wrapping import MemoryTier, checkpoint_activations
from normtune.training.memory_plan.live_bytes import LiveTensorBytes
from normtune.training.saved_activations import save_fewer_activations

WIDTH, FORWARD, HEADS = 512, 1376, 8
# bytes per token that the backward pass needs in bf16; see `normtune.training.saved_activations`
NEEDED_BYTES = 4 * FORWARD + 8 * WIDTH + 4 * WIDTH + 4 * HEADS + 8
TIERS: tuple[MemoryTier, ...] = ("fast", "balanced", "tight")
PEERS = ("PEFT LN_TUNING", "PEFT LoRA r8 q,v", "PEFT LoRA r8 all-linear", "full")
OURS = tuple(f"normtune ln, {tier}" for tier in TIERS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slake", type=Path, help="SLAKE's folder, to measure groups of it too")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--length", type=int, default=776, help="tokens of the block's input")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--groups", type=int, default=3, help="images of SLAKE")
    options = parser.parse_args()
    rows = block_rows(options.length, options.rounds)
    tables = block_table(rows)
    print(tables)
    slake_rows: list[dict[str, Any]] = []
    if options.slake:
        slake_rows = group_rows(options.slake, options.groups)
        tables += "\n" + group_table(slake_rows)
        print("\n" + group_table(slake_rows))
    if options.out:
        shape = {"width": WIDTH, "feed_forward": FORWARD, "heads": HEADS, "tokens": options.length}
        record(options.out, "memory", rows, groups=slake_rows, block=shape | {"needed": NEEDED_BYTES})
        options.out.with_suffix(".md").write_text(tables, encoding="utf-8")


# --- 1. a block ---------------------------------------------------------------------------------------------


def block_rows(length: int, rounds: int) -> list[dict[str, Any]]:
    """One row per method: bytes per token and layer, and seconds per step."""
    methods = (*PEERS, *OURS)
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    runs = {method: build_step(method, layers=4, length=length) for method in methods}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for method, run in runs.items():
            seconds[method].append(run())
    medians = {method: statistics.median(values) for method, values in seconds.items()}
    rows = []
    for method in methods:
        measured = bytes_per_token_and_layer(method, length)
        row = {"method": method, "bytes": measured, "of_needed": measured / NEEDED_BYTES, "seconds": seconds[method]}
        row["time_against_fast"] = medians[method] / medians[OURS[0]]
        rows.append(row)
    return rows


def block_model(method: str, layers: int, dtype: torch.dtype) -> tuple[nn.Module, MemoryTier | None]:
    """(a LLaMA with `method` applied, its memory tier); the tier is None for a peer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=FORWARD, num_hidden_layers=layers, num_attention_heads=HEADS, vocab_size=64
    )
    model: Any = LlamaModel(config).to(dtype)
    if method in OURS:
        adapt(model, "language=ln")
        return model, TIERS[OURS.index(method)]
    if "LN" in method:
        model = get_peft_model(model, LNTuningConfig(target_modules=list(norms(model))))
    elif "LoRA" in method:
        targets = "all-linear" if "all" in method else ["q_proj", "v_proj"]
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    return model, None


def forward_mean(model: Any, length: int, dtype: torch.dtype) -> Tensor:
    """The mean of the last hidden states, a scalar to call backward() on."""
    states = torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    mask = torch.full((length, length), -torch.inf).triu(1).to(dtype)[None, None]
    return model(inputs_embeds=states, attention_mask=mask, use_cache=False).last_hidden_state.float().mean()


def tier_contexts(model: nn.Module, tier: MemoryTier | None) -> tuple[Any, Any]:
    """The context managers of a memory tier; they do nothing for a peer."""
    return (
        (nullcontext(), nullcontext())
        if tier is None
        else (save_fewer_activations(model), checkpoint_activations(model, tier))
    )


def build_step(method: str, layers: int, length: int) -> Callable[[], float]:
    """A function that runs one forward and backward pass in fp32 and returns its seconds."""
    model, tier = block_model(method, layers, torch.float32)

    def run() -> float:
        first, second = tier_contexts(model, tier)
        with first, second:
            start = time.perf_counter()
            forward_mean(model, length, torch.float32).backward()
            return time.perf_counter() - start

    return run


def bytes_per_token_and_layer(method: str, length: int) -> float:
    """Measured as the difference of six layers and two, so that memory outside the layers cancels out."""
    live_bytes = []
    for layers in (2, 6):
        model, tier = block_model(method, layers, torch.bfloat16)
        first, second = tier_contexts(model, tier)
        with first, second, LiveTensorBytes() as tensor_bytes:
            loss = forward_mean(model, length, torch.bfloat16)
            live_bytes.append(tensor_bytes.now + 0 * loss.numel())
    return (live_bytes[1] - live_bytes[0]) / 4 / length


def block_table(rows: Sequence[dict[str, Any]]) -> str:
    header = [f"a LLaMA block, d = {WIDTH}, bf16", "bytes a token and layer", "of what is needed", "step time"]
    lines = [
        [row["method"], f"{row['bytes']:,.0f}", f"{row['of_needed']:.2f}", f"{row['time_against_fast']:.2f}x"]
        for row in rows
    ]
    return "\n".join(markdown_table(header, lines)) + "\n"


# --- 2. groups of SLAKE -------------------------------------------------------------------------------------


def group_rows(root: Path, count: int) -> list[dict[str, Any]]:
    """Peak bytes per pair of training steps, each on one image and all its questions."""
    shape = LlavaShape()
    dataset = open_dataset("slake", root)
    shape.learn_words([f"{e.question} {e.answer}" for e in dataset.examples])
    groups = sorted(group_by_image(dataset.split("train")), key=len)
    selected = [groups[int((i + 0.5) * len(groups) / count)] for i in range(count)]
    rows = []
    for method in (*OURS, "normtune lora-8, fast", *PEERS[:3], f"{PEERS[2]}, checkpointed"):
        peaks = [peak_bytes(shape, dataset, members, method) for members in selected]
        pairs = sum(len(members) for members in selected)
        rows.append({"method": method, "peaks": peaks, "bytes_a_pair": sum(peaks) / pairs, "pairs": pairs})
        print(f"{method:<40} {rows[-1]['bytes_a_pair'] / 2**20:8.2f} MiB a pair", flush=True)
    for row in rows:
        row["ratio"] = row["bytes_a_pair"] / rows[0]["bytes_a_pair"]
    return rows


def peak_bytes(shape: LlavaShape, dataset: Dataset, members: Sequence[Example], method: str) -> int:
    """The most bytes of live tensors in one training step on one image and its questions."""
    torch.manual_seed(0)
    if method.startswith("normtune"):
        family = shape.build_family()
        recipe, tier = method.removeprefix("normtune ").split(", ")
        adapt(family.model, recipe)
        batch = Collator(family, ImageCache(family, dataset))([members])
        with (
            save_fewer_activations(family.model),
            checkpoint_activations(family.model, tier),
            LiveTensorBytes() as tensor_bytes,
        ):  # type: ignore[arg-type]
            family.loss(batch)[0].backward()
            return tensor_bytes.peak
    peer, checkpointed, _ = method.removeprefix("PEFT ").partition(", checkpointed")
    model, rows, collate = shape.build_peer(peer, dataset, members)
    model.train()
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    inputs = collate(rows)
    with LiveTensorBytes() as tensor_bytes:
        model(**inputs).loss.backward()
        return tensor_bytes.peak


def group_table(rows: Sequence[dict[str, Any]]) -> str:
    header = ["one SLAKE image and its questions, LLaVA's shape", "MiB a pair", "against ln, fast"]
    lines = []
    for row in rows:
        lines.append([row["method"], f"{row['bytes_a_pair'] / 2**20:.2f}", f"{row['ratio']:.2f}x"])
    return "\n".join(markdown_table(header, lines)) + "\n"


if __name__ == "__main__":
    main()
