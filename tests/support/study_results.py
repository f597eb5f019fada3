"""Made-up results of a study, in the format of `results.json`."""

from __future__ import annotations

import math
import random
from typing import Any

from normtune.methods.presets import PRESETS
from normtune.methods.recipe import parse, resolve
from normtune.metrics.statistics.intervals import mean_over_seeds

NANO = ("vision", "encoder", "decoder")
LARGE = ("vision", "connector", "language")
RECIPES = {  # recipe: trained share, score gained, learning rate
    "frozen": (0.0, 0.0, {}),
    "ln": (0.0029, 0.145, {"ln": 0.03}),
    "ln-vision": (0.0007, 0.05, {"ln": 0.03}),
    "ln-encoder+decoder": (0.0022, 0.12, {"ln": 0.03}),
    "attention": (0.33, 0.16, {"attention": 0.001}),
    "ffn": (0.51, 0.165, {"ffn": 0.001}),
    "full": (1.0, 0.17, {"full": 0.0003}),
    "lora-4": (0.008, 0.13, {"lora": 0.003}),
    "lora-8": (0.016, 0.135, {"lora": 0.003}),
    "prefix": (0.012, 0.04, {"prefix": 0.003}),
    "ia3": (0.0015, 0.06, {"ia3": 0.1}),
}
VQA = ("closed_label", "open_exact", "open_recall", "global_exact")
REPORT = ("bleu_1/none", "bleu_4/none", "rouge_l/none", "meteor_exact_stem/none", "cider_d/none")


