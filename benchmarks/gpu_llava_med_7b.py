"""LLaVA-Med-7B's real shape on a CUDA device: training speed, memory, attention masks, precision of norms.

    python benchmarks/gpu_llava_med_7b.py --data slake --root DIR --out benchmarks/gpu_llava_med_7b.json
    python benchmarks/gpu_llava_med_7b.py --smoke

Random bf16 weights made on the device. (1) Pairs a second and activation memory of a training step: Normtune
grouped, with dense and with block masks and with layers run again, beside stock PEFT (LN_TUNING, LoRA), every
question a row of its own; all interleaved. A peer's batch is halved until it fits. (2) Norms held in fp32
beside norms in bf16, as PEFT holds them, over learning rates, on the same batches. `--smoke` runs all that a
CPU can at a tiny width, to try the script; without a GPU the record says that nothing was measured.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.resources import files
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import send_to_device
from bf16_norms import normtune_norms, peft_norms
from bf16_norms import run as train_norms
from record import record
from shape_llava import LlavaShape
from torch import Tensor, nn
from transformers import AutoConfig, LlavaForConditionalGeneration
from workload import sample, shown, spread

from normtune.data.batches import batches_of_pairs
from normtune.data.groups import group_by_image
from normtune.data.records import Dataset, Example
from normtune.data.registry import open_dataset
from normtune.methods.adapt import adapt
from normtune.models.families.llava import LlavaFamily
from normtune.models.image_cache import ImageCache
from normtune.models.types import Batch
from normtune.runtime.files import read_json
from normtune.training.collator import Collator
from normtune.training.layer_wrapping import MemoryTier, checkpoint_activations
from normtune.training.saved_activations import save_fewer_activations

MODEL = "llava-med-7b"
MEASURED, SMOKE, NOT_YET = "measured", "smoke run", "not yet measured"
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@dataclass(frozen=True)
class Ours:
    """A way of Normtune's."""

    recipe: str
    attention: Literal["dense", "block"]
    memory: MemoryTier

    @property
    def name(self) -> str:
        return f"normtune {self.recipe}, {self.attention}, {self.memory}"


FIRST = Ours("ln", "dense", "fast")  # what the others are compared with
OURS = (FIRST, Ours("ln", "block", "fast"), Ours("ln", "dense", "tight"), Ours("lora-8", "dense", "fast"))
PEERS = ("LN_TUNING", "LoRA r8 q,v", "LoRA r8 all-linear")
NORMS = {"fp32 norms (normtune ln)": normtune_norms, "bf16 norms (PEFT LN_TUNING)": peft_norms}


class LlavaMed(LlavaShape):
    """The shape that comes with the package, or its tiny likeness, on a device; a BPE of the data's texts."""

    name = MODEL

    def __init__(self, device: torch.device, tiny: bool) -> None:
        values = read_json(Path(str(files("normtune.models"))) / "shapes" / f"{MODEL}.json")
        if tiny:
            values["vision_config"] |= TINY | {"image_size": 28}
            values["text_config"] |= TINY | {"num_key_value_heads": 1, "vocab_size": 4000}
        super().__init__(values["vision_config"]["image_size"])
        self.values, self.device = values, device

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "image_tokens": self.image_tokens, "config": self.values}

    def _config(self) -> Any:
        tokenizer = self._processor.tokenizer
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        image = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>")}
        return AutoConfig.for_model(**self.values | image | {"text_config": self.values["text_config"] | ids})

    def _model(self) -> LlavaForConditionalGeneration:
        torch.manual_seed(0)
        with self.device:
            return LlavaForConditionalGeneration._from_config(
                self._config(), dtype=torch.bfloat16, attn_implementation="sdpa"
            )


