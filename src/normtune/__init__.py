"""Normtune: fine-tune medical vision-language models by training what is already inside them.

The public names are imported when they are first used, so that `import normtune` does not import torch;
`__init__.pyi` declares them for editors and type checkers.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any
from warnings import warn

__version__ = "0.1.0"

_MODULES = {  # public name -> the module that defines it
    "Dataset": "normtune.data.records",
    "EvaluateConfig": "normtune.evaluation.config",
    "Example": "normtune.data.records",
    "InputError": "normtune.errors",
    "TrainConfig": "normtune.training.config",
    "TunedModel": "normtune.methods.adapt",
    "adapt": "normtune.api.models",
    "advise": "normtune.api.runs",
    "ask": "normtune.api.questions",
    "compare": "normtune.evaluation.compare",
    "describe": "normtune.api.questions",
    "evaluate": "normtune.api.runs",
    "export_peft": "normtune.api.models",
    "load": "normtune.api.models",
    "load_adapter": "normtune.api.models",
    "merge": "normtune.api.models",
    "mix_adapters": "normtune.adapters.mixing",
    "open_dataset": "normtune.data.registry",
    "parse": "normtune.methods.recipe",
    "read_evaluation": "normtune.evaluation.results",
    "restore_base": "normtune.methods.adapt",
    "save_adapter": "normtune.adapters.storage",
    "score_vqa": "normtune.metrics.answers",
    "study": "normtune.api.runs",
    "train": "normtune.api.runs",
}
_RENAMED = {  # name in version 0.1.0 -> its name today
    "Tuned": "TunedModel",
    "load_delta": "load_adapter",
    "save_delta": "save_adapter",
    "untune": "restore_base",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        warn(f"normtune.{name} is now normtune.{_RENAMED[name]}.", DeprecationWarning, stacklevel=2)
        name = _RENAMED[name]
    if name not in _MODULES:
        raise AttributeError(f"module 'normtune' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
