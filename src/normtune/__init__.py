"""Normtune: fine-tune medical vision-language models by training what is already inside them.

The public names load what they need when they are first used, so that `import normtune` takes no torch.
Functions named like their module are imported from it: `from normtune.methods.adapt import adapt`, and so `train` and
`evaluate`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Dataset": "normtune.data.records",
    "Example": "normtune.data.records",
    "EvaluateConfig": "normtune.evaluation.config",
    "InputError": "normtune.errors",
    "TrainConfig": "normtune.training.config",
    "Tuned": "normtune.methods.adapt",
    "compare": "normtune.evaluation.compare",
    "load": "normtune.models.loading",
    "load_delta": "normtune.adapters.storage",
    "open_dataset": "normtune.data.registry",
    "parse": "normtune.methods.recipe",
    "save_delta": "normtune.adapters.storage",
    "score_vqa": "normtune.metrics.answers",
    "untune": "normtune.methods.adapt",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'normtune' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
