"""Normtune: fine-tune medical vision-language models by training what is already inside them.

The public names load what they need when they are first used, so that `import normtune` takes no torch.
Functions named like their module are imported from it: `from normtune.adapt import adapt`, and so `train` and
`evaluate`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Dataset": "normtune.data.records",
    "Example": "normtune.data.records",
    "EvaluateConfig": "normtune.config",
    "InputError": "normtune.errors",
    "TrainConfig": "normtune.config",
    "Tuned": "normtune.adapt",
    "compare": "normtune.comparison",
    "load": "normtune.models",
    "load_delta": "normtune.delta",
    "open_dataset": "normtune.catalog",
    "parse": "normtune.recipe",
    "save_delta": "normtune.delta",
    "score_vqa": "normtune.metrics.vqa",
    "untune": "normtune.adapt",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'normtune' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
