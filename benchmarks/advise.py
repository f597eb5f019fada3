"""What `normtune advise` recommends on SLAKE, beside the winner of the full grid, and whether a search repeats itself.

    python benchmarks/advise.py --root SLAKE --minutes 15 --work work/advise --out benchmarks/advise.json

1. A search on SLAKE. Its recommendation, and every other recipe of its last round, then answers the test split, which
   the search has not read. So does the winner of the grid of docs/results/real-nano, trained for as many passes.
2. A small search on phantoms, twice with one seed and once killed (SIGKILL) several times and run again: the advice has
   to be the same, times apart.
3. How far from the best rate three and five rates lead, chosen in several ways, on the curves of learning_rates.json.

Run it again to continue where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from record import record

import normtune
from normtune.metrics.sum_metrics import cluster_rows, paired_difference
from normtune.metrics.table import metric_table
from normtune.runtime.files import read_json, write_json
from normtune.runtime.number_format import format_interval, format_share
from normtune.runtime.text_table import markdown_table

ROOT = Path(__file__).parents[1]
GRID = ROOT / "docs" / "results" / "real-nano" / "results.json"
METRIC = "global_exact"
SMALL = ("--data", "phantom-b:24/16/8", "--recipes", "ln", "--recipes", "full", "--pairs", "4000", "--epochs", "4")
KILLS = 3
TIMES = {"seconds_per_pass", "estimated_seconds", "training_seconds"}  # keys of the advice that a clock decides
PLACES = {"out", "adapter"}
WINNER = "winner"  # of the grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="folder of SLAKE")
    parser.add_argument("--minutes", type=float, help="budget of the search")
    parser.add_argument("--pairs", type=int, help="budget of the search, instead of --minutes")
    parser.add_argument("--work", type=Path, required=True, help="folder for the searches")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = [
        once(options.work / "search.json", lambda: search(options)),
        *once(options.work / "test.json", lambda: test(options)),
        once(options.work / "repeated.json", lambda: repeated(options.work / "repeated")),
        *once(options.work / "rates.json", rates),
    ]
    record(options.out, "advise", rows, model="nano", dataset="slake", seed=0)
    options.out.with_suffix(".md").write_text(table(rows), encoding="utf-8")


def once(path: Path, make: Callable[[], Any]) -> Any:
    """The contents of a file, which is made if it is missing."""
    if not path.is_file():
        write_json(path, make())
    return read_json(path)


def search(options: argparse.Namespace) -> dict[str, Any]:
    """Search on SLAKE. Processor time is measured too: on a shared machine it is the time of a quiet core."""
    started, processor = time.perf_counter(), time.process_time()
    budget = {"minutes": options.minutes} if options.pairs is None else {"pairs": options.pairs}
    data = normtune.open_dataset("slake", root=options.root)
    advice = normtune.advise("nano", data, out=options.work / "slake", progress=False, **budget)
    return {
        "kind": "search",
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - processor,
        "threads": int(os.environ.get("OMP_NUM_THREADS", 0)) or None,
        **budget,
        **plain(advice.to_dict(), PLACES),
        "command": advice.command.replace(str(options.root), "SLAKE"),
    }


def test(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The recipes of the last round and the grid's winner on the test split."""
    advice = read_json(options.work / "slake" / "advice.json")
    data, model = normtune.open_dataset("slake", root=options.root), normtune.load("nano")
    last = [item for item in advice["candidates"] if item["adapter"]]
    winner, rate, score = grid_winner()
    epochs = last[0]["epochs"]
    run = normtune.train(model, data, tune=winner, lr=rate, epochs=epochs, out=options.work / "winner", progress=False)
    adapters = {item["recipe"]: (item["lr"], Path(item["adapter"])) for item in last}
    adapters[WINNER] = (rate, run.adapter)
    rows, tables = [], {}
    for name, (lr, adapter) in adapters.items():
        result = normtune.evaluate(model, data, adapter=adapter, progress=False, out=options.work / "test" / name)
        tables[name] = metric_table(result.examples, result.predictions, "vqa")[METRIC]
        rows.append({"kind": "test", "recipe": name, "lr": lr, "epochs": epochs} | vars(result.metrics[METRIC]))
    cluster = cluster_rows(result.examples)
    for row in rows:
        difference = paired_difference(tables[rows[-1]["recipe"]], tables[row["recipe"]], cluster)
        row["from_winner"] = {"value": difference.difference, "low": difference.low, "high": difference.high}
        row["recommended"], row["grid"] = row["recipe"] == advice["recommended"], row["recipe"] == WINNER
    rows[-1] |= {"recipe": winner, "grid_score": score}
    return rows


