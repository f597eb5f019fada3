"""Training speed, memory, attention masks and norm precision of LLaVA-Med 7B's real shape on a CUDA GPU.

    python benchmarks/gpu_llava_med_7b.py --data slake --root DIR --out benchmarks/gpu_llava_med_7b.json
    python benchmarks/gpu_llava_med_7b.py --smoke

The weights are random, in bf16, and created on the device. (1) Pairs per second and activation memory of a
training step: Normtune with grouped questions, with dense masks, block masks and recomputed layers, compared
with stock PEFT (LN_TUNING, LoRA) with one row per question. All methods are interleaved; a peer's batch is
halved until it fits in memory. (2) Norms in fp32 compared with norms in bf16, as in PEFT, at several learning
rates on the same batches. `--smoke` runs everything that a CPU supports at a tiny width, to try the script.
Without a GPU, the rows of the record have the status "not yet measured".
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
from bf16_norms import add_normtune_norms, add_peft_norms, train_norms
from record import record
from shape_llava import LlavaShape
from torch import Tensor, nn
from transformers import AutoConfig, LlavaForConditionalGeneration
from workload import format_range, median_and_range, sample_images

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
class Setting:
    """The options of one training step of Normtune."""

    recipe: str
    attention: Literal["dense", "block"]
    memory: MemoryTier

    @property
    def name(self) -> str:
        return f"normtune {self.recipe}, {self.attention}, {self.memory}"


REFERENCE = Setting("ln", "dense", "fast")  # what the others are compared with
SETTINGS = (
    REFERENCE,
    Setting("ln", "block", "fast"),
    Setting("ln", "dense", "tight"),
    Setting("lora-8", "dense", "fast"),
)
PEERS = ("LN_TUNING", "LoRA r8 q,v", "LoRA r8 all-linear")
NORMS = {"fp32 norms (normtune ln)": add_normtune_norms, "bf16 norms (PEFT LN_TUNING)": add_peft_norms}


class LlavaMed(LlavaShape):
    """LLaVA-Med 7B's shape from the package, or a tiny one, with a BPE tokenizer trained on the data."""

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

    def _build_config(self) -> Any:
        tokenizer = self._processor.tokenizer
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        image = {"image_token_index": tokenizer.convert_tokens_to_ids("<image>")}
        return AutoConfig.for_model(**self.values | image | {"text_config": self.values["text_config"] | ids})

    def _build_model(self) -> LlavaForConditionalGeneration:
        torch.manual_seed(0)
        with self.device:
            return LlavaForConditionalGeneration._from_config(
                self._build_config(), dtype=torch.bfloat16, attn_implementation="sdpa"
            )


@dataclass
class Step:
    """The training step of one method."""

    run: Callable[[], int]  # returns the number of pairs in the step
    device: torch.device

    def measure(self) -> tuple[float, int]:
        """Run the step; (pairs per second, bytes per pair at the peak above those before the step)."""
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if cuda else 0
        start = time.perf_counter()
        pairs = self.run()
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        peak = torch.cuda.max_memory_allocated() - before if cuda else 0
        return pairs / seconds, peak // pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, to try the script")
    parser.add_argument("--data", default="phantom-b:24", help="slake, vqa-rad, ... (default %(default)s)")
    parser.add_argument("--root", type=Path, help="the dataset's folder")
    parser.add_argument("--pairs", type=int, default=22, help="pairs per step, grouped (default %(default)s)")
    parser.add_argument("--peer-pairs", type=int, default=8, help="pairs per step of a peer, before halving")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a method in one round")
    parser.add_argument("--norm-steps", type=int, default=100, help="steps at each learning rate")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    options = parser.parse_args()
    if options.smoke:
        options.data, options.root, options.pairs, options.peer_pairs = "phantom-b:2", None, 4, 2
        options.rounds, options.steps, options.norm_steps, options.rates = 1, 1, 2, [1e-4, 1e-2]
    about: dict[str, Any] = {"model": MODEL, "dtype": "bfloat16", "data": options.data}
    if options.smoke or torch.cuda.is_available():
        device = torch.device("cpu" if options.smoke else "cuda")
        dataset = open_dataset(options.data, options.root)
        shape = LlavaMed(device, tiny=options.smoke)
        shape.learn_words([f"{e.question} {e.answer}" for e in dataset.examples])
        examples = sample_images(dataset.split("train"), max(4 * options.pairs, options.peer_pairs))
        rows = training_rows(shape, dataset, examples, options)
        rows += norm_rows(shape, dataset, examples, options)
        about["questions_per_image"] = len(examples) / len(group_by_image(examples))
        about["shape"] = shape.describe()
    else:
        rows = [
            {"method": name, "status": NOT_YET} for name in (*(setting.name for setting in SETTINGS), *peer_names())
        ]
        rows += [{"method": name, "lr": rate, "status": NOT_YET} for rate in options.rates for name in NORMS]
    print("\n" + table(rows))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record(options.out, "gpu_llava_med_7b", rows, **about)
        options.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")


