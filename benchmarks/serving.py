"""Requests per second with many adapters on one base: the engine, the engine with one adapter, and PEFT.

    python benchmarks/serving.py --shape llava --data slake --root DIR --out FILE.json

All sides have the same random base, with a bias that prevents early end tokens, so that all generate the
same number of tokens, and one adapter per request. There are two settings: each request about another image,
and all requests about a few images; the engine keeps no encoded image between rounds. The methods of PEFT are
`set_adapter` between requests, for LN tuning and for LoRA, and LoRA with `adapter_names` in one batch, with
one adapter and with all; the engine is also measured with LoRA adapters. Before anything is timed, each row
of a batch with `adapter_names` is compared with the answer of its adapter in a separate batch. Rounds are
interleaved, every second one in reverse order. Preprocessed pixels and, for PEFT, tokens are read from
memory. Afterwards many adapters are registered in a new process, to measure memory and the time to the first
answer of an adapter that is not loaded.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from peft import LNTuningConfig, LoraConfig, get_peft_model
from record import record
from shape import AnswerTokens, Shape
from torch import nn
from workload import Workload, build_parser, format_range, load_workload, median_and_range, ratio

from normtune.adapters.fingerprint import fingerprint
from normtune.adapters.storage import save_adapter
from normtune.data.groups import group_by_image
from normtune.data.records import Dataset, Example
from normtune.data.registry import open_dataset
from normtune.methods.adapt import adapt, restore_base
from normtune.models.family import Family
from normtune.models.norm_kinds import norms
from normtune.runtime import memory
from normtune.runtime.text_table import markdown_table
from normtune.serving.engine.engine import Engine
from normtune.serving.engine.requests import Request

RECIPES = {"miss": "encoder=ln,decoder=ln", "llava": "language=ln"}
LORA_TARGETS = {"miss": ["query", "value", "qkv"], "llava": ["q_proj", "v_proj"]}
LORA_RECIPE = "all=lora(r=8)"  # of queries and values, like `LORA_TARGETS` for PEFT
LN, LORA = "PEFT LN_TUNING", "PEFT LoRA r8 q,v"
OURS, OURS_ONE = "normtune, an adapter each", "normtune, one adapter"
OURS_LORA, OURS_LORA_ONE = "normtune, a LoRA adapter each", "normtune, one LoRA adapter"
SWITCHED, NAMED, NAMED_ONE = "set_adapter between requests", "adapter_names", "one adapter, one batch"
COLD_ADAPTERS = 20  # how many adapters' first answers are timed
MAX_WAIT_S = 5.0  # so long the engine waits for a full batch


def main() -> None:
    parser = build_parser(__doc__.splitlines()[0], pairs=64, rounds=5)
    parser.add_argument("--images", type=int, nargs="+", default=[64, 8], help="numbers of images")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of each answer (default %(default)s)")
    parser.add_argument("--registered", type=int, default=1000, help="adapters (default %(default)s)")
    options = parser.parse_args()
    workload = load_workload(options, options.pairs)
    family, peer = build_pair(workload.shape)
    with tempfile.TemporaryDirectory() as folder:
        lora_folders = write_adapters(family, LORA_RECIPE, options.pairs, Path(folder) / "lora")
        ln_folders = write_adapters(family, RECIPES[options.shape], options.pairs, Path(folder) / "ln")
        peers = {
            name: add_peft_adapters(copy.deepcopy(peer), name, LORA_TARGETS[options.shape], options.pairs)
            for name in (LN, LORA)
        }
        rows: list[dict[str, Any]] = []
        for images in options.images:
            rows += measure_throughput(workload, family, peers, ln_folders, lora_folders, images, options)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # without freed memory to reuse
            registration = pool.submit(measure_registration, workload.shape, ln_folders, options).result()
    text = table(rows) + "\n" + registration_sentence(registration)
    print("\n" + text)
    if options.out:
        record(
            options.out,
            "serving",
            rows,
            shape=workload.shape.describe(),
            data=options.data,
            recipe=RECIPES[options.shape],
            requests=options.pairs,
            tokens=options.tokens,
            registered=registration,
        )
        options.out.with_suffix(".md").write_text(text, encoding="utf-8")


def build_pair(shape: Shape) -> tuple[Family, nn.Module]:
    """Both models of `Shape.build_pair`, with the same weights in every call."""
    torch.manual_seed(0)
    return shape.build_pair()


# --- adapters -----------------------------------------------------------------------------------------------


def write_adapters(family: Family, recipe: str, count: int, out: Path) -> list[Path]:
    """Write `count` adapters with different random values; afterwards the family is the base again."""
    mark = fingerprint(family.model)
    tuned = adapt(family.model, recipe)
    initial = {name: parameter.detach().clone() for name, parameter in tuned.trained.items()}
    adapter_folders = [out / str(number) for number in range(count)]
    for folder in adapter_folders:
        with torch.no_grad():
            for name, parameter in tuned.trained.items():
                parameter.copy_(initial[name] + 0.1 * torch.randn_like(parameter))
        save_adapter(tuned, folder, base_name="random", base_fingerprint=mark)
    restore_base(tuned)
    return adapter_folders


def add_peft_adapters(model: nn.Module, method: str, lora_targets: list[str], count: int) -> Any:
    """Add `count` adapters of PEFT with different random values to `model`."""
    config: Any = LoraConfig(r=8, lora_alpha=16, target_modules=lora_targets)
    if method == LN:
        config = LNTuningConfig(target_modules=list(norms(model)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about every kind of norm that it trains
        peft_model: Any = get_peft_model(model, config, adapter_name="0")  # type: ignore[arg-type]
        for number in range(1, count):
            peft_model.add_adapter(str(number), config)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name or "ln_tuning_layers" in name:
                parameter += 0.1 * torch.randn_like(parameter)
    return peft_model.eval()


# --- throughput ---------------------------------------------------------------------------------------------


def measure_throughput(
    workload: Workload,
    family: Family,
    peers: dict[str, Any],
    ln_folders: Sequence[Path],
    lora_folders: Sequence[Path],
    images: int,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """One row per side, for requests about `images` images."""
    examples = select_questions(workload.dataset, images, options.pairs)
    images = len({example.images for example in examples})
    workload = replace(workload, examples=examples)
    preprocess_image = family.preprocess_image
    dataset = workload.cache_images(family)
    lora_family = copy.deepcopy(family)  # each engine needs its own base
    lora_family.preprocess_image = family.preprocess_image  # type: ignore[method-assign]
    shape, tokens = workload.shape, options.tokens
    rows = shape.build_rows(family, dataset, examples)
    batch, single_rows = shape.question_batch(rows), [shape.question_batch([row]) for row in rows]
    adapters = [str(number) for number in range(len(examples))]
    one_adapter = adapters[:1] * len(adapters)
    engine_options: Any = {"max_batch": len(adapters), "max_wait": MAX_WAIT_S, "queue_limit": len(adapters)}
    with (
        Engine(family, image_memory=0, **engine_options) as engine,
        Engine(lora_family, image_memory=0, lora_rank=8, **engine_options) as lora_engine,
    ):
        for name, folder, lora_folder in zip(adapters, ln_folders, lora_folders, strict=True):
            engine.register(name, folder)
            lora_engine.register(name, lora_folder)
        sides: dict[str, Callable[[], Any]] = {
            OURS_ONE: lambda: answer_with_engine(engine, dataset, examples, one_adapter, tokens),
            OURS: lambda: answer_with_engine(engine, dataset, examples, adapters, tokens),
            OURS_LORA_ONE: lambda: answer_with_engine(lora_engine, dataset, examples, one_adapter, tokens),
            OURS_LORA: lambda: answer_with_engine(lora_engine, dataset, examples, adapters, tokens),
            f"{LN}, {SWITCHED}": lambda: answer_by_switching(shape, peers[LN], single_rows, tokens),
            f"{LORA}, {SWITCHED}": lambda: answer_by_switching(shape, peers[LORA], single_rows, tokens),
            f"{LORA}, {NAMED_ONE}": lambda: answer_by_names(shape, peers[LORA], batch, one_adapter, tokens),
            f"{LORA}, {NAMED}": lambda: answer_by_names(shape, peers[LORA], batch, adapters, tokens),
        }
        own_counts = {
            f"{peer}, {NAMED}": count_own_answers(shape, peers[peer], batch, adapters, tokens) for peer in peers
        }
        for name in (OURS_ONE, OURS, OURS_LORA_ONE, OURS_LORA):  # loads the adapters
            sides[name]()
        speeds: dict[str, list[float]] = {name: [] for name in sides}
        for round_ in range(options.rounds):
            for name in [*sides][:: -1 if round_ % 2 else 1]:
                start = time.perf_counter()
                sides[name]()
                speeds[name].append(len(adapters) / (time.perf_counter() - start))
                print(f"round {round_ + 1}  {images} images  {name:<48} {speeds[name][-1]:8.2f} requests/s")
        stats = engine.stats(), lora_engine.stats()
    family.preprocess_image = preprocess_image  # type: ignore[method-assign]
    for engine_stats in stats:
        assert engine_stats.failed == 0 and engine_stats.batches == 2 * (options.rounds + 1), "whole batches"
    timed_rows = [
        {
            "images": images,
            "side": name,
            "requests_per_second": median_and_range(values),
            "of_one_adapter": ratio(values, speeds[_one_adapter_side(name)]) if _one_adapter_side(name) else None,
            "normtune_is_faster": ratio(speeds[OURS], values),
            "own_answers": own_counts.pop(name, None),
            "rounds": values,
        }
        for name, values in speeds.items()
    ]
    untimed_rows: list[dict[str, Any]] = [  # methods with wrong answers are not timed
        {"images": images, "side": name, "own_answers": count} for name, count in own_counts.items()
    ]
    return timed_rows + untimed_rows


def _one_adapter_side(name: str) -> str | None:
    """The side with one adapter that a side with many adapters is compared with."""
    return {OURS: OURS_ONE, OURS_LORA: OURS_LORA_ONE, f"{LORA}, {NAMED}": f"{LORA}, {NAMED_ONE}"}.get(name)


def select_questions(dataset: Dataset, images: int, questions: int) -> list[Example]:
    """Questions about `images` images, or about all if there are fewer; the images take turns."""
    groups = group_by_image(dataset.split("train"))
    count = min(images, len(groups), questions)
    selected = [groups[int((i + 0.5) * len(groups) / count)] for i in range(count)]
    return [selected[i % count][(i // count) % len(selected[i % count])] for i in range(questions)]


def answer_with_engine(
    engine: Engine, dataset: Dataset, examples: Sequence[Example], adapters: Sequence[str], tokens: int
) -> list[str]:
    """The engine's answers to requests that are submitted at the same time."""
    futures = [
        engine.submit(Request((dataset.open_image(example.images[0]),), example.question, adapter, tokens))
        for example, adapter in zip(examples, adapters, strict=True)
    ]
    return [future.result().text for future in futures]


