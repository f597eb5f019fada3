"""LoRA on one LLaVA checkpoint: the commands of LLaMA-Factory and ms-swift compared with Normtune.

    python benchmarks/peers.py --slake DIR --llamafactory PYTHON --swift PYTHON --out benchmarks/peers.json

PYTHON is the interpreter of an environment in which the toolkit is installed. All methods train only the
language model, in fp32, with the same number of pairs per step: LoRA with r=8 on the query and value
projections, and for Normtune also LN. A toolkit's command runs as its users run it, and prepares images and
texts itself; gradient checkpointing, which both toolkits enable by default, is disabled. A step's time is
measured from the printed loss of the previous step to its own, so that the start is not included. The
methods are interleaved. With a torch without CUDA, LLaMA-Factory 0.9.5 also needs torchvision and torchaudio
without CUDA.
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
from throughput import STEPS_PER_PEER, TimedRun, table, train_normtune
from workload import Workload, median_and_range, ratio, sample_images

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
    parser.add_argument("--llamafactory", type=Path, help="a Python interpreter with LLaMA-Factory installed")
    parser.add_argument("--swift", type=Path, help="a Python interpreter with ms-swift installed")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pairs", type=int, default=24, help="question-answer pairs per step")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a toolkit in one round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    dataset = open_dataset("slake", options.slake)
    examples = sample_images(dataset.split("train"), options.pairs * (options.steps * STEPS_PER_PEER + 1))
    workload = Workload(SHAPES["llava"], "slake", dataset, examples)
    workload.shape.learn_words([f"{e.question} {e.answer}" for e in dataset.examples])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        workload.shape.build_family().save(folder / "base")
        write_conversations(dataset, examples, folder)
        runs = make_methods(workload, folder, options)
        speeds: dict[str, list[float]] = {name: [] for name in runs}
        for round_ in range(options.rounds):
            for name, run in runs.items():
                timed_run = run()
                speeds[name].append(timed_run.pairs / timed_run.seconds)
                print(f"round {round_ + 1}  {name:<30} {speeds[name][-1]:7.2f} pairs/s", flush=True)
    first = next(iter(speeds))
    rows = [
        {
            "method": name,
            "pairs_per_second": median_and_range(values),
            "faster": ratio(speeds[first], values),
            "rounds": values,
        }
        for name, values in speeds.items()
    ]
    print("\n" + table(rows, first))
    if options.out:
        pythons = {"LLaMA-Factory": options.llamafactory, "ms-swift": options.swift}
        record(
            options.out,
            "peers",
            rows,
            **workload.describe(),
            pairs_a_step=options.pairs,
            steps=options.steps,
            toolkits={name: read_versions(python, name) for name, python in pythons.items() if python},
        )
        options.out.with_suffix(".md").write_text(table(rows, first), encoding="utf-8")


def make_methods(workload: Workload, folder: Path, options: argparse.Namespace) -> dict[str, Callable[[], TimedRun]]:
    """The functions that are timed, by name; Normtune's come first."""
    runs: dict[str, Callable[[], TimedRun]] = {}
    for recipe in RECIPES:
        runs[f"normtune {recipe}"] = lambda recipe=recipe: train_normtune(
            load(str(folder / "base")), workload, workload.dataset, recipe, True, options
        )
    if options.llamafactory:
        command = [
            find_command(options.llamafactory, "llamafactory-cli"),
            "train",
            *llamafactory_arguments(folder, options),
        ]
        runs["LLaMA-Factory, LoRA r8 q,v"] = lambda: time_toolkit(command, folder, options)
    if options.swift:
        sft = [find_command(options.swift, "swift"), "sft", *swift_arguments(folder, options)]
        runs["ms-swift, LoRA r8 q,v"] = lambda: time_toolkit(sft, folder, options)
    return runs


def find_command(python: Path, name: str) -> str:
    """The path of a command in the environment of an interpreter.

    Raises:
        InputError: the environment has no command of that name.
    """
    command = python.absolute().parent / name
    if not command.is_file():
        raise InputError(f"{python}: there is no {name} next to it. Give the toolkit's Python interpreter.")
    return str(command)


def read_versions(python: Path, toolkit: str) -> dict[str, str]:
    """The versions of a toolkit and of the libraries that it uses."""
    names = (PACKAGES[toolkit], "torch", "transformers", "peft", "accelerate")
    code = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {names!r}}}))"
    process = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    package_versions: dict[str, str] = json.loads(process.stdout)
    return package_versions


def write_conversations(dataset: Dataset, examples: Sequence[Example], folder: Path) -> None:
    """Write the examples as conversations, in the layout that both toolkits read."""
    rows = []
    for example in examples:
        image = folder / "images" / (example.images[0].replace("/", "-") + ".png")
        if not image.exists():
            image.parent.mkdir(exist_ok=True)
            dataset.open_image(example.images[0]).save(image)
        user_turn = {"role": "user", "content": f"<image>{example.question}"}
        assistant_turn = {"role": "assistant", "content": example.answer}
        rows.append({"messages": [user_turn, assistant_turn], "images": [str(image)]})
    (folder / "pairs.json").write_text(json.dumps(rows), encoding="utf-8")
    columns = {"messages": "messages", "images": "images"}
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    dataset_info = {"file_name": "pairs.json", "formatting": "sharegpt", "columns": columns, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"pairs": dataset_info}), encoding="utf-8")


def llamafactory_arguments(folder: Path, arguments: argparse.Namespace) -> list[str]:
    """The arguments of `llamafactory-cli train`: the path of a file with its options."""
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
        "per_device_train_batch_size": arguments.pairs,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "max_steps": 1 + arguments.steps,
        "use_cpu": True,
    }
    path = folder / "llamafactory.yaml"  # JSON is YAML
    path.write_text(json.dumps(options), encoding="utf-8")
    return [str(path)]


def swift_arguments(folder: Path, arguments: argparse.Namespace) -> list[str]:
    """The arguments of `swift sft`."""
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
        "per_device_train_batch_size": arguments.pairs,
        "gradient_accumulation_steps": 1,
        "max_steps": 1 + arguments.steps,
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
    flags = [flag for name, value in options.items() for flag in (f"--{name}", str(value))]
    return [*flags, "--target_modules", *TARGETS]


def time_toolkit(command: Sequence[str], folder: Path, options: argparse.Namespace) -> TimedRun:
    """Run a toolkit offline on the CPU; the steps after the first are timed by when their losses are printed.

    Raises:
        InputError: the command failed, or printed another number of losses than it has steps.
    """
    environment = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    log = folder / "toolkit.log"
    times: list[float] = []
    with (
        log.open("w", encoding="utf-8") as log_file,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | environment,
            cwd=folder,
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:  # universal newlines: a progress bar's \r ends a line too
            log_file.write(line)
            if "{'loss'" in line:
                times.append(time.perf_counter())
    if process.returncode or len(times) != 1 + options.steps:
        last = [line for line in log.read_text(encoding="utf-8").splitlines() if line.strip()][-1:]
        raise InputError(f"{Path(command[0]).name} printed {len(times)} losses; last line: {' '.join(last)}")
    return TimedRun(options.pairs * options.steps, times[-1] - times[0])


if __name__ == "__main__":
    main()
