"""`normtune train --dry-run`: the checks of a run, its steps, what it would train and its memory."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from normtune.data.sampling import sampling_text
from normtune.inference.limits import check_run
from normtune.methods.recipe import parse
from normtune.models.loading import resolve_device, resolve_dtype
from normtune.training.arguments import optimizer_steps
from normtune.training.config import TrainConfig
from normtune.training.identity import check_identity, option_identity
from normtune.training.inspection import inspect_model, inspect_text
from normtune.training.memory_plan.plan import plan_memory
from normtune.training.privacy import PoissonBatches, check_private_options, plan_privacy, spent
from normtune.training.setup import build_batches, read_examples

_FOLDERS = {
    "new": "holds no run",
    "unfinished": "holds a checkpoint of this run, which would be resumed",
    "finished": "holds the adapter of this run: nothing would be trained",
    "other": "holds another run, which would be moved (--overwrite)",
}


def plan_run(config: TrainConfig) -> tuple[dict[str, Any], str]:
    """Check a training run as training does, and describe it; no weights are loaded and nothing is written.

    Returns:
        (report, text): the run's pairs, images and optimiser steps, what its output folder holds, the preflight,
        the inspection of the model and the memory plan.

    Raises:
        InputError: training would refuse the run.
    """
    check_private_options(config)
    parse(config.tune)
    config = config.model_copy(update={"dtype": resolve_dtype(config.dtype, resolve_device(config.device))})
    folder = check_identity(config, option_identity(config))
    dataset, examples = read_examples(config)
    examples, preflight = check_run(config, examples, config.model, training=True)
    batches = build_batches(config, dataset, examples)
    steps = optimizer_steps(config, batches)
    privacy = plan_privacy(config, batches, steps) if isinstance(batches, PoissonBatches) else None
    sampling = {} if batches.sampler is None else batches.sampler.counts(1)
    run = {
        "data": dataset.name,
        "split": config.split,
        "pairs": len(examples),
        "images": examples.image_count,
        "steps_an_epoch": batches.steps,
        "steps": steps,
        **({"sampling": sampling} if sampling else {}),
        **({"privacy": asdict(privacy)} if privacy else {}),
        "out": str(config.out),
        "folder": folder,
    }
    inspection = inspect_model(config.model, config.tune) | {"plan": plan_memory(config).to_json()}
    lines = [
        f"{run['pairs']:,} pairs of {run['images']:,} images ({dataset.name}, {config.split}): {run['steps']:,} steps, "
        f"{batches.steps:,} batches an epoch",
        *([sampling_text(sampling)] if sampling else []),
        *([str(spent(privacy, steps))] if privacy else []),
        f"--out {config.out}: {_FOLDERS[folder]}",
        f"\nPreflight\n{preflight.text()}",
        f"\n{inspect_text(inspection)}",
        "\nnothing was trained (--dry-run)",
    ]
    return {"run": run, "preflight": preflight.to_dict(), **inspection}, "\n".join(lines)
