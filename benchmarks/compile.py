"""Seconds of a training step with and without torch.compile on the layers of the language model.

    python benchmarks/compile.py --out benchmarks/compile.json

LLaVA's shape at a small width, with 576 image tokens and 8 to 13 questions per image, so that lengths differ.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from PIL import Image
from record import record
from shape_llava import LlavaShape

from normtune.data.groups import Group
from normtune.methods.adapt import adapt
from normtune.methods.recipe import parse
from normtune.models.families.llava import LlavaFamily
from normtune.models.types import Batch
from normtune.training.layer_wrapping import compile_layers
from normtune.training.saved_activations import save_fewer_activations

QUESTIONS = [
    "What modality is used to take this image?",
    "Is the heart healthy?",
    "Which organ is abnormal in this picture, left lung or right lung?",
    "Does the picture contain liver?",
    "How many kidneys are there?",
]
GROUPS = (10, 11, 12, 9, 13, 8)  # questions of one image in each batch


def make_batches(family: LlavaFamily) -> list[Batch]:
    """One batch per entry of `GROUPS`, with the features of one random image computed in advance."""
    noise = torch.randint(0, 256, (336, 336, 3), generator=torch.Generator().manual_seed(0))
    features = family.encode_image(family.preprocess_image(Image.fromarray(noise.to(torch.uint8).numpy())))
    batches = []
    for size in GROUPS:
        questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(size)]
        segments = tuple(family.tokenize(str(i), text, "left lung") for i, text in enumerate(questions))
        batches.append(send_to_device(family.collate([Group(("a",), segments)], [[features]]), family.device))
    return batches


def time_step(family: LlavaFamily, batch: Batch) -> float:
    """Seconds of one step; on a CPU the time that this process was running, whatever other processes do."""
    clock = time.perf_counter if family.device.type == "cuda" else time.process_time
    start = clock()
    family.model.zero_grad(set_to_none=True)
    family.loss(batch)[0].backward()
    if family.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = LlavaShape()
    shape.learn_words(QUESTIONS)
    torch.manual_seed(0)
    family = shape.build_family()
    family.model.to(options.device)
    adapt(family.model, parse("ln"), seed=0)
    step_batches = make_batches(family)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with save_fewer_activations(family.model):
        for is_counted in [False] + [True] * options.rounds:  # the first round compiles and is not counted
            for compiled in (False, True):
                with compile_layers(family.model, compiled):
                    step_seconds = [time_step(family, batch) for batch in step_batches]
                if is_counted:
                    seconds[compiled] += step_seconds
    plain_seconds, compiled_seconds = (statistics.median(seconds[compiled]) for compiled in (False, True))
    lengths = [batch["input_ids"].shape[1] for batch in step_batches]
    row: dict[str, Any] = {
        "device": options.device,
        "shortest_tokens": min(lengths),
        "longest_tokens": max(lengths),
        "seconds": round(plain_seconds, 4),
        "compiled_seconds": round(compiled_seconds, 4),
        "times_as_fast": round(plain_seconds / compiled_seconds, 3),
    }
    print("\n".join(f"{name}: {value}" for name, value in row.items()))
    if options.out is not None:
        record(options.out, "compile", [row], shape=shape.describe(), rounds=options.rounds)


if __name__ == "__main__":
    main()
