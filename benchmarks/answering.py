"""Evaluation throughput on real questions: Normtune beside transformers' `generate()` for each question.

    python benchmarks/answering.py --shape llava --data slake --root DIR --out FILE.json

Both sides hold the same random weights, with a bias that keeps answers from ending, so that both write as
many tokens. Before anything is timed, every answer of the one is compared with the other's, token for token;
there the peer is asked in batches of one question length, as transformers' BLIP lets padding reach its
decoder. The peer answers in batches, each question with its own copy of its image. All runs are interleaved;
pixels and tokens come from memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from record import record
from shape import Shape, Written
from torch import nn
from workload import parser, ratio, shown, spread, workload

from normtune.data.batches import batches_of_pairs
from normtune.data.groups import Group, group_by_image
from normtune.data.records import Dataset, Example
from normtune.models.family import Family

OURS, THEIRS = "normtune", "generate()"
Answers = dict[str, Written]  # by question


def main() -> None:
    options = parser(__doc__.splitlines()[0], pairs=64, rounds=5)
    options.add_argument("--batch", type=int, default=32, help="questions at once (default %(default)s)")
    options.add_argument("--tokens", type=int, default=8, help="tokens of each answer (default %(default)s)")
    options.add_argument("--beams", type=int, nargs="+", default=[1, 3])
    chosen = options.parse_args()
    work = workload(chosen, chosen.pairs)
    torch.manual_seed(0)
    family, peer = work.shape.twins()
    dataset = work.held(family)
    batches = grouped(family, dataset, work.examples, chosen.batch)
    sides: dict[str, Callable[[int], Answers]] = {
        OURS: lambda beams: ours(work.shape, family, batches, beams, chosen.tokens),
        THEIRS: lambda beams: theirs(work.shape, peer, padded, beams, chosen.tokens),
    }
    rows = work.shape.rows(family, dataset, work.examples)
    ids = [example.id for example in work.examples]
    padded = asked(work.shape, ids, rows, chosen.batch)
    alike = of_one_length(work.shape, ids, rows, chosen.batch)
    for beams in chosen.beams:
        found = sides[OURS](beams)
        check(found, theirs(work.shape, peer, alike, beams, chosen.tokens), chosen.tokens)
        print(
            f"{beams} beams: all {len(ids)} answers are the same, token for token "
            f"({len(set(found.values()))} different ones)",
            flush=True,
        )
    speeds: dict[tuple[str, int], list[float]] = {}
    for round_ in range(chosen.rounds):
        for beams in chosen.beams:
            for name, run in sides.items():
                began = time.perf_counter()
                found = run(beams)
                speed = len(found) / (time.perf_counter() - began)
                assert all(len(answer) == chosen.tokens for answer in found.values()), "as many tokens"
                speeds.setdefault((name, beams), []).append(speed)
                print(f"round {round_ + 1}  {name:<10} {beams} beams {speed:8.2f} questions/s", flush=True)
    made = [
        {
            "beams": beams,
            "normtune": spread(speeds[OURS, beams]),
            "generate": spread(speeds[THEIRS, beams]),
            "ratio": ratio(speeds[OURS, beams], speeds[THEIRS, beams]),
            "rounds": {name: speeds[name, beams] for name in sides},
        }
        for beams in chosen.beams
    ]
    print("\n" + table(made))
    if chosen.out:
        record(
            chosen.out,
            "answering",
            made,
            **work.about(),
            batch=chosen.batch,
            tokens=chosen.tokens,
            same_answers=len(ids),
        )
        chosen.out.with_suffix(".md").write_text(table(made), encoding="utf-8")


Grouped = tuple[list[Group], list[list[Any]]]  # groups, and the pixels of each
Asked = tuple[list[str], dict[str, Any]]  # ids, and the arguments of `generate`


def grouped(family: Family, dataset: Dataset, examples: Sequence[Example], batch: int) -> list[Grouped]:
    """Batches of about so many questions, as `evaluate` cuts them; images of one key are processed once."""
    members = group_by_image(examples)
    made = []
    for chosen in batches_of_pairs([len(group) for group in members], batch):
        groups = [
            Group(m[0].images, tuple(family.tokenize(e.id, e.question, None) for e in m))
            for m in (members[i] for i in chosen)
        ]
        made.append(
            (groups, [[family.preprocess_image(dataset.open_image(key)) for key in g.images] for g in groups])
        )
    return made


@torch.inference_mode()
def ours(shape: Shape, family: Family, batches: list[Grouped], beams: int, tokens: int) -> Answers:
    found: Answers = {}
    for groups, pixels in batches:
        ids = [segment.id for group in groups for segment in group.segments]
        found |= zip(ids, shape.written(family, groups, pixels, beams, tokens), strict=True)
    return found


@torch.inference_mode()
def theirs(shape: Shape, peer: nn.Module, batches: list[Asked], beams: int, tokens: int) -> Answers:
    found: Answers = {}
    for ids, inputs in batches:
        found |= zip(ids, shape.generated(peer, inputs, beams, tokens), strict=True)
    return found


def asked(shape: Shape, ids: Sequence[str], rows: Sequence[Any], batch: int) -> list[Asked]:
    """Batches of so many questions."""
    starts = range(0, len(ids), batch)
    return [(list(ids[i : i + batch]), shape.asked(rows[i : i + batch])) for i in starts]


def of_one_length(shape: Shape, ids: Sequence[str], rows: Sequence[Any], batch: int) -> list[Asked]:
    """Batches without padding."""
    by_length: dict[int, list[tuple[str, Any]]] = {}
    for id, row in zip(ids, rows, strict=True):
        by_length.setdefault(shape.question_tokens(row), []).append((id, row))
    made = []
    for same in by_length.values():
        made += asked(shape, *zip(*same, strict=True), batch)
    return made


def check(one: Answers, other: Answers, tokens: int) -> None:
    """Both wrote the same, and as much as was asked for."""
    differ = [id for id in other if one[id] != other[id]]
    if differ or any(len(answer) != tokens for answer in one.values()):
        raise SystemExit(
            f"{len(differ)} of {len(other)} answers differ: the two sides do not compute the same."
        )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Medians with the lowest and highest round."""
    lines = ["| beams | normtune, questions/s | generate() | faster |", "|--:|--:|--:|--:|"]
    for row in rows:
        cells = [shown(row["normtune"], 1), shown(row["generate"], 1), shown(row["ratio"], 1, "x")]
        lines.append("| " + " | ".join((str(row["beams"]), *cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
