from __future__ import annotations

import pytest

from normtune.studies.page import curves, figures
from normtune.studies.page.curves import binned_means
from normtune.studies.page.norm_maps import heat_maps, map_cell
from normtune.studies.page.results import Results, Setting
from tests.support.study_results import FakeStudy, fake_results


@pytest.fixture(scope="module")
def study() -> Results:
    return Results(fake_results(recipes=["frozen", "ln", "full"], losses=20))


METHODS, CURVES = Setting("methods", "nano", "slake"), Setting("curves", "nano", "slake")


def test_bins_of_a_loss_curve_include_all_runs() -> None:
    assert binned_means([[(1, 4.0), (60, 1.0)], [(1, 2.0), (60, float("nan"))]]) == [(1.0, 3.0), (60.0, 1.0)]
    assert len(binned_means([[(step, 1.0) for step in range(1, 1000)]])) == curves.BINS
    assert binned_means([]) == []


def test_every_trained_recipe_is_a_mark_in_the_scatter_plot(study: Results) -> None:
    (panel,) = figures.against_share(study, METHODS)
    assert panel.counts == "96 images, 3 seeds"
    assert [row[0] for row in panel.rows] == ["ln", "full"]
    assert panel.chart.count("<title>") == 2


def test_the_forest_plot_shows_each_test_and_the_margin() -> None:
    made = FakeStudy(losses=2)
    for recipe in ("ln", "full", "lora-8"):
        for seed in range(3):
            made.add_cell("nano", recipe, "slake", {"slake": "in"}, grids=["methods"], seed=seed)
    results = made.build_results(margin=0.02)
    (panel,) = figures.differences(Results(results), METHODS)
    tests = {row["recipe"]: row for row in results["tests"] if row["metric"] == "global_exact"}
    assert panel.title == "Difference to `ln`"
    assert [row[0] for row in panel.rows] == ["full", "lora-8"]
    assert panel.rows[0][1].startswith(f"{100 * tests['full']['difference']:+.1f} [".replace("-", "\u2212"))
    assert panel.rows[0][3:] == ("96", "3") and "+2.0 points either way" in panel.text
    for row in results["tests"]:
        row |= {"margin": None, "question": "trained models"}
    (panel,) = figures.differences(Results(results), METHODS)
    assert "margin" not in panel.text and "another seed may differ" in panel.text


def test_each_seed_has_a_mark_below_its_mean(study: Results) -> None:
    (panel,) = figures.seed_scores(study, METHODS)
    keys = {cell["key"] for cell in next(iter(study.full_data_arms(METHODS))).cells}
    rows = [r for r in study.tables["metrics"] if r["key"] in keys and r["dataset"] == "slake"]
    assert panel.rows[0][2] == ", ".join(f"{100 * r['value']:.1f}" for r in rows if r["metric"] == "global_exact")
    assert panel.chart.count("<title>") == 2 * (1 + 3)
    (curve,) = figures.seed_scores(study, CURVES)
    assert curve.rows[0][0] == "ln, 100%"


def test_a_learning_curve_is_the_mean_of_the_seeds_that_still_train() -> None:
    made = fake_results(recipes=["ln"], losses=2)
    keys = [cell["key"] for cell in made["cells"] if cell["grids"] == ["methods"] and cell["trained_on"] == "slake"][:3]
    made["curves"] = [
        {"key": key, "step": step, "passes": float(step), "metric": "global_exact", "score": 0.1 * step + 0.01 * at,
         "validation_loss": 3.0 - step, "is_best": int(step == 2)}
        for at, key in enumerate(keys) for step in range(1, 3 + (at == 2))
    ]  # fmt: skip
    scores, losses = curves.learning_curves(Results(made), METHODS)
    assert (scores.title, losses.title) == ("Learning curves", "Validation loss")
    assert scores.rows == (("ln", "11", "32", "2 to 2", "3", "3"),)
    assert losses.rows[0][1:3] == ("2", "0")
    assert "<title>ln, pass 3: 32, 1 seed</title>" in scores.chart
    assert not list(curves.learning_curves(Results(made), CURVES))