@torch.inference_mode()
def answer_by_switching(
    shape: Shape, model: Any, single_rows: Sequence[dict[str, Any]], tokens: int
) -> list[AnswerTokens]:
    """Answer one request after the other, each with its adapter set."""
    answers = []
    for number, inputs in enumerate(single_rows):
        model.set_adapter(str(number))
        answers += shape.answer_with_transformers(model, inputs, 1, tokens)
    return answers


@torch.inference_mode()
def answer_by_names(
    shape: Shape, model: Any, batch: dict[str, Any], adapters: Sequence[str], tokens: int
) -> list[AnswerTokens]:
    """Answer one batch with the name of an adapter for each row."""
    return shape.answer_with_transformers(model, {**batch, "adapter_names": [*adapters]}, 1, tokens)


def count_own_answers(
    shape: Shape, model: Any, batch: dict[str, Any], adapters: Sequence[str], tokens: int
) -> dict[str, int]:
    """Count the rows of a batch with `adapter_names` that get the same answer as in a separate batch."""
    single_rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(adapters))]
    reference = answer_by_switching(shape, model, single_rows, tokens)
    model.set_adapter(adapters[0])
    answers = answer_by_names(shape, model, batch, adapters, tokens)
    same = sum(answer == expected for answer, expected in zip(answers, reference, strict=True))
    return {"same": same, "of": len(adapters), "different_answers": len({*reference})}


