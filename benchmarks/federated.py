"""What does a federation bring? Four sites of two phantom hospitals: each alone, pooled, and federated.

    python benchmarks/federated.py --work DIR --out benchmarks/federated.json

Two sites have images of hospital A, two of hospital B, all with as many images. Every arm passes over each site's
pairs as often. A site is tested on the test images of its hospital. Accuracy is the share of equal answers, a
question's score being its mean over the seeds; intervals and differences are clustered by image.
The sites train one after the other in one process, in one thread.
"""

from __future__ import annotations

import argparse
import shutil
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from record import record

from normtune.adapters.info import AdapterInfo
from normtune.data.examples import Examples
from normtune.data.records import Dataset
from normtune.data.registry import open_dataset
from normtune.data.splits import part_of_images
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import evaluate_config
from normtune.federated.config import FederateConfig, SiteOptions
from normtune.federated.rounds import federate
from normtune.federated.rules import SiteUpdate, Values
from normtune.federated.site import RoundTask, train_at_site, write_site_adapter
from normtune.metrics.answers import score_rows
from normtune.metrics.sum_metrics import mean_metric, metric_intervals, paired_difference
from normtune.runtime.number_format import format_interval
from normtune.runtime.text_table import markdown_table
from normtune.training.config import TrainConfig
from normtune.training.train import train

METRIC = "global_exact"
ARMS: dict[str, dict[str, Any]] = {
    "ln, federated": {"tune": "ln"},
    "ln, federated, vision norms local": {"tune": "ln", "local": "vision"},
    "lora-8, federated, naive": {"tune": "lora-8"},
    "lora-8, federated, exact": {"tune": "lora-8", "average": "exact"},
}


class OneProcess:
    """Trains the sites one after the other; see `normtune.federated.rounds.Engine`."""

    def __init__(self, out: Path, sites: dict[str, SiteOptions]) -> None:
        self.out, self.sites = out, sites

    def train_round(self, task: RoundTask) -> dict[str, SiteUpdate | str]:
        return {name: train_at_site(task, site, self.out / "sites" / name) for name, site in self.sites.items()}

    def finish(self, info: AdapterInfo, values: Values) -> None:
        for name in self.sites:
            write_site_adapter(self.out / "sites" / name, info, values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs; it is emptied")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--images", type=int, default=24, help="training images of a site")
    parser.add_argument("--test-images", type=int, default=40, help="test images of a hospital")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shutil.rmtree(options.work, ignore_errors=True)
    names = {hospital: f"phantom-{hospital}:{2 * options.images}/0/{options.test_images}" for hospital in "ab"}
    sites = {f"{hospital}{n}": SiteOptions(data=names[hospital], part=f"{n}/2") for hospital in "ab" for n in (1, 2)}
    rows = measure(options, names, sites)
    table = accuracy_table(rows, list(sites), options.seeds)
    print("\n" + table)
    if options.out:
        about = {"images": options.images, "test_images": options.test_images, "rounds": options.rounds}
        record(options.out, "federated", rows, seeds=options.seeds, **about)
        options.out.with_suffix(".md").write_text(table, encoding="utf-8")


