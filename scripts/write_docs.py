"""Writes what the docs take from elsewhere: the example and the GPU table of README.md, the GPU measurements of
docs/speed.md and benchmarks/gpu.md, the commands of docs/which-gpu.md, the tables of docs/demo.md,
docs/results.md and docs/commands.md.

PYTHONPATH=src python scripts/write_docs.py
"""

from __future__ import annotations

import json
import re
import sys
from datetime import date
from pathlib import Path
from typing import Any

import typer.main

from normtune.cli import app

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]

import results_page  # noqa: E402
import which_gpu as plans  # noqa: E402
from gpu import table  # noqa: E402

GPU_RECORD = ROOT / "benchmarks" / "gpu.json"
GPU_SIZES = (8, 12, 16, 24, 40, 48, 80, 141)  # GB of common GPUs
PLANS = ROOT / "benchmarks" / "which_gpu.json"
# (part and measurement of benchmarks/gpu.json, model, options)
FITS = (
    ("medgemma-step", "normtune ln, tight", "MedGemma 4B", "`ln`, `--memory tight`"),
    ("quantized", "nf4", "LLaVA-Med 7B", "`ln`, `--quantize nf4`"),
    ("quantized", "int8", "LLaVA-Med 7B", "`ln`, `--quantize int8`"),
    ("llava-step", "normtune ln, tight", "LLaVA-Med 7B", "`ln`, `--memory tight`"),
    ("medgemma-step", "normtune ln", "MedGemma 4B", "`ln`"),
    ("llava-step", "normtune ln", "LLaVA-Med 7B", "`ln`"),
    ("llava-step", "normtune lora(r=16)", "LLaVA-Med 7B", "`lora(r=16)`"),
)


def gpu_table(record: dict[str, Any]) -> str:
    """The smallest common GPU for each model and its options, by the peak memory of a training step."""
    figures = {row["part"]: row.get("figures", {}) for row in record["rows"]}
    lines = [
        f"Peak memory of a bf16 training step with 2 images and 11 questions of each, and its speed, measured on one "
        f"{record['machine']['accelerator']}:\n",
        "| GPU | model | recipe and options | peak GiB | pairs/s |",
        "|--:|---|---|--:|--:|",
    ]
    for part, name, model, options in FITS:
        figure = figures[part][name]
        peak = figure["peak_mib"] / 1024
        size = next(size for size in GPU_SIZES if plans.usable_bytes(size) / 2**30 >= peak)
        lines.append(f"| {size} GB | {model} | {options} | {peak:.1f} | {figure['pairs_per_s']:.0f} |")
    return "\n".join(lines) + "\n"


def replace_between(page: str, source: str, text: str) -> str:
    """The page with the lines between the marker of a source and the next end marker replaced."""
    begin, end = f"<!-- from {source}, by scripts/write_docs.py -->\n", "<!-- end -->"
    before, marker, rest = page.partition(begin)
    assert marker, f"a marker for {source}"
    return before + begin + text + end + rest.partition(end)[2]


def readme(page: str) -> str:
    """README.md with its example and its table brought up to date."""
    example = (ROOT / "examples" / "quick_start.py").read_text(encoding="utf-8")
    record = json.loads(GPU_RECORD.read_text(encoding="utf-8"))
    page = replace_between(page, "examples/quick_start.py", f"```python\n{example}```\n")
    return replace_between(page, "benchmarks/gpu.json", gpu_table(record))


def which_gpu(page: str) -> str:
    """docs/which-gpu.md with its commands and tables brought up to date."""
    rows, gpu = (json.loads(path.read_text(encoding="utf-8")) for path in (PLANS, GPU_RECORD))
    return replace_between(page, "benchmarks/which_gpu.json", plans.page(rows["rows"], gpu))


def measurements(record: dict[str, Any]) -> str:
    """The lines of docs/speed.md that a record determines: when, on what, and the table of all measurements."""
    day = date.fromisoformat(record["date"])
    versions = record["versions"]
    about = (
        f"Measured on {day:%d %B %Y} on one {record['machine']['accelerator']} with torch {versions['torch']}, "
        f"transformers {versions['transformers']} and PEFT {versions['peft']}:\n\n"
    )
    return about + table(record["rows"], record["tiny"])


def results() -> str:
    """docs/results.md, from the study's results and the question-only baseline."""
    study = json.loads((ROOT / "docs" / "results" / "real-nano" / "results.json").read_text(encoding="utf-8"))
    baseline = json.loads((ROOT / "benchmarks" / "question_only.json").read_text(encoding="utf-8"))
    return results_page.page(study, {row["dataset"]: row["metrics"] for row in baseline["rows"]})


def demo_tables(page: str) -> str:
    """docs/demo.md with the tables of the demo brought up to date."""
    for name in ("table", "reports"):
        source = f"benchmarks/demo/{name}.md"
        page = replace_between(page, source, (ROOT / source).read_text(encoding="utf-8"))
    return page


def commands_page() -> str:
    """docs/commands.md: every command with its arguments and options."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("normtune", [], resilient_parsing=True)
    parts = [
        "# Command line\n",
        "`normtune COMMAND --help` prints the same. Every command prints text, and with `--json` one JSON object.\n"
        "The exit status is 0 on success, 2 for bad input (one sentence on stderr), 1 if the self-test of\n"
        "`normtune doctor` fails, and 130 after an interrupt. `normtune --version` prints the version.\n",
    ]
    for name in group.list_commands(context):
        command = group.commands[name]
        help_text = re.sub(r"\s*\n(?!\n)\s*", " ", re.sub(r"\n\s*\n", "\0", command.help)).replace("\0", "\n\n")
        parts.append(f"## normtune {name}\n\n{help_text.strip()}\n")
        rows = [_row(parameter) for parameter in command.params if parameter.name != "help"]
        if rows:
            parts.append("\n".join(["| option | default | meaning |", "|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def _row(parameter: Any) -> str:
    is_option = parameter.param_type_name == "option"
    flags = " / ".join([*parameter.opts, *parameter.secondary_opts]) if is_option else parameter.name.upper()
    default = parameter.default
    if parameter.required:
        default_text = "required"
    elif default is None or default is False or default in ((), []) or callable(default):
        default_text = ""
    else:
        default_text = f"`{'on' if default is True else default}`"
    text = (parameter.help or "").replace("|", "\\|").replace("<", "&lt;")
    return f"| `{flags}` | {default_text} | {text} |"


def main() -> None:
    record = json.loads(GPU_RECORD.read_text(encoding="utf-8"))
    GPU_RECORD.with_suffix(".md").write_text(table(record["rows"], record["tiny"]), encoding="utf-8")
    speed = ROOT / "docs" / "speed.md"
    text = replace_between(speed.read_text(encoding="utf-8"), "benchmarks/gpu.json", measurements(record))
    speed.write_text(text, encoding="utf-8")
    page = ROOT / "README.md"
    page.write_text(readme(page.read_text(encoding="utf-8")), encoding="utf-8")
    page = ROOT / "docs" / "which-gpu.md"
    page.write_text(which_gpu(page.read_text(encoding="utf-8")), encoding="utf-8")
    page = ROOT / "docs" / "demo.md"
    page.write_text(demo_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    (ROOT / "docs" / "commands.md").write_text(commands_page(), encoding="utf-8")
    (ROOT / "docs" / "results.md").write_text(results(), encoding="utf-8")


if __name__ == "__main__":
    main()