def test_transfer_shows_recipes_with_and_without_the_data(study: Results) -> None:
    (panel,) = figures.transfer(study, METHODS)
    assert panel.title == "Transfer to vqa-rad"
    assert [row[:2] for row in panel.rows] == [
        ("ln", "vqa-rad"), ("full", "vqa-rad"), ("ln", "slake"), ("full", "slake"),
        ("frozen base", "nothing (zero-shot)"),
    ]  # fmt: skip
    assert list(figures.transfer(study, Setting("methods", "large", "slake"))) == []


def test_the_chosen_rate_is_highlighted() -> None:
    made = fake_results(recipes=["frozen", "ln", "full"], losses=2)
    for cell in made["cells"]:
        if cell["recipe"] == "ln" and cell["rate_source"] == "search":
            cell["rates"] = {"ln": 0.03 * (1 / 3)}  # not the best trial
    (panel,) = curves.rate_curves(Results(made), METHODS)
    assert [row[1] for row in panel.rows if row[0] == "ln" and row[3] == "chosen"] == ["0.01"]
    best = max((row for row in panel.rows if row[0] == "full"), key=lambda row: float(row[2].split()[0]))
    assert [row for row in panel.rows if row[0] == "full" and row[3] == "chosen"] == [best]


def test_forgetting_is_the_mean_of_the_seeds(study: Results) -> None:
    (panel,) = figures.forgetting(study, METHODS)
    keys = {c["key"] for c in study.cells if (c["grids"], c["recipe"], c["trained_on"]) == (["methods"], "ln", "slake")}
    keys &= {c["key"] for c in study.cells if c["model"] == "nano"}
    lost = [r["forgotten"] for r in study.tables["forgetting"] if r["key"] in keys and r["metric"] == "global_exact"]
    assert len(lost) == 3
    assert panel.rows[0][0] == "ln" and panel.rows[0][1].startswith(f"{100 * sum(lost) / 3:+.1f} [")
    two_seeds = Results(fake_results(recipes=["ln"], seeds=2, losses=2))
    estimate = figures.forgetting_estimate(two_seeds, two_seeds.arms(METHODS)[0], "phantom-a")
    assert estimate is not None and estimate.low == estimate.value == estimate.high and estimate.seeds == 2


def test_a_heat_map_has_a_cell_for_each_norm(study: Results) -> None:
    panels = list(heat_maps(study, METHODS))
    assert [panel.title for panel in panels[:2]] == [
        "`ln`: gains, % of its start",
        "`ln`: biases, root mean square of the step",
    ]
    keys = {cell["key"] for cell in next(iter(study.full_data_arms(METHODS))).cells}
    norms = {row["name"] for row in study.tables["norms"] if row["key"] in keys and row["kind"] == "gain"}
    assert len(panels[0].rows) == len(norms)


@pytest.mark.parametrize(
    ("name", "layer", "row"),
    [
        ("visual_encoder.blocks.3.norm1.weight", 3, "part: before attention"),
        ("text_decoder.bert.encoder.layer.1.crossattention.output.LayerNorm.bias", 1, "part: cross-attention"),
        ("text_encoder.encoder.layer.0.output.LayerNorm.weight", 0, "part: feed-forward"),
        ("text_decoder.cls.predictions.transform.LayerNorm.weight", None, "part: head"),
        ("visual_encoder.norm.weight", None, "part: last"),
        ("model.language_model.layers.7.self_attn.q_norm.weight", 7, "part: self_attn.q_norm"),
    ],
)
def test_norms_have_plain_names(name: str, layer: int | None, row: str) -> None:
    assert map_cell({"name": name, "layer": layer, "part": "part"}) == (row, "other" if layer is None else str(layer))
