"""PEFT's methods with about as few parameters as norms have: VeRA, RoAd, MiSS mini and BEFT."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from peft import BeftConfig, MissConfig, PeftConfig, RoadConfig, VeraConfig
from torch import nn

from normtune.errors import InputError
from normtune.methods.lora import PEFT_NAME, exact_name_pattern, inject
from normtune.methods.registry import Method
from normtune.methods.sites import FUSED, QUERY, VALUE, AddedLayers, NoTarget, TargetLinear, layer_linears
from normtune.models.parts import is_quantized

# the trained tensors of PEFT's layers
_TENSORS = {
    "vera": ("vera_lambda_d", "vera_lambda_b"),  # [r] and [out]: scales of shared random matrices
    "road": ("road_theta", "road_alpha"),  # angles and scales of pairs of outputs
    "miss": ("miss_block",),  # [r, columns], repeated over the weight
    "beft": ("beft_bias",),  # [1, out]
}
_LEAVES = {"vera": QUERY + VALUE + FUSED, "beft": VALUE + FUSED}  # the published targets; others: every linear


def _vector_config(method: Method, targets: Sequence[TargetLinear]) -> PeftConfig:
    """PEFT's config of the method on exactly these linears.

    Raises:
        InputError: the columns of a `miss` do not divide a linear's outputs.
    """
    pattern = exact_name_pattern([target.name for target in targets])
    if method.name == "vera":
        return VeraConfig(r=int(method.option("r")), target_modules=pattern)
    if method.name == "beft":
        return BeftConfig(target_modules=pattern)
    widths = {target.module.out_features: target.name for target in targets}
    if method.name == "road":
        # Groups decide which outputs are a pair. Their size has to divide every width; 64 is PEFT's default.
        return RoadConfig(variant="road_1", group_size=math.gcd(64, *widths), target_modules=pattern)
    r, columns = int(method.option("r")), int(method.option("columns"))
    for width, name in widths.items():
        if width % columns:
            raise InputError(f"miss(columns={columns}): {name} has {width} outputs. Choose a divisor of them.")
    return MissConfig(r=r, mini_r=columns, init_weights="mini", target_modules=pattern)


def add_peft_vectors(model: nn.Module, part: str, method: Method, linears: Sequence[TargetLinear]) -> AddedLayers:
    """Add the vectors of VeRA, RoAd, MiSS mini or BEFT to a part, as PEFT implements them.

    They change the linears that the method's paper changes. VeRA: query and value projections (Kopiczko et al. 2023,
    arXiv 2310.11454); BEFT: value projections; RoAd (Liao and Monz 2024, arXiv 2409.00119) and MiSS (Kang and Yin
    2024, arXiv 2409.15371): every linear of attentions and feed-forwards.

    VeRA's random matrices are drawn from PEFT's key 0 and are not in the adapter's file.

    Raises:
        NoTarget: the part has no linear that the method changes.
        InputError: another added method already changes one of them, or one is quantised.
    """
    targets = layer_linears(linears)
    if method.name in _LEAVES:
        targets = [target for target in targets if target.role == "attention" and target.leaf in _LEAVES[method.name]]
    if not targets:
        raise NoTarget(f"{method.name} finds no linear in part '{part}'. Choose another method there.")
    if any(is_quantized(target.module.weight) for target in targets):
        raise InputError(f"part '{part}' is quantised, and {method.name} is not supported there. Use ln or lora.")
    with warnings.catch_warnings():
        # a bias on a linear without one cannot be merged into it: `normtune merge` says so
        warnings.filterwarnings("ignore", "Detected that the base layer has no bias term")
        layers, remove = inject(model, _vector_config(method, targets), targets)
    parameters = {
        f"{name}.{tensor}": getattr(layer, tensor)[PEFT_NAME]
        for name, layer in layers.items()
        for tensor in _TENSORS[method.name]
    }
    return AddedLayers(parameters, remove)
