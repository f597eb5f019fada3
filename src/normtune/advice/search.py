"""The search: measures what each recipe takes, divides the budget into rounds, runs their trials, and advises.

`plan.json` has everything that was decided from a measurement of time or memory. It is written once, before the first
trial, and a resumed search reads it. All later decisions follow from the scores and the seed.
"""

from __future__ import annotations

import shutil
import sys
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from normtune.adapters.fingerprint import fingerprint
from normtune.advice.advice import Advice, build_advice
from normtune.advice.config import DEFAULT_MINUTES, RECIPES, AdviseConfig
from normtune.advice.page import write_page
from normtune.advice.rounds import STEPS, Round, Speed, estimate_seconds, plan_rounds, promote, rates_of
from normtune.advice.trials import ESTIMATE, SELECT, Trial, Workplace, metric_of, split_in_halves
from normtune.data.records import Dataset, Split
from normtune.data.registry import open_configured
from normtune.errors import InputError
from normtune.evaluation.results import split_hash
from normtune.inference.limits import check_run
from normtune.models.family import Family
from normtune.models.loading import load, resolve_dtype
from normtune.runtime import distributed
from normtune.runtime.files import read_json, try_lock, write_json
from normtune.runtime.number_format import format_bytes
from normtune.training.setup import read_examples

TIMED_STEPS = 12
_NO_RESULT = {"out", "root", "device"}  # options that change where a search runs, not its results
_PLAN, _ADVICE = "plan.json", "advice.json"
_GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """What a search decided before its first trial. The field names are keys of `plan.json`."""

    options: dict[str, Any]  # of the command, and digests of the rows and of the base
    pairs_per_pass: int
    images: int
    pairs: int  # the budget
    answer_seconds: float  # for half of the validation rows
    start_seconds: float  # from the start of the command to the first trial
    estimated_seconds: float  # for the rounds
    speeds: dict[str, Speed]
    left_out: dict[str, str]  # recipe -> why it is not tried
    rounds: tuple[Round, ...]


