"""What the docs and the defaults take from benchmarks is what the committed files hold."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from normtune.commands.bench import benchmarks, recorded, run_benchmark
from normtune.methods.registry import LEARNING_RATES, METHODS
from tests.support.dataset_samples import slake_row, write_slake

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


def found(name: str) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((BENCHMARKS / name).read_text(encoding="utf-8"))
    assert held["versions"]["torch"] and held["machine"]["cores"], (
        f"{name} says what it was measured with and on"
    )
    return held


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_default_learning_rates_are_the_best_of_the_sweep() -> None:
    sweep = found("learning_rates.json")
    assert sweep["best"] == LEARNING_RATES
    for method, rate in sweep["best"].items():
        own = [row for row in sweep["rows"] if row["method"] == method]
        assert max(row["accuracy"] for row in own) == next(
            row["accuracy"] for row in own if row["lr"] == rate
        )


def test_every_method_has_a_learning_rate() -> None:
    assert set(LEARNING_RATES) == set(METHODS) - {"frozen"}


SHOWN = {  # page -> the committed tables that it shows
    "README.md": ["demo/table", "real_data", "throughput_llava_slake"],
    "docs/method.md": ["quantised"],
    "docs/quickstart.md": ["demo/reports"],
    "docs/recipes.md": ["multi"],
    "docs/serving.md": ["load", "serving_llava_slake", "serving_miss_slake"],
    "docs/metrics.md": ["reliance", "medpix"],
    "docs/speed.md": [
        "throughput_llava_slake",
        "throughput_llava_vqa-rad",
        "throughput_miss_slake",
        "answering_llava_slake",
        "answering_miss_slake",
        "memory",
        "large",
        "scaling",
        "grouping",
        "gpu_llava_med_7b",
    ],
}


def test_the_results_page_quotes_the_studys_tables() -> None:
    """Rows of a recipe as they stand there; of the small-data table the cells."""
    tables = (ROOT / "docs/results/real-nano/tables.md").read_text(encoding="utf-8")
    quoted = [
        line
        for line in (ROOT / "docs/results.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    shares = [line for line in quoted if re.match(r"\| \d+% ", line)]
    recipes = [line for line in quoted if line not in shares and not line.startswith("| share")]
    assert len(recipes) == 27 and len(shares) == 5
    assert all(line in tables for line in recipes)
    assert all(cell.strip() in tables for line in shares for cell in line.split("|")[2:4])


@pytest.mark.parametrize(
    ("page", "table"), [(page, table) for page, tables in SHOWN.items() for table in tables]
)
def test_pages_show_the_committed_tables(page: str, table: str) -> None:
    assert (BENCHMARKS / f"{table}.md").read_text(encoding="utf-8") in (ROOT / page).read_text(
        encoding="utf-8"
    )


def test_the_readme_tells_the_committed_figures_of_bf16() -> None:
    rows = {(row["method"], row["lr"]): row for row in found("bf16_norms.json")["rows"]}
    for method in ("normtune ln", "peft LN_TUNING"):
        row = rows[method, 1e-4]
        assert f"{row['moved']:,} of {row['values']:,}" in readme()


@pytest.mark.parametrize("name", benchmarks())
def test_every_benchmark_starts(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_benchmark(name, ["--help"])
    assert "--out" in capsys.readouterr().out


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks by its name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def small(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The shapes at a few image tokens, and a folder in SLAKE's layout."""
    shapes: ModuleType = script("shapes")
    miss = shapes.MissShape()
    miss.image_size, miss.layers = 32, 1
    llava = shapes.LlavaShape(size=42, vision={"num_hidden_layers": 2}, text={"num_hidden_layers": 1})
    monkeypatch.setitem(shapes.SHAPES, "llava", llava)
    monkeypatch.setitem(shapes.SHAPES, "miss", miss)
    rows = [slake_row(i, i % 2, question=f"Which organ is {'clearly ' * (i % 3)}shown?") for i in range(12)]
    root = tmp_path / "slake"
    root.mkdir()
    return write_slake(root, train=rows, validate=rows[:1], test=rows[:1])


def test_the_table_of_what_images_earn_is_of_its_record(script: Any) -> None:
    reliance, rows = script("reliance"), found("reliance.json")["rows"]
    assert reliance.table(rows) == (BENCHMARKS / "reliance.md").read_text(encoding="utf-8")
    for dataset in {row["dataset"] for row in rows}:
        assert tuple(row["recipe"] for row in rows if row["dataset"] == dataset) == reliance.RECIPES
    for row in rows:
        for about in row["reliance"].values():
            for one in about["metrics"].values():
                lost = one["real"]["value"] - one["replaced"]["value"]
                assert one["difference"]["value"] == pytest.approx(lost)
                assert one["earned"]["value"] == pytest.approx(lost / one["real"]["value"])


