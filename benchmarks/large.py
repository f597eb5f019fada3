"""Time and memory of every command on a 7B LLaVA-Med, from import to answers in 8 and 4 bits.

    python benchmarks/large.py --data slake --root DIR --work DIR --out benchmarks/large.json

It writes a checkpoint of LLaVA-Med v1.5's full size (7.57 B random parameters, bf16, in the original layout)
shard by shard, and runs the commands as a user runs them, each in its own process: import; inspect; one
training step on one image with all its questions and then the answers to these questions, with the base in
int8 and in nf4 (pip install 'normtune[quantize]'); merge and export of the trained norms. The memory of a
process is its anonymous memory (RssAnon), sampled every 20 ms; pages of mapped files are not counted, since
the system can drop them at any time. The table also has the estimate of the memory planner (`inspect
--data`). 35 GB of disk are needed. The result of a finished command is kept in --work, and the command is not
run again.
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
from normtune.models.checkpoints.writer import PlannedTensor, write_safetensors
from normtune.models.loading import meta_model
from normtune.models.quantization import PACKAGES
from normtune.runtime.files import read_json, write_json
from normtune.runtime.memory import read_status_bytes
from normtune.runtime.text_table import markdown_table

SHARD_BYTES = 2 * 10**9
SAMPLING_S = 0.02  # seconds between two samples of the memory
VOCABULARY = 32000
ORIGINAL_NAMES = (  # pattern of a name in transformers -> the name in the original layout
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
    parser.add_argument("--out", type=Path, help="JSON file; the table is written next to it as .md")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoints and results")
    parser.add_argument("--data", default="slake")
    parser.add_argument("--root", type=Path, help="the dataset's folder")
    parser.add_argument(
        "--dtype", default="float32", help="dtype of the weights that are not quantised, and of the computation"
    )
    parser.add_argument("--memory", default="fast", help="memory tier of the training step")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    rows = [*run_import(options), *(row for kind in PACKAGES for row in run_quantised(options, kind))]
    rows += run_merge_and_export(options)
    for row in rows:
        row["came_of"] = describe_result(row, row.pop("found"))  # the output itself contains paths
    print(table(rows))
    if options.out:
        packages = {package: version(package) for package in PACKAGES.values()}
        shared = {"data": options.data, "dtype": options.dtype, "memory": options.memory}
        record(options.out, "large", rows, quantised_by=packages, **shared)
        options.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")


# --- The commands -------------------------------------------------------------------------------------------


def run_import(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Write the checkpoint in its original layout, then import and inspect it."""
    original, model = options.work / "original", options.work / "model"
    if not model.is_dir() and not (original / "config.json").is_file():
        start = time.perf_counter()
        write_original(original, options)
        print(f"written in {time.perf_counter() - start:.0f} s", flush=True)
    imported = run_cli(options, "import", "import-llava-med", str(original), str(model))
    shutil.rmtree(original, ignore_errors=True)
    return [imported, run_cli(options, "inspect", "inspect", str(model), "--tune", "language=ln")]


def run_quantised(options: argparse.Namespace, kind: str) -> list[dict[str, Any]]:
    """Plan and run one training step on one image with all its questions, then answer them."""
    adapter, scores = options.work / f"ln-{kind}", options.work / f"scores-{kind}"
    dataset = open_dataset(options.data, options.root)
    pairs = len(group_by_image(dataset.split("train"))[0])
    model = [str(options.work / "model"), "--data", options.data, "--root", str(options.root)]
    base_args = ["--quantize", kind, "--dtype", options.dtype, "--device", "cpu", "--limit", str(pairs)]
    step_args = ["--tune", "language=ln", "--batch", str(pairs), "--memory", options.memory]
    plan = run_cli(options, f"plan {kind}", "inspect", *model, *base_args, *step_args)
    run_args = ["--epochs", "1", "--no-resume", "--out", str(adapter)]
    training = run_cli(options, f"train {kind}", "train", *model, *base_args, *step_args, *run_args)
    training |= {"planned": plan["found"]["plan"]["asked"]["total"], "pairs": pairs}
    evaluation = run_cli(
        options,
        f"evaluate {kind}",
        "evaluate",
        *model,
        *base_args,
        *("--split", "train", "--batch", str(pairs), "--max-new-tokens", "4"),
        *("--adapter", str(adapter), "--out", str(scores)),
    )
    return [plan, training, evaluation | {"pairs": pairs}]


