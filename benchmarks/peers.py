"""LoRA on one LLaVA checkpoint by LLaMA-Factory's and ms-swift's own commands, beside Normtune.

    python benchmarks/peers.py --slake DIR --llamafactory PYTHON --swift PYTHON --out benchmarks/peers.json

PYTHON is the interpreter of an environment in which the toolkit is installed. All train the language model
alone, in fp32, by steps of as many pairs: r=8 on query and value projections; Normtune by LN too. A toolkit's
command runs as its users run it, with its own preparation of images and texts; gradient checkpointing, which
both switch on, is off. A step's time is that between its loss and the one before, so that starting up is not
counted. All are interleaved in one run. Where torch has no CUDA, LLaMA-Factory 0.9.5 needs torchvision and
torchaudio that have none either.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from record import record
from shapes import SHAPES
from throughput import MORE, Timed, table, train_ours
from workload import Workload, ratio, sample, spread

from normtune.data.records import Dataset, Example
from normtune.data.registry import open_dataset
from normtune.errors import InputError
from normtune.models.loading import load

RECIPES = ("language=ln", "language=lora(r=8)")
TARGETS = ("q_proj", "v_proj")
PACKAGES = {"LLaMA-Factory": "llamafactory", "ms-swift": "ms-swift"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--slake", type=Path, required=True)
    parser.add_argument("--llamafactory", type=Path, help="a Python that has LLaMA-Factory")
    parser.add_argument("--swift", type=Path, help="a Python that has ms-swift")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pairs", type=int, default=24, help="question-answer pairs a step")
    parser.add_argument("--steps", type=int, default=2, help="counted steps of a toolkit in one round")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    dataset = open_dataset("slake", chosen.slake)
    examples = sample(dataset.split("train"), chosen.pairs * (chosen.steps * MORE + 1))
    work = Workload(SHAPES["llava"], "slake", dataset, examples)
    work.shape.learn_words([f"{e.question} {e.answer}" for e in dataset.examples])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        work.shape.family().save(folder / "base")
        as_messages(dataset, examples, folder)
        runs = methods(work, folder, chosen)
        speeds: dict[str, list[float]] = {name: [] for name in runs}
        for round_ in range(chosen.rounds):
            for name, run in runs.items():
                timed = run()
                speeds[name].append(timed.pairs / timed.seconds)
                print(f"round {round_ + 1}  {name:<30} {speeds[name][-1]:7.2f} pairs/s", flush=True)
    first = next(iter(speeds))
    rows = [
        {
            "method": name,
            "pairs_per_second": spread(values),
            "faster": ratio(speeds[first], values),
            "rounds": values,
        }
        for name, values in speeds.items()
    ]
    print("\n" + table(rows, first))
    if chosen.out:
        pythons = {"LLaMA-Factory": chosen.llamafactory, "ms-swift": chosen.swift}
        record(
            chosen.out,
            "peers",
            rows,
            **work.about(),
            pairs_a_step=chosen.pairs,
            steps=chosen.steps,
            toolkits={name: versions(python, name) for name, python in pythons.items() if python},
        )
        chosen.out.with_suffix(".md").write_text(table(rows, first), encoding="utf-8")


def methods(work: Workload, folder: Path, chosen: argparse.Namespace) -> dict[str, Callable[[], Timed]]:
    """What is timed, by name; Normtune's first."""
    runs: dict[str, Callable[[], Timed]] = {}
    for recipe in RECIPES:
        runs[f"normtune {recipe}"] = lambda recipe=recipe: train_ours(
            load(str(folder / "base")), work, work.dataset, recipe, True, chosen
        )
    if chosen.llamafactory:
        command = [beside(chosen.llamafactory, "llamafactory-cli"), "train", *llamafactory(folder, chosen)]
        runs["LLaMA-Factory, LoRA r8 q,v"] = lambda: toolkit(command, folder, chosen)
    if chosen.swift:
        sft = [beside(chosen.swift, "swift"), "sft", *swift(folder, chosen)]
        runs["ms-swift, LoRA r8 q,v"] = lambda: toolkit(sft, folder, chosen)
    return runs


