"""Questions that share an image give the results of transformers for each question separately."""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zlib import crc32

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers.models.paligemma import modeling_paligemma

from normtune.data.examples import Example, Examples
from normtune.data.groups import Group
from normtune.data.records import Dataset
from normtune.errors import InputError
from normtune.inference.choices import answer_choices
from normtune.models import family as families
from normtune.models.answer_loss import answer_loss
from normtune.models.causal.family import CausalFamily
from normtune.models.loading import load
from normtune.models.types import Pixels
from normtune.training.layer_wrapping import checkpoint_activations
from tests.support.base_models import CACHE_ARGUMENT
from tests.support.tiny_models import IN_FP64, MORE, TINY, make_tiny
from tests.support.tolerance import MODEL_TERMS, approx, assert_close, assert_gradients_close

FAMILIES = (*TINY, *MORE)
GOLDEN = Path(__file__).with_name("golden.json")
# from GLM-4V's processor in transformers
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")
PAIRS = [
    ("a", "What is the modality of this image?", "MRI"),
    ("a", "Is there a fracture of the left rib?", "no"),
    ("a", "Which organ is abnormal in this image?", "lung, liver and heart"),
    ("b", "Is the heart normal in size?", "Yes."),
    ("b", "Which organ is abnormal?", "brain"),
    ("c", "X?", "kidney or the left lung"),
]
MIXED_TILES = ("internvl", "lfm2_vl")  # transformers before 5.24 mixed up the tiles of several beams
GROUPINGS = {
    "by image": [[0, 1, 2], [3, 4], [5]],
    "cap of two": [[0, 1], [2], [3, 4], [5]],  # image a is in two groups
    "mixed order": [[5], [4, 3], [1, 2, 0]],
}


# a gated DeltaNet solves a system of equations for each chunk of 64 tokens before the other sums
CHUNK_TERMS = 64**3 * MODEL_TERMS


def image(name: str) -> Image.Image:
    seed = ord(name)
    size = {"a": (40, 40), "b": (56, 40), "c": (40, 64)}[name]
    noise = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(noise.to(torch.uint8).numpy())


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CausalFamily]:
    if request.param == "paligemma2" and "softcapping" not in inspect.getsource(modeling_paligemma):
        pytest.skip("these transformers leave out the cap of PaliGemma 2's logits: they are no reference")
    loaded = load_tiny(request.param, tmp_path_factory.mktemp(request.param))
    single = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        if request.param in IN_FP64:  # their norms and states are computed in torch.float32 whatever the inputs
            for place, name in ((torch, "float32"), (torch, "float")):
                patch.setattr(place, name, torch.float64)
            patch.setattr(Tensor, "float", Tensor.double)
            torch.set_default_dtype(torch.float64)
        preprocess = loaded.preprocess_image
        patch.setattr(loaded, "preprocess_image", lambda opened: as_dtype(preprocess(opened), loaded.dtype))
        yield loaded
        torch.set_default_dtype(single)


def load_tiny(name: str, folder: str | Path) -> CausalFamily:
    loaded = load(str(make_tiny(name, folder)), dtype=torch.float64 if name in IN_FP64 else torch.float32)
    assert isinstance(loaded, CausalFamily)
    if name in IN_FP64 and hasattr(loaded.decoder.config, "num_experts"):
        loaded.model.set_experts_implementation("eager")  # torch multiplies no grouped matrices in float64
    return loaded


def as_dtype(values: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in values.items()}


def grouped(
    family: CausalFamily, grouping: list[list[int]], *, answered: bool = True
) -> tuple[list[Group], list[list[Pixels]]]:
    preprocessed = {name: family.preprocess_image(image(name)) for name in "abc"}
    groups, pixels = [], []
    for members in grouping:
        name = PAIRS[members[0]][0]
        segments = [family.tokenize(str(i), PAIRS[i][1], PAIRS[i][2] if answered else None) for i in members]
        groups.append(Group((name,), tuple(segments)))
        pixels.append([preprocessed[name]])
    return groups, pixels