def run_merge_and_export(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Merge the trained norms into the base's files, and export them."""
    model, adapter = options.work / "model", options.work / "ln-int8"
    merged, peft = options.work / "merged", options.work / "peft"
    rows = [
        run_cli(options, "merge", "merge", str(model), "--adapter", str(adapter), "--out", str(merged)),
        run_cli(options, "export", "export", "--adapter", str(adapter), "--to", "peft", "--out", str(peft)),
    ]
    for row, folder in zip(rows, (merged, peft), strict=True):
        stats = [path.stat() for path in folder.rglob("*") if path.is_file()]
        row["new_bytes"] = sum(stat.st_size for stat in stats if stat.st_nlink == 1)
    return rows


def run_cli(options: argparse.Namespace, name: str, *arguments: str) -> dict[str, Any]:
    """Run `normtune ARGUMENTS --json`.

    Returns:
        The command's name, seconds, peak bytes of anonymous memory, and its JSON output under "found".

    Raises:
        SystemExit: the command failed; the message has the end of its log.
    """
    stem = options.work / name.replace(" ", "-")
    if (finished := stem.with_suffix(".json")).is_file():
        return dict(read_json(finished))
    print(f"{time.strftime('%X')} {name} ...", flush=True)
    out, log = stem.with_suffix(".out"), stem.with_suffix(".log")
    start = time.perf_counter()
    with open(out, "w") as printed, open(log, "w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "normtune", *arguments, "--json"], stdout=printed, stderr=errors
        )
        peak = watch_peak(process)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{name} failed: {log.read_text()[-2000:]}")
    row = {"command": name, "seconds": seconds, "peak_bytes": peak, "found": json.loads(out.read_text())}
    print(f"{name}: {seconds:.1f} s, {peak / 2**30:.2f} GiB", flush=True)
    write_json(finished, row)
    return row


def watch_peak(process: subprocess.Popen[bytes]) -> int:
    """The highest RssAnon of a process, sampled until it ends."""
    peak = 0
    while process.poll() is None:
        peak = max(peak, read_status_bytes("RssAnon", process.pid) or 0)
        time.sleep(SAMPLING_S)
    return peak


# --- The checkpoint -----------------------------------------------------------------------------------------


def write_original(folder: Path, options: argparse.Namespace) -> None:
    """Write random weights with LLaVA-Med v1.5's names and sizes, and a tokenizer trained on the data."""
    folder.mkdir(exist_ok=True)
    shape = LlavaShape()
    shape.learn_words([f"{e.question} {e.answer}" for e in open_dataset(options.data, options.root).examples])
    shape._processor.tokenizer.save_pretrained(folder)
    tensors = list(map(plan_tensor, meta_model("llava-med-7b").state_dict().items()))
    shards: list[list[PlannedTensor]] = [[]]
    for tensor in tensors:
        if sum(planned.bytes for planned in shards[-1]) + tensor.bytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    file_of_tensor = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard)
        file_of_tensor |= {planned.name: file for planned in shard}
    index = {"metadata": {"total_size": sum(planned.bytes for planned in tensors)}, "weight_map": file_of_tensor}
    write_json(folder / "model.safetensors.index.json", index)
    text = meta_model("llava-med-7b").config.text_config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: getattr(text, name) for name in (*names, "num_key_value_heads", "rms_norm_eps")}
    write_json(folder / "config.json", CONFIG | sizes)


def plan_tensor(item: tuple[str, Tensor]) -> PlannedTensor:
    """A random tensor for a (name, meta tensor) of the imported model, under its original name."""
    name, tensor = item
    for pattern, original in ORIGINAL_NAMES:
        name = re.sub(f"^{pattern}", original, name)
    rows = VOCABULARY if "embed_tokens" in name or name == "lm_head.weight" else tensor.shape[0]
    shape = (rows, *tensor.shape[1:])
    return PlannedTensor(name, torch.bfloat16, shape, name, partial(random_tensor, shape, "norm" in name))


def random_tensor(shape: Sequence[int], gain: bool) -> Tensor:
    """Gains near 1, biases near 0, and matrices that keep the variance of the activations."""
    if len(shape) == 1:
        return (float(gain) + 0.02 * torch.randn(shape)).bfloat16()
    return torch.randn(shape, dtype=torch.float32).mul_(math.prod(shape[1:]) ** -0.5).bfloat16()


# --- The table ----------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table, one row per command."""
    lines = []
    for row in rows:
        planned = f"{row['planned'] / 2**30:.2f}" if "planned" in row else "–"
        cells = [row["command"], f"{row['seconds']:.1f}", f"{row['peak_bytes'] / 2**30:.2f}", planned, row["came_of"]]
        lines.append(cells)
    header = ["command", "seconds", "memory, GiB", "planned, GiB", "result"]
    return "\n".join(markdown_table(header, lines, "lrrrl")) + "\n"


def describe_result(row: dict[str, Any], output: dict[str, Any]) -> str:
    """The last cell of a row: the result of a command in a few words."""
    kind = row["command"].split()[0]
    if kind == "import":
        return f"{output['parameters']:,} parameters, {output['bytes'] / 1e9:.1f} GB written"
    if kind == "train":
        return f"one step of {row['pairs']} pairs on one image, loss {output['final_loss']:.3f}"
    if kind == "evaluate":
        return f"{row['pairs']} answers of at most 4 tokens"
    if "new_bytes" in row:
        return f"{row['new_bytes'] / 1e6:.2f} MB new on disk"
    if kind == "inspect":
        return f"{output['recipe']['trainable']:,} of {output['total']:,} would be trained"
    return "the planner's table"


if __name__ == "__main__":
    main()
