"""What a vision-language model is made of: its parameters by part (vision, language, ..) and role (norm, ..).

Everything is told from types and structure, so that it holds for any torch model and on the meta device: a
vision tower has a convolution or takes images, a text part has token embeddings, the connector is what lies
between; a norm is what normalises when it is tried, an attention holds query, key and value projections, and
a layer is an element of a list whose elements hold attentions.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normtune.errors import InputError
from normtune.models.part_names import PARTS, ROLES

# children of an attention: one linear for query, key and value, or one for each
FUSED_PROJECTIONS = frozenset(
    ("qkv", "qkv_proj", "query_key_value", "Wqkv", "c_attn", "in_proj_qkv", "in_proj_qkvz")
)
SPLIT_PROJECTIONS = (
    frozenset(("q_proj", "k_proj", "v_proj")),
    frozenset(("query", "key", "value")),
    frozenset(("q", "k", "v")),
    frozenset(("wq", "wk", "wv")),
    frozenset(("to_q", "to_k", "to_v")),
    frozenset(("kv_a_proj_with_mqa", "kv_b_proj")),  # DeepSeek's latent attention
)

ParameterHolder = tuple[nn.Module, str]  # a module, and the attribute under which it holds a parameter


@dataclass(frozen=True)
class ParameterInfo:
    """Where one parameter stands.

    Attributes:
        name: its name in `model.named_parameters()`; a tied parameter has its first one.
        role: one of ROLES; "other" is what is none of the rest, such as a connector's projections.
        layer: the layer of the part that holds it, counted through the part from 0; None outside the layers.
    """

    name: str
    part: str
    role: str
    layer: int | None
    shape: tuple[int, ...]
    numel: int

    @property
    def is_bias(self) -> bool:
        """Whether it is a bias of anything but a norm."""
        return self.role != "norm" and self.name.rpartition(".")[2].endswith("bias")


@dataclass(frozen=True)
class ModelParts:
    """The parts of a model, and every parameter's place; a tied parameter counts once."""

    parts: tuple[str, ...]  # in the order of PARTS
    parameters: tuple[ParameterInfo, ...]  # in the model's order

    @property
    def total(self) -> int:
        return sum(place.numel for place in self.parameters)

    def count(self, part: str | None = None, role: str | None = None) -> int:
        """Parameters of a part, of a role, or of a role in a part."""
        return sum(
            place.numel
            for place in self.parameters
            if part in (None, place.part) and role in (None, place.role)
        )

    def depth(self, part: str) -> int:
        """The number of the part's layers that hold parameters."""
        return 1 + max(
            (place.layer for place in self.parameters if place.part == part and place.layer is not None),
            default=-1,
        )

    def table(self) -> list[dict[str, Any]]:
        """One row for each role of each part: part, role, tensors, parameters, percent of the total."""
        total = self.total
        rows: list[dict[str, Any]] = []
        for part in self.parts:
            for role in ROLES:
                found = [place for place in self.parameters if (place.part, place.role) == (part, role)]
                if found:
                    count = sum(place.numel for place in found)
                    rows.append(
                        {
                            "part": part,
                            "role": role,
                            "tensors": len(found),
                            "parameters": count,
                            "percent": 100 * count / total,
                        }
                    )
        return rows


def find_parts(model: nn.Module) -> ModelParts:
    """The parts and places of `model`, on any device, meta included.

    Raises:
        InputError: a model without parameters.
    """
    parts = _Parts(model)
    named_norms = {id(module) for module in model.modules() if _is_norm(module)}
    layers = _layers_by_part(model, parts)
    owners = dict(model.named_modules())
    places = []
    seen_layer: set[str] = set()  # parts whose first layer has been passed
    for name, parameter in model.named_parameters():
        owner_name, _, attribute = name.rpartition(".")
        owner = owners[owner_name]
        part = parts.of(owner_name)
        layer = _layer_of(owner_name, layers)
        if layer is not None:
            seen_layer.add(part)
        if id(owner) in named_norms:
            role = "norm"
        elif layer is not None:
            role = _role_in_layer(owners, layer.name, owner_name, attribute, parameter)
        elif isinstance(owner, (nn.Embedding, nn.Conv2d, nn.Conv3d)):
            role = "embedding"
        elif part == "connector":
            role = "other"
        else:  # class tokens and the like come before the layers, what reads the last layer comes after
            role = "head" if part in seen_layer else "embedding"
        shape = tuple(parameter.shape)
        places.append(
            ParameterInfo(name, part, role, None if layer is None else layer.index, shape, _numel(parameter))
        )
    if not places:
        raise InputError(f"{type(model).__name__} has no parameters. Give a vision-language model.")
    present = {place.part for place in places}
    return ModelParts(tuple(part for part in PARTS if part in present), tuple(places))


def _numel(parameter: Tensor) -> int:
    """Values of a parameter; of one that bitsandbytes packed (4 bits a value), those that it stands for."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else parameter.numel()


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of every norm whose kind is known and that has a gain, in the model's order."""
    return {name: module for name, module in model.named_modules() if _kind(module) is not None}


