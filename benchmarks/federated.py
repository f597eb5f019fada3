"""What does a federation bring? Four sites: each alone, pooled, and federated with norms and with LoRA.

    python benchmarks/federated.py --sites phantoms --work DIR --out benchmarks/federated_phantoms.json
    python benchmarks/federated.py --sites real --slake DIR --vqa-rad DIR --work DIR \
        --out benchmarks/federated_real.json

`--figures docs/images` draws the curves, `federated_real.png` and `federated_phantoms.png`.

The sites `real` are SLAKE (English, a third of the images), VQA-RAD (split by image) and two phantom hospitals; those
of `phantoms` are four hospitals that differ in their images, their wording, and both. Every arm passes over each
site's pairs once in a round. Learning rates are those of the study `studies/tiny-budget.yaml`. A site is tested on its
own test images. Accuracy is the share of equal answers, a question's score being its mean over the seeds; intervals
and differences are clustered by image. Seconds are of the processor, one thread, without tests.

A stopped run continues with the arms of `--work` that it has not finished. Seeds may run in several processes with the
same `--work`.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import process_time
from typing import Any

import torch
from record import record
from score_intervals import METRIC, difference, interval

import normtune
from normtune.adapters.info import AdapterInfo
from normtune.data.examples import Examples
from normtune.data.records import Dataset
from normtune.data.registry import open_dataset
from normtune.federated.config import FederateConfig, SiteOptions
from normtune.federated.rounds import federate
from normtune.federated.rules import SiteUpdate, Values
from normtune.federated.site import RoundTask, select_part, train_at_site, write_site_adapter
from normtune.metrics.answers import score_rows
from normtune.runtime.files import read_json, write_json
from normtune.runtime.number_format import format_interval
from normtune.runtime.text_table import markdown_table
from normtune.training.config import TrainConfig
from normtune.training.train import train

RATES = {"phantoms": {"ln": 0.03, "lora-8": 0.003}, "real": {"ln": 0.01, "lora-8": 0.003}}
FEDERATIONS: dict[str, dict[str, Any]] = {
    "ln, federated": {"tune": "ln"},
    "ln, federated, vision norms local": {"tune": "ln", "local": "vision"},
    "lora-8, federated, naive": {"tune": "lora-8"},
    "lora-8, federated, exact": {"tune": "lora-8", "average": "exact"},
}
TESTED_ROUNDS = (1, 2, 3, 4, 6, 8, 10, 12, 15, 20)
REACHED = 0.95  # share of the accuracy of pooled training that counts as reaching it
BASE = "nano, not trained"
COMPARED = (  # further differences: the second less the first
    ("ln, federated", "ln, federated, vision norms local"),
    ("lora-8, federated, naive", "lora-8, federated, exact"),
    ("ln, federated", "lora-8, federated, naive"),
    ("ln, federated, vision norms local", "lora-8, federated, naive"),
)
ARMS = (BASE, *(f"{tune}, {how}" for tune in ("ln", "lora-8") for how in ("alone", "pooled")), *FEDERATIONS)


class OneProcess:
    """Trains the sites one after the other; see `normtune.federated.rounds.Engine`."""

    def __init__(self, out: Path, sites: dict[str, SiteOptions]) -> None:
        self.out, self.sites = out, sites

    def train_round(self, task: RoundTask) -> dict[str, SiteUpdate | str]:
        for name in self.sites:
            (self.out / "sites" / name).mkdir(parents=True, exist_ok=True)
        return {name: train_at_site(task, site, self.out / "sites" / name) for name, site in self.sites.items()}

    def finish(self, info: AdapterInfo, values: Values) -> None:
        for name in self.sites:
            write_site_adapter(self.out / "sites" / name, info, values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", choices=tuple(RATES), default="phantoms")
    parser.add_argument("--slake", type=Path, help="folder of SLAKE (--sites real)")
    parser.add_argument("--vqa-rad", type=Path, help="folder of VQA-RAD (--sites real)")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--out", type=Path, help="JSON file; the table is written beside it")
    parser.add_argument("--figures", type=Path, help="folder for the curves; the figure has the name of --out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--images", type=int, default=60, help="training images of a phantom hospital")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Benchmark(options, make_sites(options))
    results = {(arm, seed): bench.result(arm, seed) for seed in options.seeds for arm in ARMS}
    rows = summarise(results, bench, options.seeds)
    table = accuracy_table(rows, list(bench.sites), len(options.seeds))
    print("\n" + table)
    if options.out:
        pairs = {name: len(bench.rows_of(name)) for name in bench.sites}
        about = {"images": options.images, "rounds": options.rounds, "rates": RATES[options.sites], "pairs": pairs}
        record(options.out, "federated", rows, seeds=options.seeds, **about)
        options.out.with_suffix(".md").write_text(table, encoding="utf-8")
        if options.figures:
            draw_curves(rows, options.rounds, options.figures / f"{options.out.stem}.png")


def make_sites(options: argparse.Namespace) -> dict[str, SiteOptions]:
    """Name of each site -> its data."""
    if options.sites == "phantoms":
        names = ("a", "acquisition", "wording", "b")
        return {name: SiteOptions(data=f"phantom-{name}:{options.images}/0/40") for name in names}
    if not options.slake or not options.vqa_rad:
        raise SystemExit("--sites real needs --slake DIR and --vqa-rad DIR.")
    return {
        "slake": SiteOptions(data="slake", root=options.slake, part="1/3"),
        "vqa-rad": SiteOptions(data="vqa-rad", root=options.vqa_rad, image_disjoint=True),
        **{f"phantom-{name}": SiteOptions(data=f"phantom-{name}:{options.images}/0/40") for name in "ab"},
    }


@dataclass
class Benchmark:
    """Trains and tests the arms; the result of each is written to a file, and read if it is there."""

    options: argparse.Namespace
    sites: dict[str, SiteOptions]

    def __post_init__(self) -> None:
        self.model = normtune.load("nano", dtype="float32", device="cpu")
        self.datasets = {
            name: open_dataset(site.data, root=site.root, image_disjoint=site.image_disjoint)
            for name, site in self.sites.items()
        }
        self.images = {  # id of a test question -> its images
            f"{name}/{example.id}": tuple(f"{name}/{key}" for key in example.images)
            for name, dataset in self.datasets.items()
            for example in dataset.test
        }

    def rows_of(self, site: str) -> Examples:
        """The training rows of a site."""
        return select_part(self.datasets[site].split("train"), self.sites[site])

    def pooled(self, names: Sequence[str]) -> Dataset:
        """The training rows of sites as one dataset; keys of images begin with the site."""
        rows = [
            replace(example, id=f"{name}/{example.id}", images=tuple(f"{name}/{key}" for key in example.images))
            for name in names
            for example in self.rows_of(name)
        ]

        def open_image(key: str) -> Any:
            site, _, rest = key.partition("/")
            return self.datasets[site].open_image(rest)

        return Dataset("+".join(names), Examples(rows), open_image, licence="see each dataset")

    def result(self, arm: str, seed: int) -> dict[str, Any]:
        """The final scores of an arm, its accuracy after rounds, its seconds and bytes."""
        name = f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
        path = self.options.work / "results" / f"{name}.json"
        if not path.is_file():
            out = self.options.work / "runs" / name
            shutil.rmtree(out, ignore_errors=True)
            write_json(path, self.measure(arm, seed, out))
            print(f"{arm}, seed {seed}: done", flush=True)
        return dict(read_json(path))

    def measure(self, arm: str, seed: int, out: Path) -> dict[str, Any]:
        if arm == BASE:
            return {"scores": self.test(dict.fromkeys(self.sites))}
        tune, _, how = arm.partition(", ")
        rate = RATES[self.options.sites][tune]
        shared: dict[str, Any] = {"model": "nano", "batch": 16, "seed": seed, "device": "cpu", "lr": rate}
        if arm in FEDERATIONS:
            return self.measure_federation(FEDERATIONS[arm], out, shared)
        seconds = 0.0
        groups = [tuple(self.sites)] if how == "pooled" else [(name,) for name in self.sites]
        adapters: dict[str, Path | None] = {}
        for group in groups:
            dataset, folder = self.pooled(group), out / "-".join(group)
            config = TrainConfig(
                data=dataset.name, out=folder, epochs=self.options.rounds, warmup=0, schedule="constant", **shared
            )
            started = process_time()
            train(config, dataset=dataset)
            seconds += process_time() - started
            adapters |= dict.fromkeys(group, folder)
        return {"scores": self.test(adapters), "seconds": seconds}

    def measure_federation(self, changes: dict[str, Any], out: Path, shared: dict[str, Any]) -> dict[str, Any]:
        seconds, curve = 0.0, []
        for rounds in sorted({*(n for n in TESTED_ROUNDS if n < self.options.rounds), self.options.rounds}):
            # the federation of the same folder continues after the rounds that it has finished
            config = FederateConfig(site=[], out=out, rounds=rounds, **shared, **changes)
            engine = OneProcess(out, self.sites)
            started = process_time()
            result = federate(config, list(self.sites), engine, quiet=True)
            seconds += process_time() - started
            scores = self.test({name: out / "sites" / name / "adapter" for name in self.sites})
            curve.append([rounds, *(sum(scores[name].values()) / len(scores[name]) for name in self.sites)])
        lost = max((entry["lost"] for entry in result.rounds if entry["lost"] is not None), default=None)
        return {
            "scores": scores, "curve": curve, "seconds": seconds, "bytes_a_round": result.bytes_a_round, "lost": lost
        }  # fmt: skip

    def test(self, adapters: dict[str, Path | None]) -> dict[str, dict[str, float]]:
        """The score of each test question of each site, answered with the site's adapter."""
        scores = {}
        for site, adapter in adapters.items():
            result = normtune.evaluate(self.model, self.datasets[site], split="test", adapter=adapter, progress=False)
            rows = score_rows(result.examples, result.texts, normalisation="vqa")[METRIC]
            scores[site] = {f"{site}/{id}": value for id, value in rows.items()}
        return scores


