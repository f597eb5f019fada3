"""The result of a training run, as `train_result.json` and as text."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from normtune.data.sampling import sampling_text
from normtune.errors import InputError
from normtune.runtime import distributed, memory
from normtune.runtime.files import read_json
from normtune.runtime.notebook import Result, axes_or_new
from normtune.training.changes import Change, change_report, norm_changes
from normtune.training.privacy import Privacy, spent
from normtune.training.validation import LOSS, CurvePoint, best_point, curve, is_stopped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from normtune.training.setup import TrainingSetup
    from normtune.training.trainer import AdapterTrainer


@dataclass(frozen=True)
class TrainResult(Result):
    """The result of a training run; `print` and Jupyter show it as a few lines of text.

    The field names are the keys of `train_result.json` and of `--json`.
    """

    out: str  # folder of the adapter
    recipe: str  # resolved: a method for each part of the model
    trainable: int  # number of trained parameters
    total: int  # number of parameters of the adapted model
    share: float  # trainable / total
    pairs: int  # question-answer pairs seen, those before a resume included
    steps: int  # optimiser steps, those before a resume included
    seconds: float  # wall-clock time since the last start
    pairs_per_second: float  # pairs since the last start / seconds
    peak_memory_bytes: int  # since the last start; the largest of all processes
    computed_once: str | None  # the part of the model's work that is done once per image; None: none of it
    final_loss: float | None  # last entry of the loss log, in nats per answer token; None: the log is empty
    changed: float  # share of the trained values that differ from those before training
    changes: tuple[Change, ...]  # the same for each part and role, with sizes
    warning: str | None  # set if almost nothing changed or values are not finite
    # step of the checkpoint from which the last start resumed; None: the run was not interrupted
    resumed_from_step: int | None = None
    already_finished: bool = False  # the adapter of the same run was in `out` already; nothing was trained
    left_out: int = 0  # values that the recipe names and that the model never uses
    earlier_run: str | None = None  # folder to which --overwrite moved what was in `out`
    device: str = "cpu"  # where the base was trained, such as cuda:0
    dtype: str = "float32"  # of the frozen weights
    # of training in all starts, without set-up and validation; None: written by version 0.1
    total_seconds: float | None = None
    validation_seconds: float = 0.0  # in all starts
    # peak during training less the memory of the process (of the device) with the loaded base before it: gradients,
    # optimiser, activations, cached images and added weights. None: written by version 0.1
    peak_above_base_bytes: int | None = None
    passes: float | None = None  # over the training pairs
    curve: tuple[CurvePoint, ...] = ()  # the validations
    validation_metric: str | None = None  # the metric that chose the best step; None: the run did not validate
    best_step: int | None = None  # step with the best value of this metric
    best_score: float | None = None  # this value; of `loss`, lower is better
    adapter_step: int | None = None  # the adapter has its values: the best step, or with keep=last the last one
    stopped_early: bool = False  # the score did not rise in `patience` validations
    sampling: dict[str, dict[str, Any]] | None = None  # see `RowSampler.counts`; None: every pair once an epoch
    privacy: dict[str, Any] | None = None  # of a private run: see `normtune.training.privacy.Privacy`

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter."""
        return Path(self.out)

    @property
    def losses(self) -> list[tuple[int, float]]:
        """The loss log, read from the adapter: (step, mean loss per answer token since the previous entry)."""
        log = read_json(self.adapter / "adapter.json")["metrics"]["training"]["loss"]
        return [(step, loss) for step, loss in log]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the loss against the step; with validation also the loss and the score of the validation rows."""
        ax = axes_or_new(ax)
        losses = self.losses
        ax.plot([step for step, _ in losses], [loss for _, loss in losses], label="training loss")
        if self.curve and self.validation_metric and self.best_step:
            steps = [point.step for point in self.curve]
            ax.plot(steps, [point.validation_loss for point in self.curve], "o-", label="validation loss")
            ax.axvline(self.best_step, color="0.6", linestyle=":", label=f"best step: {self.best_step}")
            if self.validation_metric != LOSS:
                scores = ax.twinx()
                values = [100 * point.metrics[self.validation_metric] for point in self.curve]
                (line,) = scores.plot(steps, values, "s-", color="C2", label=f"validation {self.validation_metric}")
                scores.set_ylabel(f"{self.validation_metric} in %")
                ax.plot([], [], "s-", color=line.get_color(), label=line.get_label())  # its entry in the one legend
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, frameon=False)  # below the axes
        ax.set_xlabel("step")
        ax.set_ylabel("loss in nats per answer token")
        ax.set_title(self.recipe)
        ax.grid(alpha=0.3)
        return ax

    def save_plot(self) -> Path:
        """Draw the curve to `curve.png` in the adapter's folder; return its path."""
        from matplotlib.figure import Figure  # not pyplot, which would look for a display

        figure = Figure(figsize=(7, 4), layout="constrained")
        self.plot(figure.subplots())
        figure.savefig(self.adapter / "curve.png", dpi=120)
        return self.adapter / "curve.png"

    def __str__(self) -> str:
        lines = []
        if self.already_finished:
            lines.append(f"finished already: {self.out} holds the adapter of the same run. --overwrite trains it again")
        lines += [
            f"{self.recipe}: {self.trainable:,} of {self.total:,} parameters ({100 * self.share:.4f}%)",
            f"{self.pairs:,} pairs in {self.steps:,} steps, {self.seconds:.1f} s "
            f"({self.pairs_per_second:.1f} pairs/s), peak memory {self.peak_memory_bytes / 2**20:,.0f} MiB, "
            f"{self.dtype} on {self.device}",
        ]
        if self.earlier_run is not None:
            lines.append(f"moved the earlier run in {self.out} to {self.earlier_run}")
        if self.resumed_from_step is not None:
            lines.append(
                f"resumed from step {self.resumed_from_step:,}; time, pairs/s and memory are of the steps since"
            )
        if self.left_out:
            lines.append(f"left out: {self.left_out:,} values that the model never uses (image encoder layers, sound)")
        if self.computed_once is not None:
            lines.append(f"computed once per image: {self.computed_once}")
        if self.sampling:
            lines.append(sampling_text(self.sampling))
        if self.privacy:
            lines += [str(Privacy(**self.privacy)), "the training loss is not recorded: nothing protects it"]
        if self.final_loss is not None:
            lines.append(f"final loss {self.final_loss:.4f} per token")
        if self.best_step is not None and self.best_score is not None:
            is_loss = self.validation_metric == LOSS
            value = f"{self.best_score:.4f}" if is_loss else f"{100 * self.best_score:.1f}%"
            lines.append(
                f"validation: best {self.validation_metric} {value} at step {self.best_step:,} of {self.steps:,}"
                f"{', stopped early' if self.stopped_early else ''}; the adapter has the values of step "
                f"{self.adapter_step:,} ({len(self.curve)} validations, {self.validation_seconds:.1f} s: curve.png)"
            )
        lines.append(f"{100 * self.changed:.1f}% of the trained values changed")
        for change in self.changes:
            step = change.relative
            size = "from zero" if step is None else f"by {100 * step:.2g}% of their size"
            changed = f"{100 * change.changed:.1f}% of {change.values:,} changed, {size}"
            lines.append(f"  {change.part} {change.role}: {changed}")
        if self.warning:
            lines.append(f"WARNING: {self.warning}")
        return "\n".join([*lines, f"Written: {self.out}"])