def grid_winner() -> tuple[str, float, float]:
    """The recipe with the best mean test score on SLAKE in the study real-nano, its rate, and this score."""
    study = read_json(GRID)
    scores = defaultdict(list)
    cells = {cell["key"]: cell for cell in study["cells"] if "slake" in cell["grids"] and cell["trained_on"] == "slake"}
    for row in study["metrics"]:
        if row["key"] in cells and (row["dataset"], row["metric"]) == ("slake", METRIC):
            cell = cells[row["key"]]
            scores[cell["recipe"], *cell["rates"].values()].append(row["value"])
    recipe, rate = max(scores, key=lambda key: fmean(scores[key]))
    return recipe, rate, fmean(scores[recipe, rate])


def repeated(work: Path) -> dict[str, Any]:
    """The same search twice, and killed and run again."""
    for name in ("first", "second"):
        subprocess.run(command(work / name), check=True, capture_output=True)
    killed_at = []
    for number in range(KILLS):
        process = subprocess.Popen(command(work / "killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        finished = [0, 2, 5][number]  # kill within the trial after these
        while process.poll() is None and len(list(work.glob("killed/trials/*"))) <= finished:
            time.sleep(0.05)
        time.sleep(0.5 * number)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed_at.append(len(list(work.glob("killed/trials/*/result.json"))))
        process.wait()
    subprocess.run(command(work / "killed"), check=True, capture_output=True)
    first, second, killed = (
        plain(read_json(work / name / "advice.json"), TIMES | PLACES | {"fronts"})
        for name in ("first", "second", "killed")
    )
    return {
        "kind": "repeated",
        "trials": sum(item["trials"] for item in first["search"]["rounds"]),
        "same_seed_same_advice": first == second,
        "killed_after_trials": killed_at,
        "killed_and_resumed_same_advice": first == killed,
        "recommended": first["recommended"],
        "differences": [*differing(first, second), *differing(first, killed)],
    }


def command(out: Path) -> list[str]:
    """The small search."""
    return [sys.executable, "-m", "normtune", "advise", "nano", *SMALL, "--out", str(out), "--json"]


def plain(value: Any, without: set[str]) -> Any:
    """JSON values without some keys."""
    if isinstance(value, dict):
        return {key: plain(item, without) for key, item in value.items() if key not in without}
    return [plain(item, without) for item in value] if isinstance(value, list) else value


def differing(first: Any, second: Any, path: str = "") -> Iterator[str]:
    """The paths at which two JSON values differ."""
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        for key in first:
            yield from differing(first[key], second[key], f"{path}/{key}")
    elif json.dumps(first) != json.dumps(second):
        yield path


def rates() -> list[dict[str, Any]]:
    """The mean distance from the best score, in points, of the rate that a search of few rates chooses.

    The curves are those of learning_rates.json with noise of 1.5 points, and a default rate that is off by up to half a
    power of ten, as for a model that the default was not measured on.
    """
    import optuna  # pip install optuna: only to compare

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = {"step": optuna.distributions.IntDistribution(-4, 4)}
    file = read_json(ROOT / "benchmarks" / "learning_rates.json")
    curves: dict[str, dict[float, float]] = defaultdict(dict)
    for row in file["rows"]:
        curves[row["method"]][row["lr"]] = row["accuracy"]

    def sampled(scores_by_step: dict[int, float], start: tuple[int, ...], seed: int) -> int:
        if len(scores_by_step) < len(start):
            return start[len(scores_by_step)]
        for attempt in range(50):
            sampler = optuna.samplers.TPESampler(
                seed=1000 * seed + 50 * len(scores_by_step) + attempt, n_startup_trials=len(start)
            )
            study = optuna.create_study(direction="maximize", sampler=sampler)
            for step, score in scores_by_step.items():
                study.add_trial(optuna.trial.create_trial(params={"step": step}, distributions=space, value=score))
            if (step := study.ask(space).params["step"]) not in scores_by_step:
                return step
        return next(step for step in range(-4, 5) if step not in scores_by_step)

    searches = {
        "the default alone": (1, (0,)),
        "3: default, then TPE": (3, (0,)),
        "3: default, above, below": (3, (0, 2, -2)),
        "5: default, then TPE": (5, (0,)),
        "5: default, above, below, then TPE": (5, (0, 2, -2)),
        "5: fixed": (5, (0, 2, -2, 4, -4)),
    }
    losses = defaultdict(list)
    for number, (method, curve) in enumerate(sorted(curves.items())):
        known = np.log10(sorted(curve))
        scores = [curve[rate] for rate in sorted(curve)]
        for shift in (-0.5, -0.25, 0.0, 0.25, 0.5):
            default = np.log10(file["best"][method]) + shift
            true = {step: float(np.interp(default + step / 4, known, scores)) for step in range(-4, 5)}
            noise = np.random.default_rng(number).normal(0, 0.015, 9)
            for name, (count, start) in searches.items():
                scores_by_step: dict[int, float] = {}
                while len(scores_by_step) < count:
                    step = sampled(scores_by_step, start, number)
                    scores_by_step[step] = true[step] + noise[step + 4]
                losses[name].append(
                    max(true.values()) - true[max(scores_by_step, key=lambda step: scores_by_step[step])]
                )
    return [{"kind": "rates", "way": name, "points": 100 * fmean(values)} for name, values in losses.items()]


def table(rows: list[dict[str, Any]]) -> str:
    """The record as Markdown: what was searched, the recipes, the test split, and the rates."""
    of_kind: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        of_kind[row["kind"]].append(row)
    searched = search_parts(of_kind["search"][0], of_kind["test"]) if of_kind["search"] else []
    (repeat,) = of_kind["repeated"]
    yes = {True: "the same advice", False: "other advice"}
    curves = [[row["way"], f"{row['points']:.1f}"] for row in of_kind["rates"]]
    paragraphs = [
        *searched,
        f"A small search on phantoms ({repeat['trials']} trials): the same seed in another folder gave "
        f"{yes[repeat['same_seed_same_advice']]}; killed (SIGKILL) {len(repeat['killed_after_trials'])} times and run "
        f"again, it gave {yes[repeat['killed_and_resumed_same_advice']]}.",
        "How far the score of the selected rate is below that of the best rate, in points: known curves of 16 methods, "
        "with noise of 1.5 points and a default that is off by up to half a power of ten. TPE is Optuna's sampler.",
        markdown_table(["rates tried", "points below the best"], curves),
    ]
    return "\n\n".join(item if isinstance(item, str) else "\n".join(item) for item in paragraphs) + "\n"


def search_parts(search: dict[str, Any], tests: list[dict[str, Any]]) -> list[str | list[str]]:
    """The search on SLAKE and its test, as paragraphs and tables."""
    about, recommended = search["search"], search["recommended"]
    candidates = [
        [
            f"`{item['recipe']}`",
            *(f"{item['lr']:g}", f"{item['epochs']:g}", format_share(item["share"])),
            format_interval(item["score"]),
            format_interval(item["estimate"]) if item["estimate"] else "",
        ]
        for item in search["candidates"]
    ]
    tested = [
        [
            f"`{row['recipe']}`{', recommended' if row['recommended'] else ''}{', of the grid' if row['grid'] else ''}",
            *(f"{row['lr']:g}", f"{row['epochs']:g}", format_interval(row)),
            format_interval(row["from_winner"], sign="+"),
        ]
        for row in tests
    ]
    winner = tests[-1]
    rounds = ", then ".join(f"{item['trials']} of {item['epochs']:g} passes" for item in about["rounds"])
    estimate = next(item for item in search["candidates"] if item["recipe"] == recommended)["estimate"]
    test = next(row for row in tests if row["recommended"])
    return [
        f"A search with nano on SLAKE (English): {about['pairs_trained']:,} pairs in {rounds}. It took "
        f"{search['processor_seconds'] / 60:.0f} min of processor time of one core, on a machine that was shared. "
        f"It recommends `{recommended}`. Its score on validation rows that were not used for the choice is "
        f"{format_interval(estimate)}, which is {abs(100 * search['optimism']):.1f} points "
        f"{'below' if search['optimism'] >= 0 else 'above'} that on the rows of the choice; on the test split it is "
        f"{format_interval(test)}.",
        markdown_table(["recipe", "rate", "passes", "trained", "rows of the choice", "other rows"], candidates),
        f"The test split, which the search does not read: the recipes of the last round, and the winner of the grid of "
        f"[the results](results.md), `{winner['recipe']}` at a rate of {winner['lr']:g}, trained for as many passes. "
        f"With the 10 passes of the grid it has {100 * winner['grid_score']:.1f}.",
        markdown_table(["recipe", "rate", "passes", METRIC, "minus the grid's winner"], tested),
    ]


if __name__ == "__main__":
    main()
