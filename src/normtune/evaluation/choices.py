"""Results of questions with options: chance, rates of letters, position bias, and their form in result files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from normtune.data.examples import Example, option_index, option_letter
from normtune.data.records import ChoiceResult, Prediction
from normtune.metrics.choices import chosen_positions, rotated_options
from normtune.metrics.statistics.comparisons import holm_correction
from normtune.metrics.sum_metrics import cluster_rows, mean_metric, metric_intervals, paired_difference
from normtune.runtime.number_format import format_interval
from normtune.runtime.text_table import text_table


def choice_report(examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Describe how the options of questions were selected.

    Returns:
        A dict for JSON with these keys:

        - `rows`, `images`, and `options`: number of options -> rows.
        - `chance`: the accuracy of choosing at random. `constant_letter`: the letter that is right most often, and
          the accuracy of always choosing it.
        - `unparsed`: generated answers from which no option could be read; `options_cut`: options that are longer
          than the model reads. Both may be missing.
        - `scoring`: scoring -> `positions`, `spread`, and after rotations `rotated`. `positions` are letter -> `rows`
          (in which there is such an option), `right` (the share in which it is right), `selected` (the share in which
          it was selected), `difference` of the two with its interval, `p` and `p_holm`, and `accuracy` where it is
          right.
          `spread` is the highest minus the lowest of these accuracies. `rotated` has the accuracy over all rotations
          (`accuracy`), the share of questions that are right in every rotation (`all_right`), and for which every
          rotation chooses the same option (`same_option`).
    """
    by_id = {prediction.id: prediction for prediction in predictions}
    choices = [example for example in examples if example.options]
    letters = Counter(example.letter for example in choices)
    letter, rows = min(letters.items(), key=lambda item: (-item[1], item[0]))
    report: dict[str, Any] = {
        "rows": len(choices),
        "images": len({example.images for example in choices}),
        "options": {str(n): rows for n, rows in sorted(Counter(len(e.options) for e in choices).items())},
        "chance": sum(e.options.count(e.answer) / len(e.options) for e in choices) / len(choices),
        "constant_letter": {"letter": letter, "accuracy": rows / len(choices)},
    }
    results = {e.id: _result(e, by_id[e.id]) for e in choices}
    if generated := [result.selected["generated"][0] for result in results.values() if "generated" in result.selected]:
        report["unparsed"] = generated.count(None)
    if cut := sum(result.options_cut for result in results.values()):
        report["options_cut"] = cut
    cluster = cluster_rows(choices)
    scorings = dict.fromkeys(scoring for result in results.values() for scoring in result.selected)
    report["scoring"] = {
        scoring: _positions(choices, {id: result.selected[scoring] for id, result in results.items()}, cluster)
        for scoring in scorings
    }
    return report


def _result(example: Example, prediction: Prediction) -> ChoiceResult:
    """The result of a prediction; one that is only a text has selected that option."""
    if prediction.choice is not None:
        return prediction.choice
    text = prediction.text
    return ChoiceResult({"prediction": (example.options.index(text) if text in example.options else None,)})


def _positions(
    choices: Sequence[Example], selected: Mapping[str, Sequence[int | None]], cluster: Mapping[str, str]
) -> dict[str, Any]:
    """The rates and accuracies of each position, over all rotations; see `choice_report`."""
    rows: dict[tuple[str, int], tuple[set[int], int | None]] = {}  # (id, rotation) -> right positions, selected one
    counts = {example.id: len(example.options) for example in choices}
    for example in choices:
        for rotation, row in enumerate(chosen_positions(example, selected[example.id])):
            rows[example.id, rotation] = row
    names = {key: f"{key[0]}\0{key[1]}" for key in rows}
    clusters = {names[key]: cluster[key[0]] for key in rows}

    def interval(scores: Mapping[str, float]) -> dict[str, float]:
        return asdict(metric_intervals({"": mean_metric(scores)}, clusters)[""])

    positions: dict[str, Any] = {}
    for position in range(max(counts.values())):
        position_rows = {names[key]: row for key, row in rows.items() if position < counts[key[0]]}
        right = {name: (position in places) / len(places) for name, (places, _) in position_rows.items()}
        picked = {name: float(place == position) for name, (_, place) in position_rows.items()}
        pair = paired_difference(mean_metric(right), mean_metric(picked), clusters)
        where = {name: float(place in places) for name, (places, place) in position_rows.items() if position in places}
        positions[option_letter(position)] = {
            "rows": len(position_rows),
            "right": sum(right.values()) / len(right),
            "selected": sum(picked.values()) / len(picked),
            "difference": {"value": pair.difference, "low": pair.low, "high": pair.high, "p": pair.p},
            "accuracy": interval(where) if where else None,
        }
    corrected = holm_correction({name: row["difference"]["p"] for name, row in positions.items()})
    for name, row in positions.items():
        row["difference"]["p_holm"] = corrected[name]
    accuracies = [row["accuracy"]["value"] for row in positions.values() if row["accuracy"] is not None]
    result: dict[str, Any] = {"positions": positions, "spread": max(accuracies) - min(accuracies)}
    if all(len(places) == counts[id] for id, places in selected.items()):
        right_rows = {names[key]: float(place in places) for key, (places, place) in rows.items()}
        clusters |= {id: cluster[id] for id in counts}
        result["rotated"] = {
            "accuracy": interval(right_rows),
            "all_right": interval(
                {id: min(right_rows[names[id, rotation]] for rotation in range(count)) for id, count in counts.items()}
            ),
            "same_option": interval({example.id: _is_constant(example, selected[example.id]) for example in choices}),
        }
    return result


