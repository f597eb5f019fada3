"""METEOR 1.5 (Denkowski and Lavie 2014), the METEOR of papers, by its Java program `meteor-1.5.jar`.

The program aligns each pair of texts by exact words, stems, synonyms and paraphrases, and returns 23 counts. The score
is computed from the sums of these counts, here as in the program, so that it has an interval and can be compared. Its
parameters are those for English: alpha 0.85, beta 0.2, gamma 0.6, delta 0.75.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from normtune.errors import InputError
from normtune.metrics.statistics.intervals import Floats
from normtune.metrics.sum_metrics import SumMetric

ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
STAGES = (1.0, 0.6, 0.8, 0.6)  # weights of matches: exact, stem, synonym, paraphrase
COUNTS = 23  # numbers that the program returns for a pair


def meteor15(words: Mapping[str, tuple[Sequence[str], Sequence[str]]], jar: Path) -> SumMetric:
    """Build METEOR 1.5 of rows: row id -> (words of the prediction, words of the reference).

    Args:
        words: the words of each pair, as for the other metrics.
        jar: the path of `meteor-1.5.jar`; its folder must have `data/paraphrase-en.gz`.

    Raises:
        InputError: if the program or Java is missing, or the program fails.
    """
    if not jar.is_file():
        raise InputError(f"--meteor15 {jar}: no such file. Download METEOR 1.5 and give the path of meteor-1.5.jar.")
    lines = [
        " ||| ".join(("SCORE", _one_line(reference), _one_line(prediction))) for prediction, reference in words.values()
    ]
    command = ["java", "-Xmx2G", "-jar", str(jar.resolve()), "-", "-", "-stdio", "-l", "en", "-norm"]
    try:
        done = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--meteor15: cannot start java ({error.strerror}). Install Java, or omit it.") from error
    output = [line.split() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or len(output) != len(lines) or any(len(counts) != COUNTS for counts in output):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(f"--meteor15: METEOR failed (exit status {done.returncode}): {last}. Check the installation.")
    return SumMetric({id: _row(counts) for id, counts in zip(words, output, strict=True)}, score)


def _one_line(words: Sequence[str]) -> str:
    return " ".join(words).replace("|||", "").replace("\n", " ")


def _row(counts: Sequence[str]) -> Floats:
    """Parse the counts of one pair. A pair of equal texts has no chunks: it is not fragmented."""
    row = np.array(counts, dtype=np.float64)
    if row[20] == 1 and row[0] == row[21] and row[1] == row[22]:
        row[20] = 0
    return row


def score(sums: Floats) -> Floats:
    """Compute METEOR 1.5 from summed counts, [n, 23] -> [n].

    The counts are: words and function words of both texts (prediction, reference, prediction's function words,
    reference's function words); for each of four stages the matched content words of both, then the matched
    function words of both; chunks; matched words of both.
    """
    lengths, matches = sums[:, :2], np.moveaxis(sums[:, 4:20].reshape(-1, 4, 2, 2), 1, -1)  # [n, kind, side, stage]
    function_words = sums[:, 2:4]
    weighted = (DELTA * matches[:, 0] + (1 - DELTA) * matches[:, 1]) @ np.array(STAGES)  # [n, side]
    with np.errstate(invalid="ignore", divide="ignore"):
        shares = weighted / (DELTA * (lengths - function_words) + (1 - DELTA) * function_words)
        precision, recall = np.nan_to_num(shares).T
        mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
        fragmentation = sums[:, 20] / (sums[:, 21:23].sum(axis=1) / 2)
    scores: Floats = np.nan_to_num(mean) * (1 - GAMMA * np.nan_to_num(fragmentation) ** BETA)
    return scores
