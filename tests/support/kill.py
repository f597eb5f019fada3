"""A training run that ends early."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class Stop(TrainerCallback):
    """Ends a run at once after a step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt
