"""A callback that interrupts a training run."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback


class StopAfterStep(TrainerCallback):
    """Interrupts a run after a step, as Ctrl-C does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt
