"""Questions answered per second: Normtune, grouped by image, compared with transformers' `generate()`.

    python benchmarks/answering.py --shape llava --data slake --root DIR --out FILE.json

Both sides have the same random weights, with a bias that prevents early end tokens, so that both generate the
same number of tokens. Before anything is timed, all answers of the two sides are compared token by token. For
this comparison, transformers answers in batches of questions of one length, because the decoder of its BLIP
also attends to padding. For the timing it answers in padded batches, in which each question has its own copy
of its image. The runs of both sides are interleaved; pixels and tokens are read from memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from record import record
from shape import AnswerTokens, Shape
from torch import nn
from workload import build_parser, format_range, load_workload, median_and_range, ratio

from normtune.data.batches import batches_of_pairs
from normtune.data.groups import Group, group_by_image
from normtune.data.records import Dataset, Example
from normtune.models.family import Family
from normtune.runtime.text_table import markdown_table

OURS, THEIRS = "normtune", "generate()"
Answers = dict[str, AnswerTokens]  # by the id of the question


def main() -> None:
    parser = build_parser(__doc__.splitlines()[0], pairs=64, rounds=5)
    parser.add_argument("--batch", type=int, default=32, help="questions per batch (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=8, help="tokens of each answer (default %(default)s)")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 3])
    options = parser.parse_args()
    workload = load_workload(options, options.pairs)
    torch.manual_seed(0)
    family, peer = workload.shape.build_pair()
    dataset = workload.cache_images(family)
    batches = group_batches(family, dataset, workload.examples, options.batch)
    sides: dict[str, Callable[[int], Answers]] = {
        OURS: lambda beams: run_normtune(workload.shape, family, batches, beams, options.tokens),
        THEIRS: lambda beams: run_peer(workload.shape, peer, padded_batches, beams, options.tokens),
    }
    rows = workload.shape.build_rows(family, dataset, workload.examples)
    ids = [example.id for example in workload.examples]
    padded_batches = row_batches(workload.shape, ids, rows, options.batch)
    unpadded_batches = equal_length_batches(workload.shape, ids, rows, options.batch)
    for beams in options.beams:
        answers = sides[OURS](beams)
        reference = run_peer(workload.shape, peer, unpadded_batches, beams, options.tokens)
        check_same_answers(answers, reference, options.tokens)
        print(
            f"{beams} beams: all {len(ids)} answers are the same, token for token "
            f"({len(set(answers.values()))} distinct answers)",
            flush=True,
        )
    speeds: dict[tuple[str, int], list[float]] = {}
    for round_ in range(options.rounds):
        for beams in options.beams:
            for name, run in sides.items():
                start = time.perf_counter()
                answers = run(beams)
                speed = len(answers) / (time.perf_counter() - start)
                assert all(len(answer) == options.tokens for answer in answers.values()), "as many tokens"
                speeds.setdefault((name, beams), []).append(speed)
                print(f"round {round_ + 1}  {name:<10} {beams} beams {speed:8.2f} questions/s", flush=True)
    results = [
        {
            "beams": beams,
            "normtune": median_and_range(speeds[OURS, beams]),
            "generate": median_and_range(speeds[THEIRS, beams]),
            "ratio": ratio(speeds[OURS, beams], speeds[THEIRS, beams]),
            "rounds": {name: speeds[name, beams] for name in sides},
        }
        for beams in options.beams
    ]
    print("\n" + table(results))
    if options.out:
        record(
            options.out,
            "answering",
            results,
            **workload.describe(),
            batch=options.batch,
            tokens=options.tokens,
            same_answers=len(ids),
        )
        options.out.with_suffix(".md").write_text(table(results), encoding="utf-8")


GroupBatch = tuple[list[Group], list[list[Any]]]  # groups, and the pixels of each group's images
RowBatch = tuple[list[str], dict[str, Any]]  # ids of the questions, and the arguments of `generate`


def group_batches(family: Family, dataset: Dataset, examples: Sequence[Example], batch: int) -> list[GroupBatch]:
    """Batches of whole groups with about `batch` questions each, as `evaluate` makes them."""
    members = group_by_image(examples)
    batches = []
    for indices in batches_of_pairs([len(group) for group in members], batch):
        groups = [
            Group(m[0].images, tuple(family.tokenize(e.id, e.question, None) for e in m))
            for m in (members[i] for i in indices)
        ]
        batches.append(
            (groups, [[family.preprocess_image(dataset.open_image(key)) for key in g.images] for g in groups])
        )
    return batches


@torch.inference_mode()
def run_normtune(shape: Shape, family: Family, batches: list[GroupBatch], beams: int, tokens: int) -> Answers:
    answers: Answers = {}
    for groups, pixels in batches:
        ids = [segment.id for group in groups for segment in group.segments]
        answers |= zip(ids, shape.answer_with_normtune(family, groups, pixels, beams, tokens), strict=True)
    return answers


@torch.inference_mode()
def run_peer(shape: Shape, peer: nn.Module, batches: list[RowBatch], beams: int, tokens: int) -> Answers:
    answers: Answers = {}
    for ids, inputs in batches:
        answers |= zip(ids, shape.answer_with_transformers(peer, inputs, beams, tokens), strict=True)
    return answers


def row_batches(shape: Shape, ids: Sequence[str], rows: Sequence[Any], batch: int) -> list[RowBatch]:
    """Batches of `batch` questions in the given order, padded to one length."""
    starts = range(0, len(ids), batch)
    return [(list(ids[i : i + batch]), shape.question_batch(rows[i : i + batch])) for i in starts]


def equal_length_batches(shape: Shape, ids: Sequence[str], rows: Sequence[Any], batch: int) -> list[RowBatch]:
    """Batches of questions of the same length in tokens, which need no padding."""
    by_length: dict[int, list[tuple[str, Any]]] = {}
    for id, row in zip(ids, rows, strict=True):
        by_length.setdefault(shape.question_length(row), []).append((id, row))
    batches = []
    for same_length in by_length.values():
        batches += row_batches(shape, *zip(*same_length, strict=True), batch)
    return batches


def check_same_answers(ours: Answers, theirs: Answers, tokens: int) -> None:
    """Check that both sides generated the same answers, of `tokens` tokens each.

    Raises:
        SystemExit: an answer differs or has another length.
    """
    different = [id for id in theirs if ours[id] != theirs[id]]
    if different or any(len(answer) != tokens for answer in ours.values()):
        raise SystemExit(f"{len(different)} of {len(theirs)} answers differ: the two sides do not compute the same.")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table of medians with the lowest and highest round."""
    lines = []
    for row in rows:
        cells = [format_range(row["normtune"], 1), format_range(row["generate"], 1), format_range(row["ratio"], 1, "x")]
        lines.append([str(row["beams"]), *cells])
    header = ["beams", "normtune, questions/s", "generate()", "faster"]
    return "\n".join(markdown_table(header, lines, "r")) + "\n"


if __name__ == "__main__":
    main()
