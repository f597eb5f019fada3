"""Seconds and resident memory of a dataset with many rows: opened, surveyed, grouped, split, trained.

    python benchmarks/rows.py --folder /tmp/rows --rows 100000 1000000 10000000 --out benchmarks/rows.json

The rows are made: 100 questions about each image, in a JSONL or parquet file. The names of the images are hard links to
a few small PNG files, as nothing here depends on their pixels. Each size is measured in processes of their own: one
opens, surveys, groups, splits and starts an epoch; another one trains. Processor seconds are those of all threads and
child processes; wall seconds are longer where other programs run. Memory is the peak of what is resident: it never
falls from one stage to the next, and includes the pages of mapped files.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

QUESTIONS_PER_IMAGE = 100
STEPS = 200
FORMATS = ("jsonl", "parquet")
_FILES = 8  # different PNG files
_FOLDER_SIZE = 1000  # images of one subfolder
_BLOCK = 100_000  # rows that are written at once
_FINDINGS = ("effusion", "nodule", "fracture", "opacity", "cardiomegaly", "pneumothorax", "oedema", "device")
_PLACES = ("left lung", "right lung", "heart", "mediastinum", "left rib", "right rib", "spine", "diaphragm")
_FORMS = ("Is there {} in the {}?", "Does the {1} show {0}?", "Where is the {} of the {}?", "Describe {} of the {}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="folder for the made files; about 1.5 GB for 10 M")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--format", choices=FORMATS, nargs="+", default=FORMATS)
    parser.add_argument("--skip-training", action="store_true")
    parser.add_argument("--trainer", action="store_true", help="measure `datasets` and the Trainer too (parquet)")
    parser.add_argument("--out", type=Path, help="JSON file; the table is written next to it")
    parser.add_argument(
        "--stages", choices=("data", "training", "trainer"), help=argparse.SUPPRESS
    )  # in a process of its own
    options = parser.parse_args()
    if options.stages:
        [rows], [form] = options.rows, options.format
        path = options.folder / str(rows) / f"train.{form}"
        if options.stages == "trainer":
            from rows_trainer import trainer_stages

            print(json.dumps(list(trainer_stages(path, STEPS, seconds, stage_row))))
            return
        stages = data_stages if options.stages == "data" else training_stages
        print(json.dumps(list(stages(path))))
        return
    from record import write_record

    results = []
    for rows in options.rows:
        make_files(options.folder / str(rows), rows, options.format)
        for form in options.format:
            with_trainer = options.trainer and form == "parquet"
            for stages in ("data",) if options.skip_training else ("data", "training", *["trainer"] * with_trainer):
                command = [sys.executable, __file__, "--folder", options.folder, "--rows", rows, "--format", form]
                done = subprocess.run([*map(str, command), "--stages", stages], stdout=subprocess.PIPE, check=True)
                for stage in json.loads(done.stdout):
                    results.append({"rows": rows, "format": form, **stage})
                    print(results[-1], flush=True)
                if options.out:  # a run takes many minutes: what is measured is written
                    options.out.with_suffix(".md").write_text(table(results), encoding="utf-8")
                    write_record(options.out, "rows", results, questions_per_image=QUESTIONS_PER_IMAGE, steps=STEPS)
    print("\n" + table(results))


def table(results: list[dict[str, Any]]) -> str:
    """One line for each stage and format, one column for each number of rows: processor and wall seconds, memory."""
    from normtune.runtime.text_table import markdown_table

    sizes = list(dict.fromkeys(result["rows"] for result in results))
    lines = []
    for form, stage in dict.fromkeys((result["format"], result["stage"]) for result in results):
        of_stage = {r["rows"]: r for r in results if (r["format"], r["stage"]) == (form, stage)}
        cells = [
            "{processor_seconds:.1f} s, {seconds:.1f} s, {peak_mb:,.0f} MB".format(**of_stage[rows])
            if rows in of_stage
            else ""
            for rows in sizes
        ]
        lines.append((form, stage, *cells))
    return (
        "\n".join(
            markdown_table(("format", "stage", *(f"{rows:,} rows: processor, wall, peak" for rows in sizes)), lines)
        )
        + "\n"
    )


def make_files(folder: Path, rows: int, formats: list[str]) -> None:
    """Write the images and the rows, unless the folder has them already."""
    from PIL import Image

    for number in range(_FILES):
        original = folder / "originals" / f"{number}.png"
        if not original.is_file():
            original.parent.mkdir(parents=True, exist_ok=True)
            Image.effect_noise((32, 32), 20 + 10 * number).save(original)
    images = [f"images/{i // _FOLDER_SIZE:04d}/{i:06d}.png" for i in range(max(1, rows // QUESTIONS_PER_IMAGE))]
    for number, name in enumerate(images):
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(folder / "originals" / f"{number % _FILES}.png", path)
    for form in formats:
        path = folder / f"train.{form}"
        if not path.is_file():
            {"jsonl": _write_jsonl, "parquet": _write_parquet}[form](path, images, rows)


def _blocks(images: list[str], rows: int) -> Iterator[list[dict[str, str]]]:
    """Lists of rows; a tenth of the answers occur once only, as free text does."""
    rng = random.Random(0)
    questions = [(finding, place, form) for finding in _FINDINGS for place in _PLACES for form in _FORMS]
    block: list[dict[str, str]] = []
    for number in range(rows):
        image = number // QUESTIONS_PER_IMAGE % len(images)
        if number % QUESTIONS_PER_IMAGE == 0:
            of_image = rng.sample(questions, QUESTIONS_PER_IMAGE)
        finding, place, form = of_image[number % QUESTIONS_PER_IMAGE]
        answer = rng.choice(("yes", "no")) if form is _FORMS[0] or form is _FORMS[1] else f"{finding} of the {place}"
        if rng.random() < 0.1:
            answer = f"{finding} of the {place}, {number % 977} mm, grade {number}"
        split = "test" if image % 10 == 9 else "train"
        row = {"id": f"q{number}", "image": images[image], "question": form.format(finding, place), "answer": answer}
        block.append(row | {"split": split, "modality": "X-ray", "patient_id": f"p{image // 2}"})
        if len(block) == _BLOCK:
            yield block
            block = []
    if block:
        yield block


def _write_jsonl(path: Path, images: list[str], rows: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        for block in _blocks(images, rows):
            file.writelines(json.dumps(row) + "\n" for row in block)


def _write_parquet(path: Path, images: list[str], rows: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    for block in _blocks(images, rows):
        table = pa.Table.from_pylist(block)
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def data_stages(path: Path) -> Iterator[dict[str, Any]]:
    """Open a file, survey it without its pictures, group its rows, split them, and start an epoch."""
    from normtune.data.batches import EpochBatches
    from normtune.data.groups import group_by_image
    from normtune.data.preflight import preflight
    from normtune.data.registry import open_dataset
    from normtune.data.splits import share_of_images

    def open_file() -> Any:
        return open_dataset(path.suffix[1:], path)

    dataset, opened = measure("open", open_file)
    yield opened
    yield measure("preflight without decoding", lambda: preflight(dataset, open_pictures=False))[1]
    yield measure("summary", dataset.summary)[1]
    yield measure("group", lambda: group_by_image(dataset.examples))[1]
    training, split = measure("split", lambda: dataset.split("train"))
    yield split
    yield measure("half of the images", lambda: share_of_images(training, 0.5, 0))[1]

    def start_epoch() -> Any:
        return next(iter(EpochBatches(training, 32, None, 0)))

    yield measure("start of an epoch", start_epoch)[1]

    def skip_epoch() -> int:
        return sum(1 for _ in EpochBatches(training, 32, None, 0))

    yield measure("all batches of an epoch, not collated", skip_epoch)[1]


def training_stages(path: Path) -> Iterator[dict[str, Any]]:
    """Train the embedded base: everything up to the first step, and the steps."""
    import tempfile

    from transformers import TrainerCallback

    ends: list[tuple[float, float]] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            ends.append(seconds())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(seconds())

    from normtune.training.config import TrainConfig
    from normtune.training.train import train

    started = seconds()
    with tempfile.TemporaryDirectory() as out:
        config = TrainConfig(
            data=path.suffix[1:], root=path, model="nano", tune="language=ln", out=Path(out) / "run",
            batch=8, cap=8, max_steps=STEPS, device="cpu",
        )  # fmt: skip
        train(config, progress=Clock())
    peak = peak_mb()
    times = [started, ends[1], ends[-1]]
    for stage, before, after in zip(
        ("training: until the first step has ended", f"training: {STEPS - 1} further steps"),
        times,
        times[1:],
        strict=False,
    ):
        yield {"stage": stage, **_elapsed(before, after), "peak_mb": peak}


def stage_row(stage: str, before: tuple[float, float], after: tuple[float, float]) -> dict[str, Any]:
    """The record of a stage between two results of `seconds`."""
    return {"stage": stage, **_elapsed(before, after), "peak_mb": peak_mb()}


def measure(stage: str, call: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """(the value of a call, its seconds and the peak memory of the process so far)."""
    started = seconds()
    value = call()
    return value, {"stage": stage, **_elapsed(started, seconds()), "peak_mb": peak_mb()}


def seconds() -> tuple[float, float]:
    """Wall seconds, and processor seconds of the threads of this process and of its ended child processes."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime


def _elapsed(before: tuple[float, float], after: tuple[float, float]) -> dict[str, float]:
    wall, processor = (round(b - a, 3) for a, b in zip(before, after, strict=True))
    return {"seconds": wall, "processor_seconds": processor}


def peak_mb() -> float:
    """The most memory of this process that was resident, in MB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6, 1)


if __name__ == "__main__":
    main()