def peer_names() -> list[str]:
    return [f"PEFT {peer}" for peer in PEERS]


# --- 1. speed and memory ------------------------------------------------------------------------------------


def training_rows(
    shape: LlavaMed, dataset: Dataset, examples: Sequence[Example], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row per method, over all rounds. A new model is built for each method and round."""
    methods: dict[str, Callable[[int], AbstractContextManager[Step]]] = {
        setting.name: lambda _, setting=setting: normtune_step(shape, dataset, examples, setting, options.pairs)
        for setting in SETTINGS
    }
    for peer in PEERS:
        methods[f"PEFT {peer}"] = lambda pairs, peer=peer: peft_step(shape, dataset, examples, peer, pairs)
    speeds: dict[str, list[float]] = {name: [] for name in methods}
    bytes_per_pair: dict[str, list[int]] = {name: [] for name in methods}
    pairs = {name: options.peer_pairs if name in peer_names() else options.pairs for name in methods}
    not_measured = {}
    for round_ in range(options.rounds):
        for name, build_step in methods.items():
            if ", block," in name and shape.device.type == "cpu":
                not_measured[name] = "FlexAttention has no backward pass on the CPU"
                continue
            while True:
                try:
                    measurements = measure_steps(build_step(pairs[name]), options.steps)
                    break
                except torch.OutOfMemoryError:
                    if pairs[name] == 1 or name not in peer_names():
                        measurements, not_measured[name] = [], "out of memory"
                        break
                    pairs[name] //= 2
                finally:
                    free_memory(shape.device)
            speeds[name] += [speed for speed, _ in measurements]
            bytes_per_pair[name] += [peak for _, peak in measurements]
            if measurements:
                print(f"round {round_ + 1}  {name:<34} {measurements[-1][0]:8.2f} pairs/s", flush=True)
    status = MEASURED if shape.device.type == "cuda" else SMOKE
    rows = []
    for name in methods:
        row: dict[str, Any] = {"method": name, "status": not_measured.get(name, status), "pairs": pairs[name]}
        if speeds[name] and name not in not_measured:
            row |= {"pairs_per_second": median_and_range(speeds[name]), "rounds": speeds[name]}
            row["activation_bytes_a_pair"] = max(bytes_per_pair[name]) or None  # 0 on a CPU
        rows.append(row)
    add_ratios(rows)
    return rows


def measure_steps(step_context: AbstractContextManager[Step], count: int) -> list[tuple[float, int]]:
    """The measurements of `count` steps, after one step that is not counted."""
    with step_context as step:
        step.measure()
        return [step.measure() for _ in range(count)]


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Add to each row how many times faster the first row is, and its memory relative to the first row."""
    first = rows[0]
    for row in rows:
        if "pairs_per_second" in row and "pairs_per_second" in first:
            row["faster"] = first["pairs_per_second"]["median"] / row["pairs_per_second"]["median"]
            if row["activation_bytes_a_pair"]:
                row["memory_times"] = row["activation_bytes_a_pair"] / first["activation_bytes_a_pair"]


@contextmanager
def normtune_step(
    shape: LlavaMed, dataset: Dataset, examples: Sequence[Example], setting: Setting, pairs: int
) -> Iterator[Step]:
    family = shape.build_family()
    family.attention = setting.attention
    tuned = adapt(family.model, setting.recipe)
    batches = cycle(make_batches(family, dataset, examples, pairs))

    def loss() -> tuple[Tensor, int]:
        batch = next(batches)
        total, tokens = family.loss(batch)
        return total / tokens, int(batch["pairs"])

    with save_fewer_activations(family.model), checkpoint_activations(family.model, setting.memory):
        yield Step(build_optimizer_step(loss, list(tuned.trained.values())), shape.device)


@contextmanager
def peft_step(shape: LlavaMed, dataset: Dataset, examples: Sequence[Example], peer: str, pairs: int) -> Iterator[Step]:
    model, rows, collate = shape.build_peer(peer, dataset, examples)
    batches = cycle(
        send_to_device(collate(rows[start : start + pairs]), shape.device)
        for start in range(0, len(rows) - pairs + 1, pairs)
    )

    def loss() -> tuple[Tensor, int]:
        return model(**next(batches)).loss, pairs

    yield Step(build_optimizer_step(loss, [p for p in model.parameters() if p.requires_grad]), shape.device)


def build_optimizer_step(
    loss: Callable[[], tuple[Tensor, int]], parameters: Sequence[nn.Parameter]
) -> Callable[[], int]:
    """A function that runs forward, backward and AdamW, and returns the number of pairs."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)

    def run() -> int:
        value, pairs = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        return pairs

    return run


def make_batches(family: LlavaFamily, dataset: Dataset, examples: Sequence[Example], pairs: int) -> list[Batch]:
    """Batches of whole groups with about `pairs` pairs, on the device."""
    members = group_by_image(examples)
    collate = Collator(family, ImageCache(family, dataset))
    return [
        send_to_device(collate([members[i] for i in indices]), family.device)
        for indices in batches_of_pairs([len(group) for group in members], pairs)
    ]


def free_memory(device: torch.device) -> None:
    """Return the memory of deleted models to the GPU."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


# --- 2. precision of norms ----------------------------------------------------------------------------------


def norm_rows(
    shape: LlavaMed, dataset: Dataset, examples: Sequence[Example], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row per rate and precision: how many values changed, and the first and last loss."""
    rows = []
    for rate in options.rates:
        for name, add_norms in NORMS.items():
            family = shape.build_family()
            family.attention = "dense"
            batches = islice(cycle(make_batches(family, dataset, examples, options.pairs)), options.norm_steps)
            result = train_norms(add_norms, rate, family, batches)
            status = MEASURED if shape.device.type == "cuda" else SMOKE
            rows.append({"method": name, "status": status, "lr": rate, **result})
            print(f"{name:<28} lr {rate:.0e}: {describe_changes(rows[-1])}", flush=True)
            del family, batches
            free_memory(shape.device)
    return rows


def describe_changes(row: dict[str, Any]) -> str:
    share = 100 * row["moved"] / row["values"]
    return f"{share:.1f}% of the values moved, loss {row['first_loss']:.3f} -> {row['last_loss']:.3f}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Two Markdown tables: speed and memory; norms by learning rate. Unmeasured rows show their status."""
    lines = [
        f"| method | pairs a step | pairs/s | {REFERENCE.name} is faster | MiB a pair | times the first row's |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in (row for row in rows if "lr" not in row):
        if "pairs_per_second" not in row:
            lines.append(f"| {row['method']} | | {row['status']} | | | |")
            continue
        bytes_per_pair = row["activation_bytes_a_pair"]
        speed = format_range(row["pairs_per_second"], 2) + (f" ({SMOKE})" if row["status"] == SMOKE else "")
        memory = f"{bytes_per_pair / 2**20:,.0f} | {row['memory_times']:.1f}x" if bytes_per_pair else "– | –"
        lines.append(f"| {row['method']} | {row['pairs']} | {speed} | {row.get('faster', 1.0):.1f}x | {memory} |")
    lines += ["", "| norms | learning rate | values that moved, and the loss |", "|---|--:|---|"]
    for row in (row for row in rows if "lr" in row):
        text = describe_changes(row) + (f" ({SMOKE})" if row["status"] == SMOKE else "") if "moved" in row else NOT_YET
        lines.append(f"| {row['method']} | {row['lr']:.0e} | {text} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
