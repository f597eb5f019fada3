"""Imported LLaVA-Med checkpoints compute the same logits as the original ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoProcessor, LlavaForConditionalGeneration

from normtune.adapters.merge import merge_to_disk
from normtune.adapters.storage import load_model
from normtune.data.groups import Group
from normtune.errors import InputError
from normtune.models.causal.family import CausalFamily
from normtune.models.importers.llava_med.importer import ImportReport, import_llava_med
from normtune.models.importers.llava_med.original_config import read_original_config
from normtune.models.importers.llava_med.processor import read_vocabulary
from normtune.models.importers.llava_med.tensor_plan import append_mean_rows
from normtune.models.loading import load
from normtune.training.config import TrainConfig
from normtune.training.train import train
from tests.support.llava_med_original import (
    HEADS,
    PATCHES,
    TOWER,
    FileFormat,
    OriginalModel,
    build_tokenizer,
    import_error,
    make_original,
    original_tensors,
    preprocess,
    write_clip,
    write_delta_and_base,
    write_original,
)
from tests.support.llava_med_original import original_config as config_of
from tests.support.tiny_models import TEXT
from tests.support.tolerance import approx, assert_close

QUESTION = "Is there a fracture of the left rib?"
V15_PROMPT = f"[INST] <image>\n{QUESTION} [/INST]"


@pytest.fixture(scope="module")
def original() -> OriginalModel:
    return make_original()


@pytest.fixture(scope="module")
def separated() -> OriginalModel:
    return make_original("1.0")


def picture(width: int = 50, height: int = 40) -> Image.Image:
    generator = torch.Generator().manual_seed(3)
    values = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def conversation(question: str = QUESTION) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


@torch.no_grad()
def assert_same_logits(out: Path, original: OriginalModel, prompt: str = V15_PROMPT, *, pad: bool = True) -> None:
    """Compare the logits of the imported model, from image and question to the head, with the original's."""
    model: Any = LlavaForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    processor: Any = AutoProcessor.from_pretrained(out)
    text = processor.apply_chat_template(conversation(), tokenize=False, add_generation_prompt=True)
    inputs = processor(images=picture(), text=text, return_tensors="pt")
    before, after = original.split_prompt(prompt)
    vocabulary = original.language.config.vocab_size
    image = model.config.image_token_index
    assert inputs.input_ids[0].tolist() == [*before, *[image] * PATCHES, *after]
    expected = original.logits(preprocess(picture(), pad=pad), before, after)
    logits = model(**inputs).logits[0]
    assert_close(logits[:, :vocabulary], expected)
    if logits.shape[1] > vocabulary:  # the logit of an added token is the mean, never the largest
        mean = expected.mean(1, keepdim=True).expand(-1, logits.shape[1] - vocabulary)
        assert_close(logits[:, vocabulary:], mean, magnitude=float(expected.abs().max()))


def written(out: Path) -> dict[str, Tensor]:
    written_tensors: dict[str, Tensor] = {}
    for file in sorted(out.glob("*.safetensors")):
        written_tensors |= load_file(file)
    return written_tensors


@pytest.mark.parametrize("form, shards", [("safetensors", 3), ("bin", 3), ("old bin", 2), ("bin", 1)])
def test_a_checkpoint_with_an_image_encoder_gives_the_original_logits(
    original: OriginalModel, tmp_path: Path, form: FileFormat, shards: int
) -> None:
    source = write_original(tmp_path / "src", original, form=form, shards=shards)
    report = import_llava_med(str(source), tmp_path / "out", **HEADS)
    assert_same_logits(tmp_path / "out", original)
    source_tensors = original_tensors(original, tower=True)
    assert set(report.mapped.values()) | set(report.dropped) == set(source_tensors)
    assert {name.rpartition(".")[2] for name in report.dropped} == {"inv_freq", "position_ids"}
    assert report.missing == {} and report.left_over == ()
    assert "the checkpoint's own, which LLaVA-Med's loader would replace" in str(report)
    written_report = json.loads((tmp_path / "out" / "import_report.json").read_text())
    assert written_report["mapped"] == report.mapped and "kept" not in written_report
    assert sorted(tmp_path.iterdir()) == [tmp_path / "out", source]


@pytest.mark.parametrize("whole", [False, True])
def test_a_separate_image_encoder_is_imported(original: OriginalModel, tmp_path: Path, whole: bool) -> None:
    source = write_original(tmp_path / "src", original, tower=False)
    clip = write_clip(tmp_path / "clip", original.clip, whole=whole, form="bin" if whole else "safetensors")
    report = import_llava_med(str(source), tmp_path / "out", vision=str(clip))
    assert_same_logits(tmp_path / "out", original)
    assert report.tower == f"{clip} (the checkpoint holds none)" and report.tower_differs is None
    assert ("text_projection.weight" in report.dropped) is whole


def test_a_missing_image_encoder_is_named_in_the_error(original: OriginalModel, tmp_path: Path) -> None:
    source = write_original(tmp_path / "src", original, tower=False)
    message = import_error(source, tmp_path / "out")
    assert "holds no image encoder" in message
    assert "Give --vision openai/clip-vit-large-patch14-336, or the directory" in message


def test_the_checkpoints_image_encoder_is_used_unless_stock_tower_is_set(
    original: OriginalModel, tmp_path: Path
) -> None:
    source = write_original(tmp_path / "src", original)
    stock = make_original()
    with torch.no_grad():
        stock.clip.get_parameter("pre_layrnorm.weight").mul_(1.5)
    clip = write_clip(tmp_path / "clip", stock.clip)
    inside_report = import_llava_med(str(source), tmp_path / "own", vision=str(clip))
    assert_same_logits(tmp_path / "own", original)
    assert inside_report.tower_differs == 1 and "1 tensors differ between SRC and --vision" in str(inside_report)
    stock_report = import_llava_med(str(source), tmp_path / "stock", vision=str(clip), stock_tower=True)
    assert_same_logits(tmp_path / "stock", stock)
    assert (
        len(stock_report.left_over)
        == sum(name.startswith(TOWER) for name in original_tensors(original, tower=True)) - 1
    )
    assert "as LLaVA-Med's loader uses it" in stock_report.tower and "not used: " in str(stock_report)
    with pytest.raises(InputError, match="--stock-tower needs --vision"):
        import_llava_med(str(source), tmp_path / "none", stock_tower=True)


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("size", [(50, 40), (31, 64), (32, 32)])
def test_images_are_padded_to_squares_if_the_config_says_so(
    original: OriginalModel, tmp_path: Path, pad: bool, size: tuple[int, int]
) -> None:
    ratio = "pad" if pad else "square"
    source = write_original(tmp_path / "src", original, image_aspect_ratio=ratio)
    import_llava_med(str(source), tmp_path / "out", **HEADS)
    processor: Any = AutoProcessor.from_pretrained(tmp_path / "out")
    pixels = processor.image_processor([picture(*size)], return_tensors="pt").pixel_values[0]
    assert_close(pixels, preprocess(picture(*size), pad=pad))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_tensor_keeps_its_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    original = make_original(dtype=dtype)
    source = write_original(tmp_path / "src", original)
    report = import_llava_med(str(source), tmp_path / "out", **HEADS)
    source_tensors, imported_tensors = original_tensors(original, tower=True), written(tmp_path / "out")
    assert set(imported_tensors) == set(report.mapped) and set(report.dtypes) == {str(dtype).removeprefix("torch.")}
    for name, original_name in report.mapped.items():
        assert torch.equal(
            imported_tensors[name][: len(source_tensors[original_name])], source_tensors[original_name]
        ), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == report_dtype(report)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == dtype


def report_dtype(report: ImportReport) -> str:
    return next(iter(report.dtypes))


def test_new_rows_of_a_grown_vocabulary_are_the_mean_and_new_tokens_come_first(
    original: OriginalModel, tmp_path: Path
) -> None:
    source = write_original(tmp_path / "src", original)
    report = import_llava_med(str(source), tmp_path / "out", **HEADS)
    before, after = report.vocabulary
    assert before == original.language.config.vocab_size and after % 64 == 0 and 0 < after - before - 2 < 64
    assert report.tokens == ("<image>", "<pad>")
    family = load(str(tmp_path / "out"))
    assert isinstance(family, CausalFamily)
    assert family.image_token_id == before and family.pad_id == before + 1
    rows = torch.randn(2000, 3)
    grown = append_mean_rows(rows.bfloat16(), 2002)
    assert grown.shape == (2002, 3) and torch.equal(grown[:2000], rows.bfloat16())
    torch.testing.assert_close(grown[2000:].float(), rows.bfloat16().float().mean(0).expand(2, 3).bfloat16().float())


def test_a_vocabulary_with_unused_rows_does_not_grow(original: OriginalModel, tmp_path: Path) -> None:
    roomy = make_original()
    roomy.language.resize_token_embeddings(len(roomy.tokenizer) + 10, mean_resizing=False)
    source = write_original(tmp_path / "src", roomy)
    report = import_llava_med(str(source), tmp_path / "out", **HEADS)
    assert report.vocabulary[0] == report.vocabulary[1] == len(original.tokenizer) + 10
    assert_same_logits(tmp_path / "out", roomy)


# --- version 1.0: LLaMA, a projector of one layer, deltas -------------------------------------------------