@pytest.mark.parametrize("shape", ["llava", "miss"])
def test_answering_compares_every_answer_and_then_times_both(shape: str, small: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = ["--shape", shape, "--data", "slake", "--root", str(small), "--pairs", "12", "--batch", "6"]
    out = tmp_path / "record.json"
    record = recorded("answering", [*options, "--tokens", "3", "--rounds", "2", "--out", str(out)])
    assert record["same_answers"] == record["questions"] == 12 and record["tokens"] == 3
    assert [row["beams"] for row in record["rows"]] == [1, 3]
    for row in record["rows"]:
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        assert len(row["rounds"]["normtune"]) == len(row["rounds"]["generate()"]) == 2
    assert out.with_suffix(".md").read_text(encoding="utf-8").count("\n") == 4


def test_answering_stops_where_the_two_sides_differ(script: Any) -> None:
    check = script("answering").check
    check({"a": (1, 2), "b": (3, 4)}, {"a": (1, 2), "b": (3, 4)}, 2)
    with pytest.raises(SystemExit, match="1 of 2 answers differ"):
        check({"a": (1, 2), "b": (3, 4)}, {"a": (1, 2), "b": (3, 5)}, 2)
    with pytest.raises(SystemExit):
        check({"a": (1,)}, {"a": (1,)}, 2)


@pytest.mark.parametrize("shape", ["llava", "miss"])
def test_the_twins_hold_the_same_weights(shape: str, small: Path, script: Any) -> None:
    one = script("shapes").SHAPES[shape]
    one.learn_words(["which organ is shown? lung"])
    family, peer = one.twins()
    models = (family.model, peer)
    ours, theirs = (sum(float(p.detach().double().sum()) for p in m.parameters()) for m in models)
    assert ours == pytest.approx(theirs, rel=1e-9) and family.model is not peer


@pytest.mark.parametrize("shape", ["llava", "miss"])
def test_throughput_runs_all_methods_in_every_round(shape: str, small: Path) -> None:
    options = ["--shape", shape, "--data", "slake", "--root", str(small), "--pairs", "3", "--steps", "1"]
    record = recorded("throughput", [*options, "--rounds", "1"])
    methods = [row["method"] for row in record["rows"]]
    assert methods[0] == "normtune ln" and "PEFT LoRA r8 all-linear" in methods and len(methods) == 8
    assert all(row["pairs_per_second"]["median"] > 0 for row in record["rows"])
    assert record["rows"][0]["faster"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert record["shape"]["name"] == shape and record["questions_per_image"] == 6


def test_the_arithmetic_of_a_step_is_that_of_the_formula(script: Any) -> None:
    vision = {"hidden_size": 2, "intermediate_size": 3, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {"hidden_size": 4, "intermediate_size": 5, "num_hidden_layers": 2, "num_attention_heads": 1}
    shape = script("shape_llava").LlavaShape(size=28, vision=vision, text=text)
    shape.learn_words(["lung"])
    words = shape.describe()["vocabulary"]
    tower = 4 * (4 * 2 * 2 + 2 * 2 * 3) * 5 + 14 * 2 * 5**2
    entry = 2 * 3 * 14**2 * 2 * 4 + 4 * (2 * 4 + 4 * 4) * 4
    language = 2 * (4 * (4 * 4 * 4 + 3 * 4 * 5) * 7 + 14 * 4 * 7**2)
    flops = script("scaling").flops
    one = flops(shape, [7], images=1, logits=3)
    assert one == tower + entry + language + 4 * 4 * words * 3
    assert flops(shape, [7] * 5, images=5, logits=15) == 5 * one


def test_scaling_measures_both_at_every_point(script: Any, small: Path, tmp_path: Path) -> None:
    scaling = script("scaling")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "AT_TOKENS", 9)
        patch.setattr(scaling, "AT_QUESTIONS", 3)
        out = tmp_path / "scaling.json"
        told = ["--questions", "1", "2", "--image-tokens", "4", "--rounds", "1", "--out", str(out)]
        patch.setattr("sys.argv", ["scaling", "--slake", str(small), *told])
        scaling.main()
    record = json.loads(out.read_text(encoding="utf-8"))
    points = {(row["questions"], row["image_tokens"]) for row in record["rows"]}
    assert points == {(1, 9), (2, 9), (3, 4), (3, 9)} and len(record["rows"]) == 8
    held = [row for row in record["rows"] if row["method"] == scaling.SEPARATE and row["questions"] == 3]
    anchor = next(row for row in held if row["image_tokens"] == 9)
    assert anchor["predicted"] == pytest.approx(anchor["seconds"]["median"])
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_gpu_script_runs_at_a_tiny_width() -> None:
    record = recorded("gpu_llava_med_7b", ["--smoke"])
    speeds = [row for row in record["rows"] if "lr" not in row]
    assert [row["status"] for row in speeds].count("smoke run") == 6, "all but the block mask"
    assert {row["method"] for row in speeds if "faster" in row} >= {"PEFT LN_TUNING", "PEFT LoRA r8 q,v"}
    norms = [row for row in record["rows"] if "lr" in row]
    fp32, bf16, *rest = (row["moved"] / row["values"] for row in norms)
    assert fp32 > bf16 and len(rest) == 2, "at the lower rate; then the higher one"


@pytest.mark.skipif(torch.cuda.is_available(), reason="it measures where there is a GPU")
def test_without_a_gpu_its_rows_say_that_nothing_was_measured() -> None:
    rows = recorded("gpu_llava_med_7b", [])["rows"]
    assert {row["status"] for row in rows} == {"not yet measured"}
    assert not any("pairs_per_second" in row or "moved" in row for row in rows)


def test_several_adapters_are_timed_beside_their_runs(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    options = ["--shape", "miss", "--data", "slake", "--root", str(small), "--adapters", "2", "--steps", "1"]
    record = recorded("multi", [*options, "--rounds", "1", "--pairs", "6", "--out", str(out)])
    assert [row["sweep"] for row in record["rows"]] == ["seeds", "learning rates"]
    for row in record["rows"]:
        step = row["step_bytes"]
        assert step["one_run"] < step["1"] < step["2"] < 3 * step["one_run"]
        for way in row["ways"]:
            assert way["memory_of_runs_side_by_side"] < 1 < way["memory_of_one_run"]
    assert out.with_suffix(".md").read_text(encoding="utf-8").count("\n") == 6


def test_serving_times_many_adapters_beside_one_and_beside_peft(small: Path, tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    options = ["--shape", "llava", "--data", "slake", "--root", str(small), "--pairs", "4", "--images", "2"]
    options += ["--rounds", "1", "--tokens", "3", "--registered", "6", "--out", str(out)]
    record = recorded("serving", options)
    timed = [row for row in record["rows"] if "rounds" in row]
    assert len(timed) == 8 and all(row["requests_per_second"]["median"] > 0 for row in timed)
    many = next(row for row in timed if row["side"] == "normtune, an adapter each")
    assert many["of_one_adapter"]["median"] > 0 and many["normtune_is_faster"]["median"] == 1.0
    own = {row["side"]: row["own_answers"] for row in record["rows"] if row["own_answers"]}
    assert own["PEFT LoRA r8 q,v, adapter_names"]["same"] == 4
    assert own["PEFT LN_TUNING, adapter_names"]["same"] < 4, "PEFT gives all rows one adapter's norms"
    found = record["registered"]
    assert found["adapters"] == found["loaded"] == 6 and found["first_answer_s"]["median"] > 0
    assert "6 adapters are registered" in out.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_server_is_loaded_beyond_its_capacity_and_ends_without_a_loss(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    options = ["--minutes", "0.02", "--capacity-seconds", "0.5", "--clients", "4", "--adapters", "2"]
    options += ["--images", "4", "--warm-seconds", "0.2", "--every", "0.5", "--out", str(out)]
    record = recorded("load", options)
    assert (record["lost"], record["wrong"], record["exit_status"]) == (0, 0, 0)
    capacity, loaded, end = (row["outcomes"] for row in record["rows"])
    assert capacity["200"] > 0 and loaded["200"] > 0 and set(loaded) <= {"200", "429"}
    assert record["logged"]["200"] >= sum(row.get("200", 0) for row in (capacity, loaded, end))
    assert record["rows"][1]["latency_s"]["200"]["p50"] > 0 and record["memory"][-1]["bytes"] > 0
    assert "0 lost; exit status 0" in out.with_suffix(".md").read_text(encoding="utf-8")


def test_an_answer_that_the_server_logged_and_no_client_read_is_lost(script: Any) -> None:
    load = script("load")
    read = load.Book(load.Counter({"200": 3, "429": 2, load.UNREAD: 4}))
    line = "2026-01-01 POST {} {} 0.010s -\n"
    log = line.format("/v1/chat/completions", 200) * 3 + line.format("-", 429) * 2
    assert load.balance([read], log) == {"logged": {"200": 3, "429": 2}, "lost": 0}
    assert load.balance([read], log + line.format("/v1/chat/completions", 503))["lost"] == 1
    cut = load.Book(load.Counter({"200": 2, "429": 2, load.CUT: 1}))
    assert load.balance([cut], log)["lost"] == 1
