"""The result of a search: a recommendation, the fronts of score against costs, and the command to run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from normtune.advice.config import AdviseConfig
from normtune.advice.rounds import Speed
from normtune.advice.trials import ESTIMATE, SELECT, Trial, Workplace, metric_name, metric_of, paired
from normtune.metrics.sum_metrics import PairedDifference
from normtune.runtime.notebook import Result, Rows
from normtune.runtime.number_format import format_bytes, format_duration, format_interval, format_share
from normtune.runtime.text_table import text_table
from normtune.training.config import TrainConfig

COSTS = ("trainable", "memory_bytes", "seconds_per_pass")  # fields of `Candidate` that fronts are drawn against


@dataclass(frozen=True)
class Candidate:
    """A recipe at its best rate, from the last round that it reached. The field names are keys of `advice.json`."""

    recipe: str
    resolved: str  # with a method for each part of the model
    lr: float
    epochs: float  # passes of its last trial
    round: int  # the last one that it reached
    trainable: int
    share: float  # of all parameters
    memory_bytes: int  # planned for training: weights, optimiser, a step and caches, without the Python program
    seconds_per_pass: float
    score: dict[str, float]  # on the half of the validation rows that trials were selected on: value, low, high
    estimate: dict[str, float] | None = None  # on the other half; None: it did not reach the last round
    # from the best recipe: difference of the scores on the same images of the first half, and its standard error
    difference: float | None = None
    error: float | None = None
    rates: tuple[tuple[float, float], ...] = ()  # of the first round: rate, score
    good_rates: tuple[float, float] | None = None  # the span of its rates within a standard error of the best one
    fronts: tuple[str, ...] = ()  # the costs for which no recipe of the last round is as good and cheaper
    adapter: str | None = None
    warning: str | None = None  # of its last training


@dataclass(frozen=True, repr=False)
class Advice(Result):
    """The result of `normtune advise`; `print` and Jupyter show it as text. The field names are keys of `advice.json`.

    Attributes:
        recommended: the recipe that trains fewest parameters, among those within a standard error of the best score.
        best: the recipe with the best score on the rows that trials were selected on.
        candidates: every recipe, the best first.
        base: the frozen base's score on both halves of the validation rows.
        command: trains the recommended recipe, as the search has trained it.
        gain: the recommended recipe's score minus the frozen base's, on the rows that were not used for the choice.
        optimism: the recommended recipe's score on the rows that it was selected on, minus its score on the others.
        search: budget and rounds; `estimated_seconds` and `training_seconds` are times.
        left_out: recipe -> why it was not tried.
    """

    model: str
    data: str
    metric: str
    out: str
    recommended: str
    best: str
    command: str
    gain: dict[str, float]  # value, low, high
    optimism: float
    candidates: tuple[Candidate, ...]
    base: dict[str, dict[str, float]]
    rows: dict[str, int]  # of each half of the validation rows
    search: dict[str, Any]
    left_out: dict[str, str]
    seed: int

    @property
    def candidate(self) -> Candidate:
        """The recommended recipe with its rate and its scores."""
        return next(item for item in self.candidates if item.recipe == self.recommended)

    @property
    def adapter(self) -> Path:
        """The folder of the recommended recipe's adapter, from its last trial."""
        assert self.candidate.adapter is not None
        return Path(self.candidate.adapter)

    @property
    def page(self) -> Path:
        """The HTML page of the advice."""
        return Path(self.out) / "report.html"

    @property
    def table(self) -> Rows:
        """One row for each recipe, the best first."""
        return Rows(
            {name: value for name, value in asdict(item).items() if name != "rates"} for item in self.candidates
        )

    def reasons(self) -> list[str]:
        """Why this recipe, and what the numbers do not say, as sentences."""
        item = self.candidate
        assert item.estimate is not None
        best = next(other for other in self.candidates if other.recipe == self.best)
        if item is best:
            first = (
                f"`{item.recipe}` has the best {self.metric}, and no smaller recipe is within a standard error of it."
            )
        else:
            assert item.difference is not None and item.error is not None
            first = (
                f"`{item.recipe}` trains {format_share(item.share)} of the parameters, and its {self.metric} is within "
                f"a standard error of that of the best recipe, `{best.recipe}`: {100 * item.difference:+.1f} points, "
                f"standard error {100 * item.error:.1f}."
            )
        rates = f"{item.good_rates[0]:g} to {item.good_rates[1]:g}" if item.good_rates else ""
        return [
            first,
            f"On {self.rows[ESTIMATE]:,} rows that were not used for the choice it scores "
            f"{format_interval(item.estimate)}, {format_interval(self.gain, sign='+')} points from the frozen base"
            + ("." if self.gain["low"] > 0 else ": no gain is shown. Give a larger budget, or more validation images."),
            f"On the {self.rows[SELECT]:,} rows that it was chosen on it scores {100 * item.score['value']:.1f}, "
            f"{abs(100 * self.optimism):.1f} points {'higher' if self.optimism >= 0 else 'lower'}.",
            f"Rates of {rates} are within a standard error of its best rate, {item.lr:g}, in short trials.",
            "The interval is for new images and this trained adapter: there is one seed, and another may differ.",
        ]

    def __str__(self) -> str:
        head = ("recipe", "rate", "passes", "trained", "memory", "time per pass", "for choice", "other rows", "front")
        lines = [
            f"{self.model} on {self.data}, {self.metric} x 100: {self.search['pairs_trained']:,} pairs trained in "
            f"{sum(item['trials'] for item in self.search['rounds'])} trials",
            *text_table(
                [head, *(candidate_cells(item) for item in self.candidates), _base_cells(self.base)], "lrrrrrrrl"
            ),
            *(f"{recipe} is left out: {reason}" for recipe, reason in self.left_out.items()),
            *(f"{item.recipe}: {item.warning}" for item in self.candidates if item.warning),
            "",
            *(sentence.replace("`", "") for sentence in self.reasons()),
            "",
            f"Trained already: {self.adapter}. To train it again:",
            self.command,
            f"Written: {self.page}",
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Advice for {self.model} on {self.data}: {self.recommended}>"


def candidate_cells(item: Candidate) -> tuple[str, ...]:
    """A recipe as the cells of a table: its rate, its costs and its scores."""
    return (
        item.recipe,
        f"{item.lr:g}",
        f"{item.epochs:g}",
        format_share(item.share),
        format_bytes(item.memory_bytes),
        format_duration(item.seconds_per_pass),
        format_interval(item.score),
        format_interval(item.estimate) if item.estimate else "",
        ", ".join(FRONT_NAMES[cost] for cost in item.fronts),
    )


FRONT_NAMES = {"trainable": "trained share", "memory_bytes": "memory", "seconds_per_pass": "time"}


def _base_cells(base: Mapping[str, Mapping[str, float]]) -> tuple[str, ...]:
    return ("frozen", "", "", "0%", "", "", *(format_interval(base[half]) for half in (SELECT, ESTIMATE)), "")


def build_advice(
    workplace: Workplace,
    speeds: Mapping[str, Speed],
    left_out: Mapping[str, str],
    trials: Sequence[Trial],
    about: dict[str, Any],
) -> Advice:
    """Choose among the trials of the last round, and measure these on the other half of the validation rows."""
    config, last = workplace.config, max(trial.round for trial in trials)
    finalists = [trial for trial in trials if trial.round == last]
    answers = {trial.number: workplace.answers_of(trial, SELECT) for trial in finalists}
    best = min(finalists, key=lambda trial: (-trial.score, trial.trainable))
    differences = {
        number: paired(answers[best.number], evaluation, config.metric) for number, evaluation in answers.items()
    }
    near = [trial for trial in finalists if trial is best or _within_error(differences[trial.number])]
    recommended = min(near, key=lambda trial: (trial.trainable, -trial.score))
    candidates = []
    for recipe in speeds:
        of_recipe = [trial for trial in trials if trial.recipe == recipe]
        furthest = max(trial.round for trial in of_recipe)
        trial = min((trial for trial in of_recipe if trial.round == furthest), key=lambda trial: -trial.score)
        if recipe == recommended.recipe:
            trial = recommended
        item = _candidate(workplace, trial, speeds[recipe], [trial for trial in of_recipe if trial.round == 1], about)
        if furthest == last:
            difference = differences[trial.number]
            estimate = metric_of(workplace.answers_of(trial, ESTIMATE), config.metric)
            adapter = str(workplace.folder(trial.round, trial.number, recipe) / "adapter")
            item = replace(
                item, estimate=estimate, difference=difference.difference, error=difference.error, adapter=adapter
            )
        candidates.append(item)
    candidates = [replace(item, fronts=_fronts(item, candidates, last)) for item in candidates]
    candidates.sort(key=lambda item: (-item.round, -item.score["value"], item.trainable))
    of_recommended = next(item for item in candidates if item.recipe == recommended.recipe)
    assert of_recommended.estimate is not None
    base = {half: workplace.answers_of_base(half) for half in (SELECT, ESTIMATE)}
    gain = paired(base[ESTIMATE], workplace.answers_of(recommended, ESTIMATE), config.metric)
    return Advice(
        model=config.model,
        data=workplace.dataset.name,
        metric=metric_name(base[SELECT], config.metric),
        out=str(config.out),
        recommended=recommended.recipe,
        best=best.recipe,
        command=train_command(config, recommended),
        gain={"value": gain.difference, "low": gain.low, "high": gain.high},
        optimism=of_recommended.score["value"] - of_recommended.estimate["value"],
        candidates=tuple(candidates),
        base={half: metric_of(evaluation, config.metric) for half, evaluation in base.items()},
        rows={half: len(rows) for half, rows in workplace.halves.items()},
        search=about,
        left_out=dict(left_out),
        seed=config.seed,
    )


def _within_error(difference: PairedDifference) -> bool:
    return difference.difference >= -difference.error


def _candidate(
    workplace: Workplace, trial: Trial, speed: Speed, first_round: Sequence[Trial], about: Mapping[str, Any]
) -> Candidate:
    rates = sorted((item.lr, item.score) for item in first_round)
    top = max(first_round, key=lambda item: item.score)
    answers = workplace.answers_of(top, SELECT)
    good = [
        item.lr
        for item in first_round
        if item is top or _within_error(paired(answers, workplace.answers_of(item, SELECT), workplace.config.metric))
    ]
    return Candidate(
        recipe=trial.recipe,
        resolved=speed.resolved,
        lr=trial.lr,
        epochs=trial.epochs,
        round=trial.round,
        trainable=trial.trainable,
        share=trial.trainable / speed.total,
        memory_bytes=speed.memory_bytes,
        seconds_per_pass=trial.seconds / trial.pairs * about["pairs_per_pass"],
        score=trial.metric,
        rates=tuple(rates),
        good_rates=(min(good), max(good)),
        warning=trial.warning,
    )


def _fronts(item: Candidate, candidates: Sequence[Candidate], last: int) -> tuple[str, ...]:
    """The costs for which no other recipe of the last round scores at least as high and costs at most as much."""
    others = [other for other in candidates if other.round == last]

    def is_beaten(cost: str) -> bool:
        mine = getattr(item, cost), -item.score["value"]  # of both numbers, lower is better
        theirs = [(getattr(other, cost), -other.score["value"]) for other in others]
        return any(numbers[0] <= mine[0] and numbers[1] <= mine[1] and numbers != mine for numbers in theirs)

    return tuple(cost for cost in COSTS if item.round == last and not is_beaten(cost))


def train_command(config: AdviseConfig, trial: Trial) -> str:
    """The command that repeats a trial's training: the recipe, and options that differ from their defaults."""
    options = config.train_config(tune=trial.recipe, lr=trial.lr, out=Path("runs/advised"), epochs=trial.epochs)
    values = options.model_dump(mode="json")
    words = ["normtune", "train", str(values.pop("model"))]
    for name, field in TrainConfig.model_fields.items():
        if name in values and (name == "tune" or field.is_required() or values[name] != field.default):
            option = "--" + name.replace("_", "-")
            value = values[name]
            if isinstance(value, bool):
                words.append(option if value else f"--no-{option[2:]}")
            else:
                words += [option, f"{value:g}" if isinstance(value, float) else str(value)]
    return shlex.join(words)
