"""Parts, roles and norms of real families at their real sizes, on the meta device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from normtune.errors import InputError
from normtune.models.part_names import ROLES
from normtune.models.parts import find_parts, norm_kind, norms
from tests.support.architectures import SHAPES, shape
from tests.support.base_models import base

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


@pytest.mark.parametrize("name", SHAPES)
def test_every_family_is_counted_at_its_real_size(name: str) -> None:
    model = shape(name)
    found = find_parts(model)
    if name in TOTALS:
        assert found.total == TOTALS[name]
    assert found.total == sum(parameter.numel() for parameter in model.parameters())
    encoder_decoder = name in ("miss_base", "blip_vqa")
    wanted = ("vision", "encoder", "decoder") if encoder_decoder else ("vision", "connector", "language")
    assert found.parts == wanted
    norm_places = [place for place in found.parameters if place.role == "norm"]
    counted = {
        part: (len(sizes), sum(sizes))
        for part in found.parts
        if (sizes := [place.numel for place in norm_places if place.part == part])
    }
    assert counted == NORMS[name]
    assert all(place.role in ROLES for place in found.parameters)


@pytest.mark.parametrize("name", SHAPES)
def test_no_norm_of_a_family_is_left_out_and_nothing_else_is_taken(name: str) -> None:
    model = shape(name)
    leaves = [(n, module) for n, module in model.named_modules() if not module._modules]
    called = {n for n, module in leaves if type(module).__name__.endswith("Norm")}
    found = norms(model)
    assert set(found) == called
    owners = {p.name.rpartition(".")[0] for p in find_parts(model).parameters if p.role == "norm"}
    assert owners == called
    text = {
        norm_kind(module) for n, module in found.items() if "vis" not in n and "projector.layer_norm" not in n
    }
    assert text == {KINDS.get(name, "rms")}


def test_the_roles_of_miss_are_the_papers() -> None:
    found = find_parts(shape("miss_base"))
    percent = {
        (row["part"], row["role"]): row["percent"] for row in found.table() if row["role"] != "embedding"
    }
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
    assert found.count("vision") == 86_339_328
    assert round(100 * found.count("vision") / found.total, 3) == 23.885
    assert found.count("encoder") == 137_258_496
    assert found.count("decoder") == 137_881_148
    assert found.count(role="norm") == 153_600
    assert round(100 * 153_600 / found.total, 4) == 0.0425


def test_attention_and_feed_forward_are_counted_by_hand_for_a_7b_model() -> None:
    found = find_parts(shape("llava_med"))
    width, key_width, inner, vocabulary = 4096, 1024, 14336, 32064
    assert found.count("language", "attention") == 32 * (2 * width * width + 2 * width * key_width)
    assert found.count("language", "ffn") == 32 * 3 * width * inner
    assert found.count("language", "embedding") == found.count("language", "head") == vocabulary * width
    assert found.count("vision", "attention") == 24 * 4 * (1024 * 1024 + 1024)
    assert found.count("vision", "ffn") == 24 * (2 * 1024 * 4096 + 4096 + 1024)
    patches = 1024 * 3 * 14 * 14
    assert found.count("vision", "embedding") == patches + (577 + 1) * 1024  # places, and the class token
    assert found.count("connector") == found.count("connector", "other")


def test_a_tied_head_counts_once_as_the_embedding_of_its_own_part() -> None:
    found = find_parts(shape("miss_base"))
    names = [place.name for place in found.parameters]
    assert len(names) == len(set(names))
    tied = [place for place in found.parameters if place.part == "decoder" and place.shape == (30524, 768)]
    assert len(tied) == 1
    assert tied[0].role == "embedding"


def test_layers_are_numbered_in_each_part() -> None:
    found = find_parts(shape("miss_base"))
    layers = {place.name: place.layer for place in found.parameters}
    assert layers["text_decoder.bert.encoder.layer.7.crossattention.output.dense.weight"] == 7
    assert layers["text_encoder.encoder.layer.11.output.LayerNorm.weight"] == 11
    assert layers["text_encoder.embeddings.LayerNorm.weight"] is None
    assert [found.depth(part) for part in found.parts] == [12, 12, 12]
    assert find_parts(shape("qwen3_vl_4b")).depth("connector") == 0


def test_a_class_that_nobody_knows_is_told_by_what_it_does() -> None:
    class Strange(nn.Module):  # a root-mean-square norm with an offset, by no name that says so
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8))
            self.eps = 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)

    class Scaled(nn.Module):  # a gain without a norm
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))
            self.eps = 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    assert norm_kind(Strange().to("meta")) == "rms_offset"
    assert list(norms(nn.Sequential(Strange(), Scaled(), nn.LayerNorm(8), nn.GroupNorm(2, 8)))) == [
        "0",
        "2",
        "3",
    ]
    with pytest.raises(InputError, match="Scaled is not a norm"):
        norm_kind(Scaled())


def test_a_gated_norm_keeps_its_role_but_is_not_replaced() -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    body = nn.ModuleDict({"norm": Qwen3NextRMSNormGated(8), "linear": nn.Linear(8, 8)})
    assert not norms(body)
    assert {place.name for place in find_parts(body).parameters if place.role == "norm"} == {"norm.weight"}


def test_asking_leaves_the_model_as_it_was() -> None:
    model = base("llava")
    before = {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()}
    find_parts(model)
    assert {name: (id(p), p._version, p.requires_grad) for name, p in model.named_parameters()} == before


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(InputError, match="Identity has no parameters"):
        find_parts(nn.Identity())
