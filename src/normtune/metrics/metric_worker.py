"""Scores pairs of reports with the package RadEval, in any Python that has it; Normtune need not be installed there.

`normtune.metrics.metric_models` runs this file as `PYTHON -c SOURCE METRIC`. It loads the models of the metric, then
reads JSON lines from standard input, {"reference": ..., "prediction": ...}, and writes one JSON object to standard
output: {"scores": {NAME: [one number per pair, or null]}}. Without METRIC, it writes {"version": ...}.

Packages print the texts that they score. The output of the package is therefore discarded, its standard error too as
soon as texts are read. An error of that time is reported by its kind and place only.
"""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from importlib import metadata
from importlib.util import find_spec
from typing import Any

PACKAGE = "radeval"


def load(metric: str) -> Any:
    """Load the models of a metric: a function (refs, hyps) -> name -> one score per pair."""
    import radeval  # type: ignore[import-not-found, unused-ignore]  # in the environment of the metric

    if find_spec("RadEval") is None:
        # RadEval 2.2.1 imports itself as RadEval, which fails where file names are case-sensitive (its issue 27).
        sys.modules["RadEval"] = radeval
    return radeval.RadEval(metrics=[metric], per_sample=True, show_progress=False)


def _number(score: Any) -> float | None:
    """Convert a score to what JSON has: no numpy number, and null for NaN."""
    return float(score) if score is not None and math.isfinite(score) else None


def score_pairs(metric: str, score: Any, pairs: list[dict[str, str]]) -> dict[str, list[float | None]]:
    """Score the pairs: name -> one score per pair, None where the metric has none."""
    # RaTEScore drops texts of less than three characters, and then scores the next text in their place. Such a pair
    # gets what the metric gives to a text without entities.
    scored = [metric != "ratescore" or all(len(text.strip()) >= 3 for text in pair.values()) for pair in pairs]
    texts = [pair for pair, is_scored in zip(pairs, scored, strict=True) if is_scored]
    refs, hyps = ([pair[side] for pair in texts] for side in ("reference", "prediction"))
    answer = {}
    for name, rows in (score(refs=refs, hyps=hyps) if refs else {metric: []}).items():
        numbers = [_number(row) for row in rows]
        if len(numbers) == len(refs):  # otherwise the caller reports the count
            values = iter(numbers)
            numbers = [next(values) if is_scored else 0.5 for is_scored in scored]
        answer[name] = numbers
    return answer


def main(arguments: list[str]) -> None:
    """Run as the top of this module describes. Exits with status 1 after one line on standard error."""
    output, errors = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(2), "w")
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    pairs = None
    try:
        if not arguments:
            answer: dict[str, Any] = {"version": metadata.version(PACKAGE)}
        else:
            score = load(arguments[0])
            pairs = [json.loads(line) for line in sys.stdin]
            os.dup2(devnull, 2)
            answer = {"scores": score_pairs(arguments[0], score, pairs)}
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f" in {os.path.basename(place.filename)}, line {place.lineno}"
        line = f"{type(error).__name__}{f': {error}' if pairs is None else where}"
        errors.write("\n" + " ".join(line.split()))
        errors.flush()
        sys.exit(1)
    output.write(json.dumps(answer, allow_nan=False))
    output.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