V10_PROMPT = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the human's questions.\n\n"
    f"### Human: <im_start><image><im_end>\n{QUESTION}\n### Assistant:"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_delta_is_added_to_its_base(separated: OriginalModel, tmp_path: Path, dtype: torch.dtype) -> None:
    delta, base, expected = write_delta_and_base(separated, tmp_path, dtype)
    clip = write_clip(tmp_path / "clip", separated.clip)
    report = import_llava_med(str(delta), tmp_path / "out", base=str(base), vision=str(clip))
    imported_tensors = written(tmp_path / "out")
    for name, original_name in report.mapped.items():
        if not name.startswith("model.vision_tower"):
            assert torch.equal(imported_tensors[name], expected[original_name]), name
    language = [name for name in report.mapped if "vision_tower" not in name and "projector" not in name]
    assert set(report.added) == set(language) and report.version == "1.0"
    assert f"{len(language)} tensors are {base} + {delta}" in str(report)
    if dtype == torch.float32:
        separated.language.load_state_dict({n: w for n, w in expected.items() if n in separated.language.state_dict()})
        assert_same_logits(tmp_path / "out", separated, V10_PROMPT, pad=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_projector_of_one_layer_is_exact_to_the_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    original = make_original("1.0", dtype)
    source = write_original(tmp_path / "src", original, tower=False)
    clip = write_clip(tmp_path / "clip", original.clip)
    report = import_llava_med(str(source), tmp_path / "out", vision=str(clip))
    assert set(report.missing) == {f"model.multi_modal_projector.linear_2.{kind}" for kind in ("weight", "bias")}
    model: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=dtype)
    features = torch.randn(3, 16, 32).to(dtype)
    weight, bias = original.projector.values()
    with torch.no_grad():
        assert torch.equal(model.model.multi_modal_projector(features), F.linear(features, weight, bias))


def test_answers_of_version_1_0_end_at_the_separator(separated: OriginalModel, tmp_path: Path) -> None:
    source = write_original(tmp_path / "src", separated, tower=False)
    clip = write_clip(tmp_path / "clip", separated.clip)
    import_llava_med(str(source), tmp_path / "out", vision=str(clip))
    family = load(str(tmp_path / "out"))
    assert isinstance(family, CausalFamily) and len(family.end_tokens) == 2
    answer = family.tokenize("1", QUESTION, "no").answer
    tokens = family.processor.tokenizer
    assert answer[-1] == family.end_tokens[1] and tokens.decode(answer[:-1]).strip() == "no"
    assert tokens.decode(family.end_tokens[1]).startswith("#")
    group = Group(("a",), (family.tokenize("1", QUESTION, None),))
    with torch.no_grad():
        family.model.lm_head.weight.zero_()
        family.model.lm_head.weight[family.end_tokens[1]] = 1
        family.model.model.language_model.norm.weight.fill_(1)
        family.model.lm_head.weight[family.end_tokens[1]] = sign_of_state(family, group)
    assert family.generate_answers([group], [[family.preprocess_image(picture())]])[0][0].text == ""


def sign_of_state(family: CausalFamily, group: Group) -> Tensor:
    """A row of the head that gives the largest logit at the last token of the group."""
    pixels = [[family.preprocess_image(picture())]]
    layout, _, _ = family.layout([group], pixels, "pad")
    return family.hidden_states(layout, use_cache=False)[0, -1].sign()


# --- training and inference with an imported model ------------------------------------------------------


