"""Kinds of norms are recognised by what a module computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from normtune.errors import InputError
from normtune.models.norm_kinds import norm_kind, norms
from normtune.models.parts import find_parts


def test_an_unknown_norm_class_is_recognised_by_its_output() -> None:
    class Strange(nn.Module):  # a root-mean-square norm with an offset, without "Norm" in its name
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
    assert list(norms(nn.Sequential(Strange(), Scaled(), nn.LayerNorm(8), nn.GroupNorm(2, 8)))) == ["0", "2", "3"]
    with pytest.raises(InputError, match="Scaled is not a norm"):
        norm_kind(Scaled())


def test_a_gated_norm_keeps_its_role_but_is_not_replaced() -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    body = nn.ModuleDict({"norm": Qwen3NextRMSNormGated(8), "linear": nn.Linear(8, 8)})
    assert not norms(body)
    assert {info.name for info in find_parts(body).parameters if info.role == "norm"} == {"norm.weight"}
