"""Planned memory of training steps at real model shapes, for docs/which-gpu.md: no weights and no GPU are needed.

    python benchmarks/which_gpu.py --out benchmarks/which_gpu.json

A step has 2 images with 11 questions each, as in `normtune bench gpu`, and a bf16 base. It runs on fake tensors; their
bytes are counted as `normtune inspect` counts them. torch without CUDA has no fake CUDA tensors, so that the plan is
made on the CPU without what only a CPU has: the program, the caches, and what the C library keeps. `comparison` sets
it against the measurements in benchmarks/gpu.json.

The shapes are those of the published configs. LLaVA-Med 7B and MedGemma 4B are in `gpu_models`; MISS has the defaults
of `MissConfig` (480 pixels). The others, as width / feed-forward / layers / heads (key heads) / vocabulary:

    Qwen2.5-VL 3B   2048 / 11008 / 36 / 16 (2) / 151936, tied; encoder 1280 / 3420 / 32 / 16
    Qwen2.5-VL 7B   3584 / 18944 / 28 / 28 (4) / 152064; the same encoder
                    an image of 504 x 504 pixels, which is 324 tokens
    SmolVLM 2B      2048 / 8192 / 24 / 32 (32) / 49155; encoder 1152 / 4304 / 27 / 16
                    an image of 1536 x 1536 pixels in 17 tiles of 384 x 384, which is 1377 tokens
"""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_models import IGNORED, QUESTIONS_PER_IMAGE, Shape, model_shape
from gpu_normtune import build_family
from record import write_record
from torch import Tensor

from normtune.methods.adapt import adapt
from normtune.models.quantization import PACKAGES, quantised_linears
from normtune.runtime.text_table import markdown_table
from normtune.training.layer_wrapping import MemoryTier, checkpoint_activations
from normtune.training.memory_plan.fake_model import BooleanIndexing, model_bytes, use_fake_tensors
from normtune.training.memory_plan.live_bytes import LiveTensorBytes
from normtune.training.memory_plan.quantized import linear_bytes
from normtune.training.saved_activations import save_fewer_activations

