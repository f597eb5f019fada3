"""Fingerprints of base models: an adapter records the fingerprint of the base that it was trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from normtune.models.parts import is_quantized
from normtune.models.quantization import UnquantisedSamples, sampled_indices

QUANTISED = "quantised"  # second half of a quantised base's fingerprint
ReadValues = Callable[[str, range], Tensor]  # (parameter, indices into the flattened parameter) -> values


def fingerprint(model: nn.Module, values: ReadValues | None = None) -> str:
    """Compute the fingerprint of a base; call it before `adapt`.

    It does not depend on the dtype in which the base is loaded, and takes well under a second for a 7B model.

    Args:
        values: reads some values of a named parameter, for a model that is not in memory (`model` may be on
            the meta device); None reads them from the model.

    Returns:
        Two digests of names, shapes and 64 sampled values per tensor, rounded to bf16: "REST-LINEAR". LINEAR
        covers the weights of linear layers, before they were quantised. It is the word "quantised" if those values
        are unknown (see `keep_unquantised_samples`). REST covers all other parameters.
    """
    linear, rest = hashlib.sha256(), hashlib.sha256()
    quantised = False
    for module_name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{attribute}"
            if isinstance(module, nn.Linear) and attribute == "weight":
                digest = linear
                if is_quantized(parameter):
                    sampled: UnquantisedSamples | None = getattr(module, "unquantised_samples", None)
                    if sampled is None:
                        quantised = True
                    else:
                        digest.update(f"{name} {sampled.shape}\n".encode() + _bytes(sampled.values))
                    continue
            else:
                digest = rest
            digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
            indices = sampled_indices(parameter.numel())
            if values is not None:
                digest.update(_bytes(values(name.removeprefix("."), indices)))
            elif parameter.device.type != "meta":
                flat = parameter.detach().reshape(-1)
                digest.update(_bytes(flat[indices.start : indices.stop : indices.step]))
    return f"{rest.hexdigest()[:32]}-{QUANTISED if quantised else linear.hexdigest()[:32]}"


def same_base(first: str, second: str) -> bool:
    """Whether two fingerprints belong to one base.

    If the values of a quantised base are unknown, only the parameters outside of linear layers are compared.
    """
    (rest, linear), (second_rest, second_linear) = first.split("-"), second.split("-")
    return rest == second_rest and (linear == second_linear or QUANTISED in (linear, second_linear))


def _bytes(values: Tensor) -> bytes:
    # rounded to bf16, so that an fp32 and a bf16 load of one base agree
    return values.to(torch.bfloat16).contiguous().view(torch.int16).cpu().numpy().tobytes()
