"""A 7B LLaVA-Med on disk, from import to answers in 8 and 4 bits: time and memory of every command.

    python benchmarks/large.py --data slake --root DIR --work DIR --out benchmarks/large.json

A checkpoint of LLaVA-Med v1.5's full size (7.57 B parameters, random, bf16, in the original layout) is
written shard by shard; then the commands are run as a user runs them, each a process of its own: import,
inspect, one training step on one image with all its questions, and their answers, with the base in int8 and
in nf4 (pip install 'normtune[quantize]'); merge and export of the trained norms. Memory is what a process
holds of its own (RssAnon: pages of mapped files can be dropped at any time), sampled every 20 ms. The
planner's word (`inspect --data`) stands beside it. Needs 35 GB of disk; a command that is done is kept in
--work, and not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from record import record
from shape_llava import LlavaShape
from torch import Tensor

from normtune.data.groups import group_by_image
from normtune.data.registry import open_dataset
from normtune.models.checkpoints.writer import Planned, write_safetensors
from normtune.models.loading import meta_model
from normtune.models.quantization import PACKAGES
from normtune.runtime.files import read_json, write_json
from normtune.runtime.memory import status_bytes

SHARD_BYTES = 2 * 10**9
SAMPLING = 0.02  # seconds
VOCABULARY = 32000
ORIGINAL = (  # names in transformers -> names in the original layout
    (r"model\.language_model\.", "model."),
    (r"model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
    (r"model\.multi_modal_projector\.linear_1", "model.mm_projector.0"),
    (r"model\.multi_modal_projector\.linear_2", "model.mm_projector.2"),
)
CONFIG = {
    "architectures": ["LlavaMistralForCausalLM"],
    "model_type": "llava_mistral",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "initializer_range": 0.02,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_mm_proj": True,
    "image_aspect_ratio": "pad",
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file; the table goes beside it")
    parser.add_argument("--work", type=Path, required=True, help="where the checkpoints lie")
    parser.add_argument("--data", default="slake")
    parser.add_argument("--root", type=Path, help="the data set's folder")
    parser.add_argument("--dtype", default="float32", help="of what is not quantised, and of the arithmetic")
    parser.add_argument("--memory", default="fast", help="the tier of the training step")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = [*on_disk(options), *(row for kind in PACKAGES for row in quantised(options, kind))]
    rows += after(options)
    for row in rows:
        row["came_of"] = came_of(row, row.pop("found"))  # what is printed has paths in it
    print(table(rows))
    if options.out:
        packages = {package: version(package) for package in PACKAGES.values()}
        about = {"data": options.data, "dtype": options.dtype, "memory": options.memory}
        record(options.out, "large", rows, quantised_by=packages, **about)
        options.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")


# --- What is run --------------------------------------------------------------------------------------------


def on_disk(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The checkpoint in its original layout, and its import."""
    original, model = options.work / "original", options.work / "model"
    if not model.is_dir() and not (original / "config.json").is_file():
        began = time.perf_counter()
        write_original(original, options)
        print(f"written in {time.perf_counter() - began:.0f} s", flush=True)
    imported = command(options, "import", "import-llava-med", str(original), str(model))
    shutil.rmtree(original, ignore_errors=True)
    return [imported, command(options, "inspect", "inspect", str(model), "--tune", "language=ln")]


def quantised(options: argparse.Namespace, kind: str) -> list[dict[str, Any]]:
    """One training step of one image with all its questions, and the answers to them."""
    adapter, scores = options.work / f"ln-{kind}", options.work / f"scores-{kind}"
    dataset = open_dataset(options.data, options.root)
    pairs = len(group_by_image(dataset.split("train"))[0])
    model = [str(options.work / "model"), "--data", options.data, "--root", str(options.root)]
    held = ["--quantize", kind, "--dtype", options.dtype, "--device", "cpu", "--limit", str(pairs)]
    step = ["--tune", "language=ln", "--batch", str(pairs), "--memory", options.memory]
    planned = command(options, f"plan {kind}", "inspect", *model, *held, *step)
    once = ["--epochs", "1", "--no-resume", "--out", str(adapter)]
    trained = command(options, f"train {kind}", "train", *model, *held, *step, *once)
    trained |= {"planned": planned["found"]["plan"]["asked"]["total"], "pairs": pairs}
    answered = command(
        options,
        f"evaluate {kind}",
        "evaluate",
        *model,
        *held,
        *("--split", "train", "--batch", str(pairs), "--max-new-tokens", "4"),
        *("--adapter", str(adapter), "--out", str(scores)),
    )
    return [planned, trained, answered | {"pairs": pairs}]