def read_result(out: Path) -> TrainResult:
    """Read the result of the finished run in a folder; an `InputError` if it is missing or damaged."""
    stored = read_json(out / "train_result.json")
    names = {field.name for field in fields(TrainResult)}  # files of version 0.1 have an entry more
    try:
        objects: dict[str, Any] = {"changes": tuple(Change(**change) for change in stored["changes"])}
        objects["curve"] = tuple(CurvePoint(**point) for point in stored.get("curve", ()))
        return TrainResult(**{name: value for name, value in stored.items() if name in names} | objects)
    except (KeyError, TypeError) as error:
        raise InputError(f"{out / 'train_result.json'} is damaged ({error}). Choose another --out.") from error


def build_result(
    setup: TrainingSetup, before: Mapping[str, Tensor], trainer: AdapterTrainer, base_bytes: int
) -> tuple[TrainResult, dict[str, Any]]:
    """Compare the trained values with those before training and collect the result of a run.

    Args:
        before: copies of `tuned.trained` from before training, by name.
        trainer: the run, which has ended.
        base_bytes: memory of the process, or of the device, before training.

    Returns:
        The result, and a description for `adapter.json`: the loss log and one row per norm.
    """
    config, tuned, checkpoint, device = setup.config, setup.tuned, trainer.checkpoint, trainer.args.device
    # HF's log also has rows of other kinds, such as the summary at the end
    losses = [(int(row["step"]), row["loss"]) for row in trainer.state.log_history if "loss" in row]
    points, steps = curve(trainer.state.log_history), trainer.state.global_step
    private = trainer.private
    if private is not None:
        losses = []  # losses of training rows, without noise
        if private.dropped:
            print(f"{private.dropped} gradients of patients were not finite and counted as zero", file=sys.stderr)
    # what was repeated and left out in each epoch
    sampler = trainer.batches.sampler
    sampling = None if sampler is None else sampler.counts(math.ceil(trainer.state.epoch or 0))
    changes = change_report(before, tuned)
    pairs = sum(distributed.all_gather(trainer.pairs_seen))
    peak = max(distributed.all_gather(memory.peak_memory_bytes(device)))
    above_base = max(distributed.all_gather(memory.peak_memory_bytes(device) - base_bytes))
    total_seconds = trainer.train_seconds()
    seconds = total_seconds - (0.0 if checkpoint is None else checkpoint.train_seconds)  # since the last start
    result = TrainResult(
        out=str(config.out),
        recipe=str(tuned.recipe),
        trainable=tuned.trainable,
        total=tuned.total,
        share=tuned.share,
        pairs=pairs,
        steps=steps,
        seconds=seconds,
        pairs_per_second=(pairs - (0 if checkpoint is None else checkpoint.pairs_seen)) / seconds,
        peak_memory_bytes=peak,
        device=str(device),
        dtype=config.dtype,
        computed_once=setup.collate.cached_states,
        final_loss=losses[-1][1] if losses else None,
        changed=changes.share,
        changes=changes.changes,
        warning=changes.warning,
        resumed_from_step=None if checkpoint is None else checkpoint.step,
        left_out=tuned.left_out,
        total_seconds=total_seconds,
        validation_seconds=trainer.validation_seconds,
        peak_above_base_bytes=above_base,
        passes=trainer.state.epoch,
        curve=points,
        sampling=sampling,
        privacy=None if private is None else asdict(spent(private.privacy, steps)),
    )
    if trainer.validation is not None:
        metric = trainer.validation.metric
        best = best_point(points, metric)
        result = replace(
            result,
            validation_metric=metric,
            best_step=best.step,
            best_score=best.validation_loss if metric == LOSS else best.metrics[metric],
            adapter_step=steps if config.keep == "last" else best.step,
            stopped_early=is_stopped(points, metric, config.patience),
        )
    description = {"loss": losses, "norms": norm_changes(before, tuned)}
    return result, description | ({} if sampling is None else {"sampling": sampling})