@dataclass
class Step:
    """One method's training step, ready to run."""

    run: Callable[[], int]  # returns its pairs
    device: torch.device

    def timed(self) -> tuple[float, int]:
        """(pairs a second, peak bytes above what lived before)."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if cuda else 0
        began = time.perf_counter()
        pairs = self.run()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated() - before if cuda else 0
        return pairs / seconds, peak // pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, to try the script")
    parser.add_argument("--data", default="phantom-b:24", help="slake, vqa-rad, ... (default %(default)s)")
    parser.add_argument("--root", type=Path, help="the data set's folder")
    parser.add_argument("--pairs", type=int, default=22, help="pairs a step, grouped (default %(default)s)")
    parser.add_argument("--peer-pairs", type=int, default=8, help="pairs a step of a peer, at first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="counted steps of a method in one round")
    parser.add_argument("--norm-steps", type=int, default=100, help="steps at each learning rate")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    chosen = parser.parse_args()
    if chosen.smoke:
        chosen.data, chosen.root, chosen.pairs, chosen.peer_pairs = "phantom-b:2", None, 4, 2
        chosen.rounds, chosen.steps, chosen.norm_steps, chosen.rates = 1, 1, 2, [1e-4, 1e-2]
    about: dict[str, Any] = {"model": MODEL, "dtype": "bfloat16", "data": chosen.data}
    if chosen.smoke or torch.cuda.is_available():
        device = torch.device("cpu" if chosen.smoke else "cuda")
        dataset = open_dataset(chosen.data, chosen.root)
        shape = LlavaMed(device, tiny=chosen.smoke)
        shape.learn_words([f"{e.question} {e.answer}" for e in dataset.examples])
        examples = sample(dataset.split("train"), max(4 * chosen.pairs, chosen.peer_pairs))
        rows = training_rows(shape, dataset, examples, chosen)
        rows += norm_rows(shape, dataset, examples, chosen)
        about["questions_per_image"] = len(examples) / len(group_by_image(examples))
        about["shape"] = shape.describe()
    else:
        rows = [{"method": name, "status": NOT_YET} for name in (*(one.name for one in OURS), *peer_names())]
        rows += [{"method": name, "lr": rate, "status": NOT_YET} for rate in chosen.rates for name in NORMS]
    print("\n" + table(rows))
    if chosen.out:
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        record(chosen.out, "gpu_llava_med_7b", rows, **about)
        chosen.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")


def peer_names() -> list[str]:
    return [f"PEFT {peer}" for peer in PEERS]


# --- 1. speed and memory ------------------------------------------------------------------------------------


def training_rows(
    shape: LlavaMed, dataset: Dataset, examples: Sequence[Example], chosen: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row a method; speeds and peaks of all rounds. A model is built anew for each method and round."""
    ways: dict[str, Callable[[int], AbstractContextManager[Step]]] = {
        one.name: lambda _, one=one: ours(shape, dataset, examples, one, chosen.pairs) for one in OURS
    }
    for peer in PEERS:
        ways[f"PEFT {peer}"] = lambda pairs, peer=peer: theirs(shape, dataset, examples, peer, pairs)
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    bytes_a_pair: dict[str, list[int]] = {name: [] for name in ways}
    pairs = {name: chosen.peer_pairs if name in peer_names() else chosen.pairs for name in ways}
    left_out = {}
    for round_ in range(chosen.rounds):
        for name, way in ways.items():
            if ", block," in name and shape.device.type == "cpu":
                left_out[name] = "FlexAttention has no backward pass on the CPU"
                continue
            while True:
                try:
                    found = several(way(pairs[name]), chosen.steps)
                    break
                except torch.OutOfMemoryError:
                    if pairs[name] == 1 or name not in peer_names():
                        found, left_out[name] = [], "out of memory"
                        break
                    pairs[name] //= 2
                finally:
                    emptied(shape.device)
            speeds[name] += [speed for speed, _ in found]
            bytes_a_pair[name] += [peak for _, peak in found]
            if found:
                print(f"round {round_ + 1}  {name:<34} {found[-1][0]:8.2f} pairs/s", flush=True)
    status = MEASURED if shape.device.type == "cuda" else SMOKE
    rows = []
    for name in ways:
        row: dict[str, Any] = {"method": name, "status": left_out.get(name, status), "pairs": pairs[name]}
        if speeds[name] and name not in left_out:
            row |= {"pairs_per_second": spread(speeds[name]), "rounds": speeds[name]}
            row["activation_bytes_a_pair"] = max(bytes_a_pair[name]) or None  # none: not counted on a CPU
        rows.append(row)
    compare(rows)
    return rows


def several(way: AbstractContextManager[Step], count: int) -> list[tuple[float, int]]:
    """The measurements of so many steps, after one that does not count."""
    with way as step:
        step.timed()
        return [step.timed() for _ in range(count)]


def compare(rows: Sequence[dict[str, Any]]) -> None:
    """How many times faster the first row is, and what the others keep, in its bytes."""
    first = rows[0]
    for row in rows:
        if "pairs_per_second" in row and "pairs_per_second" in first:
            row["faster"] = first["pairs_per_second"]["median"] / row["pairs_per_second"]["median"]
            if row["activation_bytes_a_pair"]:
                row["memory_times"] = row["activation_bytes_a_pair"] / first["activation_bytes_a_pair"]


