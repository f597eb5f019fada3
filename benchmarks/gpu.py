"""Training steps, answers, memory and kernels on a CUDA GPU at real shapes, part by part.

    normtune bench gpu --out benchmarks/gpu.json
    PYTHONPATH=src python benchmarks/gpu.py --tiny

It runs on a bare machine: random bf16 weights of LLaVA-Med 7B and MedGemma 4B are made on the GPU, without
files or network. The parts (`gpu_parts`, `gpu_training`) run in order of importance, each with a time limit;
when one ends, its line of JSON is printed and the record at `--out` is rewritten, so that an interrupted run
keeps its figures. A part that fails does not end the run, and a part for which no time is left is skipped.
`--tiny` runs every part on the CPU at a width of 64, to try the script: its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from gpu_models import Workbench
from gpu_parts import PARTS, Part
from gpu_timing import TimeLimitReached, failure, time_limit
from record import record, write_record

BUDGET_S = 450.0  # Python's start and the imports take the rest of eight minutes
LEAST_S = 15.0  # a part needs at least this much time to measure anything
TRIAL = "Tiny models on the CPU, to try the script: the times and ratios say nothing about real shapes."
MEASURED, INCOMPLETE, STOPPED, FAILED, SKIPPED = "measured", "incomplete", "stopped", "failed", "skipped"
NOT_YET = "not yet measured"


def main() -> None:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, help="JSON file, rewritten after each part; the table is written next to it"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU, to try the script")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="in this order (default: all)")
    parser.add_argument(
        "--budget-s",
        type=float,
        default=BUDGET_S,
        help="seconds in all, without Python's start and the imports (default %(default)s)",
    )
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here. Add --tiny to try the benchmark on the CPU")
    device = torch.device("cpu" if options.tiny else "cuda")
    bench = Workbench(device, options.tiny)
    about = {
        "device": device.type,
        "tiny": options.tiny,
        "dtype": "bfloat16",
        "questions_per_image": bench.pairs_per_image,
        "budget_s": options.budget_s,
    }
    rows: list[dict[str, Any]] = []
    for name in options.parts:
        left = options.budget_s - (time.perf_counter() - began)
        rows.append(run_part(name, PARTS[name], bench, left))
        print(json.dumps(rows[-1]), flush=True)
        if options.out:
            write_record(options.out, "gpu", rows, **about)
    bench.free()
    seconds = round(time.perf_counter() - began, 1)
    complete = sum(row["status"] == MEASURED for row in rows)
    print(f"\n{table(rows, options.tiny)}\n{complete} of {len(rows)} parts measured in full, {seconds} s")
    if options.out:
        record(options.out, "gpu", rows, **about, seconds=seconds)
        options.out.with_suffix(".md").write_text(table(rows, options.tiny), encoding="utf-8")


def run_part(name: str, part: Part, bench: Workbench, left_s: float) -> dict[str, Any]:
    """The row of one part, within its limit and the `left_s` seconds of the budget.

    Keys: part, about, status, figures, seconds; reason where it was skipped, stopped or failed, and `at`, the
    line of code, where it failed. An "incomplete" part has a measurement that failed.
    """
    row: dict[str, Any] = {"part": name, "about": part.summary}
    if left_s < LEAST_S:
        reason = f"{max(0.0, left_s):.0f} s of the budget are left, a part needs {LEAST_S:.0f}"
        return row | {"status": SKIPPED, "reason": reason, "figures": {}, "seconds": 0.0}
    figures: dict[str, Any] = {}
    limit_s = min(part.limit_s, left_s)
    began = time.perf_counter()
    try:
        with warnings.catch_warnings(), time_limit(limit_s):
            warnings.simplefilter("ignore")  # PEFT and transformers warn about settings that are intended here
            part.run(bench, figures)
        failed = any(isinstance(value, dict) and "error" in value for value in figures.values())
        row["status"] = INCOMPLETE if failed else MEASURED
    except TimeLimitReached:
        row |= {"status": STOPPED, "reason": f"the limit of {limit_s:.0f} s was reached"}
    except Exception as error:
        where = failure(error)
        row |= {"status": FAILED, "reason": where["error"], "at": where["at"]}
    if row["status"] in (STOPPED, FAILED):
        bench.free()  # the part may have left the model changed; its frames no longer refer to it here
    return row | {"figures": figures, "seconds": round(time.perf_counter() - began, 1)}


def table(rows: list[dict[str, Any]], tiny: bool) -> str:
    """A line for each measurement, and one for each part that was not run.

    Memory columns are empty on a CPU, and its times are marked as a trial.
    """
    lines = [TRIAL, ""] if tiny else []
    lines += [
        "| part | measurement | pairs | ms a step | pairs/s | MiB a step | MiB a pair | notes |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        if row["status"] in (STOPPED, FAILED, SKIPPED):
            lines.append(f"| {row['part']} | | | | | | | {row['status']}: {row['reason']} |")
        for name, figures in row["figures"].items():
            if not isinstance(figures, dict):
                continue
            columns = ("pairs", "step_ms", "pairs_per_s", "step_mib", "step_mib_per_pair")
            cells = [str(figures.get(key, "")) for key in columns]
            lines.append(f"| {row['part']} | {name} | {' | '.join(cells)} | {notes(figures)} |")
    run = {row["part"] for row in rows}
    lines += [f"| {name} | | | | | | | {NOT_YET} |" for name in PARTS if name not in run]
    return "\n".join(lines) + "\n"


def notes(figures: dict[str, Any]) -> str:
    """The figures of a measurement besides its time and memory, as text."""
    if "error" in figures:
        return f"failed: {figures['error']}".replace("|", "/")
    if "missing" in figures:
        return f"{figures['missing']} is not installed"
    parts = []
    if "ln_is_faster" in figures:
        parts.append(f"normtune ln is {figures['ln_is_faster']}x as fast")
    if "gains" in figures:
        moved = (figures[name]["moved_percent"] for name in ("gains", "biases"))
        parts.append("{}% of the gains and {}% of the biases moved".format(*moved))
    if figures.get("host_waits") is not None:
        parts.append(f"the host waits {sum(figures['host_waits'].values())} times")
    if "weights_mib" in figures:
        parts.append(f"weights {figures['weights_mib']} MiB")
    if "graphs" in figures:
        parts.append(f"{figures['graphs']} graphs of {figures['layers']} layers")
    if "with_compilation_s" in figures:
        parts.append(f"{figures['with_compilation_s']} s in all")
    if "images" in figures:
        parts.append(f"{figures['images']} images")
    if "relative_difference" in figures:
        parts.append(f"relative difference {figures['relative_difference']:.1e}")
    if "pairs" not in figures and not parts:
        parts = [f"{key} {value}" for key, value in figures.items() if isinstance(value, int | float)]
    return ", ".join(parts)


if __name__ == "__main__":
    main()
