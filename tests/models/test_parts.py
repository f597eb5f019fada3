"""Parts, roles and norms of real models at their real sizes, on the meta device."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from normtune.errors import InputError
from normtune.models.loading import meta_model
from normtune.models.norm_kinds import norm_kind, norms
from normtune.models.part_names import ROLES
from normtune.models.parts import find_parts, unused_parameters
from tests.support.architectures import ARCHITECTURES, build_on_meta
from tests.support.base_models import tiny_base
from tests.support.tiny_models import MORE

# parameters of each, tied ones once: the hub's published counts, and the papers' for MISS and LLaVA-Med
TOTALS = {
    "miss_base": 361_478_972,
    "blip_vqa": 361_478_972,
    "llava_med": 7_566_743_552,
    "llava_15": 7_063_427_072,
    "llava_med_10": 6_738_448_384 + 303_179_776 + 4096 * (1024 + 1) + 4096 * (4096 + 1),
    "llava_16": 7_566_743_552 + 4096,
    "qwen2_vl_2b": 2_208_985_600,
    "qwen25_vl_7b": 8_292_166_656,
    "qwen3_vl_4b": 4_437_815_808,
    "gemma3_4b": 4_300_079_472,
    "paligemma_3b": 2_923_466_480,
    "paligemma2_3b": 3_032_242_416,
    "smolvlm_500m": 507_482_304,
}
# (tensors, values) of the norms of each part, by hand: layers x (norms x width) and the norms outside layers
CLIP_NORMS = (2 * (24 * 2 + 2), 2 * (24 * 2 + 2) * 1024)
SIGLIP_NORMS = (2 * (27 * 2 + 1), 2 * (27 * 2 + 1) * 1152)
BERT_NORMS = {
    "encoder": (2 * (12 * 3 + 1), 2 * (12 * 3 + 1) * 768),
    "decoder": (2 * (12 * 3 + 2), 2 * (12 * 3 + 2) * 768),
}
NORMS = {
    "miss_base": {"vision": (50, 25 * 2 * 768), **BERT_NORMS},
    "blip_vqa": {"vision": (50, 25 * 2 * 768), **BERT_NORMS},
    "llava_med": {"vision": CLIP_NORMS, "language": (32 * 2 + 1, (32 * 2 + 1) * 4096)},
    "llava_15": {"vision": CLIP_NORMS, "language": (32 * 2 + 1, (32 * 2 + 1) * 4096)},
    "llava_med_10": {"vision": CLIP_NORMS, "language": (32 * 2 + 1, (32 * 2 + 1) * 4096)},
    "llava_16": {"vision": CLIP_NORMS, "language": (32 * 2 + 1, (32 * 2 + 1) * 4096)},
    "qwen2_vl_2b": {
        "vision": (32 * 4, 32 * 4 * 1280),
        "connector": (2, 2 * 1280),
        "language": (28 * 2 + 1, (28 * 2 + 1) * 1536),
    },
    "qwen25_vl_7b": {
        "vision": (32 * 2, 32 * 2 * 1280),
        "connector": (1, 1280),
        "language": (28 * 2 + 1, (28 * 2 + 1) * 3584),
    },
    "qwen3_vl_4b": {
        "vision": (24 * 4, 24 * 4 * 1024),
        "connector": (2 * 4, 2 * 1024 + 3 * 2 * 4 * 1024),
        "language": (36 * 4 + 1, (36 * 2 + 1) * 2560 + 36 * 2 * 128),
    },
    "gemma3_4b": {
        "vision": SIGLIP_NORMS,
        "connector": (1, 1152),
        "language": (34 * 6 + 1, (34 * 4 + 1) * 2560 + 34 * 2 * 256),
    },
    "paligemma_3b": {"vision": SIGLIP_NORMS, "language": (18 * 2 + 1, (18 * 2 + 1) * 2048)},
    "paligemma2_3b": {"vision": SIGLIP_NORMS, "language": (26 * 4 + 1, (26 * 4 + 1) * 2304)},
    "smolvlm_500m": {"vision": (50, 25 * 2 * 768), "language": (32 * 2 + 1, (32 * 2 + 1) * 960)},
    "internvl3_1b": {
        "vision": (24 * 4, 24 * 4 * 1024),
        "connector": (2, 2 * 4096),
        "language": (24 * 2 + 1, (24 * 2 + 1) * 896),
    },
}
KINDS = {  # of the language's norms, or the text parts'
    "miss_base": "layer",
    "blip_vqa": "layer",
    "gemma3_4b": "rms_offset",
    "paligemma_3b": "rms_offset",
    "paligemma2_3b": "rms_offset",
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_family_is_counted_at_its_real_size(name: str) -> None:
    model = build_on_meta(name)
    model_parts = find_parts(model)
    if name in TOTALS:
        assert model_parts.total == TOTALS[name]
    assert model_parts.total == sum(parameter.numel() for parameter in model.parameters())
    encoder_decoder = name in ("miss_base", "blip_vqa")
    expected = ("vision", "encoder", "decoder") if encoder_decoder else ("vision", "connector", "language")
    assert model_parts.parts == expected
    norm_parameters = [info for info in model_parts.parameters if info.role == "norm"]
    counted = {
        part: (len(sizes), sum(sizes))
        for part in model_parts.parts
        if (sizes := [info.numel for info in norm_parameters if info.part == part])
    }
    assert counted == NORMS[name]
    assert all(info.role in ROLES for info in model_parts.parameters)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_norms_of_a_family_are_found_and_nothing_else(name: str) -> None:
    model = build_on_meta(name)
    leaves = [(n, module) for n, module in model.named_modules() if not module._modules]
    called = {n for n, module in leaves if type(module).__name__.endswith("Norm")}
    found_norms = norms(model)
    assert set(found_norms) == called
    modules_with_norm_role = {p.name.rpartition(".")[0] for p in find_parts(model).parameters if p.role == "norm"}
    assert modules_with_norm_role == called
    text = {
        norm_kind(module) for n, module in found_norms.items() if "vis" not in n and "projector.layer_norm" not in n
    }
    assert text == {KINDS.get(name, "rms")}


def test_the_roles_of_miss_are_the_papers() -> None:
    model_parts = find_parts(build_on_meta("miss_base"))
    percent = {(row["part"], row["role"]): row["percent"] for row in model_parts.table() if row["role"] != "embedding"}
    assert {key: round(value, 4 if key[1] == "norm" else 3) for key, value in percent.items()} == {
        ("vision", "norm"): 0.0106,
        ("vision", "attention"): 7.842,
        ("vision", "ffn"): 15.677,
        ("encoder", "norm"): 0.0157,
        ("encoder", "attention"): 15.685,
        ("encoder", "ffn"): 15.677,
        ("decoder", "norm"): 0.0161,
        ("decoder", "attention"): 15.685,
        ("decoder", "ffn"): 15.677,
        ("decoder", "head"): 0.172,
    }
    assert model_parts.count("vision") == 86_339_328
    assert round(100 * model_parts.count("vision") / model_parts.total, 3) == 23.885
    assert model_parts.count("encoder") == 137_258_496
    assert model_parts.count("decoder") == 137_881_148
    assert model_parts.count(role="norm") == 153_600
    assert round(100 * 153_600 / model_parts.total, 4) == 0.0425


def test_attention_and_feed_forward_are_counted_by_hand_for_a_7b_model() -> None:
    model_parts = find_parts(build_on_meta("llava_med"))
    width, key_width, inner, vocabulary = 4096, 1024, 14336, 32064
    assert model_parts.count("language", "attention") == 32 * (2 * width * width + 2 * width * key_width)
    assert model_parts.count("language", "ffn") == 32 * 3 * width * inner
    assert model_parts.count("language", "embedding") == model_parts.count("language", "head") == vocabulary * width
    assert model_parts.count("vision", "attention") == 24 * 4 * (1024 * 1024 + 1024)
    assert model_parts.count("vision", "ffn") == 24 * (2 * 1024 * 4096 + 4096 + 1024)
    patches = 1024 * 3 * 14 * 14
    assert model_parts.count("vision", "embedding") == patches + (577 + 1) * 1024  # positions, and the class token
    assert model_parts.count("connector") == model_parts.count("connector", "other")


def test_a_tied_head_counts_once_as_the_embedding_of_its_part() -> None:
    model_parts = find_parts(build_on_meta("miss_base"))
    names = [info.name for info in model_parts.parameters]
    assert len(names) == len(set(names))
    tied = [info for info in model_parts.parameters if info.part == "decoder" and info.shape == (30524, 768)]
    assert len(tied) == 1
    assert tied[0].role == "embedding"


def test_layers_are_numbered_in_each_part() -> None:
    model_parts = find_parts(build_on_meta("miss_base"))
    layers = {info.name: info.layer for info in model_parts.parameters}
    assert layers["text_decoder.bert.encoder.layer.7.crossattention.output.dense.weight"] == 7
    assert layers["text_encoder.encoder.layer.11.output.LayerNorm.weight"] == 11
    assert layers["text_encoder.embeddings.LayerNorm.weight"] is None
    assert [model_parts.depth(part) for part in model_parts.parts] == [12, 12, 12]
    assert find_parts(build_on_meta("qwen3_vl_4b")).depth("connector") == 0


def test_finding_parts_does_not_change_the_model() -> None:
    model = tiny_base("llava")
    before = {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()}
    find_parts(model)
    assert {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()} == before


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(InputError, match="Identity has no parameters"):
        find_parts(nn.Identity())


# parameters as the configs give them (published are 10.6 and 24.0 billion), and the norms of the language model by hand
SHAPES = [
    ("llama-3.2-vision-11b", 10_642_941_475, 40 * 2 + 8 * 2 + 1),
    ("mistral-small-3.1-24b", 24_011_361_280, 40 * 2 + 1),
]


@pytest.mark.parametrize(("name", "total", "norms_of_language"), SHAPES)
def test_shapes_in_the_package_have_their_counts(name: str, total: int, norms_of_language: int) -> None:
    model_parts = find_parts(meta_model(name))
    assert model_parts.total == total and model_parts.parts == ("vision", "connector", "language")
    roles = [info for info in model_parts.parameters if info.part == "language" and info.role == "norm"]
    # in cross-attention also the norms of queries and keys
    assert len(roles) == norms_of_language
    assert model_parts.count("language", "head") == model_parts.count("language", "embedding") - (
        8 * 4096 if "llama" in name else 0  # the image token and padding have no logit
    )


def test_gemma_4_has_its_parts_also_where_layers_share_keys() -> None:
    model = meta_model("gemma4-e2b")
    model_parts = find_parts(model)
    assert model_parts.parts == ("vision", "connector", "language")
    assert (model_parts.depth("vision"), model_parts.depth("language")) == (16, 35)
    own_keys, width = 15, 1536
    full = [layer % 5 == 4 for layer in range(35)]
    heads = sum(2 * width * 8 * (512 if is_full else 256) for is_full in full)  # queries and outputs
    keys = sum(2 * width * (512 if is_full else 256) for is_full in full[:own_keys])
    assert model_parts.count("language", "attention") == heads + keys
    unused = unused_parameters(model, model_parts)
    assert unused == {info.name for info in model_parts.parameters if "audio" in info.name} != set()
    assert all(info.part == "connector" for info in model_parts.parameters if info.name in unused)


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "qwen3_5_moe", "gemma4_moe"])
def test_mixtures_of_experts_have_the_roles_of_dense_models(name: str) -> None:
    """Routers and experts belong to the feed-forward, and every norm that has a gain is a norm."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(MORE[name]()[0])
    roles = {info.name: info.role for info in find_parts(model).parameters if info.layer is not None}
    language = {name: role for name, role in roles.items() if "language_model.layers" in name}
    for parameter, role in language.items():
        if "norm" in parameter:
            assert role == "norm", parameter
        elif "self_attn" in parameter or "linear_attn" in parameter:
            assert role == "attention", parameter
        elif parameter.endswith(("router.scale", "per_expert_scale")):
            assert role == "other", parameter
        else:
            assert role == "ffn", parameter
    assert any("expert" in parameter for parameter in language) and any("gate" in p or "router" in p for p in language)


def test_a_short_convolution_has_the_place_of_an_attention() -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(MORE["lfm2_vl"]()[0])
    roles = {info.name: info.role for info in find_parts(model).parameters if ".conv." in info.name}
    assert len(roles) == 2 * 3 and set(roles.values()) == {"attention"}
