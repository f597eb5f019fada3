"""What the Trainer receives: the family's loss as its model, groups of examples as its data, and a progress bar."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.data import Dataset as TorchDataset
from transformers import TrainerCallback, TrainerControl, TrainerState

from normtune.data.batches import EpochBatches
from normtune.data.records import Example
from normtune.models.family import Family
from normtune.runtime import distributed
from normtune.runtime.progress import ProgressBar

BATCHES_AHEAD = 2
GPU_WORKERS = 2  # threads by default where the model is on a GPU; on a CPU the model needs all cores

Groups = Sequence[Sequence[Example]]  # a batch: the examples of each group


class Objective(nn.Module):
    """The family's loss as a module, so that the Trainer can wrap it in DDP or FSDP2.

    Args:
        family: its model becomes a submodule; `family.loss` computes the sum over answer tokens.
        label_smoothing: see `TrainConfig.label_smoothing`.
        dropout: whether the base's own dropout is active during training; see `train`.
    """

    def __init__(self, family: Family, label_smoothing: float, dropout: bool) -> None:
        super().__init__()
        self.model = family.model
        self._family = [family]  # in a list, so that torch neither registers nor copies it
        self._label_smoothing = label_smoothing
        self._dropout = dropout

    def forward(self, call: Callable[[], Any] | None = None, **batch: Any) -> Any:
        """Return the sum of the answer tokens' cross-entropies, a scalar.

        Args:
            call: returns the result in place of the loss, such as answers: what FSDP2 shards outside of the layers is
                gathered only within this function.
        """
        if call is not None:
            return call()
        total, _ = self._family[0].loss(batch, label_smoothing=self._label_smoothing)
        return total

    def train(self, mode: bool = True) -> Objective:
        """Set training mode, with the base's dropout off for grouped questions.

        Questions of a group share one image, and would therefore share its dropout mask. LoRA's dropout,
        which the recipe asks for, stays on: each question's mask has the same distribution as without
        grouping, so that the expected gradient is the same; the masks within a group are correlated.
        """
        super().train(mode)
        if mode and not self._dropout:
            lora = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
            lora_dropout = {id(module) for layer in lora for module in layer.lora_dropout.modules()}
            # all modules, not only nn.Dropout: an attention layer, for one, reads its own `training`
            for module in self.model.modules():
                if id(module) not in lora_dropout:
                    module.training = False
        return self


class IdentityDataset(TorchDataset[list[list[Example]]]):
    """Returns each index as the item: `EpochBatches` yields groups of examples in place of indices.

    The DataLoader thereby hands the groups of a batch to the collator unchanged.
    """

    def __init__(self, batches: EpochBatches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches.examples)

    def __getitem__(self, group: Any) -> Any:
        return group

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the batches.

        In a resumed run of several processes accelerate wraps the batch sampler twice, and reaches it only
        here.
        """
        self.batches.set_epoch(epoch)


class LookaheadBatches:
    """Yields the same batches as `EpochBatches`, and passes each to `prepare` two batches before it yields it.

    Only the batches of this process are passed. All other attributes (epoch, number of processes) are the batches'.
    """

    def __init__(self, batches: EpochBatches, prepare: Callable[[Groups], None]) -> None:
        self.batches, self.prepare = batches, prepare

    def __iter__(self) -> Iterator[Groups]:
        waiting: deque[Groups] = deque()
        for number, groups in enumerate(self.batches):
            if number % self.batches.ranks == distributed.rank():  # batches go to the processes in turn
                self.prepare(groups)
            waiting.append(groups)
            if len(waiting) > BATCHES_AHEAD * self.batches.ranks:
                yield waiting.popleft()
        yield from waiting

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)


def worker_count(workers: int | None, device_type: str) -> int:
    """The number of threads that read images: `workers`, or the default for the device."""
    return workers if workers is not None else GPU_WORKERS if device_type == "cuda" else 0


class PrintProgress(TrainerCallback):
    """Shows the step and the loss of a run; never texts, which may be patient data."""

    def __init__(self) -> None:
        self.bar = ProgressBar("training")
        self.loss = ""
        self.validation = ""

    # the hooks of HF's TrainerCallback; a resumed run starts at its step

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(state.global_step, state.max_steps, self.loss)

    on_train_begin = on_step_end

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.loss = f"loss {logs['loss']:.4f}{self.validation}"
        elif logs and "eval_validation_loss" in logs:
            self.validation = f", validation {logs['eval_validation_loss']:.4f}"

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.close()