def norm_kind(module: nn.Module) -> str:
    """ "layer", "rms", "rms_offset" (the gain is 1 + weight, as Gemma's) or "group".

    Raises:
        InputError: the module is not a norm of these kinds.
    """
    kind = _kind(module)
    if kind is None:
        raise InputError(
            f"{type(module).__name__} is not a norm that normtune knows. Choose full in its part."
        )
    return kind


def _kind(module: nn.Module) -> str | None:
    """The kind of a norm with a gain; None for any other module.

    Torch's own are told by type. Any other module with nothing but a gain [width] (and a bias) is tried on
    two numbers: a family's class need not be known, and Gemma's 1 + weight is told from LLaMA's weight.
    """
    if isinstance(getattr(module, "kind", None), str) and hasattr(module, "groups"):
        return module.kind  # type: ignore[return-value]  # a TunedNorm
    weight = module._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        return None
    for known, kind in ((nn.LayerNorm, "layer"), (nn.RMSNorm, "rms"), (nn.GroupNorm, "group")):
        if isinstance(module, known):  # a subclass may norm another axis (SAM's, channels first)
            return kind if weight.ndim == 1 and type(module).forward is known.forward else None
    own = {name for name, parameter in module._parameters.items() if parameter is not None}
    if own - {"weight", "bias"} or module._modules or weight.ndim != 1:
        return None
    if not (hasattr(module, "eps") or hasattr(module, "variance_epsilon")):
        return None
    if len(inspect.signature(type(module).forward).parameters) != 2:  # a gated norm takes its gate too
        return None
    return _probe_norm_kind(module, "bias" in own)


def probe_norm(module: nn.Module, x: Tensor, gain: Tensor, shift: Tensor | None = None) -> Tensor:
    """What a norm would make of x [rows, width] with this gain and bias [width]; it is left alone."""
    probe: Any = copy.copy(module)
    own = {"weight": gain} if shift is None else {"weight": gain, "bias": shift}
    given = {name: nn.Parameter(value, requires_grad=False) for name, value in own.items()}
    probe._parameters = {**module._parameters, **given}
    if hasattr(probe, "normalized_shape"):
        probe.normalized_shape = tuple(gain.shape)
    with torch.no_grad(), torch.device("cpu"):
        return type(module).forward(probe, x)


def _probe_norm_kind(module: nn.Module, has_bias: bool) -> str | None:
    """The kind that explains what a norm makes of two numbers; its parameters and hooks are left alone."""
    x, gain, shift = torch.tensor([[3.0, 5.0]]), torch.tensor([0.5, 4.0]), torch.tensor([0.25, -1.0])
    try:
        got = probe_norm(module, x, gain, shift if has_bias else None)
    except Exception:  # whatever a foreign module raises on two numbers, it is no norm of these kinds
        return None
    if not isinstance(got, Tensor) or got.shape != x.shape:
        return None
    extra = shift if has_bias else torch.zeros(2)
    rms = x * x.square().mean(-1, keepdim=True).rsqrt()
    layer = torch.tensor([[-1.0, 1.0]])
    expected = {
        "rms": rms * gain + extra,
        "rms_offset": rms * (1 + gain) + extra,
        "layer": layer * gain + extra,
    }
    if has_bias:  # `TunedNorm` has a bias for the layer kind alone
        expected = {"layer": expected["layer"]}
    for kind, values in expected.items():
        if torch.allclose(got.float(), values, rtol=1e-3, atol=1e-3):
            return kind
    return None


def _is_norm(module: nn.Module) -> bool:
    """Whether the module is a norm: of a known kind, or called one by its class."""
    if not any(parameter is not None for parameter in module._parameters.values()):
        return False
    return ("Norm" in type(module).__name__ and not module._modules) or _kind(module) is not None


class _Parts:
    """The roots of a model's parts, and the part of any module by its nearest root."""

    def __init__(self, model: nn.Module) -> None:
        self.tokens = _token_embedding(model)
        self.roots: dict[str, str] = {}  # module name -> part
        self.texts: list[str] = []
        self.heads: list[str] = []
        self._split("", model)
        several = len(self.texts) > 1
        for index, name in enumerate(self.texts):
            self.roots[name] = ("encoder" if index == 0 else "decoder") if several else "language"
        for name in self.heads:
            self.roots[name] = "decoder" if several else "language"
        for name, module in model.named_modules():
            if self.of(name) == "vision" and type(module).__name__.endswith("PatchMerger"):
                self.roots[name] = "connector"  # Qwen's vision module holds the connector

    def of(self, name: str) -> str:
        """The part of a module; what is under no root lies between the parts."""
        while name:
            if name in self.roots:
                return self.roots[name]
            name = name.rpartition(".")[0]
        return self.roots.get("", "connector")

    def _split(self, name: str, module: nn.Module) -> None:
        sees = any(_takes_images(one) for one in module.modules())
        embeds = any(isinstance(one, nn.Embedding) for one in module.modules())
        if getattr(module, "of_part", None) in PARTS:
            self.roots[name] = module.of_part  # type: ignore[assignment]  # a prefix, which was added
        elif sees and any(one is self.tokens for one in module.modules()):
            for child_name, child in module.named_children():
                self._split(f"{name}.{child_name}" if name else child_name, child)
        elif sees:
            self.roots[name] = "vision"
        elif embeds:
            self.texts.append(name)
        elif self.tokens is None:
            self.roots[name] = "language"
        elif getattr(module, "out_features", None) == self.tokens.num_embeddings:
            self.heads.append(name)
        else:
            self.roots[name] = "connector"