@contextmanager
def ours(
    shape: LlavaMed, dataset: Dataset, examples: Sequence[Example], way: Ours, pairs: int
) -> Iterator[Step]:
    family = shape.family()
    family.attention = way.attention
    tuned = adapt(family.model, way.recipe)
    batches = cycle(grouped(family, dataset, examples, pairs))

    def loss() -> tuple[Tensor, int]:
        batch = next(batches)
        total, tokens = family.loss(batch)
        return total / tokens, int(batch["pairs"])

    with save_fewer_activations(family.model), checkpoint_activations(family.model, way.memory):
        yield Step(stepper(loss, list(tuned.trained.values())), shape.device)


@contextmanager
def theirs(
    shape: LlavaMed, dataset: Dataset, examples: Sequence[Example], peer: str, pairs: int
) -> Iterator[Step]:
    model, rows, collate = shape.peer(peer, dataset, examples)
    batches = cycle(
        send_to_device(collate(rows[start : start + pairs]), shape.device)
        for start in range(0, len(rows) - pairs + 1, pairs)
    )

    def loss() -> tuple[Tensor, int]:
        return model(**next(batches)).loss, pairs

    yield Step(stepper(loss, [p for p in model.parameters() if p.requires_grad]), shape.device)


def stepper(loss: Callable[[], tuple[Tensor, int]], parameters: Sequence[nn.Parameter]) -> Callable[[], int]:
    """Forward, backward, AdamW; returns the pairs."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def run() -> int:
        value, pairs = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return pairs

    return run


def grouped(family: LlavaFamily, dataset: Dataset, examples: Sequence[Example], pairs: int) -> list[Batch]:
    """Batches of whole images and about so many pairs, on the device."""
    members = group_by_image(examples)
    collate = Collator(family, ImageCache(family, dataset))
    return [
        send_to_device(collate([members[i] for i in chosen]), family.device)
        for chosen in batches_of_pairs([len(group) for group in members], pairs)
    ]


def emptied(device: torch.device) -> None:
    """Give back what a model held."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


# --- 2. precision of norms ----------------------------------------------------------------------------------


def norm_rows(
    shape: LlavaMed, dataset: Dataset, examples: Sequence[Example], chosen: argparse.Namespace
) -> list[dict[str, Any]]:
    """How many values moved and how the loss fell, a row for each rate and precision."""
    rows = []
    for rate in chosen.rates:
        for name, train in NORMS.items():
            family = shape.family()
            family.attention = "dense"
            batches = islice(cycle(grouped(family, dataset, examples, chosen.pairs)), chosen.norm_steps)
            found = train_norms(train, rate, family, batches)
            status = MEASURED if shape.device.type == "cuda" else SMOKE
            rows.append({"method": name, "status": status, "lr": rate, **found})
            print(f"{name:<28} lr {rate:.0e}: {moved(rows[-1])}", flush=True)
            del family, batches
            emptied(shape.device)
    return rows


def moved(row: dict[str, Any]) -> str:
    share = 100 * row["moved"] / row["values"]
    return f"{share:.1f}% of the values moved, loss {row['first_loss']:.3f} -> {row['last_loss']:.3f}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Speed and memory, then norms over learning rates; a row that was not measured says so."""
    lines = [
        f"| method | pairs a step | pairs/s | {FIRST.name} is faster | MiB a pair | times the first row's |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in (row for row in rows if "lr" not in row):
        if "pairs_per_second" not in row:
            lines.append(f"| {row['method']} | | {row['status']} | | | |")
            continue
        kept = row["activation_bytes_a_pair"]
        speed = shown(row["pairs_per_second"], 2) + (f" ({SMOKE})" if row["status"] == SMOKE else "")
        memory = f"{kept / 2**20:,.0f} | {row['memory_times']:.1f}x" if kept else "– | –"
        lines.append(
            f"| {row['method']} | {row['pairs']} | {speed} | {row.get('faster', 1.0):.1f}x | {memory} |"
        )
    lines += ["", "| norms | learning rate | values that moved, and the loss |", "|---|--:|---|"]
    for row in (row for row in rows if "lr" in row):
        told = moved(row) + (f" ({SMOKE})" if row["status"] == SMOKE else "") if "moved" in row else NOT_YET
        lines.append(f"| {row['method']} | {row['lr']:.0e} | {told} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
