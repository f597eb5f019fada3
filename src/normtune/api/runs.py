"""Runs that take a while: train, evaluate, advise, study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from normtune.data.options import DataOptions
from normtune.data.records import Dataset
from normtune.runtime import distributed
from normtune.runtime.progress import progress_bar

if TYPE_CHECKING:
    from normtune.advice.advice import Advice
    from normtune.api.models import Adapter, Model
    from normtune.evaluation.results import Evaluation
    from normtune.models.family import Family
    from normtune.studies.study import StudyResult
    from normtune.training.result import TrainResult

Config = TypeVar("Config", bound=DataOptions)


def train(
    model: Model, data: str | Dataset, *, out: str | Path, tune: str = "ln", progress: bool = True, **options: Any
) -> TrainResult:
    """Train an adapter and write it to `out`.

    ```python
    run = normtune.train(model, data, tune="ln", epochs=3, out="runs/ln")
    ```

    If a run is interrupted, the same call resumes from its last checkpoint. A loaded model is the base again
    afterwards; for recipes that train more than norms, this takes a copy of what is trained.

    Args:
        model: a name, or a loaded model.
        data: the name of a dataset, or an opened dataset.
        out: folder for the adapter and the checkpoints.
        tune: the recipe: what is trained.
        progress: show a progress bar.
        options: the other fields of `normtune.TrainConfig`, such as epochs, lr, batch and seed.

    Raises:
        InputError: an option, the data, the model or the recipe is not valid, or `out` cannot be written.
    """
    from normtune.api.models import check_is_base
    from normtune.training.config import TrainConfig
    from normtune.training.objective import PrintProgress
    from normtune.training.train import train

    config, family, dataset = _read_options(TrainConfig, model, data, {**options, "tune": tune, "out": out})
    check_is_base(family)
    shows = progress and distributed.is_main_process()
    return train(config, family=family, dataset=dataset, progress=PrintProgress() if shows else None)


def evaluate(
    model: Model,
    data: str | Dataset,
    *,
    adapter: Adapter | None = None,
    out: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Evaluation:
    """Answer every question of a split and score the answers, with 95% confidence intervals.

    ```python
    result = normtune.evaluate(model, data, split="test", adapter="runs/ln")
    result.metrics["global_exact"].value
    ```

    Args:
        model: a name, or a loaded model, which is the base again afterwards.
        data: the name of a dataset, or an opened dataset.
        adapter: directory of an adapter, or the adapter that is in the loaded model; None: the base.
        out: folder for the files of the evaluation; None: they are not written (see `Evaluation.save`).
        progress: show a progress bar.
        options: the other fields of `normtune.EvaluateConfig`, such as split, limit, batch and controls.

    Raises:
        InputError: an option, the data, the model, the adapter or an image is not valid.
    """
    from normtune.adapters.storage import use_adapter
    from normtune.api.models import adapter_path, local_adapter
    from normtune.evaluation.config import EvaluateConfig
    from normtune.evaluation.evaluate import evaluate_config
    from normtune.methods.adapt import TunedModel

    adapter = local_adapter(adapter)
    directory = None if isinstance(adapter, TunedModel) else adapter
    values = {**options, "adapter": directory, "out": out}
    config, family, dataset = _read_options(EvaluateConfig, model, data, values)
    with progress_bar("answering", quiet=not progress or not distributed.is_main_process()) as tick:
        if family is None:
            adapter_path(adapter)
            return evaluate_config(config, dataset=dataset, progress=tick)
        with use_adapter(family, adapter):
            return evaluate_config(config, family=family, dataset=dataset, progress=tick)


def advise(
    model: Model, data: str | Dataset, *, out: str | Path = "advice", progress: bool = True, **options: Any
) -> Advice:
    """Search which recipe fits a model and data, at which learning rate, within a budget.

    ```python
    advice = normtune.advise(model, data, minutes=15, max_trained="1%")
    advice.recommended, advice.command, advice.candidate.estimate
    ```

    If a search is interrupted, the same call continues it and gives the same advice. A loaded model is the base again
    afterwards.

    Args:
        model: a name, or a loaded model.
        data: the name of a dataset, or an opened dataset; its validation split must have several images.
        out: folder for the trials, the advice and its page.
        progress: show a progress bar.
        options: the other fields of `AdviseConfig`, such as minutes, pairs, recipes, max_trained and max_memory.

    Raises:
        InputError: an option, the data, the model or a recipe is not valid, the budget is too small, or `out` holds
            another search.
    """
    from normtune.advice.config import AdviseConfig
    from normtune.advice.search import search
    from normtune.api.models import check_is_base

    config, family, dataset = _read_options(AdviseConfig, model, data, {**options, "out": out})
    check_is_base(family)
    with progress_bar("searching", quiet=not progress) as tick:
        return search(config, family=family, dataset=dataset, progress=tick)


def study(
    file: str | Path,
    out: str | Path | None = None,
    *,
    roots: Mapping[str, str | Path] | Sequence[str] = (),
    workers: int | None = None,
    on: str = "local",
    report_only: bool = False,
    examples: bool = False,
    progress: bool = True,
) -> StudyResult:
    """Run a grid of trainings and evaluations, and write its tables and its page.

    Cells that have a result are not run again. Cells run in processes of their own, so that a script that calls
    this function needs the guard `if __name__ == "__main__":`.

    Args:
        file: YAML file of the study.
        out: folder of the results; None: the study's name.
        roots: dataset of the study -> its folder.
        workers: cells that run at once; None: as cores and memory allow.
        on: where cells run: local, ray or slurm.
        report_only: run nothing; write tables and page of the finished cells.
        examples: show some images with answers on the page, if the licence of the data allows it.
        progress: show progress bars.

    Raises:
        InputError: the file is not valid, or a package that `on` needs is missing.
    """
    from normtune.studies.spec import read_study
    from normtune.studies.study import run_study_and_report

    named = [f"{name}={root}" for name, root in roots.items()] if isinstance(roots, Mapping) else roots
    spec = read_study(Path(file), named)
    return run_study_and_report(
        spec,
        Path(out or spec.study),
        workers=workers,
        on=on,
        report_only=report_only,
        examples=examples,
        quiet=not progress,
    )


def _read_options(
    config_type: type[Config], model: Any, data: str | Path | Dataset, options: dict[str, Any]
) -> tuple[Config, Family | None, Dataset | None]:
    """Check the options of a run, and complete them with those that made the objects.

    Returns:
        The options, and the loaded model and the opened dataset, each None if it was given by name.

    Raises:
        InputError: an option is not valid, or has no effect on an object that was made before.
    """
    from normtune.api.models import loaded_or_none, refuse_options

    values = dict(options)
    family = loaded_or_none(model)
    if family is None:
        values["model"] = str(model)
    else:
        refuse_options([name for name in ("dtype", "device", "quantize") if name in options], "normtune.load")
        values |= {"model": family.source or type(family).__name__, "device": family.device.type}
        values["quantize"] = family.quantize
        dtype = str(next(family.model.parameters()).dtype).removeprefix("torch.")
        values |= {"dtype": dtype} if dtype in ("float32", "bfloat16") else {}
    dataset = data if isinstance(data, Dataset) else None
    if dataset is None:
        values["data"] = str(data)
    else:
        refuse_options([name for name in DataOptions.model_fields if name in options], "normtune.open_dataset")
        values |= dataset.options or {"data": dataset.name}
    return config_type.checked(**values), family, dataset