def search(
    config: AdviseConfig,
    *,
    family: Family | None = None,
    dataset: Dataset | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Advice:
    """Search a recipe and its learning rate for a model and data, and write the advice and its page to `config.out`.

    Args:
        family: the loaded base; it is the base again afterwards. None: it is loaded.
        dataset: the opened dataset; None: it is opened.
        progress: called with (trials done, trials in all).

    Raises:
        InputError: an option, the data, the model or a recipe is not valid, the budget is too small, or `config.out`
            holds another search.
    """
    from transformers.utils import logging

    started = time.perf_counter()
    if distributed.launched_count() > 1:
        raise InputError("normtune advise runs in one process: start it without torchrun or accelerate launch.")
    dataset = open_configured(config) if dataset is None else dataset
    rows = Split(dataset, dataset.split(config.validation_split), config.validation_split)
    with try_lock(config.out / "lock", remove=True) as acquired:
        if not acquired:
            raise InputError(f"{config.out}: another search runs there. Choose another --out.")
        if family is None:
            family = load(config.model, dtype=config.dtype, device=config.device, quantize=config.quantize)
        checked, _ = check_run(config.evaluate_config(config.out, None), rows, family)
        halves = split_in_halves(Split(dataset, checked, rows.name), config.validation_limit, config.seed)
        workplace = Workplace(config, family, dataset, halves)
        logging.set_verbosity_error()  # it warns if two checkpoints are saved within one second
        plan = _read_or_make_plan(workplace, started)
        for recipe, reason in plan.left_out.items():
            print(f"{recipe} is left out: {reason}", file=sys.stderr)
        trials = _run_rounds(workplace, plan, progress)
        advice = build_advice(workplace, plan.speeds, plan.left_out, trials, _about(plan, trials))
        write_json(config.out / _ADVICE, advice.to_dict())
        write_page(advice)
        shutil.rmtree(config.out / "cache", ignore_errors=True)
        return advice


def _about(plan: Plan, trials: list[Trial]) -> dict[str, Any]:
    """The search in numbers, for the advice."""
    return {
        "pairs": plan.pairs,
        "pairs_trained": sum(trial.pairs for trial in trials),
        "pairs_per_pass": plan.pairs_per_pass,
        "images": plan.images,
        "rounds": [asdict(item) for item in plan.rounds],
        "estimated_seconds": plan.start_seconds + plan.estimated_seconds,
        "training_seconds": sum(trial.seconds for trial in trials),
    }


def _run_rounds(workplace: Workplace, plan: Plan, progress: Callable[[int, int], None] | None) -> list[Trial]:
    """Run the trials of all rounds, or read their results."""
    trials: list[Trial] = []
    config, total = workplace.config, sum(item.trials for item in plan.rounds)

    def run(round: int, recipe: str, lr: float) -> Trial:
        keep = round == len(plan.rounds)
        epochs, memory = plan.rounds[round - 1].epochs, plan.speeds[recipe].memory
        trial = workplace.run(round, len(trials) + 1, recipe, lr, epochs, keep=keep, memory_plan=memory)
        trials.append(trial)
        if progress is not None:
            progress(len(trials), total)
        return trial

    recipes = list(plan.speeds)
    for index in range(plan.rounds[0].trials):
        recipe = recipes[index % len(recipes)]
        run(1, recipe, rates_of(recipe)[index // len(recipes)])
    base_score = metric_of(workplace.answers_of_base(SELECT), config.metric)["value"]
    for number, item in enumerate(plan.rounds[1:], 2):
        before = [trial for trial in trials if trial.round == number - 1]
        promoted = promote(before, item.trials, base_score, last=number == len(plan.rounds))
        for trial in promoted:
            run(number, trial.recipe, trial.lr)
    return trials


def _read_or_make_plan(workplace: Workplace, started: float) -> Plan:
    """Read `plan.json` of an earlier start of the same search, or measure and write it.

    Raises:
        InputError: the folder holds another search, or the budget is too small.
    """
    config, dataset = workplace.config, workplace.dataset
    path = config.out / _PLAN
    first = config.train_config(tune="ln", out=config.out)
    _, examples = read_examples(first, dataset)
    ids = [example.id for split in (examples, *workplace.halves.values()) for example in split]
    options = config.model_dump(mode="json", exclude=_NO_RESULT) | {
        "rows": split_hash(ids),
        "base": fingerprint(workplace.family.model),
        "dtype": resolve_dtype(config.dtype, workplace.family.device),
    }
    if path.is_file():
        stored = read_json(path)
        stored["speeds"] = {name: Speed(**speed) for name, speed in stored["speeds"].items()}
        plan = Plan(**stored | {"rounds": tuple(Round(**item) for item in stored["rounds"])})
        if changed := sorted(name for name in options if options[name] != plan.options.get(name)):
            raise InputError(
                f"{config.out} holds a search that differs in {', '.join(changed)}. Repeat its options and data, or "
                "choose another --out."
            )
        return plan
    base = workplace.answers_of_base(SELECT)
    metric_of(base, config.metric)  # an unknown metric is an error before the first training
    workplace.answers_of_base(ESTIMATE)
    speeds, left_out = _measure(workplace)
    count, answer_seconds = len(examples), base.seconds

    def rounds_of(pairs: int) -> tuple[Round, ...]:
        return plan_rounds(pairs, len(speeds), count, config.epochs, config.batch)

    def seconds_of(pairs: int) -> float:
        try:
            return estimate_seconds(rounds_of(pairs), speeds, count, answer_seconds)
        except InputError:  # fewer pairs than a search can do with
            return 0.0

    start_seconds = time.perf_counter() - started
    pairs = config.pairs
    if pairs is None:
        minutes = config.minutes or DEFAULT_MINUTES
        most = int(count * config.epochs * len(speeds) * len(STEPS))  # more than any search of these recipes
        pairs = max(1, bisect_right(range(1, most), 60 * minutes - start_seconds, key=seconds_of))
    rounds = rounds_of(pairs)
    plan = Plan(
        options=options,
        pairs_per_pass=count,
        images=examples.image_count,
        pairs=pairs,
        answer_seconds=answer_seconds,
        start_seconds=start_seconds,
        estimated_seconds=seconds_of(pairs),
        speeds=speeds,
        left_out=left_out,
        rounds=rounds,
    )
    write_json(path, asdict(plan))
    return plan


def _measure(workplace: Workplace) -> tuple[dict[str, Speed], dict[str, str]]:
    """Train every recipe for a few steps: its speed, its size, and whether it fits.

    Returns:
        The speeds of the recipes that are tried, and the reasons why others are not.

    Raises:
        InputError: a recipe of the user's does not fit the model, or no recipe is within the limits.
    """
    config = workplace.config
    speeds: dict[str, Speed] = {}
    left_out: dict[str, str] = {}
    folder = config.out / "timing"
    for recipe in config.recipes or RECIPES:
        shutil.rmtree(folder, ignore_errors=True)
        options = config.train_config(tune=recipe, lr=rates_of(recipe)[0], out=folder, max_steps=TIMED_STEPS)
        started = time.perf_counter()
        try:
            result = workplace.train(options)
        except InputError as error:
            if config.recipes is not None:
                raise InputError(f"--recipes {recipe}: {error}") from error
            left_out[recipe] = str(error)
            continue
        seconds = result.total_seconds or result.seconds
        memory = read_json(folder / "preflight.json")["memory"]
        peak = memory.get("peak", result.peak_memory_bytes)
        speed = Speed(
            resolved=result.recipe,
            trainable=result.trainable,
            total=result.total,
            pairs_per_second=result.pairs / seconds,
            overhead_seconds=time.perf_counter() - started - seconds,
            memory=memory,
            memory_bytes=peak - memory.get("program", 0),
        )
        if result.trainable > config.most_trained(result.total):
            left_out[recipe] = f"it trains {result.trainable:,} parameters, above --max-trained {config.max_trained}"
        elif config.max_memory is not None and peak > config.max_memory * _GIB:
            left_out[recipe] = f"it needs {format_bytes(peak)}, above --max-memory {config.max_memory:g}"
        else:
            speeds[recipe] = speed
    shutil.rmtree(folder, ignore_errors=True)
    if not speeds:
        raise InputError(f"no recipe is within the limits: {'; '.join(f'{k}: {v}' for k, v in left_out.items())}.")
    return speeds, left_out
