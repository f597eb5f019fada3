"""Decoder-only families: questions that share an image give what transformers gives for each of them alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from normtune.models import load
from normtune.models.causal import CausalFamily
from normtune.models.family import Pixels
from normtune.packing import Group, Segment
from tests.models.tiny import TINY, make_tiny

FAMILIES = tuple(TINY)
TOLERANCE = 1e-5
PAIRS = [
    ("a", "What is the modality of this image?", "MRI"),
    ("a", "Is there a fracture of the left rib?", "no"),
    ("a", "Which organ is abnormal in this image?", "lung, liver and heart"),
    ("b", "Is the heart normal in size?", "Yes."),
    ("b", "Which organ is abnormal?", "brain"),
    ("c", "X?", "kidney or the left lung"),
]
GROUPINGS = {
    "by image": [[0, 1, 2], [3, 4], [5]],
    "cap of two": [[0, 1], [2], [3, 4], [5]],  # image a stands in two groups
    "mixed order": [[5], [4, 3], [1, 2, 0]],
}


def image(name: str) -> Image.Image:
    seed = ord(name)
    size = {"a": (40, 40), "b": (56, 40), "c": (40, 64)}[name]
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.to(torch.uint8).numpy())


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: Any, tmp_path_factory: pytest.TempPathFactory) -> CausalFamily:
    loaded = load(str(make_tiny(request.param, tmp_path_factory.mktemp(request.param))))
    assert isinstance(loaded, CausalFamily)
    return loaded


def grouped(
    family: CausalFamily, grouping: list[list[int]], *, answered: bool = True
) -> tuple[list[Group], list[list[Pixels]]]:
    seen = {name: family.pixels(image(name)) for name in "abc"}
    groups, pixels = [], []
    for members in grouping:
        name = PAIRS[members[0]][0]
        segments = [family.encode(str(i), PAIRS[i][1], PAIRS[i][2] if answered else None) for i in members]
        groups.append(Group((name,), tuple(segments)))
        pixels.append([seen[name]])
    return groups, pixels


def conversation(family: CausalFamily, i: int) -> tuple[dict[str, Any], int]:
    """What transformers' own processor makes of pair i, and how many tokens its answer has at the end."""
    name, question, answer = PAIRS[i]
    processor = family.processor
    asked: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    ]
    told = [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    prompt = processor.apply_chat_template(asked, add_generation_prompt=True)
    whole = processor.apply_chat_template(told).rstrip()
    tokenizer = processor.tokenizer
    if tokenizer(whole, add_special_tokens=False).input_ids[-1] not in family.ends:
        whole += tokenizer.eos_token
    first = not (tokenizer.bos_token and prompt.startswith(tokenizer.bos_token))

    def processed(text: str) -> dict[str, Any]:
        return dict(
            processor(images=[image(name)], text=[text], return_tensors="pt", add_special_tokens=first)
        )

    inputs = processed(whole)
    return inputs, inputs["input_ids"].shape[1] - processed(prompt)["input_ids"].shape[1]


def plain_loss(family: CausalFamily, i: int) -> Tensor:
    """Transformers' own loss of one conversation, summed over the answer's tokens."""
    inputs, tokens = conversation(family, i)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -tokens:] = inputs["input_ids"][:, -tokens:]
    return family.model(**inputs, labels=labels).loss * tokens


def gradients(family: CausalFamily, loss: Tensor) -> dict[str, Tensor]:
    family.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in family.model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted) and len(wanted) > 30
    scale = max(float(gradient.norm()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        # a key's bias moves no softmax: its gradient is rounding alone
        if gradient.norm() < 1e-6 * scale:
            assert found[name].norm() < 1e-6 * scale, name
        else:
            assert (found[name] - gradient).norm() / gradient.norm() < TOLERANCE, name


@pytest.fixture(scope="module")
def plain(family: CausalFamily) -> tuple[list[float], dict[str, Tensor]]:
    """Loss of every pair and the gradients of their sum, by transformers alone."""
    losses = [plain_loss(family, i) for i in range(len(PAIRS))]
    return [float(loss.detach()) for loss in losses], gradients(family, torch.stack(losses).sum())


@pytest.mark.parametrize("rows", ["pad", "pack"])
@pytest.mark.parametrize("grouping", GROUPINGS)
def test_shared_images_give_transformers_own_loss_and_gradients(
    family: CausalFamily, plain: tuple[list[float], dict[str, Tensor]], grouping: str, rows: Any
) -> None:
    family.rows = rows
    loss, tokens = family.loss(family.collate(*grouped(family, GROUPINGS[grouping])))
    family.rows = "pad"
    assert tokens == sum(conversation(family, i)[1] for i in range(len(PAIRS)))
    assert abs(float(loss.detach()) - sum(plain[0])) / sum(plain[0]) < TOLERANCE
    assert_same_gradients(gradients(family, loss), plain[1])


def test_log_probs_are_those_of_each_conversation(
    family: CausalFamily, plain: tuple[list[float], dict[str, Tensor]]
) -> None:
    grouping = GROUPINGS["mixed order"]
    with torch.inference_mode():
        found = family.log_probs(family.collate(*grouped(family, grouping)))
    wanted = [-plain[0][i] for members in grouping for i in members]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-5, atol=1e-5)


def transformers_answer(family: CausalFamily, i: int, beams: int) -> tuple[tuple[int, ...], float]:
    """What transformers' `generate` writes for one question, and the mean log-probability of its tokens."""
    inputs, answered = conversation(family, i)
    prompt = inputs["input_ids"].shape[1] - answered
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            inputs[name] = inputs[name][:, :prompt]
    written = family.model.generate(
        **inputs,
        max_new_tokens=8,
        num_beams=beams,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    tokens = written.sequences[0, prompt:].tolist()
    ends = [place for place, token in enumerate(tokens, start=1) if token in family.ends]
    tokens = tokens[: ends[0]] if ends else tokens
    scores = family.model.compute_transition_scores(
        written.sequences, written.scores, getattr(written, "beam_indices", None), normalize_logits=beams == 1
    )
    return tuple(tokens), float(scores[0, : len(tokens)].mean())


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("grouping", ["by image", "mixed order"])
def test_answers_are_transformers_own_token_for_token(
    family: CausalFamily, grouping: str, beams: int
) -> None:
    groups, pixels = grouped(family, GROUPINGS[grouping], answered=False)
    found = family.written(groups, pixels, max_new_tokens=8, beams=beams)
    for i, one in zip(sum(GROUPINGS[grouping], []), found, strict=True):
        tokens, score = transformers_answer(family, i, beams)
        assert one.tokens == tokens
        assert abs(one.score - score) < 1e-4