# --- registration -------------------------------------------------------------------------------------------


def measure_registration(shape: Shape, ln_folders: Sequence[Path], options: argparse.Namespace) -> dict[str, Any]:
    """Register many adapters: time, memory, and the first and second answers of adapters that are not loaded.

    The folders of the adapters have hard links to the files of `ln_folders`, in turns.
    """
    dataset = open_dataset(options.data, options.root)
    example = select_questions(dataset, 1, 1)[0]
    image = dataset.open_image(example.images[0])
    family, _ = build_pair(shape)
    count = options.registered
    linked_folders = []
    for number in range(count):
        linked_folders.append(ln_folders[0].parent / f"linked-{number}")
        linked_folders[-1].mkdir()
        for file in ln_folders[number % len(ln_folders)].iterdir():
            os.link(file, linked_folders[-1] / file.name)
    bytes_at_start = memory.resident_bytes()
    with Engine(family, max_batch=1, max_wait=0) as engine:

        def answer_seconds(adapter: str | None) -> float:
            request = Request((image,), example.question, adapter, options.tokens)
            return engine.submit(request).result().seconds

        for _ in range(3):
            answer_seconds(None)
        bytes_before = memory.resident_bytes()
        start = time.perf_counter()
        for number, folder in enumerate(linked_folders):
            engine.register(f"clinic-{number}", folder)
        registering_s = time.perf_counter() - start
        registered_bytes = memory.resident_bytes() - bytes_before
        first_answers, next_answers, loading_times = [], [], []
        for number in range(0, count, max(1, count // COLD_ADAPTERS)):
            loading_before = engine.stats().seconds_loading
            first_answers.append(answer_seconds(f"clinic-{number}"))
            next_answers.append(answer_seconds(f"clinic-{number}"))
            loading_times.append(engine.stats().seconds_loading - loading_before)
        for number in range(count):
            answer_seconds(f"clinic-{number}")
        stats = engine.stats()
        return {
            "adapters": stats.registered,
            "engine_bytes": bytes_before - bytes_at_start,
            "registering_s": registering_s,
            "registered_bytes": registered_bytes,
            "all_asked_bytes": memory.resident_bytes() - bytes_before,
            "bytes_of_one": engine.adapters()[0].bytes,
            "loaded": stats.loaded,
            "evictions": stats.evictions,
            "first_answer_s": median_and_range(first_answers),
            "next_answer_s": median_and_range(next_answers),
            "loading_s": median_and_range(loading_times),
        }


# --- tables -------------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of medians with the range of the rounds."""
    header = ["images", "side", "requests/s", "of one adapter's", "normtune, an adapter each, is faster", "own answers"]
    lines = []
    for row in rows:
        cells = ["not timed", "", ""]
        if "rounds" in row:
            relative_speed = row["of_one_adapter"]
            cells = [
                format_range(row["requests_per_second"], 1),
                format_range(relative_speed, 2) if relative_speed else "",
                "" if row["side"] == OURS else format_range(row["normtune_is_faster"], 2, "x"),
            ]
        own_answers = row["own_answers"]
        cells.append(f"{own_answers['same']} of {own_answers['of']}" if own_answers else "")
        lines.append([str(row["images"]), row["side"], *cells])
    return "\n".join(markdown_table(header, lines, "rlr")) + "\n"


def registration_sentence(result: dict[str, Any]) -> str:
    """The results of `measure_registration` in one line."""
    first, following, loading = (
        format_range({end: 1e3 * value for end, value in result[name].items()}, 1)
        for name in ("first_answer_s", "next_answer_s", "loading_s")
    )
    names = ("engine", "registered", "all_asked")
    mib = {name: f"{result[f'{name}_bytes'] / 2**20:.1f} MiB" for name in names}
    return (
        f"The engine with its slots for adapters takes {mib['engine']}. {result['adapters']:,} adapters "
        f"are registered in {result['registering_s']:.2f} s and take {mib['registered']}; after each was "
        f"asked {mib['all_asked']}, {result['loaded']:,} of them loaded. First answer of one that is not "
        f"loaded: {first} ms, the next: {following} ms. Loading takes {loading} ms of it.\n"
    )


if __name__ == "__main__":
    main()