def _is_constant(example: Example, places: Sequence[int | None]) -> float:
    """1 if every rotation of a question selected an option, and always one with the same text; else 0."""
    texts = {
        None if place is None else rotated_options(example.options, rotation)[place]
        for rotation, place in enumerate(places)
    }
    return float(len(texts) == 1 and None not in texts)


def choice_text(report: Mapping[str, Any]) -> str:
    """Format the result of `choice_report`, in %."""
    constant = report["constant_letter"]
    options = ", ".join(f"{rows} of {count} options" for count, rows in report["options"].items())
    lines = [
        f"choices: {options}; chance {100 * report['chance']:.1f}, always {constant['letter']} "
        f"{100 * constant['accuracy']:.1f}"
    ]
    if report.get("unparsed"):
        lines.append(f"{report['unparsed']} generated answers name no option, and count as wrong")
    if report.get("options_cut"):
        lines.append(f"{report['options_cut']} options are longer than the model reads; their likelihood is cut")
    table = [["position of options", "right there", "selected", "selected - right", "p (Holm)", "accuracy where right"]]
    for scoring, result in report["scoring"].items():
        for letter, row in result["positions"].items():
            difference = row["difference"]
            table.append(
                [
                    f"{scoring} {letter}",
                    f"{100 * row['right']:.1f}",
                    f"{100 * row['selected']:.1f}",
                    format_interval(difference, sign="+"),
                    f"{difference['p_holm']:.4f}",
                    "–" if row["accuracy"] is None else format_interval(row["accuracy"]),
                ]
            )
    lines += text_table(table, "l")
    for scoring, result in report["scoring"].items():
        line = f"{scoring}: accuracy differs by up to {100 * result['spread']:.1f} points between positions"
        if rotated := result.get("rotated"):
            line += (
                f"; over all rotations {format_interval(rotated['accuracy'])}, right in every rotation "
                f"{format_interval(rotated['all_right'])}, same option in every rotation "
                f"{format_interval(rotated['same_option'])}"
            )
        lines.append(line)
    return "\n".join(lines)


def choice_to_json(result: ChoiceResult) -> dict[str, Any]:
    """The form in `predictions.jsonl`: letters in place of positions."""
    selected = {
        scoring: [None if p is None else option_letter(p) for p in places]
        for scoring, places in result.selected.items()
    }
    values: dict[str, Any] = {
        "selected": selected,
        "scores": {scoring: list(row) for scoring, row in result.scores.items()},
    }
    values |= {} if result.generated is None else {"generated": result.generated}
    return values | ({"options_cut": result.options_cut} if result.options_cut else {})


def choice_from_json(values: Mapping[str, Any]) -> ChoiceResult:
    """Read what `choice_to_json` wrote.

    Raises:
        KeyError, TypeError, AttributeError: it was changed.
    """
    selected = {
        scoring: tuple(None if letter is None else option_index(letter) for letter in letters)
        for scoring, letters in values["selected"].items()
    }
    scores = {scoring: tuple(row) for scoring, row in values["scores"].items()}
    return ChoiceResult(selected, scores, values.get("generated"), values.get("options_cut", 0))