def after(options: argparse.Namespace) -> list[dict[str, Any]]:
    """What was trained, merged into the base's files and exported."""
    model, adapter = options.work / "model", options.work / "ln-int8"
    merged, peft = options.work / "merged", options.work / "peft"
    rows = [
        command(options, "merge", "merge", str(model), "--adapter", str(adapter), "--out", str(merged)),
        command(options, "export", "export", "--adapter", str(adapter), "--to", "peft", "--out", str(peft)),
    ]
    for row, folder in zip(rows, (merged, peft), strict=True):
        sizes = [path.stat() for path in folder.rglob("*") if path.is_file()]
        row["new_bytes"] = sum(size.st_size for size in sizes if size.st_nlink == 1)
    return rows


def command(options: argparse.Namespace, name: str, *words: str) -> dict[str, Any]:
    """Run `normtune WORDS --json`; its seconds, the most memory that it held of its own, and what it found.

    Raises:
        SystemExit: the command failed; its last words are shown.
    """
    stem = options.work / name.replace(" ", "-")
    if (done := stem.with_suffix(".json")).is_file():
        return dict(read_json(done))
    print(f"{time.strftime('%X')} {name} ...", flush=True)
    out, log = stem.with_suffix(".out"), stem.with_suffix(".log")
    began = time.perf_counter()
    with open(out, "w") as printed, open(log, "w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "normtune", *words, "--json"], stdout=printed, stderr=errors
        )
        peak = watched(process)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(f"{name} failed: {log.read_text()[-2000:]}")
    row = {"command": name, "seconds": seconds, "peak_bytes": peak, "found": json.loads(out.read_text())}
    print(f"{name}: {seconds:.1f} s, {peak / 2**30:.2f} GiB", flush=True)
    write_json(done, row)
    return row


def watched(process: subprocess.Popen[bytes]) -> int:
    """The most RssAnon of a process until it ends."""
    peak = 0
    while process.poll() is None:
        peak = max(peak, status_bytes("RssAnon", process.pid) or 0)
        time.sleep(SAMPLING)
    return peak


# --- The checkpoint -----------------------------------------------------------------------------------------


def write_original(folder: Path, options: argparse.Namespace) -> None:
    """Random weights of LLaVA-Med v1.5's size under its names, and a tokenizer of the data's words."""
    folder.mkdir(exist_ok=True)
    shape = LlavaShape()
    shape.learn_words([f"{e.question} {e.answer}" for e in open_dataset(options.data, options.root).examples])
    shape._processor.tokenizer.save_pretrained(folder)
    tensors = list(map(planned_tensor, meta_model("llava-med-7b").state_dict().items()))
    shards: list[list[Planned]] = [[]]
    for tensor in tensors:
        if sum(one.bytes for one in shards[-1]) + tensor.bytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    places = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard)
        places |= {one.name: file for one in shard}
    index = {"metadata": {"total_size": sum(one.bytes for one in tensors)}, "weight_map": places}
    write_json(folder / "model.safetensors.index.json", index)
    text = meta_model("llava-med-7b").config.text_config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: getattr(text, name) for name in (*names, "num_key_value_heads", "rms_norm_eps")}
    write_json(folder / "config.json", CONFIG | sizes)


def planned_tensor(named: tuple[str, Tensor]) -> Planned:
    name, tensor = named
    for pattern, original in ORIGINAL:
        name = re.sub(f"^{pattern}", original, name)
    rows = VOCABULARY if "embed_tokens" in name or name == "lm_head.weight" else tensor.shape[0]
    shape = (rows, *tensor.shape[1:])
    return Planned(name, torch.bfloat16, shape, name, partial(random, shape, "norm" in name))


def random(shape: Sequence[int], gain: bool) -> Tensor:
    """Near 1 for gains; else so wide that a layer keeps the size of what passes through it."""
    if len(shape) == 1:
        return (float(gain) + 0.02 * torch.randn(shape)).bfloat16()
    return torch.randn(shape, dtype=torch.float32).mul_(math.prod(shape[1:]) ** -0.5).bfloat16()


# --- The table ----------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| command | seconds | memory, GiB | planned, GiB | what came of it |",
        "|---|---:|---:|---:|---|",
    ]
    for row in rows:
        planned = f"{row['planned'] / 2**30:.2f}" if "planned" in row else "–"
        lines.append(
            f"| {row['command']} | {row['seconds']:.1f} | {row['peak_bytes'] / 2**30:.2f} | {planned} "
            f"| {row['came_of']} |"
        )
    return "\n".join(lines) + "\n"


def came_of(row: dict[str, Any], found: dict[str, Any]) -> str:
    kind = row["command"].split()[0]
    if kind == "import":
        return f"{found['parameters']:,} parameters, {found['bytes'] / 1e9:.1f} GB written"
    if kind == "train":
        return f"one step of {row['pairs']} pairs on one image, loss {found['final_loss']:.3f}"
    if kind == "evaluate":
        return f"{row['pairs']} answers of at most 4 tokens"
    if "new_bytes" in row:
        return f"{row['new_bytes'] / 1e6:.2f} MB new on disk"
    if kind == "inspect":
        return f"{found['recipe']['trainable']:,} of {found['total']:,} would be trained"
    return "the planner's table"


if __name__ == "__main__":
    main()
