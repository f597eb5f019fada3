"""Writes what the docs take from elsewhere: the example and the GPU table of README.md, the GPU measurements of
docs/speed.md and benchmarks/gpu.md, the commands of docs/which-gpu.md, the tables of docs/demo.md,
docs/results.md and docs/commands.md.

PYTHONPATH=src python scripts/write_docs.py
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import typer.main

from normtune.cli import app
from normtune.runtime.files import read_json, write_text
from normtune.runtime.text_table import markdown_table

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]

import results_page  # noqa: E402
import when_norms_page  # noqa: E402
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
    rows = []
    for part, name, model, options in FITS:
        figure = figures[part][name]
        peak = figure["peak_mib"] / 1024
        size = next(size for size in GPU_SIZES if plans.usable_bytes(size) / 2**30 >= peak)
        rows.append([f"{size} GB", model, options, f"{peak:.1f}", f"{figure['pairs_per_s']:.0f}"])
    lines = markdown_table(("GPU", "model", "recipe and options", "peak GiB", "pairs/s"), rows, "rllr")
    about = (
        f"Peak memory of a bf16 training step with 2 images and 11 questions of each, and its speed, measured on one "
        f"{record['machine']['accelerator']}:\n"
    )
    return "\n".join([about, *lines]) + "\n"


def replace_between(page: str, source: str, text: str) -> str:
    """The page with the lines between the marker of a source and the next end marker replaced."""
    begin, end = f"<!-- from {source}, by scripts/write_docs.py -->\n", "<!-- end -->"
    before, marker, rest = page.partition(begin)
    assert marker, f"a marker for {source}"
    return before + begin + text + end + rest.partition(end)[2]


def readme(page: str) -> str:
    """README.md with its example and its table brought up to date."""
    example = (ROOT / "examples" / "quick_start.py").read_text(encoding="utf-8")
    page = replace_between(page, "examples/quick_start.py", f"```python\n{example}```\n")
    return replace_between(page, "benchmarks/gpu.json", gpu_table(read_json(GPU_RECORD)))


def which_gpu(page: str) -> str:
    """docs/which-gpu.md with its commands and tables brought up to date."""
    return replace_between(
        page, "benchmarks/which_gpu.json", plans.page(read_json(PLANS)["rows"], read_json(GPU_RECORD))
    )


def speed(page: str) -> str:
    """docs/speed.md with its GPU measurements brought up to date: when, on what, and the table of all of them."""
    record = read_json(GPU_RECORD)
    day = date.fromisoformat(record["date"])
    versions = record["versions"]
    about = (
        f"Measured on {day:%d %B %Y} on one {record['machine']['accelerator']} with torch {versions['torch']}, "
        f"transformers {versions['transformers']} and PEFT {versions['peft']}:\n\n"
    )
    return replace_between(page, "benchmarks/gpu.json", about + table(record["rows"], record["tiny"]))


def results() -> str:
    """docs/results.md, from the study's results and the question-only baseline."""
    study = read_json(ROOT / "docs" / "results" / "real-nano" / "results.json")
    baseline = read_json(ROOT / "benchmarks" / "question_only.json")
    return results_page.page(study, {row["dataset"]: row["metrics"] for row in baseline["rows"]})


def small_methods() -> str:
    """docs/small-methods.md, from the study of methods as small as norms."""
    return results_page.small_methods_page(read_json(ROOT / "docs" / "results" / "tiny-budget" / "results.json"))


def when_norms() -> str:
    """docs/when-norms.md, from its benchmark."""
    return when_norms_page.page(read_json(ROOT / "benchmarks" / "when_norms.json"))


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
            parts.append("\n".join(markdown_table(("option", "default", "meaning"), rows, "l")) + "\n")
    return "\n".join(parts)


def _row(parameter: Any) -> tuple[str, str, str]:
    is_option = parameter.param_type_name == "option"
    flags = " / ".join([*parameter.opts, *parameter.secondary_opts]) if is_option else parameter.name.upper()
    default = parameter.default
    if parameter.required:
        default_text = "required"
    elif default is None or default is False or default in ((), []) or callable(default):
        default_text = ""
    else:
        default_text = f"`{'on' if default is True else default}`"
    return f"`{flags}`", default_text, (parameter.help or "").replace("<", "&lt;")


# page -> a function of its present text that returns its new text
PAGES: dict[str, Callable[[str], str]] = {
    "README.md": readme,
    "docs/speed.md": speed,
    "docs/which-gpu.md": which_gpu,
    "docs/demo.md": demo_tables,
    "docs/commands.md": lambda page: commands_page(),
    "docs/results.md": lambda page: results(),
    "docs/small-methods.md": lambda page: small_methods(),
    "docs/when-norms.md": lambda page: when_norms(),
}


def main() -> None:
    record = read_json(GPU_RECORD)
    write_text(GPU_RECORD.with_suffix(".md"), table(record["rows"], record["tiny"]))
    for name, update in PAGES.items():
        write_text(ROOT / name, update((ROOT / name).read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
