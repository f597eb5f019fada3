"""The docs and the defaults agree with the committed records, and the benchmarks run at a small size."""

from __future__ import annotations

import importlib
import json
import math
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from normtune.commands.bench import benchmark_record, find_benchmarks, run_benchmark
from normtune.data.records import Example
from normtune.methods.registry import LEARNING_RATES, METHODS
from tests.support.dataset_samples import slake_row, write_slake
from tests.support.tolerance import approx, sampling_error

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


def read_record(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((BENCHMARKS / name).read_text(encoding="utf-8"))
    assert record["versions"]["torch"] and record["machine"]["cores"], f"{name} records versions and machine"
    return record


def test_default_learning_rates_are_the_best_of_the_sweep() -> None:
    sweep = read_record("learning_rates.json")
    assert sweep["best"] == LEARNING_RATES
    for method, rate in sweep["best"].items():
        method_rows = [row for row in sweep["rows"] if row["method"] == method]
        assert max(row["accuracy"] for row in method_rows) == next(
            row["accuracy"] for row in method_rows if row["lr"] == rate
        )


def test_every_method_has_a_learning_rate() -> None:
    assert set(LEARNING_RATES) == set(METHODS) - {"frozen"}


TABLES_OF_PAGE = {  # page: the committed tables that it contains
    "docs/advise.md": ["advise"],
    "docs/federated.md": ["federated_real", "federated_phantoms"],
    "docs/private.md": ["private_accuracy"],
    "docs/demo.md": ["demo/table", "demo/reports"],
    "docs/datasets.md": ["rows"],
    "docs/study.md": ["seeds"],
    "docs/method.md": ["quantised"],
    "docs/serving.md": ["load", "serving_llava_slake", "serving_miss_slake"],
    "docs/metrics.md": ["reliance", "medpix", "statistics_checks", "statistics_checks_confidence", "confidence"],
    "docs/speed.md": [
        "throughput_llava_slake",
        "throughput_llava_111",
        "throughput_llava_vqa-rad",
        "throughput_miss_slake",
        "answering_llava_slake",
        "answering_miss_slake",
        "choices",
        "memory",
        "large",
        "scaling",
        "grouping",
        "conversations",
        "grouping_speed",
    ],
}


@pytest.mark.parametrize(
    ("page", "table"), [(page, table) for page, tables in TABLES_OF_PAGE.items() for table in tables]
)
def test_pages_show_the_committed_tables(page: str, table: str) -> None:
    assert (BENCHMARKS / f"{table}.md").read_text(encoding="utf-8") in (ROOT / page).read_text(encoding="utf-8")


def test_the_docs_have_the_committed_figures_of_bf16() -> None:
    page = (ROOT / "docs/method.md").read_text(encoding="utf-8")
    rows = {(row.get("method"), row["lr"]): row for row in read_record("bf16_norms.json")["rows"]}
    for method in ("normtune ln", "peft LN_TUNING"):
        row = rows[method, 1e-4]
        assert f"{row['moved']:,} of {row['values']:,}" in page


def test_the_page_of_other_tools_has_the_committed_figures_of_bf16() -> None:
    page = (ROOT / "docs/compared.md").read_text(encoding="utf-8")
    pairs: dict[tuple[str, str], list[str]] = {}
    for row in read_record("bf16_norms.json")["rows"]:
        stores = row.get("stores", "gain - 1" if row.get("method") == "gain - 1 in bf16" else "gain")
        cells = pairs.setdefault((row.get("method") or row["language_model"], f"{stores}, {row['dtype'][6:]}"), [])
        cells.append(f"{row['gains_moved']:,} of {row['gains']:,}")
    for (_, stores), cells in pairs.items():
        stores = stores.replace("float32", "fp32").replace("bfloat16", "bf16")
        assert f"| {stores} | {' | '.join(cells)} |" in page


@pytest.mark.parametrize("name", find_benchmarks())
def test_every_benchmark_starts(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_benchmark(name, ["--help"])
    assert "--out" in capsys.readouterr().out


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that imports a module of the benchmarks by its name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def slake(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Shapes with few image tokens, and the path of a folder in SLAKE's layout."""
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


def test_the_table_of_image_reliance_agrees_with_its_record(script: Any) -> None:
    reliance, rows = script("reliance"), read_record("reliance.json")["rows"]
    assert reliance.table(rows) == (BENCHMARKS / "reliance.md").read_text(encoding="utf-8")
    assert reliance.conclusion(rows) in (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for dataset in {row["dataset"] for row in rows}:
        assert tuple(row["recipe"] for row in rows if row["dataset"] == dataset) == reliance.RECIPES
    for row in rows:
        for control_result in row["reliance"].values():
            for metric in control_result["metrics"].values():
                drop = metric["real"]["value"] - metric["replaced"]["value"]
                assert metric["difference"]["value"] == pytest.approx(drop)
                assert metric["earned"]["value"] == pytest.approx(drop / metric["real"]["value"])


def test_the_conclusion_on_medpix_agrees_with_its_record(script: Any) -> None:
    medpix, rows = script("medpix"), read_record("medpix.json")["rows"]
    assert medpix.table(rows) == (BENCHMARKS / "medpix.md").read_text(encoding="utf-8")
    assert medpix.conclusion(rows) in (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("shape", ["llava", "miss"])
def test_answering_compares_every_answer_and_then_times_both(shape: str, slake: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = ["--shape", shape, "--data", "slake", "--root", str(slake), "--pairs", "12", "--batch", "6"]
    out = tmp_path / "record.json"
    record = benchmark_record("answering", [*options, "--tokens", "3", "--rounds", "2", "--out", str(out)])
    assert record["same_answers"] == record["questions"] == 12 and record["tokens"] == 3
    assert [row["beams"] for row in record["rows"]] == [1, 3]
    for row in record["rows"]:
        assert row["ratio"]["low"] <= row["ratio"]["median"] <= row["ratio"]["high"]
        assert len(row["rounds"]["normtune"]) == len(row["rounds"]["generate()"]) == 2
    assert out.with_suffix(".md").read_text(encoding="utf-8").count("\n") == 4


def test_choices_compares_every_likelihood_and_then_times_all_sides(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    options = ["--questions", "4", "--rounds", "2", "--pixels", "28", "--batch", "8", "--out", str(out)]
    record = benchmark_record("choices", options)
    assert [(row["set"], row["questions"]) for row in record["rows"]] == [("pmc-vqa", 4), ("rexvqa", 4)]
    assert all(len(row["rounds"][side]) == 2 for row in record["rows"] for side in ("normtune", "one by one"))
    assert out.with_suffix(".md").read_text(encoding="utf-8").count("\n") == 4


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_the_rows_of_a_made_file_are_measured_stage_by_stage(
    form: str, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = script("rows")
    monkeypatch.setattr(benchmark, "STEPS", 2)
    monkeypatch.setattr("normtune.data.datasets.large_table.LARGE_BYTES", 0)
    benchmark.make_files(tmp_path, 1000, [form])
    file = tmp_path / f"train.{form}"
    stages = [*benchmark.data_stages(file), *(benchmark.training_stages(file) if form == "parquet" else ())]
    assert [stage["stage"] for stage in stages][:3] == ["open", "preflight without decoding", "summary"]
    assert all(stage["seconds"] >= 0 and stage["processor_seconds"] >= 0 for stage in stages)
    of_data = [stage for stage in stages if not stage["stage"].startswith("training")]
    assert all(before["peak_mb"] <= after["peak_mb"] for before, after in pairwise(of_data))
    lines = benchmark.table([{"rows": 1000, "format": form, **stage} for stage in stages]).splitlines()
    assert len(lines) == 2 + len(stages) and "1,000 rows" in lines[0]


def test_answering_stops_where_the_two_sides_differ(script: Any) -> None:
    check_same_answers = script("answering").check_same_answers
    check_same_answers({"a": (1, 2), "b": (3, 4)}, {"a": (1, 2), "b": (3, 4)}, 2)
    with pytest.raises(SystemExit, match="1 of 2 answers differ"):
        check_same_answers({"a": (1, 2), "b": (3, 4)}, {"a": (1, 2), "b": (3, 5)}, 2)
    with pytest.raises(SystemExit):
        check_same_answers({"a": (1,)}, {"a": (1,)}, 2)


@pytest.mark.parametrize("shape", ["llava", "miss"])
def test_both_models_of_a_pair_have_the_same_weights(shape: str, slake: Path, script: Any) -> None:
    model_shape = script("shapes").SHAPES[shape]
    model_shape.learn_words(["which organ is shown? lung"])
    family, peer = model_shape.build_pair()
    models = (family.model, peer)
    ours, theirs = (sum(float(p.detach().double().sum()) for p in m.parameters()) for m in models)
    assert ours == approx(theirs, dtype=torch.float64, magnitude=abs(theirs)) and family.model is not peer


@pytest.mark.parametrize("shape", ["llava", "miss"])
def test_throughput_runs_all_methods_in_every_round(shape: str, slake: Path) -> None:
    options = ["--shape", shape, "--data", "slake", "--root", str(slake), "--pairs", "3", "--steps", "1"]
    record = benchmark_record("throughput", [*options, "--rounds", "1"])
    methods = [row["method"] for row in record["rows"]]
    assert methods[0] == "normtune ln" and "PEFT LoRA r8 all-linear" in methods and len(methods) == 8
    assert all(row["pairs_per_second"]["median"] > 0 for row in record["rows"])
    assert record["rows"][0]["faster"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert record["shape"]["name"] == shape and record["questions_per_image"] == 6


def test_conversations_are_trained_with_shared_history_and_as_separate_turns(slake: Path, script: Any) -> None:
    questions = [Example(str(i), ("a",), f"q{i}", f"a{i}", "open", "train") for i in range(5)]
    made = script("conversations").conversations(questions, 3)
    assert [[turn for turn, _ in example.history] for example in made] == [[], ["q0"], ["q0", "q1"], [], ["q3"]]
    options = ["--data", "slake", "--root", str(slake), "--pairs", "3", "--turns", "3", "--rounds", "1"]
    rows = benchmark_record("conversations", options)["rows"]
    assert [row["turns"] for row in rows] == [3, 3, 3]
    assert all(row["pairs_per_second"]["median"] > 0 for row in rows)


def test_the_operations_of_a_step_agree_with_the_formula(script: Any) -> None:
    vision = {"hidden_size": 2, "intermediate_size": 3, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {"hidden_size": 4, "intermediate_size": 5, "num_hidden_layers": 2, "num_attention_heads": 1}
    shape = script("shape_llava").LlavaShape(size=28, vision=vision, text=text)
    shape.learn_words(["lung"])
    words = shape.describe()["vocabulary"]
    tower = 4 * (4 * 2 * 2 + 2 * 2 * 3) * 5 + 14 * 2 * 5**2
    entry = 2 * 3 * 14**2 * 2 * 4 + 4 * (2 * 4 + 4 * 4) * 4
    language = 2 * (4 * (4 * 4 * 4 + 3 * 4 * 5) * 7 + 14 * 4 * 7**2)
    count_flops = script("scaling").count_flops
    one_row = count_flops(shape, [7], images=1, logits=3)
    assert one_row == tower + entry + language + 4 * 4 * words * 3
    assert count_flops(shape, [7] * 5, images=5, logits=15) == 5 * one_row


def test_the_statistics_are_checked_on_simulations_and_on_the_committed_runs(tmp_path: Path) -> None:
    out = tmp_path / "checks.json"
    options = ["--simulations", "4", "--images", "10", "--seeds", "3", "--out", str(out)]
    options += ["--confidence-images", "20", "--confidence-simulations", "2"]
    rows = benchmark_record("statistics_checks", options)["rows"]
    counts = Counter(row["experiment"] for row in rows)
    assert counts == {"coverage": 3, "recipes": 2, "splits": 4, "pairing": 1, "confidence": 3, "conformal": 2}
    committed = [row for row in read_record("statistics_checks.json")["rows"] if row["experiment"] == "splits"]
    assert [row for row in rows if row["experiment"] == "splits"] == committed, "seeded, from the committed runs"
    assert out.with_suffix(".md").read_text(encoding="utf-8").count("| ") > 10


def test_the_committed_checks_hold_what_the_statistics_promise() -> None:
    """Limits of the rates over 2,000 simulations, and of the coverage of confidence over 1,000."""
    rows = read_record("statistics_checks.json")["rows"]
    for row in rows:
        if row["experiment"] == "coverage":
            assert row["after_coverage"] >= 0.93 and row["after_empty"] == row["outside"] == 0
        elif row["experiment"] == "recipes":
            assert row["after_size"] <= 0.07 and row["tost_size"] <= 0.07
            assert row["seeds"] < 5 or row["after_power"] >= 0.8
        elif row["experiment"] == "splits":
            assert row["splits"] >= 30 and row["after_size"] <= 0.07 < row["before_size"]
        elif row["experiment"] == "confidence":
            assert min(row[f"{measure}_coverage"] for measure in ("ece", "overconfidence", "aurc")) >= 0.91
        elif row["experiment"] == "conformal":
            assert row["coverage"] >= row["level"] - 0.01


def test_the_runs_of_the_statistics_record_right_answers_and_no_text(slake: Path) -> None:
    options = ["--slake", str(slake), "--recipes", "ln", "--seeds", "2", "--pairs", "2", "--epochs", "1"]
    record = benchmark_record("statistics_runs", options)
    assert [row["seed"] for row in record["rows"]] == [0, 1] and record["questions"] == [1]
    assert all(row.keys() == {"recipe", "seed", "right"} for row in record["rows"])


def test_scaling_measures_both_at_every_point(script: Any, slake: Path, tmp_path: Path) -> None:
    scaling = script("scaling")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "FIXED_TOKENS", 9)
        patch.setattr(scaling, "FIXED_QUESTIONS", 3)
        out = tmp_path / "scaling.json"
        options = ["--questions", "1", "2", "--image-tokens", "4", "--rounds", "1", "--out", str(out)]
        patch.setattr("sys.argv", ["scaling", "--slake", str(slake), *options])
        scaling.main()
    record = json.loads(out.read_text(encoding="utf-8"))
    points = {(row["questions"], row["image_tokens"]) for row in record["rows"]}
    assert points == {(1, 9), (2, 9), (3, 4), (3, 9)} and len(record["rows"]) == 8
    separate_rows = [row for row in record["rows"] if row["method"] == scaling.SEPARATE and row["questions"] == 3]
    anchor = next(row for row in separate_rows if row["image_tokens"] == 9)
    assert anchor["predicted"] == pytest.approx(anchor["seconds"]["median"])
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_serving_compares_many_adapters_with_one_and_with_peft(slake: Path, tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    options = ["--shape", "llava", "--data", "slake", "--root", str(slake), "--pairs", "4", "--images", "2"]
    options += ["--rounds", "1", "--tokens", "3", "--registered", "6", "--out", str(out)]
    record = benchmark_record("serving", options)
    timed = [row for row in record["rows"] if "rounds" in row]
    assert len(timed) == 8 and all(row["requests_per_second"]["median"] > 0 for row in timed)
    many = next(row for row in timed if row["side"] == "normtune, an adapter each")
    assert many["of_one_adapter"]["median"] > 0 and many["normtune_is_faster"]["median"] == 1.0
    counts = {row["side"]: row["own_answers"] for row in record["rows"] if row["own_answers"]}
    assert counts["PEFT LoRA r8 q,v, adapter_names"]["same"] == 4
    assert counts["PEFT LN_TUNING, adapter_names"]["same"] < 4, "all rows get the norms of one adapter"
    registration = record["registered"]
    assert registration["adapters"] == registration["loaded"] == 6 and registration["first_answer_s"]["median"] > 0
    assert "6 adapters are registered" in out.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_under_twice_its_capacity_the_server_shuts_down_without_losing_requests(tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    options = ["--minutes", "0.02", "--capacity-seconds", "0.5", "--clients", "4", "--adapters", "2"]
    options += ["--images", "4", "--warm-seconds", "0.2", "--every", "0.5", "--out", str(out)]
    record = benchmark_record("load", options)
    assert (record["lost"], record["wrong"], record["exit_status"]) == (0, 0, 0)
    capacity, loaded, end = (row["outcomes"] for row in record["rows"])
    assert capacity["200"] > 0 and loaded["200"] > 0 and set(loaded) <= {"200", "429"}
    assert record["logged"]["200"] >= sum(row.get("200", 0) for row in (capacity, loaded, end))
    assert record["rows"][1]["latency_s"]["200"]["p50"] > 0 and record["memory"][-1]["bytes"] > 0
    assert "0 lost; exit status 0" in out.with_suffix(".md").read_text(encoding="utf-8")


def test_an_answer_in_the_servers_log_that_no_client_received_is_lost(script: Any) -> None:
    load = script("load")
    client_log = load.RequestLog(load.Counter({"200": 3, "429": 2, load.UNREAD: 4}))
    line = "2026-01-01 POST {} {} 0.010s -\n"
    server_log = line.format("/v1/chat/completions", 200) * 3 + line.format("-", 429) * 2
    assert load.compare_logs([client_log], server_log) == {"logged": {"200": 3, "429": 2}, "lost": 0}
    assert load.compare_logs([client_log], server_log + line.format("/v1/chat/completions", 503))["lost"] == 1
    cut_log = load.RequestLog(load.Counter({"200": 2, "429": 2, load.CUT: 1}))
    assert load.compare_logs([cut_log], server_log)["lost"] == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of opacus
def test_private_gradients_are_compared_with_those_of_opacus() -> None:
    pytest.importorskip("opacus", exc_type=ImportError)
    options = ["--images", "2", "--questions", "2", "--rounds", "1"]
    (row,) = benchmark_record("private", options)["rows"]  # it compares the gradients before it times them
    assert set(row["peak_bytes"]) == {"together", "one by one", "opacus", "not private"}
    assert row["times_opacus"]["opacus"]["median"] == 1.0


def test_the_audit_bounds_epsilon_from_below(script: Any) -> None:
    audit = script("private_audit")
    # all of 100 guesses right: Clopper and Pearson's bound is 0.05^(1/100)
    probability = 0.05**0.01
    expected = math.log(probability / (1 - probability))
    assert audit.epsilon_lower_bound(100, 100, 200, 0.0) == approx(expected, magnitude=expected)
    assert audit.epsilon_lower_bound(100, 100, 200, 1e-5) < expected
    assert audit.epsilon_lower_bound(52, 100, 200, 0.0) == 0.0 == audit.epsilon_lower_bound(100, 100, 200, 1e-3)
    # guesses of an ideal attack on a mechanism of epsilon 1 exceed the bound in about 5% of the cases
    rng = random.Random(0)
    share = math.e / (1 + math.e)
    above = [
        audit.epsilon_lower_bound(sum(rng.random() < share for _ in range(50)), 50, 100, 0.0) > 1 for _ in range(400)
    ]
    assert sum(above) / 400 < 0.05 + sampling_error(math.sqrt(0.05 * 0.95), 400)
    right, guesses = audit.count_correct([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], [True] * 4 + [False] * 4)
    assert (right, guesses) == (4, 4)
    dataset, canaries, included = audit.with_canaries(4, 10)
    assert len(canaries) == 10 and len(dataset.train) == 4 + sum(included)
    assert dataset.open_image("canary-0").size == (64, 64)