@pytest.fixture(scope="module")
def imported(original: OriginalModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("imported")
    source = write_original(folder / "src", original)
    import_llava_med(str(source), folder / "out", **HEADS)
    return folder / "out"


@pytest.mark.parametrize("recipe", ["ln", "connector=full,language=lora(r=2)"])
def test_an_imported_model_is_trained_and_answers(imported: Path, tmp_path: Path, recipe: str) -> None:
    config = TrainConfig(
        model=str(imported), data="phantom-b:2", out=tmp_path / "out", tune=recipe, max_steps=2, batch=8,
        lr=0.05, device="cpu",
    )  # fmt: skip
    result = train(config)
    assert result.steps == 2 and result.changed > 0.4 and result.warning is None
    tuned = load_model(str(imported), tmp_path / "out", device="cpu")
    assert isinstance(tuned, CausalFamily)
    group = Group(("a",), (tuned.tokenize("1", QUESTION, None), tuned.tokenize("2", "Which organ?", None)))
    answers = tuned.generate_answers([group], [[tuned.preprocess_image(picture())]], max_new_tokens=3)
    assert len(answers[0]) == 2
    merge_to_disk(str(imported), tmp_path / "out", tmp_path / "merged")
    merged = load(str(tmp_path / "merged"))
    merged_answers = merged.generate_answers([group], [[merged.preprocess_image(picture())]], max_new_tokens=3)
    for merged_answer, tuned_answer in zip(merged_answers[0], answers[0], strict=True):
        assert merged_answer.text == tuned_answer.text and merged_answer.score == approx(tuned_answer.score)


def test_questions_that_share_an_image_give_the_original_log_probabilities(
    imported: Path, original: OriginalModel
) -> None:
    family = load(str(imported))
    assert isinstance(family, CausalFamily)
    questions = [(QUESTION, "no"), ("Which organ is abnormal in this image?", "lung")]
    segments = tuple(family.tokenize(str(i), q, a) for i, (q, a) in enumerate(questions))
    pixels = family.preprocess_image(picture())
    batch = family.collate([Group(("a",), segments)], [[pixels]])
    with torch.no_grad():
        log_probs = family.log_probs(batch)
    for i, (question, answer) in enumerate(questions):
        before, after = original.split_prompt(f"[INST] <image>\n{question} [/INST] {answer}</s>")
        logits = original.logits(preprocess(picture(), pad=True), before, after)
        answer_ids = segments[i].answer
        assert after[-len(answer_ids) :] == list(answer_ids) and answer_ids[-1] == 2
        mean = logits.mean(1, keepdim=True)
        new_rows = family.model.config.text_config.vocab_size - logits.shape[1]
        all_log_probs = torch.cat([logits, mean.expand(-1, new_rows)], 1).log_softmax(1)
        rows = all_log_probs[len(before) + PATCHES + len(after) - len(answer_ids) - 1 : -1]
        expected = rows.gather(1, torch.tensor(answer_ids)[:, None]).sum()
        assert_close(log_probs[i], expected)


def test_the_commands_import_inspect_and_ask(
    original: OriginalModel, tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    run = run_command
    source = write_original(tmp_path / "src", original)
    picture().save(tmp_path / "a.png")
    status, out, err = run("import-llava-med", source, tmp_path / "out", "--vision-heads", 2, "--json")
    report = json.loads(out)
    assert (status, err) == (0, "") and report["version"] == "1.5" and report["kept"] == 0
    status, out, err = run("inspect", tmp_path / "out", "--tune", "language=ln", "--json")
    assert (status, err) == (0, "") and json.loads(out)["total"] == report["parameters"]
    options = ("--image", tmp_path / "a.png", "--question", QUESTION, "--device", "cpu", "--json")
    status, out, err = run("ask", tmp_path / "out", *options)
    assert (status, err) == (0, "") and len(json.loads(out)["answers"]) == 1
    status, out, err = run("import-llava-med", source, tmp_path / "out")
    assert status == 2 and out == "" and err.count("\n") == 1 and "is not an empty directory" in err
    status, out, err = run("import-llava-med", source, tmp_path / "again", "--vision-heads", 2)
    assert status == 0 and "tensors used" in out


# --- tokenizers -------------------------------------------------------------------------------------------


def test_a_newer_tokenizer_tokenises_text_after_an_image_as_the_original_code_does(
    original: OriginalModel, tmp_path: Path
) -> None:
    """Newer tokenizers of LLaMA prepend a blank only to the first piece of a text."""
    from tokenizers import pre_tokenizers

    source = write_original(tmp_path / "src", original)
    newer = build_tokenizer()
    newer.backend_tokenizer.normalizer = None
    newer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    assert newer(QUESTION).input_ids == original.tokenizer(QUESTION).input_ids
    newer.save_pretrained(tmp_path / "newer")
    import_llava_med(str(source), tmp_path / "out", tokenizer=str(tmp_path / "newer"), **HEADS)
    assert_same_logits(tmp_path / "out", original)


def test_a_sentencepiece_model_without_its_packages_is_refused(
    original: OriginalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.utils

    source = write_original(tmp_path / "src", original)
    (source / "tokenizer.json").rename(source / "tokenizer.model")
    monkeypatch.setattr(transformers.utils, "is_sentencepiece_available", lambda: False)
    message = import_error(source, tmp_path / "out", **HEADS)
    assert "pip install sentencepiece protobuf. Or give --tokenizer" in message
    (source / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(InputError, match=r"protobuf\. Or put the same tokenizer into the"):
        load(str(source))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of sentencepiece's own bindings
def test_a_sentencepiece_model_gives_its_tokens_after_the_bos_token(tmp_path: Path) -> None:
    """As LLaMA-1 was released: no tokenizer.json, and no BOS token in tokenizer_config.json."""
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    (tmp_path / "text").write_text("\n".join(TEXT))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=330,
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    config = config_of(make_original("1.0"))
    config["vocab_size"] = 400
    config["mm_use_im_start_end"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = read_vocabulary(tmp_path, read_original_config(tmp_path)).tokenizer
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text in (QUESTION, "lung 42 µm", "lung\n### Human: liver"):
        assert tokenizer(text).input_ids == [1, *pieces.encode(text)]