def _token_embedding(model: nn.Module) -> nn.Embedding | None:
    """The embedding of the (first) text part's tokens."""
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # not a transformers model: the largest vocabulary
        embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        found = max(embeddings, key=lambda one: one.num_embeddings, default=None)
    return found if isinstance(found, nn.Embedding) else None


def _takes_images(module: nn.Module) -> bool:
    """A convolution over pixels, or a transformers model whose input is images and no text."""
    modalities = getattr(module, "input_modalities", ())
    modalities = (modalities,) if isinstance(modalities, str) else modalities
    return isinstance(module, (nn.Conv2d, nn.Conv3d)) or ("image" in modalities and "text" not in modalities)


def part_of(model: nn.Module) -> Callable[[str], str]:
    """The part of a module or parameter, by its name in `model`; what a recipe added may stand in it."""
    return _Parts(model).of


@dataclass(frozen=True)
class _Layer:
    name: str
    index: int  # in its part


def is_attention(module: nn.Module) -> bool:
    """Whether query, key and value projections are the module's own children."""
    children = set(module._modules)
    return (
        isinstance(module, nn.MultiheadAttention)
        or bool(children & FUSED_PROJECTIONS)
        or any(split <= children for split in SPLIT_PROJECTIONS)
    )


def _holds_attention(module: nn.Module) -> bool:
    return any(is_attention(one) for one in module.modules())


def layers(model: nn.Module) -> dict[str, tuple[str, int]]:
    """Name of every layer -> (part, index in the part), in the model's order."""
    parts = _Parts(model)
    return {name: (parts.of(name), layer.index) for name, layer in _layers_by_part(model, parts).items()}


def _layers_by_part(model: nn.Module, parts: _Parts) -> dict[str, _Layer]:
    """Layer's module name -> layer; each part counts its own."""
    found: dict[str, _Layer] = {}
    counts: dict[str, int] = {}
    for name in _layer_names("", model):
        part = parts.of(name)
        found[name] = _Layer(name, counts.get(part, 0))
        counts[part] = counts.get(part, 0) + 1
    return found


def _layer_names(name: str, module: nn.Module) -> Iterator[str]:
    """Elements of the lists that hold attentions; of nested lists (stages of layers) the inner ones."""
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if _is_list(child) and any(_holds_attention(one) for one in child.children()):
            for index, element in child.named_children():
                stages = [one for one in element.modules() if one is not element and _is_stack(one)]
                inner = list(_layer_names(f"{path}.{index}", element)) if stages else []
                yield from inner or [f"{path}.{index}"]
        elif _holds_attention(child):
            yield from _layer_names(path, child)


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential))


def _is_stack(module: nn.Module) -> bool:
    """A list of layers; T5's list of a layer's own sublayers is none, its feed-forward has no attention."""
    return (
        _is_list(module) and bool(module._modules) and all(_holds_attention(one) for one in module.children())
    )


def _layer_of(name: str, layers: dict[str, _Layer]) -> _Layer | None:
    while name:
        if name in layers:
            return layers[name]
        name = name.rpartition(".")[0]
    return None


def _role_in_layer(
    owners: dict[str, nn.Module], layer: str, owner_name: str, attribute: str, parameter: Tensor
) -> str:
    """The role of a layer's parameter that is no norm's.

    An attention reaches up to the layer's own child, so that BERT's `attention.output.dense` belongs to it.
    """
    rest = owner_name[len(layer) + 1 :]
    below = f"{layer}.{rest.partition('.')[0]}" if rest else layer
    if (rest or is_attention(owners[layer])) and _holds_attention(owners[below]):
        return "attention"
    weight = owners[owner_name]._parameters.get("weight")
    linear = weight is not None and (weight.ndim >= 2 or hasattr(owners[owner_name], "out_features"))
    return "ffn" if linear or parameter.ndim >= 2 else "other"


def parameter_holders(
    model: nn.Module, parameters: Mapping[str, nn.Parameter]
) -> dict[str, list[ParameterHolder]]:
    """Name -> every (module, attribute) that holds the parameter; a tied parameter has several holders."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    holders: dict[str, list[ParameterHolder]] = {name: [] for name in parameters}
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if (name := names.get(id(parameter))) is not None:
                holders[name].append((module, attribute))
    assert all(holders.values()), "every trained parameter is held by a module of the model"
    return holders


def is_quantized(parameter: Tensor) -> bool:
    """Whether a parameter holds quantised values: whole numbers, or a tensor subclass around them."""
    return not parameter.is_floating_point() or type(parameter.data) is not Tensor
