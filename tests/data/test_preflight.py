from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from normtune.data.preflight import check, preflight
from normtune.data.records import Dataset, Example, Kind
from normtune.data.token_limits import TextLimits
from normtune.errors import InputError
from normtune.metrics.answers import is_exact, score_vqa


def row(
    id: str, image: str, answer: str, question: str = "What?", kind: Kind = "open", split: str = "train"
) -> Example:
    return Example(id, (image,), question, answer, kind, split)


def made(*examples: Example, **fields: object) -> Dataset:
    def open_image(key: str) -> Image.Image:
        if key.startswith("bad"):
            raise InputError(f"{key}: the image is damaged.")
        return Image.new("RGB", (4, 4), (len(key), 0, 0))

    return Dataset("made", list(examples), open_image, **fields)  # type: ignore[arg-type]


def words(**limits: int | None) -> TextLimits:
    """Limits of a model with one token per word, which cannot tokenise texts with "<image>"."""

    def tokenize(example: Example) -> tuple[list[str], list[str]]:
        if "<image>" in example.question:
            raise InputError(f"example {example.id}: its text contains '<image>'.")
        return example.question.split(), [*example.answer.split(), "</s>"]

    return TextLimits("words", tokenize, " ".join, is_exact, **limits)  # type: ignore[arg-type]


def test_rows_pictures_and_texts_are_counted() -> None:
    data = made(
        row("1", "a", "yes", kind="closed"),
        row("2", "b", "no", kind="closed"),  # the picture of a under another name, with another answer
        row("3", "ccc", "lung <|im_end|> x"),
        row("4", "ccc", "Lung <|im_end|> x."),  # repeats row 3
        row("5", "bad", "nan"),
        row("6", "dddd", "maybe", kind="closed", split="test"),
        row("7", "eeeee", "maybe", kind="closed", split="test"),
        dropped={"answer is empty": 2, "language fr": 3},
    )
    counts = preflight(data)
    assert counts.rows == {"read": 12, "used": 7, "dropped": {"answer is empty": 2, "language fr": 3}}
    assert (counts.pictures["opened"], counts.pictures["unreadable"], counts.pictures["equal"]) == (6, 1, 1)
    assert counts.texts == {
        "languages": {},
        "control_tokens": {"<|im_end|>": 2},
        "not_a_number": 1,
        "constant": ["test"],
        "repeated": 1,
        "contradictions": 2,
        "unseen": {"test": 2},
    }
    assert counts.losses == {"answer is empty": 2, "picture cannot be decoded": 1}
    assert counts.bad_rows == {"5": "bad: the image is damaged."}
    assert "12 read, 7 used, 5 not used" in counts.text()


def test_of_very_many_texts_a_sample_is_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normtune.data.token_limits._MAX_TEXTS", 40)
    texts = ["x " * (i % 7 + 1) + str(i) for i in range(200)]
    texts[5], texts[150] = "a <b> c", "long " * 90
    data = made(*(row(str(i), "a", text) for i, text in enumerate(texts)), *(row("r", "a", texts[1]) for _ in range(3)))
    tokenized: list[str] = []

    def limits(**fields: int) -> TextLimits:
        plain = words(**fields)
        return replace(plain, tokenize=lambda example: (tokenized.append(example.answer), plain.tokenize(example))[1])

    estimated = preflight(data, limits=limits(max_answer=50, max_prompt=9))
    assert len(tokenized) <= 21 and texts[5] in tokenized and texts[150] in tokenized
    assert estimated.limits["texts"] == 200 and estimated.limits["texts_tried"] == len(tokenized)
    assert estimated.limits["answers"]["cut"] == 1 and estimated.losses == {"answer is cut": 1}
    assert estimated.limits["prompts"]["rows"] == estimated.limits["answers"]["rows"] == 203
    assert "estimated from 21 of 200 different texts (--strict: from all)" in estimated.text()
    tokenized.clear()
    exact = preflight(data, limits=limits(max_answer=50), exact=True)
    assert len(tokenized) == 200 and "texts" not in exact.limits
    assert exact.limits["answers"]["longest"] == estimated.limits["answers"]["longest"] == 90


def test_a_text_of_the_sample_that_fails_is_counted_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("normtune.data.token_limits._MAX_TEXTS", 40)

    def tokenize(example: Example) -> tuple[list[str], list[str]]:
        if int(example.answer) % 5 == 0:
            raise InputError("no")
        return ["a"], ["b", "</s>"]

    data = made(*(row(str(i), "a", str(1000 + i)) for i in range(200)))
    counts = preflight(data, limits=replace(words(), tokenize=tokenize))
    assert len(counts.bad_rows) == 40 and counts.losses == {"text cannot be tokenised": 40}