def conversation(
    family: CausalFamily, i: int, history: tuple[tuple[str, str], ...] = (), images: str = ""
) -> tuple[dict[str, Any], int]:
    """Pair i, after earlier turns, from transformers' own processor, and how many of its last tokens are the answer.

    `images` are the names of its images, if they are not that of the pair.
    """
    name, question, answer = PAIRS[i]
    images = images or name
    opened = [image(name) for name in images]
    processor = family.processor
    if processor.chat_template is None:  # PaliGemma
        made = processor(images=[opened], text=["<image>" * len(images) + question], suffix=[answer])
        inputs_by_name = {key: torch.as_tensor(value) for key, value in made.items() if key != "pixel_values"}
        pixels = [family.preprocess_image(view)["pixel_values"] for view in opened]
        inputs_by_name["pixel_values"] = torch.stack(pixels)
        return inputs_by_name, int((inputs_by_name.pop("labels") != -100).sum())
    messages: list[dict[str, Any]] = []
    for turn in (*history, (question, answer)):
        for role, text in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": [{"type": "text", "text": text}]})
    messages[0]["content"][:0] = [{"type": "image"}] * len(images)
    prompt = processor.apply_chat_template(messages[:-1], add_generation_prompt=True)
    whole = processor.apply_chat_template(messages).rstrip()
    tokenizer = processor.tokenizer
    if tokenizer(whole, add_special_tokens=False).input_ids[-1] not in family.end_tokens:
        whole += tokenizer.eos_token
    first = not (tokenizer.bos_token and prompt.startswith(tokenizer.bos_token))
    options = {"return_mm_token_type_ids": True} if family.config.model_type == "gemma4" else {}

    def processed(text: str) -> dict[str, Any]:
        inputs = processor(images=[opened], text=[text], return_tensors="pt", add_special_tokens=first, **options)
        return as_dtype(dict(inputs), family.dtype)

    inputs = processed(whole)
    return inputs, inputs["input_ids"].shape[1] - processed(prompt)["input_ids"].shape[1]


def plain_loss(family: CausalFamily, i: int, history: tuple[tuple[str, str], ...] = (), images: str = "") -> Tensor:
    """Transformers' own loss of one conversation, summed over the last answer's tokens."""
    inputs, tokens = conversation(family, i, history, images)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -tokens:] = inputs["input_ids"][:, -tokens:]
    return family.model(**inputs, labels=labels).loss * tokens


def gradients(family: CausalFamily, loss: Tensor) -> dict[str, Tensor]:
    family.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in family.model.named_parameters() if p.grad is not None}


def assert_same_gradients(result: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert len(expected) > 30
    dtype = next(iter(expected.values())).dtype
    assert_gradients_close(result, expected, dtype=dtype, terms=CHUNK_TERMS if dtype == torch.float64 else MODEL_TERMS)


def golden_values(family: CausalFamily) -> dict[str, Any]:
    """Losses and first tokens by transformers alone, with weights that depend on the names of the parameters only."""
    weights = family.model.state_dict()
    saved = {name: value.clone() for name, value in weights.items()}
    with torch.no_grad():
        for name, parameter in family.model.named_parameters():
            generator = torch.Generator().manual_seed(crc32(name.encode()))
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            drawn = 1 + 0.1 * drawn if drawn.ndim < 2 else drawn * drawn[0].numel() ** -0.5
            parameter.copy_(drawn)
        losses = [round(float(plain_loss(family, i)), 4) for i in (0, 3)]
        tokens = [list(transformers_answer(family, i, beams=1)[0]) for i in (0, 3)]
        for name, value in saved.items():
            weights[name].copy_(value)
    return {"losses": losses, "tokens": tokens}


def test_transformers_computes_what_it_did(family: CausalFamily, request: pytest.FixtureRequest) -> None:
    """If it fails after an upgrade of transformers, the model of a family has changed there: find out what, then run
    `python -m tests.models.families.test_families`, which writes new values."""
    (name,) = (name for name in FAMILIES if request.node.callspec.params["family"] == name)
    golden = json.loads(GOLDEN.read_text())[name]
    values = golden_values(family)
    assert values["tokens"] == golden["tokens"]
    assert values["losses"] == approx(golden["losses"], dtype=torch.float16, terms=1)  # they have four decimals


def test_control_tokens_in_a_users_text_are_plain_text(family: CausalFamily) -> None:
    tokenizer = family.processor.tokenizer
    end = tokenizer.convert_ids_to_tokens(family.end_tokens[0])
    plain, marked = (family.tokenize("1", f"x {text} y", f"the lung {text} is large") for text in ("z", end))
    for ours, other in ((marked.prompt, plain.prompt), (marked.answer, plain.answer)):
        assert sum(map(ours.count, family.end_tokens)) == sum(map(other.count, family.end_tokens))
    assert tokenizer.decode(marked.answer).replace(" ", "").startswith(f"thelung{end}islarge".replace(" ", ""))


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
    assert float(loss.detach()) == approx(sum(plain[0]))
    assert_same_gradients(gradients(family, loss), plain[1])


# pair -> the pairs that are its earlier turns; two turns continue the turn 0, and one of them has a third
TURNS = {0: (), 1: (0,), 2: (0, 1), 5: (0,)}


def turns(
    family: CausalFamily, answered: bool = True
) -> tuple[Group, list[Pixels], dict[int, tuple[tuple[str, str], ...]]]:
    """A branching conversation about image c, in an order in which a turn precedes its history."""
    histories = {i: tuple(PAIRS[earlier][1:] for earlier in before) for i, before in TURNS.items()}
    segments = tuple(
        family.tokenize(str(i), PAIRS[i][1], PAIRS[i][2] if answered else None, history=histories[i])
        for i in (2, 0, 5, 1)
    )
    return Group(("c",), segments), [family.preprocess_image(image("c"))], histories


def with_image(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("tests.models.families.test_families.PAIRS", [(name, *texts) for _, *texts in PAIRS])


def test_turns_share_their_history_and_give_transformers_own_loss_and_gradients(
    family: CausalFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_image(monkeypatch, "c")
    if family.processor.chat_template is None:
        with pytest.raises(InputError, match="example 2: it has earlier turns, but PaliGemmaFamily"):
            turns(family)
        return
    group, pixels, histories = turns(family)
    losses = torch.stack([plain_loss(family, i, histories[i]) for i in (2, 0, 5, 1)])
    expected, plain = gradients(family, losses.sum()), losses.detach()
    batch = family.collate([group], [pixels])
    separate = family.prefix_tokens(pixels) + sum(map(len, group.segments))
    assert (batch["group_of"] >= 0).sum() < separate - 2 * len(group.segments[1].prompt)
    loss, _ = family.loss(batch)
    assert float(loss.detach()) == approx(float(plain.sum()))
    assert_same_gradients(gradients(family, loss), expected)
    with torch.inference_mode():
        assert_close(family.log_probs(batch), -plain)


@pytest.mark.parametrize("beams", [1, 2])
def test_answers_after_earlier_turns_equal_those_of_transformers(
    family: CausalFamily, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_image(monkeypatch, "c")
    if family.processor.chat_template is None:
        pytest.skip("it has no conversations")
    if beams > 1 and family.config.model_type in MIXED_TILES and CACHE_ARGUMENT == "past_key_values":
        pytest.skip("transformers before 5.24 gives beams of this model scores that its forward does not")
    group, pixels, histories = turns(family, answered=False)
    answers = family.generate_tokens([group], [pixels], max_new_tokens=6, beams=beams)
    for i, answer in zip((2, 0, 5, 1), answers, strict=True):
        tokens, score = transformers_answer(family, i, beams, histories[i], max_new_tokens=6)
        assert answer.tokens == tokens
        assert answer.score == approx(score)


def test_tokens_are_counted_without_computing_features(family: CausalFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "features", None)
    for grouping in GROUPINGS.values():
        groups, pixels = grouped(family, grouping)
        counted = 0
        for group, images in zip(groups, pixels, strict=True):
            copies = 1 if family.shares_prefix else len(group.segments)
            counted += copies * family.prefix_tokens(images) + sum(map(len, group.segments))
        assert counted == (family.collate(groups, pixels)["group_of"] >= 0).sum()


def test_the_tokens_of_two_views_are_added(family: CausalFamily) -> None:
    first, second = family.preprocess_image(image("a")), family.preprocess_image(image("b"))
    segment = family.tokenize("0", "What changed?", "nothing")
    copies = family.collate([Group(("a", "b"), (segment,))], [[first, second]])["group_of"]
    assert family.prefix_tokens([first, second]) + len(segment) == (copies >= 0).sum()


def test_logits_in_chunks_give_transformers_own_loss_and_gradients(
    family: CausalFamily, plain: tuple[list[float], dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads are tied to the embedding in some families."""
    rows = 3 * 4 * family.vocabulary  # three rows of fp32 logits
    monkeypatch.setattr(families, "answer_loss", partial(answer_loss, limit_bytes=rows))
    loss, _ = family.loss(family.collate(*grouped(family, GROUPINGS["by image"])))
    assert float(loss.detach()) == approx(sum(plain[0]))
    assert_same_gradients(gradients(family, loss), plain[1])


def test_log_probs_are_those_of_each_conversation(
    family: CausalFamily, plain: tuple[list[float], dict[str, Tensor]]
) -> None:
    grouping = GROUPINGS["mixed order"]
    with torch.inference_mode():
        log_probs = family.log_probs(family.collate(*grouped(family, grouping)))
    expected = [-plain[0][i] for members in grouping for i in members]
    assert_close(log_probs, torch.tensor(expected, dtype=log_probs.dtype))


def transformers_answer(
    family: CausalFamily, i: int, beams: int, history: tuple[tuple[str, str], ...] = (), max_new_tokens: int = 8
) -> tuple[tuple[int, ...], float]:
    """The tokens that transformers' `generate` writes for one question, and their mean log-probability."""
    inputs, answered = conversation(family, i, history)
    prompt = inputs["input_ids"].shape[1] - answered
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "cross_attention_mask"):
        if name in inputs:
            inputs[name] = inputs[name][:, :prompt]
    written = family.model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        num_beams=beams,
        do_sample=False,
        eos_token_id=list(family.end_tokens),
        output_scores=True,
        return_dict_in_generate=True,
    )
    tokens = written.sequences[0, prompt:].tolist()
    ends = [place for place, token in enumerate(tokens, start=1) if token in family.end_tokens]
    tokens = tokens[: ends[0]] if ends else tokens
    scores = family.model.compute_transition_scores(
        written.sequences, written.scores, getattr(written, "beam_indices", None), normalize_logits=beams == 1
    )
    return tuple(tokens), float(scores[0, : len(tokens)].mean())


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("grouping", "ends"), [("by image", "its own"), ("mixed order", "every fourth token")])
def test_answers_equal_those_of_transformers_token_by_token(
    family: CausalFamily, grouping: str, beams: int, ends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if beams > 1 and family.config.model_type in MIXED_TILES and CACHE_ARGUMENT == "past_key_values":
        pytest.skip("transformers before 5.24 gives beams of this model scores that its forward does not")
    if ends != "its own":  # a random model hardly ever ends an answer: now answers differ in length
        monkeypatch.setattr(family, "end_tokens", tuple(range(0, family.model.lm_head.out_features, 4)))
    groups, pixels = grouped(family, GROUPINGS[grouping], answered=False)
    answers = family.generate_tokens(groups, pixels, max_new_tokens=8, beams=beams)
    for i, answer in zip(chain(*GROUPINGS[grouping]), answers, strict=True):
        tokens, score = transformers_answer(family, i, beams)
        assert answer.tokens == tokens
        assert answer.score == approx(score)
    if ends != "its own" and beams == 1:
        assert len({len(answer.tokens) for answer in answers}) > 1


def test_an_image_is_computed_once_and_its_prefix_is_never_copied(
    family: CausalFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups, pixels = grouped(family, GROUPINGS["cap of two"], answered=False)  # four groups of three images
    feature_counts: list[int] = []
    input_shapes: list[tuple[int, ...]] = []
    compute_features = family.features

    def features(images: dict[str, Tensor]) -> dict[str, Tensor]:
        feature_counts.append(len(compute_features(images)["features"]))
        return compute_features(images)

    monkeypatch.setattr(family, "features", features)
    hook = family.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: input_shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    family.generate_answers(groups, pixels, max_new_tokens=3)
    hook.remove()
    token = family.processor.tokenizer.convert_ids_to_tokens(family.image_token_id)
    tokens = [family.image_text(family.preprocess_image(image(name))).count(token) for name in "abc"]
    assert feature_counts == [sum(tokens)]
    if family.config.model_type == "paligemma":  # it shares no prefix
        assert [rows for rows, _ in input_shapes] == [6, 6, 6]
    else:
        assert [rows for rows, _ in input_shapes] == [4, 4, 4] and [length for _, length in input_shapes[1:]] == [2, 2]


def test_encoded_images_give_the_same_loss_and_answers(family: CausalFamily) -> None:
    groups, pixels = grouped(family, GROUPINGS["cap of two"])
    encoded = {id(image_pixels): family.encode_image(image_pixels) for images in pixels for image_pixels in images}
    features = [[encoded[id(image_pixels)] for image_pixels in images] for images in pixels]
    with torch.no_grad():
        loss, encoded_loss = (family.loss(family.collate(groups, inputs))[0] for inputs in (pixels, features))
    assert_close(encoded_loss, loss)
    open_groups, _ = grouped(family, GROUPINGS["cap of two"], answered=False)
    answers, encoded_answers = (
        list(chain(*family.generate_answers(open_groups, inputs))) for inputs in (pixels, features)
    )
    assert [answer.tokens for answer in encoded_answers] == [answer.tokens for answer in answers]
    assert [answer.score for answer in encoded_answers] == approx([answer.score for answer in answers])
    assert all(not name.startswith("pixel") for image_pixels in encoded.values() for name in image_pixels)


def test_bf16_answers_and_learns(family: CausalFamily, plain: tuple[list[float], dict[str, Tensor]]) -> None:
    half = copy.deepcopy(family.model).bfloat16()
    low = type(family)(half, family.processor)
    loss, _ = low.loss(low.collate(*grouped(low, GROUPINGS["by image"])))
    assert abs(float(loss.detach()) - sum(plain[0])) / sum(plain[0]) < 0.05
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in half.parameters() if p.grad is not None)
    groups, pixels = grouped(low, GROUPINGS["by image"], answered=False)
    assert [len(answers) for answers in low.generate_answers(groups, pixels, beams=2)] == [3, 2, 1]


def test_a_question_sees_all_views_of_a_study(family: CausalFamily) -> None:
    """Two images before each of two questions, as transformers' processor writes them."""
    if family.config.model_type == "llava_onevision":
        pytest.skip("transformers reads several images without tiles, we with tiles")
    expected = plain_loss(family, 0, images="ab") + plain_loss(family, 3, images="ab")
    segments = tuple(family.tokenize(str(i), *PAIRS[i][1:]) for i in (0, 3))
    batch = family.collate([Group(("a", "b"), segments)], [[family.preprocess_image(image(name)) for name in "ab"]])
    loss, _ = family.loss(batch)
    assert float(loss.detach()) == approx(float(expected.detach()))
    assert_same_gradients(gradients(family, loss), gradients(family, expected))


def test_recomputed_layers_and_accumulated_batches_give_the_same_gradients(
    family: CausalFamily, plain: tuple[list[float], dict[str, Tensor]]
) -> None:
    losses = []
    family.model.zero_grad()
    with checkpoint_activations(family.model, "tight") as names:
        assert len(names) >= 4
        for grouping in (GROUPINGS["by image"][:1], GROUPINGS["by image"][1:]):
            loss, _ = family.loss(family.collate(*grouped(family, grouping)))
            loss.backward()
            losses.append(float(loss.detach()))
    assert sum(losses) == approx(sum(plain[0]))
    accumulated = {name: p.grad for name, p in family.model.named_parameters() if p.grad is not None}
    assert_same_gradients(accumulated, plain[1])


def write_golden_values() -> None:
    """Write the values of all families by the installed transformers."""
    values: dict[str, Any] = {}
    for name in FAMILIES:
        with TemporaryDirectory() as folder:
            values[name] = golden_values(load_tiny(name, folder))
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in values.items())
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    write_golden_values()


def test_options_share_their_question_and_have_the_likelihoods_of_single_forwards(
    family: CausalFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("MRI", "lung, liver and heart", "left lung")
    example = Example("1", ("a",), PAIRS[1][1], "left lung", "choice", "test", options=options)
    answers = [*"ABC", *options]
    question = family.choices.question(example)
    monkeypatch.setattr(f"{__name__}.PAIRS", [("a", question, answer) for answer in answers])
    expected = []
    for i in range(len(answers)):
        inputs, tokens = conversation(family, i)
        with torch.inference_mode():
            log_probs = family.model(**inputs).logits[0].double().log_softmax(1)
        labels = inputs["input_ids"][0, -tokens:-1]  # the last one is the end token
        expected.append(log_probs[-tokens - 1 : -2].gather(1, labels[:, None]).sum())
    batches = []
    log_probs_of = family.log_probs
    monkeypatch.setattr(family, "log_probs", lambda batch: batches.append(batch) or log_probs_of(batch))
    (prediction,) = answer_choices(family, Dataset("made", Examples([example]), image), [example], ("letter", "text"))
    assert prediction.choice is not None and prediction.choice.options_cut == 0
    scores = torch.tensor([*prediction.choice.scores["letter"], *prediction.choice.scores["text"]])
    assert_close(
        scores,
        torch.stack(expected).to(scores.dtype),
        dtype=family.dtype,
        terms=CHUNK_TERMS if family.dtype == torch.float64 else MODEL_TERMS,
    )
    if family.shares_prefix:  # the question runs once
        segments = [family.tokenize_example(example, answer) for answer in answers]
        tokens = family.prefix_tokens([family.preprocess_image(image("a"))]) + len(segments[0].prompt)
        assert int((batches[0]["group_of"] >= 0).sum()) <= tokens + sum(len(s.answer) - 1 for s in segments)