def summarise(
    results: dict[tuple[str, int], dict[str, Any]], bench: Benchmark, seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """One row for each arm: accuracy of each site, the difference from pooled training, rounds, bytes and seconds."""
    sites = list(bench.sites)

    def mean_scores(arm: str, of: Sequence[str]) -> dict[str, float]:
        """Mean score of each question over the seeds, by its id."""
        runs = [results[arm, seed]["scores"] for seed in seeds]
        return {id: sum(run[site][id] for run in runs) / len(runs) for site in of for id in runs[0][site]}

    rows: list[dict[str, Any]] = []
    for arm in ARMS:
        runs = [results[arm, seed] for seed in seeds]
        pooled = f"{arm.partition(',')[0]}, pooled" if arm != BASE else "ln, pooled"
        row: dict[str, Any] = {
            "arm": arm,
            "sites": {site: interval(mean_scores(arm, [site]), bench.images) for site in sites},
            "all": interval(mean_scores(arm, sites), bench.images),
            "from_pooled": difference(mean_scores(pooled, sites), mean_scores(arm, sites), bench.images),
            "from_alone": difference(
                mean_scores(pooled.replace("pooled", "alone"), sites), mean_scores(arm, sites), bench.images
            ),
            "seconds": [run.get("seconds", 0.0) for run in runs],
            "bytes_a_round": runs[0].get("bytes_a_round"),
            "lost": max((run["lost"] for run in runs if run.get("lost") is not None), default=None),
        }
        if "curve" in runs[0]:
            row["curve"] = mean_curve(runs, sites)
            target = REACHED * next(other for other in rows if other["arm"] == pooled)["all"]["value"]
            reached = (point["round"] for point in row["curve"] if point["all"] >= target)
            row["rounds_to_pooled"] = next(reached, None)
        rows.append(row)
    for first, second in COMPARED:
        numbers = difference(mean_scores(first, sites), mean_scores(second, sites), bench.images)
        rows.append({"compared": [first, second], **numbers})
    return rows


def mean_curve(runs: Sequence[dict[str, Any]], sites: Sequence[str]) -> list[dict[str, Any]]:
    """Accuracy after each tested round, the mean over runs: of each site, and over all questions."""
    sizes = [len(runs[0]["scores"][site]) for site in sites]
    curve = []
    for points in zip(*(run["curve"] for run in runs), strict=True):  # [round, accuracy of each site], of each run
        number, *means = (sum(values) / len(runs) for values in zip(*points, strict=True))
        over_all = sum(mean * size for mean, size in zip(means, sizes, strict=True)) / sum(sizes)
        curve.append({"round": int(number), "all": over_all, "sites": dict(zip(sites, means, strict=True))})
    return curve


def accuracy_table(rows: list[dict[str, Any]], sites: list[str], seeds: int) -> str:
    """A Markdown table: accuracy of each arm at each site, the difference from pooled training, rounds and costs."""
    header = (
        "",
        *sites,
        "all",
        "from pooled",
        "from alone",
        "rounds to 95%",
        "bytes a round and site",
        "seconds of a seed",
    )
    lines = []
    for row in (row for row in rows if "arm" in row):
        size, seconds = row["bytes_a_round"], sum(row["seconds"]) / seeds
        reached = row.get("rounds_to_pooled", "")
        lines.append((
            row["arm"], *(format_interval(row["sites"][site]) for site in sites), format_interval(row["all"]),
            "" if row["arm"].endswith("pooled") else format_interval(row["from_pooled"], sign="+"),
            "" if row["arm"].endswith("alone") else format_interval(row["from_alone"], sign="+"),
            "not reached" if reached is None else str(reached),
            f"{size:,}" if size else "", f"{seconds:.0f}" if seconds else "",
        ))  # fmt: skip
    return "\n".join(markdown_table(header, lines, "l" + "r" * (len(sites) + 6))) + "\n"


def draw_curves(rows: list[dict[str, Any]], rounds: int, out: Path) -> None:
    """Draw accuracy over all sites after each tested round, with the levels of pooled training and of the base."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    by_arm = {row["arm"]: row for row in rows if "arm" in row}
    start = 100 * by_arm[BASE]["all"]["value"]
    for axis, tune in zip(panels, ("ln", "lora-8"), strict=True):
        for how, style in (("pooled", "-"), ("alone", "--")):
            level = 100 * by_arm[f"{tune}, {how}"]["all"]["value"]
            axis.axhline(level, color="#444444", linewidth=1, linestyle=style, label=f"{how}, {rounds} passes")
        curves = {arm: row["curve"] for arm, row in by_arm.items() if "curve" in row and arm.startswith(tune)}
        for (arm, curve), color in zip(curves.items(), ("#0072b2", "#d55e00"), strict=True):
            points = [(0, start), *((point["round"], 100 * point["all"]) for point in curve)]
            axis.plot(*zip(*points, strict=True), marker="o", color=color, label=arm.removeprefix(f"{tune}, "))
        axis.set(title=tune, xlabel="round", ylabel="accuracy over all sites, %")
        axis.legend(frameon=False, fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
