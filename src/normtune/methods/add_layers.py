"""Adds the layers of one method to one part of a model; imports the method's own module only then."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from normtune.methods.registry import OUTPUT_VECTORS, PEFT_VECTORS, Method
from normtune.methods.sites import AddedLayers, TargetLinear


def add_layers(model: nn.Module, part: str, method: Method, linears: Sequence[TargetLinear]) -> AddedLayers:
    """Add the layers of one added method to one part.

    Args:
        linears: the part's linears; the method chooses among them.

    Raises:
        NoTarget: the part has no layer to which the method applies.
        InputError: another method already changes a linear, or the part's layers differ too much.
    """
    # LoRA, IA3 and prefixes are PEFT's: its import takes a second that the tuning of norms does not need
    if method.name == "lora":
        from normtune.methods.lora import add_lora

        return add_lora(model, part, method, linears)
    if method.name == "ia3":
        from normtune.methods.lora import add_ia3

        return add_ia3(model, part, linears)
    if method.name in PEFT_VECTORS:
        from normtune.methods.peft_vectors import add_peft_vectors

        return add_peft_vectors(model, part, method, linears)
    if method.name in OUTPUT_VECTORS:
        from normtune.methods.output_vectors import add_output_vectors

        return add_output_vectors(part, method, linears)
    if method.name == "adapter":
        from normtune.methods.bottleneck import add_bottleneck

        return add_bottleneck(part, int(method.option("width")), linears)
    assert method.name in ("prefix", "ptuning"), method.name
    from normtune.methods.prefix import add_prefix

    return add_prefix(model, part, int(method.option("n")), method.name == "prefix", linears)