class FakeStudy:
    """The tables of `results.json`, filled cell by cell with random numbers."""

    def __init__(self, losses: int = 40) -> None:
        self.random = random.Random(0)
        self.losses = losses
        names = ("cells", "evaluations", "metrics", "forgetting", "norms", "losses", "seeds", "tests")
        self.tables: dict[str, list[dict[str, Any]]] = {name: [] for name in names}

    def add_cell(
        self,
        model: str,
        recipe: str,
        trained_on: str | None,
        tested: dict[str, str],
        *,
        grids: list[str],
        share: float = 1.0,
        seed: int | None = 0,
        rate: float | None = None,
        reduction: float = 0.0,
    ) -> None:
        """Add one cell with its evaluations; `reduction` is subtracted from the gain of its recipe."""
        trained, gain, rates = RECIPES[recipe]
        key = f"{len(self.tables['cells']):016x}"
        if rate is not None:
            rates = dict.fromkeys(rates, rate)
        size = 8 if model == "large" else 1
        steps = None if trained_on is None else 260
        self.tables["cells"].append(
            {
                "key": key, "status": "done", "error": None, "grids": grids, "model": model,
                "recipe": recipe, "recipe_text": str(parse(recipe)), "trained_on": trained_on, "share": share,
                "resolved": None if trained_on is None
                else str(resolve(parse(recipe), LARGE if model == "large" else NANO)),
                "seed": seed, "rate_source": "search" if "search" not in grids else "given", "rates": rates,
                "budget": {"epochs": 10}, "pairs_seen": 6292, "steps": steps,
                "trainable_share": trained,
                "train_seconds": steps and size * (20 + 15 * trained + self.random.random()),
                "train_peak_bytes": steps and int(size * (4e8 + 2.5e8 * math.sqrt(trained))),
                "final_loss": 1.2, "commit": "6b63bff0000000000000", "base_fingerprint": "0123456789abcdef",
                "versions": {"python": "3.11.7", "normtune": "0.1.0", "torch": "2.13.0"},
                "hardware": {"processor": "Made-up CPU", "cores": 2, "threads": 1, "accelerator": None},
                "started": "2026-11-25T09:00:00+00:00", "finished": "2026-11-25T09:05:00+00:00",
            }
        )  # fmt: skip
        for dataset, role in tested.items():
            self._evaluation(
                key, dataset, role, model, gain - reduction if role == "in" else (gain - reduction) / 4, trained
            )
        if trained_on is not None and role != "validate":
            self._training(key, model, recipe, gain)

    def _evaluation(self, key: str, dataset: str, role: str, model: str, gain: float, trained: float) -> None:
        report = dataset == "medpix"
        split = "validate" if role == "validate" else "test"
        self.tables["evaluations"].append(
            {
                "key": key, "dataset": dataset, "role": role, "task": "report" if report else "vqa",
                "split": split, "rows": 1061, "images": 96, "split_hash": "d152954a116bdef6",
                "folder": f"cells/{key}/evaluations/x",
            }
        )  # fmt: skip
        base = {"slake": 0.38, "vqa-rad": 0.3, "medpix": 0.12, "phantom-a": 0.82}[dataset] + 0.15 * (model == "large")
        if role == "home":
            gain = -0.4 * trained**0.25 * (trained > 0)
        noise = self.random.gauss(0, 0.008)
        for number, metric in enumerate(REPORT if report else VQA):
            value = (base + gain + noise) * (1.0 - 0.1 * number)
            if metric.startswith("cider"):
                value *= 2
            self.tables["metrics"].append(
                {
                    "key": key, "dataset": dataset, "role": role, "split": split, "metric": metric,
                    "value": value, "low": value - 0.03, "high": value + 0.03, "rows": 1061, "images": 96,
                }
            )  # fmt: skip
            if role == "home" and trained:
                forgetting_row = {"key": key, "dataset": dataset, "metric": metric, "base": base, "tuned": value}
                self.tables["forgetting"].append({**forgetting_row, "forgotten": base * (1 - 0.1 * number) - value})

    def _training(self, key: str, model: str, recipe: str, gain: float) -> None:
        for step in range(1, 261, max(1, 260 // self.losses)):
            loss = (1.1 - 2 * gain) + 3 * math.exp(-step / 20) + abs(self.random.gauss(0, 0.08))
            self.tables["losses"].append({"key": key, "step": step, "loss": loss})
        if not recipe.startswith(("ln", "full")):
            return
        layers = {"vision": 6, "encoder": 3, "decoder": 2} if model == "nano" else {"vision": 12, "language": 32}
        untrained_parts = {"ln-vision": ("encoder", "decoder"), "ln-encoder+decoder": ("vision",)}.get(recipe, ())
        for part, depth in layers.items():
            if part in untrained_parts:
                continue
            for layer in [*range(depth), None]:
                norms = {"vision": ("norm1", "norm2"), "language": ("input_layernorm", "post_attention_layernorm")}.get(
                    part, ("attention.output.LayerNorm", "crossattention.output.LayerNorm", "output.LayerNorm")
                )
                for norm in norms if layer is not None else ("embeddings.LayerNorm",):
                    for kind, suffix in (("gain", "weight"), ("bias", "bias")):
                        if kind == "bias" and part == "language":
                            continue
                        step = 0.02 * (1 + (layer or 0)) * self.random.uniform(0.5, 1.5)
                        prefix = f"layers.{layer}." if layer is not None else ""
                        self.tables["norms"].append(
                            {
                                "key": key, "name": f"{part}.{prefix}{norm}.{suffix}",
                                "part": part, "layer": layer,
                                "kind": kind, "count": 128,
                                "relative": step if kind == "gain" else None, "rms": step,
                            }
                        )  # fmt: skip

    def build_results(self, against: str = "ln", margin: float | None = None) -> dict[str, Any]:
        """All tables, with means over seeds and tests; the p-values are made up too."""
        cells = {cell["key"]: cell for cell in self.tables["cells"]}
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in self.tables["metrics"]:
            cell = cells[row["key"]]
            rate_text = ", ".join(f"{name} {rate:g}" for name, rate in sorted(cell["rates"].items()))
            for grid in cell["grids"]:
                if grid != "search":
                    setting = (grid, *(cell[n] for n in ("model", "trained_on", "share", "recipe")), rate_text)
                    groups.setdefault((*setting, row["dataset"], row["role"], row["metric"]), []).append(row)
        names = ("grid", "model", "trained_on", "share", "recipe", "rate", "dataset", "role", "metric")
        for group, rows in groups.items():
            values = [row["value"] for row in rows]
            interval = mean_over_seeds(values) if len(values) > 1 else None
            self.tables["seeds"].append(
                {
                    **dict(zip(names, group, strict=True)),
                    "seeds": len(values),
                    "rows": 1061,
                    "images": 96,
                    "mean": interval.value if interval else values[0],
                    "low": interval.low if interval else rows[0]["low"],
                    "high": interval.high if interval else rows[0]["high"],
                    "least": min(values),
                    "most": max(values),
                }
            )
        means = {tuple(row[n] for n in names if n != "rate"): row["mean"] for row in self.tables["seeds"]}
        for row in list(self.tables["seeds"]):
            setting = {n: row[n] for n in names if n != "rate"}
            other_mean = means.get(tuple({**setting, "recipe": against}.values()))
            if row["trained_on"] is not None and other_mean is not None and row["recipe"] != against:
                difference = row["mean"] - other_mean
                p = min(1.0, math.exp(-abs(difference) * 150))
                self.tables["tests"].append(
                    {
                        **setting, "against": against, "difference": difference,
                        "low": difference - 0.015, "high": difference + 0.015,
                        "p": p, "p_holm": min(1.0, 4 * p), "rows": 1061, "images": 96, "seeds": row["seeds"],
                        "method": "made up", "question": "recipes" if row["seeds"] >= 3 else "trained models",
                        "first": other_mean, "second": row["mean"], "smallest_difference": 0.04, "margin": margin,
                        "equivalent": None if margin is None else abs(difference) + 0.015 < margin,
                        "no_worse": None if margin is None else difference - 0.015 > -margin,
                    }
                )  # fmt: skip
        spec = {
            "models": {"nano": {}, "large": {}},
            "datasets": {"slake": {}, "vqa-rad": {}, "medpix": {}, "phantom-a": {"data": "phantom-a:4/0/4"}},
            "grids": {"methods": {}, "curves": {}},
            "compare": {"against": against},
            "search": {},
        }
        about = "Made-up numbers, to look at the page with."
        return {"study": "made-up", "about": about, "spec": spec, **self.tables}


SKIPPED_FOR_LARGE = {"ln-encoder+decoder"}


def fake_results(*, recipes: list[str] | None = None, seeds: int = 3, losses: int = 40) -> dict[str, Any]:
    """A study with all that a page can show: two models, three datasets, curves, a search, a failure."""
    study = FakeStudy(losses)
    recipe_names = recipes or list(RECIPES)
    datasets = ("slake", "vqa-rad", "medpix")
    for model in ("nano", "large"):
        study.add_cell(
            model, "frozen", None, {**dict.fromkeys(datasets, "zero-shot"), "phantom-a": "home"},
            grids=["methods", "curves"], seed=None,
        )  # fmt: skip
    for model, data in (("nano", "slake"), ("nano", "vqa-rad"), ("nano", "medpix"), ("large", "slake")):
        for recipe in recipe_names:
            if recipe == "frozen" or (model == "large" and recipe in SKIPPED_FOR_LARGE):
                continue
            for seed in range(seeds):
                other = {"slake": "vqa-rad", "vqa-rad": "slake"}.get(data) if model == "nano" else None
                tested = {data: "in", **({other: "out"} if other else {}), "phantom-a": "home"}
                study.add_cell(model, recipe, data, tested, grids=["methods"], seed=seed)
    for recipe in [name for name in ("ln", "full", "lora-8") if name in recipe_names]:
        for share in (0.01, 0.05, 0.1, 0.5, 1.0):
            for seed in range(seeds):
                drop = 0.13 * math.log10(1 / share) * (1 if recipe == "full" else 0.7) / 2
                tested = {"slake": "in", "phantom-a": "home"}
                study.add_cell(
                    "nano", recipe, "slake", tested, grids=["curves"], share=share, seed=seed, reduction=drop
                )
        (rate,) = RECIPES[recipe][2].values()
        for step, drop in ((1 / 3, 0.03), (1.0, 0.0), (3.0, 0.05)):
            study.add_cell(
                "nano", recipe, "slake", {"slake": "validate"}, grids=["search"], rate=rate * step, reduction=drop
            )
    failed = {
        **study.tables["cells"][-1],
        "key": "f" * 16,
        "status": "failed",
        "recipe": recipe_names[-1],
        "grids": ["methods"],
    }
    failed |= {"error": "the loss is not finite at step 12. Lower the learning rate.", "seed": 9}
    study.tables["cells"].append(failed)
    return study.build_results()


assert set(RECIPES) <= {*PRESETS, "attention", "ffn", "full", "ia3", "prefix", "ln", "frozen"}