GPU_SIZES = (8, 12, 16, 24, 40, 80)  # GB of the GPUs on the page
USABLE = 0.9  # of a GPU's memory: the rest is for the driver, the display and fragments
TIERS: tuple[MemoryTier, ...] = ("fast", "tight")  # `balanced` is between them
RECIPES = ("ln", "lora(r=16)", "full")
LARGEST_FULL = 3e9  # parameters of a model up to which `full` is planned: it takes 20 bytes for each without a step
IMAGES = 2  # of the planned step
GIB = 2**30
Row = Mapping[str, Any]  # a plan, as `plan_options` returns it
# what `normtune train` is given for each model: a name of the hub, or the folder of an import
SOURCES = {
    "MISS": "miss",
    "SmolVLM 2B": "HuggingFaceTB/SmolVLM-Instruct",
    "Qwen2.5-VL 3B": "Qwen/Qwen2.5-VL-3B-Instruct",
    "MedGemma 4B": "google/medgemma-4b-it",
    "LLaVA-Med 7B": "llava-med",
    "Qwen2.5-VL 7B": "Qwen/Qwen2.5-VL-7B-Instruct",
}
# (part and measurement of benchmarks/gpu.json, model, recipe, memory tier, quantisation)
MEASURED: tuple[tuple[str, str, str, str, str, str | None], ...] = (
    ("llava-step", "normtune ln", "LLaVA-Med 7B", "ln", "fast", None),
    ("llava-step", "normtune ln, tight", "LLaVA-Med 7B", "ln", "tight", None),
    ("llava-step", "normtune lora(r=16)", "LLaVA-Med 7B", "lora(r=16)", "fast", None),
    ("quantized", "int8", "LLaVA-Med 7B", "ln", "fast", "int8"),
    ("quantized", "nf4", "LLaVA-Med 7B", "ln", "fast", "nf4"),
    ("largest-batch", "normtune ln", "LLaVA-Med 7B", "ln", "fast", None),
    ("medgemma-step", "normtune ln", "MedGemma 4B", "ln", "fast", None),
    ("medgemma-step", "normtune ln, tight", "MedGemma 4B", "ln", "tight", None),
    ("medgemma-step", "normtune ln, int8 base, 2 x 11", "MedGemma 4B", "ln", "fast", "int8"),
    ("medgemma-step", "normtune ln, nf4 base, 2 x 11", "MedGemma 4B", "ln", "fast", "nf4"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--models", nargs="+", choices=SOURCES, default=list(SOURCES))
    options = parser.parse_args()
    rows = []
    for name in options.models:
        for recipe in RECIPES:
            began = time.perf_counter()
            rows += plan_options(name, recipe)
            print(f"{name}, {recipe}: {time.perf_counter() - began:.0f} s", flush=True)
            if options.out:  # rewritten as plans arrive: all of them take minutes
                about = {"device": "cpu", "dtype": "bfloat16", "questions_per_image": QUESTIONS_PER_IMAGE}
                write_record(options.out, "which_gpu", rows, **about)
    print(peak_table(rows))


# --- shapes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageShape:
    """A model's shape, and the values of one preprocessed image."""

    shape: Shape
    image: Mapping[str, Tensor]


def image_shape(name: str) -> ImageShape:
    """The shape of a model of `SOURCES`."""
    if name == "MISS":
        from normtune.models.miss.config import MissConfig

        config = MissConfig()
        size = config.vision_dims["image_size"]
        return ImageShape(Shape("miss", config, IGNORED, (), 1), {"pixel_values": torch.zeros(3, size, size)})
    if name.startswith("Qwen"):
        return _qwen_shape(small=name.endswith("3B"))
    if name.startswith("SmolVLM"):
        return _smolvlm_shape()
    shape = model_shape("llava" if name.startswith("LLaVA") else "gemma3", tiny=False)
    return ImageShape(shape, {"pixel_values": shape.pixels(0)})


def _qwen_shape(small: bool) -> ImageShape:
    from transformers import Qwen2_5_VLConfig

    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    sizes = (2048, 11008, 36, 16, 2) if small else (3584, 18944, 28, 28, 4)
    text: dict[str, Any] = dict(zip(names, sizes, strict=True)) | {"vocab_size": 151936 if small else 152064}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vision = {"hidden_size": 1280, "out_hidden_size": text["hidden_size"]}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=small)
    side = 36  # patches of 14 pixels; 2 x 2 of them are a token
    image = {"pixel_values": torch.zeros(side**2, 3 * 2 * 14**2), "image_grid_thw": torch.tensor([1, side, side])}
    tokens = [config.image_token_id] * (side // 2) ** 2
    prefix = (*range(15), config.vision_start_token_id, *tokens, config.vision_end_token_id)  # with a system prompt
    return ImageShape(Shape("qwen2_5_vl", config, config.image_token_id, prefix, 1), image)


def _smolvlm_shape() -> ImageShape:
    from transformers import Idefics3Config

    text = {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
    text |= {"num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 64, "vocab_size": 49155}
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    vision |= {"image_size": 384, "patch_size": 14}
    token, tiles = 49153, 17
    config = Idefics3Config(
        text_config=text, vision_config=vision, scale_factor=3, image_token_id=token, pad_token_id=2
    )
    image = {
        "pixel_values": torch.ones(tiles, 3, 384, 384),  # tiles of zeros would be left out as padding
        "pixel_attention_mask": torch.ones(tiles, 384, 384, dtype=torch.bool),
    }
    # 27 x 27 patches of a tile become 9 x 9 tokens; a tile also has its row and column, and a token before it
    prefix = (1, 2, *([3, 4, *[token] * 81] * tiles), 3)
    return ImageShape(Shape("idefics3", config, token, prefix, 1), image)


def build(shape: Shape) -> Any:
    """The family around a model of this shape on the meta device, in bf16."""
    from transformers import AutoModelForImageTextToText

    from normtune.models.families.miss import MissFamily
    from normtune.models.miss.model import MissForQuestionAnswering

    with torch.device("meta"):
        if shape.kind == "miss":
            return MissFamily(MissForQuestionAnswering(shape.config).to(torch.bfloat16).eval(), None)
        model = AutoModelForImageTextToText.from_config(shape.config, attn_implementation="sdpa").to(torch.bfloat16)
    family = build_family(shape.kind, model, shape.image_prefix, shape.end_token)
    family.attention = "dense"
    return family


# --- plans --------------------------------------------------------------------------------------------------


def plan_options(name: str, recipe: str) -> list[dict[str, Any]]:
    """Plan a recipe with every memory tier and quantisation: a row for each, in bytes."""
    described = image_shape(name)
    family = build(described.shape)
    model = family.model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if recipe == "full" and parameters > LARGEST_FULL:
        return []
    linears: list[Any] = [model.get_submodule(linear) for linear in quantised_linears(model)]
    sizes = [(linear.out_features, linear.in_features) for linear in linears]
    tuned = adapt(model, recipe)
    kinds = (None, *PACKAGES) if sizes and recipe != "full" else (None,)
    rows = []
    with save_fewer_activations(model):
        use_fake_tensors(model, torch.device("cpu"))
        weights = model_bytes(model)
        # fp32: AdamW's two means, and the values before training
        optimiser = 3 * 4 * tuned.trainable
        for tier in TIERS:
            step = _step_bytes(family, described, tier)
            for kind in kinds:
                saved = linear_bytes(sizes, None, 2) - linear_bytes(sizes, kind, 2) if kind else 0
                # the weight of one layer is restored while it runs
                restored = 2 * max(rows * columns for rows, columns in sizes) if kind else 0
                rows.append(
                    {
                        "model": name,
                        "parameters": parameters,
                        "recipe": recipe,
                        "trained": tuned.trainable,
                        "memory": tier,
                        "quantize": kind,
                        "pairs": IMAGES * QUESTIONS_PER_IMAGE,
                        "weights": weights - saved,
                        "optimiser": optimiser,
                        "step": step + restored,
                        # the gradients, in fp32, do not grow with the batch
                        "per_pair": (step - 4 * tuned.trainable) / (IMAGES * QUESTIONS_PER_IMAGE),
                        "peak": weights - saved + optimiser + step + restored,
                    }
                )
    return rows


def _step_bytes(family: Any, described: ImageShape, tier: MemoryTier) -> int:
    """The most bytes of a forward and backward pass on top of the weights, gradients included."""
    groups, _ = described.shape.groups([QUESTIONS_PER_IMAGE] * IMAGES)
    with BooleanIndexing():
        batch = family.collate(groups, [[dict(described.image)] for _ in groups])
    with BooleanIndexing(), LiveTensorBytes() as counter, checkpoint_activations(family.model, tier):
        family.loss(batch)[0].backward()
    family.model.zero_grad(set_to_none=True)
    return counter.peak


# --- the page -----------------------------------------------------------------------------------------------


def usable_bytes(size: int) -> float:
    """Bytes that a run may take on a GPU of `size` GB."""
    return size * 1e9 * USABLE


def best_options(rows: Sequence[Row], size: int) -> Iterator[Row]:
    """The row of each model and recipe that fits on a GPU of `size` GB and gives up the least.

    An unquantised base is preferred, then fewer recomputed layers, then more bits.
    """
    order = [None, *PACKAGES]
    for model, recipe in dict.fromkeys((row["model"], row["recipe"]) for row in rows):
        options = [row for row in rows if (row["model"], row["recipe"]) == (model, recipe)]
        options.sort(key=lambda row: (order.index(row["quantize"]), TIERS.index(row["memory"])))
        yield from [row for row in options if row["peak"] <= usable_bytes(size)][:1]


def command(row: Row) -> str:
    """The command that trains as a row plans."""
    words = ["normtune train", SOURCES[row["model"]], "--data slake --root SLAKE"]
    words += [f"--tune {shlex.quote(row['recipe'])} --batch {row['pairs']}"]
    words += [f"--{name} {row[name]}" for name in ("memory", "quantize") if row[name] not in (None, "fast")]
    return " ".join([*words, "--out runs/adapter"])


def comparison(rows: Sequence[Row], gpu: Mapping[str, Any]) -> list[tuple[Row, int, float, float]]:
    """(row, pairs, planned bytes, measured bytes) of every plan that benchmarks/gpu.json has measured."""
    figures = {row["part"]: row.get("figures", {}) for row in gpu["rows"]}
    compared = []
    for part, name, *key in MEASURED:
        row = next(row for row in rows if [row["model"], row["recipe"], row["memory"], row["quantize"]] == key)
        pairs = figures[part][name]["pairs"]
        planned = row["peak"] + (pairs - row["pairs"]) * row["per_pair"]
        compared.append((row, pairs, planned, figures[part][name]["peak_mib"] * 2**20))
    return compared


def page(rows: Sequence[Row], gpu: Mapping[str, Any]) -> str:
    """The generated part of docs/which-gpu.md: commands by GPU size, all plans, plans against measurements."""
    compared = comparison(rows, gpu)
    measured = {id(row): bytes_ for row, pairs, _, bytes_ in compared if pairs == row["pairs"]}
    parts = []
    for size in GPU_SIZES:
        lines = [f"## {size} GB\n", "```console"]
        for row in best_options(rows, size):
            largest = row["pairs"] + int((usable_bytes(size) - row["peak"]) / row["per_pair"])
            peak = f"{row['peak'] / GIB:.1f} GiB planned"
            if id(row) in measured:
                peak += f", {measured[id(row)] / GIB:.1f} measured"
            lines += [f"# {row['model']}, {row['recipe']}: {peak}; --batch up to {largest:,}", command(row)]
        parts.append("\n".join([*lines, "```\n"]))
    deviations = [planned / bytes_ - 1 for _, _, planned, bytes_ in compared]
    parts.append(f"## All plans\n\nPlanned peak in GiB, by `--memory` and `--quantize`:\n\n{peak_table(rows)}")
    parts.append(
        f"## Plans against measurements\n\nOn one {gpu['machine']['accelerator']} the planned peaks deviate by "
        f"{min(deviations):+.1%} to {max(deviations):+.1%} from the measured ones:\n\n{comparison_table(compared)}"
    )
    return "\n".join(parts)


def peak_table(rows: Sequence[Row]) -> str:
    """Peaks in GiB: a line for each model and recipe, a column for each tier and quantisation."""
    columns = [(tier, kind) for kind in (None, *PACKAGES) for tier in TIERS]
    peaks = {(row["model"], row["recipe"], row["memory"], row["quantize"]): row["peak"] for row in rows}
    lines = []
    for model, recipe in dict.fromkeys((row["model"], row["recipe"]) for row in rows):
        values = [peaks.get((model, recipe, *column)) for column in columns]
        lines.append([model, recipe, *("–" if value is None else f"{value / GIB:.1f}" for value in values)])
    header = ["model", "recipe", *(tier if kind is None else f"{tier}, {kind}" for tier, kind in columns)]
    return "\n".join(markdown_table(header, lines)) + "\n"


def comparison_table(compared: Sequence[tuple[Row, int, float, float]]) -> str:
    header = ["model", "recipe", "memory", "quantize", "pairs", "planned GiB", "measured GiB", "deviation"]
    lines = []
    for row, pairs, planned, measured in compared:
        about = [row["model"], row["recipe"], row["memory"], row["quantize"] or "–", str(pairs)]
        values = [f"{planned / GIB:.1f}", f"{measured / GIB:.1f}", f"{planned / measured - 1:+.1%}"]
        lines.append([*about, *values])
    return "\n".join(markdown_table(header, lines)) + "\n"


if __name__ == "__main__":
    main()