@dataclass
class Arm:
    """What was measured of one arm, over the seeds."""

    scores: dict[str, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    seconds: list[float] = field(default_factory=list)  # of training
    bytes_a_round: int | None = None  # to a site and back
    lost: float | None = None  # largest share of the averaged products that the rank did not hold

    def mean_scores(self, site: str | None = None) -> dict[str, float]:
        """Mean score of each question, by its id: at one site, or over the sites of its hospital."""
        values: dict[str, list[float]] = defaultdict(list)
        for name, rows in self.scores.items():
            for id, scores in rows.items() if site in (None, name) else ():
                values[id] += scores
        return {id: sum(scores) / len(scores) for id, scores in values.items()}


def measure(options: argparse.Namespace, names: dict[str, str], sites: dict[str, SiteOptions]) -> list[dict[str, Any]]:
    """One row for each arm: accuracy of each site, its difference from pooled training, bytes and seconds."""
    arms: dict[str, Arm] = defaultdict(Arm)
    images: dict[str, tuple[str, ...]] = {}  # id of a question -> its images

    def score(adapter: Path | None, hospital: str) -> dict[str, float]:
        config = EvaluateConfig(
            model="nano", data=names[hospital], split="test", adapter=adapter, out=None, device="cpu"
        )
        result = evaluate_config(config)
        images.update({example.id: example.images for example in result.examples})
        return score_rows(result.examples, result.texts, normalisation="vqa")[METRIC]

    def add(arm: str, adapters: dict[str, Path | None]) -> None:
        """Add the scores of each site; sites of one hospital that have one adapter are tested once."""
        cached: dict[tuple[Path | None, str], dict[str, float]] = {}
        for site, adapter in adapters.items():
            key = adapter, site[0]
            cached[key] = cached.get(key) or score(adapter, site[0])
            for id, value in cached[key].items():
                arms[arm].scores[site][id].append(value)

    parts = {name: part_dataset(names[name[0]], site) for name, site in sites.items()}
    add("nano, not trained", dict.fromkeys(sites))
    for seed in range(options.seeds):
        shared: dict[str, Any] = {"batch": 16, "seed": seed, "device": "cpu"}
        for tune in ("ln", "lora-8"):
            fixed = {"tune": tune, "epochs": options.rounds, "warmup": 0, "schedule": "constant", **shared}
            runs: dict[str, Path | None] = {}
            for name, dataset in parts.items():
                runs[name] = run_train(dataset, options.work / f"{seed}-{tune}-{name}", fixed, arms[f"{tune}, alone"])
            add(f"{tune}, alone", runs)
            adapter = run_train(
                pool(list(parts.values())), options.work / f"{seed}-{tune}", fixed, arms[f"{tune}, pooled"]
            )
            add(f"{tune}, pooled", dict.fromkeys(sites, adapter))
        for arm, changes in ARMS.items():
            out = options.work / f"{seed}-{'-'.join(map(str, changes.values()))}"
            config = FederateConfig(model="nano", site=[], out=out, rounds=options.rounds, **shared, **changes)
            result = federate(config, list(sites), OneProcess(out, sites), quiet=True)
            arms[arm].seconds.append(result.seconds)
            arms[arm].bytes_a_round = result.bytes_a_round
            arms[arm].lost = max((entry["lost"] for entry in result.rounds if entry["lost"] is not None), default=None)
            add(arm, {name: out / "sites" / name / "adapter" if "local" in changes else out for name in sites})
        print(f"seed {seed} is done", flush=True)
    rows = []
    for name, arm in arms.items():
        pooled = arms["lora-8, pooled" if name.startswith("lora") else "ln, pooled"]
        rows.append({
            "arm": name,
            "sites": {site: interval(arm.mean_scores(site), images) for site in sites},
            "mean": interval(arm.mean_scores(), images),
            "from_pooled": difference(pooled.mean_scores(), arm.mean_scores(), images),
            "seconds": arm.seconds, "bytes_a_round": arm.bytes_a_round, "lost": arm.lost,
        })  # fmt: skip
    return rows


def run_train(dataset: Dataset, out: Path, fixed: dict[str, Any], arm: Arm) -> Path:
    started = perf_counter()
    train(TrainConfig(model="nano", data=dataset.name, out=out, **fixed), dataset=dataset)
    arm.seconds.append(perf_counter() - started)
    return out


def part_dataset(name: str, site: SiteOptions) -> Dataset:
    """The data of a site."""
    dataset = open_dataset(name)
    part, parts = map(int, (site.part or "1/1").split("/"))
    examples = part_of_images(dataset.split("train"), part, parts)
    return Dataset(dataset.name, Examples(list(examples)), dataset.open_image, licence=dataset.licence)


def pool(datasets: list[Dataset]) -> Dataset:
    """The rows of all sites; keys of images begin with the hospital."""
    opens = {dataset.name[-1]: dataset.open_image for dataset in datasets}
    examples = Examples([example for dataset in datasets for example in dataset.examples])
    return Dataset("phantoms", examples, lambda key: opens[key[0]](key), licence=datasets[0].licence)


def interval(scores: dict[str, float], images: dict[str, tuple[str, ...]]) -> dict[str, float]:
    """Mean score and its 95% interval, clustered by image."""
    return asdict(metric_intervals({METRIC: mean_metric(scores)}, images)[METRIC])


def difference(
    first: dict[str, float], second: dict[str, float], images: dict[str, tuple[str, ...]]
) -> dict[str, float]:
    """`second` minus `first` with its 95% interval and p-value, clustered by image."""
    paired = paired_difference(mean_metric(first), mean_metric(second), images)
    return {"value": paired.difference, "low": paired.low, "high": paired.high, "p": paired.p}


def accuracy_table(rows: list[dict[str, Any]], sites: list[str], seeds: int) -> str:
    """A Markdown table: accuracy of each arm at each site, the difference from pooled training, bytes and seconds."""
    header = ("", *sites, "all", "from pooled", "bytes a round and site", "seconds of a seed")
    lines = []
    for row in rows:
        cells = [format_interval(row["sites"][site]) for site in sites]
        size, seconds = row["bytes_a_round"], sum(row["seconds"]) / seeds
        is_pooled = row["arm"].endswith("pooled")
        lines.append((
            row["arm"], *cells, format_interval(row["mean"]),
            "" if is_pooled else format_interval(row["from_pooled"], sign="+"),
            f"{size:,}" if size else "", f"{seconds:.0f}" if seconds else "",
        ))  # fmt: skip
    return "\n".join(markdown_table(header, lines, "l" + "r" * (len(sites) + 4))) + "\n"


if __name__ == "__main__":
    main()