def test_tokens_of_images_are_counted_by_their_sizes() -> None:
    tried: list[tuple[int, int]] = []

    def image_tokens(size: tuple[int, int]) -> int:
        tried.append(size)
        return size[0] * size[1]

    def open_image(key: str) -> Image.Image:
        if key == "bad":
            raise InputError("bad: damaged")
        return Image.new("RGB", (int(key), 2))

    examples = [row(str(i), key, "yes") for i, key in enumerate(["3", "3", "5", "9", "bad"])]
    data = Dataset("made", examples, open_image)  # type: ignore[arg-type]
    counts = preflight(data, limits=replace(words(), image_tokens=image_tokens, max_pixels=90))
    assert sorted(tried) == [(3, 2), (5, 2), (9, 2)]  # each size once
    # of the pictures: three of them, with 6, 10 and 18 tokens
    assert counts.limits["images"] | {"p95": 0, "p99": 0} == {
        "sizes": 3, "sizes_tried": 3, "median": 10, "p95": 0, "p99": 0, "longest": 18
    }  # fmt: skip
    assert "images          median 10, 95% 17.2, longest 18 tokens; --max-pixels 90" in counts.text()
    assert counts.adapter_figures()["limits"]["max_pixels"] == 90
    tried.clear()
    many = Dataset("made", [row(str(i), str(i), "yes") for i in range(1, 202)], open_image)  # type: ignore[arg-type]
    counts = preflight(many, limits=replace(words(), image_tokens=image_tokens))
    assert len(tried) == 50 and counts.limits["images"]["longest"] == 402 and "(50 sizes tried)" in counts.text()


def test_what_limits_cut_is_counted_with_the_score_ceiling(tmp_path: Path) -> None:
    data = made(row("1", "a", "one two three four"), row("2", "b", "yes", question="a b c d", kind="closed"))
    counts = preflight(data, limits=words(max_prompt=3, max_reference=3, max_answer=2))
    cut = {name: (counts.limits[name]["cut"], counts.limits[name]["longest"]) for name in ("prompts", "references")}
    assert cut == {"prompts": (1, 4), "references": (1, 5)}
    assert counts.limits["answers"]["cut"] == 1
    assert counts.limits["score_ceiling"] == {"all": 0.5, "open": 0.0, "closed": 1.0}
    assert counts.losses == {"question is cut": 1, "reference is cut in training": 1, "answer is cut": 1}
    figures = counts.adapter_figures()
    assert figures["limits"] == {"prompt": 3, "reference": 3, "answer": 2}
    assert figures["score_ceiling"] == {"all": 0.5, "open": 0.0, "closed": 1.0} and figures["rows"] == counts.rows
    counts.save(tmp_path)
    assert json.loads((tmp_path / "preflight.json").read_text()) == counts.to_dict()


def test_bad_rows_are_refused_or_left_out_with_their_reasons() -> None:
    data = made(row("1", "a", "x"), row("2", "bad", "x"), row("3", "b", "x", question="<image>?"))
    with pytest.raises(
        InputError, match=r"2 of 3 rows cannot be used\. 2: bad: the image is damaged\. 3: .*--skip-bad"
    ):
        check(data, data.examples, words())
    usable, counts = check(data, data.examples, words(), skip_bad=True)
    assert [example.id for example in usable] == ["1"]
    assert counts.losses == {"picture cannot be decoded": 1, "text cannot be tokenised": 1}
    assert counts.rows == {"read": 3, "used": 1, "dropped": {"bad row (--skip-bad)": 2}}
    with pytest.raises(InputError, match=r"--strict: picture cannot be decoded 1, text cannot be tokenised 1\."):
        check(data, data.examples, words(), strict=True, skip_bad=True)
    with pytest.raises(InputError, match="none of the 1 rows can be used"):
        check(data, data.examples[1:2], skip_bad=True)


answers = st.lists(st.sampled_from(["left", "lung", "a", "yes", "no", "2", "."]), min_size=1, max_size=8).map(" ".join)
kinds: st.SearchStrategy[Kind] = st.sampled_from(["open", "closed"])


@settings(max_examples=60)
@given(st.lists(st.tuples(answers, kinds), min_size=1, max_size=12), st.integers(1, 9))
def test_the_ceiling_is_the_score_of_an_oracle_that_answers_with_the_cut_reference(
    rows: list[tuple[str, Kind]], limit: int
) -> None:
    examples = [row(str(number), "a", answer, kind=kind) for number, (answer, kind) in enumerate(rows)]
    ceiling = preflight(made(*examples), limits=words(max_answer=limit)).limits["score_ceiling"]
    oracle = {example.id: " ".join(example.answer.split()[:limit]) for example in examples}
    scores = score_vqa(examples, oracle)
    names = {"all": "global_exact", "open": "open_exact", "closed": "closed_label"}
    assert ceiling == {name: scores[metric].value for name, metric in names.items() if metric in scores}


def test_progress_is_reported_for_every_picture() -> None:
    ticks: list[tuple[int, int]] = []
    report: Callable[[int, int], None] = lambda done, total: ticks.append((done, total))  # noqa: E731
    preflight(made(row("1", "a", "x"), row("2", "a", "x"), row("3", "bb", "x")), progress=report)
    assert ticks == [(1, 2), (2, 2)]


def test_planned_memory_is_printed_and_recorded() -> None:
    counts = preflight(made(row("1", "a", "x")))
    assert "memory" not in counts.text() and "memory" not in counts.adapter_figures()
    parts = {"weights": 2**30, "optimiser": 2**28, "cached": 0, "step": 2**29, "program": 2**28}
    counts.memory = {"recipe": "ln", "device": "cpu", "batch": 24, "peak": 2**31, "free": 2**32, "fits": True, **parts}
    assert "memory          about 2.00 GiB to train ln with --batch 24; 4.00 GiB are free" in counts.text()
    recorded = counts.adapter_figures()["memory"]
    assert recorded == {"batch": 24, "weights": 2**30, "optimiser": 2**28, "cached": 0, "step": 2**29}
    counts.memory = {"not_planned": "FSDP divides the model among devices"}
    assert "memory          not planned: FSDP divides" in counts.text() and "memory" not in counts.adapter_figures()
