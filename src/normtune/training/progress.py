"""The progress bar of a training run."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from normtune.runtime.progress import ProgressBar


class PrintProgress(TrainerCallback):
    """Shows the step and the loss of a run; never texts, which may be patient data."""

    def __init__(self) -> None:
        self.bar = ProgressBar("training")
        self.loss = ""
        self.validation = ""

    # the hooks of HF's TrainerCallback; a resumed run starts at its step

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(state.global_step, state.max_steps, self.loss)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(state.global_step, state.max_steps, self.loss)

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.loss = f"loss {logs['loss']:.4f}{self.validation}"
        elif logs and "eval_validation_loss" in logs:
            self.validation = f", validation {logs['eval_validation_loss']:.4f}"

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.close()