def beside(python: Path, name: str) -> str:
    """A command of the same environment.

    Raises:
        InputError: it has none of that name.
    """
    command = python.absolute().parent / name
    if not command.is_file():
        raise InputError(f"{python}: there is no {name} beside it. Give the Python that has the toolkit.")
    return str(command)


def versions(python: Path, toolkit: str) -> dict[str, str]:
    """Of the toolkit and what it computes with."""
    names = (PACKAGES[toolkit], "torch", "transformers", "peft", "accelerate")
    code = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def as_messages(dataset: Dataset, examples: Sequence[Example], folder: Path) -> None:
    """The examples as conversations, in the layout that both toolkits read."""
    rows = []
    for example in examples:
        image = folder / "images" / (example.images[0].replace("/", "-") + ".png")
        if not image.exists():
            image.parent.mkdir(exist_ok=True)
            dataset.open_image(example.images[0]).save(image)
        asked = {"role": "user", "content": f"<image>{example.question}"}
        told = {"role": "assistant", "content": example.answer}
        rows.append({"messages": [asked, told], "images": [str(image)]})
    (folder / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    columns = {"messages": "messages", "images": "images"}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    known = {"file_name": "pairs.json", "formatting": "sharegpt", "columns": columns, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"pairs": known}), encoding="utf-8")


def llamafactory(folder: Path, chosen: argparse.Namespace) -> list[str]:
    """The argument of `llamafactory-cli train`: a file of options."""
    options = {
        "model_name_or_path": str(folder / "base"),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": 8,
        "lora_target": ",".join(TARGETS),
        "disable_gradient_checkpointing": True,
        "dataset_dir": str(folder),
        "dataset": "pairs",
        "template": "llava",
        "cutoff_len": 2048,
        "preprocessing_num_workers": 1,
        "output_dir": str(folder / "llamafactory"),
        "overwrite_output_dir": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "per_device_train_batch_size": chosen.pairs,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "max_steps": 1 + chosen.steps,
        "use_cpu": True,
    }
    path = folder / "llamafactory.yaml"  # JSON is YAML
    path.write_text(json.dumps(options), encoding="utf-8")
    return [str(path)]


def swift(folder: Path, chosen: argparse.Namespace) -> list[str]:
    """The options of `swift sft`."""
    options: dict[str, Any] = {
        "model": folder / "base",
        "model_type": "llava1_5_hf",
        "dataset": folder / "pairs.json",
        "tuner_type": "lora",
        "lora_rank": 8,
        "torch_dtype": "float32",
        "attn_impl": "sdpa",
        "gradient_checkpointing": "false",
        "vit_gradient_checkpointing": "false",
        "per_device_train_batch_size": chosen.pairs,
        "gradient_accumulation_steps": 1,
        "max_steps": 1 + chosen.steps,
        "learning_rate": 1e-4,
        "max_length": 2048,
        "output_dir": folder / "swift",
        "save_strategy": "no",
        "eval_strategy": "no",
        "split_dataset_ratio": 0,
        "report_to": "none",
        "logging_steps": 1,
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "use_cpu": "true",
        "use_hf": "true",
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [*words, "--target_modules", *TARGETS]


def toolkit(command: Sequence[str], folder: Path, chosen: argparse.Namespace) -> Timed:
    """Run it offline on the CPU, and time the steps after the first by when their losses are printed.

    Raises:
        InputError: it failed, or printed other losses than were asked for.
    """
    quiet = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    log = folder / "toolkit.log"
    came: list[float] = []
    with (
        log.open("w", encoding="utf-8") as kept,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | quiet,
            cwd=folder,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:  # universal newlines: a progress bar's \r ends a line too
            kept.write(line)
            if "{'loss'" in line:
                came.append(time.perf_counter())
    if process.returncode or len(came) != 1 + chosen.steps:
        last = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()][-1:]
        raise InputError(f"{Path(command[0]).name} printed {len(came)} losses and ended so: {' '.join(last)}")
    return Timed(chosen.pairs * chosen.steps, came[-1] - came[0])


if __name__ == "__main__":
    main()
