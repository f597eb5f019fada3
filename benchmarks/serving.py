"""Serving many adapters over one base: the engine beside itself with one adapter, and beside PEFT's ways.

    python benchmarks/serving.py --shape llava --data slake --root DIR --out FILE.json

All sides hold the same random base, with a bias that keeps answers from ending, so that all write as many
tokens; as many adapters as there are requests. Two settings: every request about an image of its own, and all
about a few images; the engine keeps no image from one round to the next. PEFT's ways: `set_adapter` between
requests, for LN tuning and for LoRA, and LoRA with `adapter_names` in one batch, with one adapter and with
all; the engine's LoRA rows beside it. Before anything is timed, each row of a batch with `adapter_names` is
compared with its adapter alone. Rounds are interleaved, every other one backwards; processed pixels and, at
PEFT's side, tokens come from memory. Then, in a process of its own, many adapters are registered: memory, and
the time to the first answer of one that is not loaded.
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
from shape import Shape, Written
from torch import nn
from workload import Workload, parser, ratio, shown, spread, workload

from normtune.adapters.fingerprint import fingerprint
from normtune.adapters.storage import save_adapter
from normtune.data.groups import group_by_image
from normtune.data.records import Dataset, Example
from normtune.data.registry import open_dataset
from normtune.methods.adapt import adapt, restore_base
from normtune.models.family import Family
from normtune.models.parts import norms
from normtune.runtime import memory
from normtune.serving.engine.engine import Engine
from normtune.serving.engine.requests import Request

TUNE = {"miss": "encoder=ln,decoder=ln", "llava": "language=ln"}
QUERIES_VALUES = {"miss": ["query", "value", "qkv"], "llava": ["q_proj", "v_proj"]}
TUNE_LORA = "all=lora(r=8)"  # of queries and values, as PEFT's below
LN, LORA = "PEFT LN_TUNING", "PEFT LoRA r8 q,v"
OURS, OURS_ONE = "normtune, an adapter each", "normtune, one adapter"
OURS_LORA, OURS_LORA_ONE = "normtune, a LoRA adapter each", "normtune, one LoRA adapter"
SWITCHED, NAMED, NAMED_ONE = "set_adapter between requests", "adapter_names", "one adapter, one batch"
COLD = 20  # adapters whose first answer is timed
PATIENCE_S = 5.0  # the engine waits for a whole batch


def main() -> None:
    options = parser(__doc__.splitlines()[0], pairs=64, rounds=5)
    options.add_argument("--images", type=int, nargs="+", default=[64, 8], help="images of the requests")
    options.add_argument("--tokens", type=int, default=8, help="tokens of each answer (default %(default)s)")
    options.add_argument("--registered", type=int, default=1000, help="adapters (default %(default)s)")
    chosen = options.parse_args()
    work = workload(chosen, chosen.pairs)
    family, peer = twins(work.shape)
    with tempfile.TemporaryDirectory() as folder:
        loras = written(family, TUNE_LORA, chosen.pairs, Path(folder) / "lora")
        folders = written(family, TUNE[chosen.shape], chosen.pairs, Path(folder) / "ln")
        peers = {
            name: with_adapters(copy.deepcopy(peer), name, QUERIES_VALUES[chosen.shape], chosen.pairs)
            for name in (LN, LORA)
        }
        rows: list[dict[str, Any]] = []
        for images in chosen.images:
            rows += throughput(work, family, peers, folders, loras, images, chosen)
        with ProcessPoolExecutor(1, get_context("spawn")) as fresh:  # no memory that was used and freed
            thousands = fresh.submit(registered, work.shape, folders, chosen).result()
    text = table(rows) + "\n" + told(thousands)
    print("\n" + text)
    if chosen.out:
        record(
            chosen.out,
            "serving",
            rows,
            shape=work.shape.describe(),
            data=chosen.data,
            recipe=TUNE[chosen.shape],
            requests=chosen.pairs,
            tokens=chosen.tokens,
            registered=thousands,
        )
        chosen.out.with_suffix(".md").write_text(text, encoding="utf-8")


def twins(shape: Shape) -> tuple[Family, nn.Module]:
    """The same base every time, as Normtune and as transformers hold it."""
    torch.manual_seed(0)
    return shape.twins()


# --- adapters -----------------------------------------------------------------------------------------------


def written(family: Family, recipe: str, count: int, out: Path) -> list[Path]:
    """Adapters with values of their own, on disk; the family is as it was."""
    mark = fingerprint(family.model)
    tuned = adapt(family.model, recipe)
    start = {name: one.detach().clone() for name, one in tuned.trained.items()}
    folders = [out / str(number) for number in range(count)]
    for folder in folders:
        with torch.no_grad():
            for name, one in tuned.trained.items():
                one.copy_(start[name] + 0.1 * torch.randn_like(one))
        save_adapter(tuned, folder, base_name="random", base_fingerprint=mark)
    restore_base(tuned)
    return folders


def with_adapters(model: nn.Module, method: str, queries_values: list[str], count: int) -> Any:
    """`model` with as many adapters of PEFT's, each with values of its own."""
    config: Any = LoraConfig(r=8, lora_alpha=16, target_modules=queries_values)
    if method == LN:
        config = LNTuningConfig(target_modules=list(norms(model)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of every kind of norm that it is told to train
        tuned: Any = get_peft_model(model, config, adapter_name="0")  # type: ignore[arg-type]
        for number in range(1, count):
            tuned.add_adapter(str(number), config)
    with torch.no_grad():
        for name, one in tuned.named_parameters():
            if "lora_B" in name or "ln_tuning_layers" in name:
                one += 0.1 * torch.randn_like(one)
    return tuned.eval()


# --- throughput ---------------------------------------------------------------------------------------------


def throughput(
    work: Workload,
    family: Family,
    peers: dict[str, Any],
    folders: Sequence[Path],
    loras: Sequence[Path],
    images: int,
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """One row a side, requests about so many images."""
    examples = spread_over(work.dataset, images, options.pairs)
    images = len({example.images for example in examples})
    work = replace(work, examples=examples)
    plain = family.preprocess_image
    dataset = work.held(family)
    twin = copy.deepcopy(family)  # an engine has its base to itself
    twin.preprocess_image = family.preprocess_image  # type: ignore[method-assign]
    rows = work.shape.rows(family, dataset, examples)
    batch, single = work.shape.asked(rows), [work.shape.asked([row]) for row in rows]
    names = [str(number) for number in range(len(examples))]
    whole: Any = {"max_batch": len(names), "max_wait": PATIENCE_S, "queue_limit": len(names)}
    with (
        Engine(family, image_memory=0, **whole) as engine,
        Engine(twin, image_memory=0, lora_rank=8, **whole) as second,
    ):
        for name, folder, lora in zip(names, folders, loras, strict=True):
            engine.register(name, folder)
            second.register(name, lora)
        sides: dict[str, Callable[[], Any]] = {
            OURS_ONE: lambda: answered(engine, dataset, examples, names[:1] * len(names), options.tokens),
            OURS: lambda: answered(engine, dataset, examples, names, options.tokens),
            OURS_LORA_ONE: lambda: answered(
                second, dataset, examples, names[:1] * len(names), options.tokens
            ),
            OURS_LORA: lambda: answered(second, dataset, examples, names, options.tokens),
            f"{LN}, {SWITCHED}": lambda: switched(work.shape, peers[LN], single, options.tokens),
            f"{LORA}, {SWITCHED}": lambda: switched(work.shape, peers[LORA], single, options.tokens),
            f"{LORA}, {NAMED_ONE}": lambda: named(
                work.shape, peers[LORA], batch, names[:1] * len(names), options.tokens
            ),
            f"{LORA}, {NAMED}": lambda: named(work.shape, peers[LORA], batch, names, options.tokens),
        }
        right = {
            f"{peer}, {NAMED}": own_answers(work.shape, peers[peer], batch, names, options.tokens)
            for peer in peers
        }
        for name in (OURS_ONE, OURS, OURS_LORA_ONE, OURS_LORA):  # adapters are loaded
            sides[name]()
        speeds: dict[str, list[float]] = {name: [] for name in sides}
        for round_ in range(options.rounds):
            for name in [*sides][:: -1 if round_ % 2 else 1]:
                began = time.perf_counter()
                sides[name]()
                speeds[name].append(len(names) / (time.perf_counter() - began))
                print(f"round {round_ + 1}  {images} images  {name:<48} {speeds[name][-1]:8.2f} requests/s")
        computed = engine.stats(), second.stats()
    family.preprocess_image = plain  # type: ignore[method-assign]
    for one in computed:
        assert one.failed == 0 and one.batches == 2 * (options.rounds + 1), "whole batches"
    made = [
        {
            "images": images,
            "side": name,
            "requests_per_second": spread(speed),
            "of_one_adapter": ratio(speed, speeds[_one(name)]) if _one(name) else None,
            "normtune_is_faster": ratio(speeds[OURS], speed),
            "own_answers": right.pop(name, None),
            "rounds": speed,
        }
        for name, speed in speeds.items()
    ]
    rest: list[dict[str, Any]] = [  # what gives wrong answers is not timed
        {"images": images, "side": name, "own_answers": count} for name, count in right.items()
    ]
    return made + rest


def _one(name: str) -> str | None:
    """The side with one adapter that a side with many is compared with."""
    return {OURS: OURS_ONE, OURS_LORA: OURS_LORA_ONE, f"{LORA}, {NAMED}": f"{LORA}, {NAMED_ONE}"}.get(name)


def spread_over(dataset: Dataset, images: int, requests: int) -> list[Example]:
    """Questions about so many images, or as many as there are; every image has its turn."""
    groups = group_by_image(dataset.split("train"))
    count = min(images, len(groups), requests)
    some = [groups[int((i + 0.5) * len(groups) / count)] for i in range(count)]
    return [some[i % count][(i // count) % len(some[i % count])] for i in range(requests)]


def answered(
    engine: Engine, dataset: Dataset, examples: Sequence[Example], adapters: Sequence[str], tokens: int
) -> list[str]:
    """The engine's answers, asked all at once."""
    futures = [
        engine.submit(Request((dataset.open_image(one.images[0]),), one.question, adapter, tokens))
        for one, adapter in zip(examples, adapters, strict=True)
    ]
    return [future.result().text for future in futures]


@torch.inference_mode()
def switched(shape: Shape, model: Any, single: Sequence[dict[str, Any]], tokens: int) -> list[Written]:
    """One request after the other, each by its adapter."""
    found = []
    for number, inputs in enumerate(single):
        model.set_adapter(str(number))
        found += shape.generated(model, inputs, 1, tokens)
    return found


@torch.inference_mode()
def named(
    shape: Shape, model: Any, batch: dict[str, Any], adapters: Sequence[str], tokens: int
) -> list[Written]:
    """One batch whose rows name their adapters."""
    return shape.generated(model, {**batch, "adapter_names": [*adapters]}, 1, tokens)


def own_answers(
    shape: Shape, model: Any, batch: dict[str, Any], names: Sequence[str], tokens: int
) -> dict[str, int]:
    """How many rows of a batch with `adapter_names` are what their adapter writes of the same row alone."""
    alone = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(names))]
    wanted = switched(shape, model, alone, tokens)
    model.set_adapter(names[0])
    found = named(shape, model, batch, names, tokens)
    same = sum(one == other for one, other in zip(found, wanted, strict=True))
    return {"same": same, "of": len(names), "different_answers": len({*wanted})}


# --- many registered ----------------------------------------------------------------------------------------


def registered(shape: Shape, folders: Sequence[Path], options: argparse.Namespace) -> dict[str, Any]:
    """Registration, memory, and the first and second answers of adapters that are not loaded.

    The adapters' folders hold hard links to the files of as many as there are.
    """
    dataset = open_dataset(options.data, options.root)
    example = spread_over(dataset, 1, 1)[0]
    image = dataset.open_image(example.images[0])
    family, _ = twins(shape)
    count = options.registered
    linked = []
    for number in range(count):
        linked.append(folders[0].parent / f"linked-{number}")
        linked[-1].mkdir()
        for file in folders[number % len(folders)].iterdir():
            os.link(file, linked[-1] / file.name)
    empty = memory.resident_bytes()
    with Engine(family, max_batch=1, max_wait=0) as engine:

        def seconds(adapter: str | None) -> float:
            asked = Request((image,), example.question, adapter, options.tokens)
            return engine.submit(asked).result().seconds

        for _ in range(3):
            seconds(None)
        before = memory.resident_bytes()
        began = time.perf_counter()
        for number, folder in enumerate(linked):
            engine.register(f"clinic-{number}", folder)
        registering = time.perf_counter() - began
        registered_bytes = memory.resident_bytes() - before
        firsts, seconds_, loading = [], [], []
        for number in range(0, count, max(1, count // COLD)):
            loaded = engine.stats().seconds_loading
            firsts.append(seconds(f"clinic-{number}"))
            seconds_.append(seconds(f"clinic-{number}"))
            loading.append(engine.stats().seconds_loading - loaded)
        for number in range(count):
            seconds(f"clinic-{number}")
        stats = engine.stats()
        return {
            "adapters": stats.registered,
            "engine_bytes": before - empty,
            "registering_s": registering,
            "registered_bytes": registered_bytes,
            "all_asked_bytes": memory.resident_bytes() - before,
            "bytes_of_one": engine.adapters()[0].bytes,
            "loaded": stats.loaded,
            "evictions": stats.evictions,
            "first_answer_s": spread(firsts),
            "next_answer_s": spread(seconds_),
            "loading_s": spread(loading),
        }


# --- tables -------------------------------------------------------------------------------------------------


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Medians with the range of the rounds."""
    lines = [
        "| images | side | requests/s | of one adapter's | normtune, an adapter each, is faster "
        "| own answers |",
        "|--:|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = ["not timed", "", ""]
        if "rounds" in row:
            part = row["of_one_adapter"]
            cells = [
                shown(row["requests_per_second"], 1),
                shown(part, 2) if part else "",
                "" if row["side"] == OURS else shown(row["normtune_is_faster"], 2, "x"),
            ]
        own = row["own_answers"]
        cells.append(f"{own['same']} of {own['of']}" if own else "")
        lines.append(f"| {row['images']} | {row['side']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def told(found: dict[str, Any]) -> str:
    """The registered adapters in one line."""
    first, following, loading = (
        shown({end: 1e3 * value for end, value in found[name].items()}, 1)
        for name in ("first_answer_s", "next_answer_s", "loading_s")
    )
    names = ("engine", "registered", "all_asked")
    mib = {name: f"{found[f'{name}_bytes'] / 2**20:.1f} MiB" for name in names}
    return (
        f"The engine with its slots for adapters takes {mib['engine']}. {found['adapters']:,} adapters are "
        f"registered in {found['registering_s']:.2f} s and take {mib['registered']}; after each was asked "
        f"{mib['all_asked']}, {found['loaded']:,} of them loaded. First answer of one that is not loaded: "
        f"{first} ms, the next: {following} ms. Loading takes {loading} ms of it.\n"
    )


if __name__ == "__main__":
    main()
