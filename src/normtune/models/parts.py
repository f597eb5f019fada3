"""Sorts the parameters of a vision-language model by part (vision, language, ...) and role (norm, ...).

Types and structure decide, never the names of models, so that it works for any torch model, including new
families, and on the meta device. The rules:

- vision tower: a module with a convolution, or a transformers model with images and no text as its input;
- text part: a module with token embeddings. One text part is "language"; of two, the first is "encoder" and
  the second "decoder". A linear with one output a token is a head and belongs to the last text part;
- connector: everything else, such as a projector between vision tower and language model;
- norm: a module of a known kind (`normtune.models.norm_kinds`), and any module without children with "Norm" in
  the name of its class;
- attention: a module with query, key and value projections as children, under one of the usual names;
- layer: an element of a list of modules, if elements of the list contain attentions.

Within a layer a parameter's role is norm, attention, ffn or other. Outside, it is an embedding if it is in an
embedding or a convolution or precedes the part's first layer, and belongs to the head if it follows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from normtune.errors import InputError
from normtune.models.norm_kinds import is_norm
from normtune.models.part_names import PARTS, ROLES

# Names of the children of an attention: one linear for query, key and value together ...
FUSED_PROJECTIONS = frozenset(("qkv", "qkv_proj", "query_key_value", "Wqkv", "c_attn", "in_proj_qkv", "in_proj_qkvz"))
# ... or one linear for each; all names of one of these sets must be present.
SPLIT_PROJECTIONS = (
    frozenset(("q_proj", "k_proj", "v_proj")),
    frozenset(("query", "key", "value")),
    frozenset(("q", "k", "v")),
    frozenset(("wq", "wk", "wv")),
    frozenset(("to_q", "to_k", "to_v")),
    frozenset(("kv_a_proj_with_mqa", "kv_b_proj")),  # DeepSeek's latent attention
    frozenset(("q_proj", "o_proj")),  # Gemma 4's layers that read the keys of an earlier layer
    frozenset(("in_proj", "conv", "out_proj")),  # LFM2's short convolution, which has the place of an attention
)

ParameterHolder = tuple[nn.Module, str]  # a module, and the name of its attribute that is a parameter


@dataclass(frozen=True)
class ParameterInfo:
    """Part, role and layer of one parameter."""

    name: str  # its name in `model.named_parameters()`; the first one if it is tied
    part: str  # one of PARTS
    role: str  # one of ROLES; "other" for all that is none of the others, such as a connector's projections
    layer: int | None  # the number of its layer within the part, from 0; None outside the layers
    shape: tuple[int, ...]  # its shape
    numel: int  # how many values it has; of a quantised parameter, before quantisation

    @property
    def is_bias(self) -> bool:
        """Whether it is a bias outside norms."""
        return self.role != "norm" and self.name.rpartition(".")[2].endswith("bias")


@dataclass(frozen=True)
class ModelParts:
    """The parts of a model, and part and role of every parameter; a tied parameter counts once."""

    parts: tuple[str, ...]  # in the order of PARTS
    parameters: tuple[ParameterInfo, ...]  # in the model's order

    @property
    def total(self) -> int:
        """The number of parameters (values) of the model."""
        return sum(parameter.numel for parameter in self.parameters)

    def count(self, part: str | None = None, role: str | None = None) -> int:
        """The number of parameters (values) of a part, of a role, or of a role in a part."""
        return sum(
            parameter.numel
            for parameter in self.parameters
            if part in (None, parameter.part) and role in (None, parameter.role)
        )

    def depth(self, part: str) -> int:
        """The number of layers of a part, up to the last one with parameters."""
        return 1 + max(
            (info.layer for info in self.parameters if info.part == part and info.layer is not None), default=-1
        )

    def table(self) -> list[dict[str, Any]]:
        """One row for each role of each part: part, role, tensors, parameters, percent of the total."""
        total = self.total
        rows: list[dict[str, Any]] = []
        for part in self.parts:
            for role in ROLES:
                parameters = [info for info in self.parameters if (info.part, info.role) == (part, role)]
                if parameters:
                    count = sum(info.numel for info in parameters)
                    rows.append(
                        {
                            "part": part,
                            "role": role,
                            "tensors": len(parameters),
                            "parameters": count,
                            "percent": 100 * count / total,
                        }
                    )
        return rows


def find_parts(model: nn.Module) -> ModelParts:
    """Find part, role and layer of every parameter of a model, on any device, including meta.

    Raises:
        InputError: the model has no parameters.
    """
    parts = _PartFinder(model)
    norm_ids = {id(module) for module in model.modules() if is_norm(module)}
    layers = _number_layers(model, parts)
    modules = dict(model.named_modules())
    parameters = []
    parts_with_layers: set[str] = set()  # parts with layers before the current parameter
    for name, parameter in model.named_parameters():
        module_name, _, attribute = name.rpartition(".")
        module = modules[module_name]
        part = parts.part_of(module_name)
        layer = _enclosing(module_name, layers)
        if layer is not None:
            parts_with_layers.add(part)
        if id(module) in norm_ids:
            role = "norm"
        elif layer is not None:
            role = _role_in_layer(modules, layer, module_name, attribute, parameter)
        elif isinstance(module, (nn.Embedding, nn.Conv2d, nn.Conv3d)):
            role = "embedding"
        elif part == "connector":
            role = "other"
        else:  # class tokens, position tables and so on precede the layers; heads and poolers follow them
            role = "head" if part in parts_with_layers else "embedding"
        index = None if layer is None else layers[layer]
        parameters.append(ParameterInfo(name, part, role, index, tuple(parameter.shape), _numel(parameter)))
    if not parameters:
        raise InputError(f"{type(model).__name__} has no parameters. Give a vision-language model.")
    present = {parameter.part for parameter in parameters}
    return ModelParts(tuple(part for part in PARTS if part in present), tuple(parameters))


def unused_parameters(model: nn.Module, base: ModelParts) -> frozenset[str]:
    """Names of the parameters that nothing depends on, so that they can never train.

    These are an encoder for sound, and the last layers of some image encoders: LLaVA takes the features from the
    states at `config.vision_feature_layer`, usually -2, so that the last layer and what follows it run for nothing.
    """
    audio = tuple(f"{name}." for name in _audio_modules(model))
    unused = [info.name for info in base.parameters if info.name.startswith(audio)]
    setting = getattr(getattr(model, "config", None), "vision_feature_layer", None)
    if setting is None:
        return frozenset(unused)
    depth = base.depth("vision")
    # states 0 are the embeddings, states n the output of layer n - 1; -1 is the output of the last layer
    last = max(
        index if index >= 0 else depth + 1 + index for index in ([setting] if isinstance(setting, int) else setting)
    )
    if last >= depth:
        return frozenset(unused)
    after_layers = False
    for info in base.parameters:
        if info.part == "vision":
            after_layers = after_layers or info.layer is not None
            if after_layers and (info.layer is None or info.layer >= last):
                unused.append(info.name)
    return frozenset(unused)


def _numel(parameter: Tensor) -> int:
    """The number of values of a parameter; if bitsandbytes packed it (4 bits a value), before packing."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else parameter.numel()


class _PartFinder:
    """Finds the root modules of a model's parts; any other module belongs to the part of its nearest root."""

    def __init__(self, model: nn.Module) -> None:
        self.tokens = _token_embedding(model)
        # a head is also recognised by its object: Llama 3.2 Vision's has fewer outputs than its embedding has tokens
        find_head = getattr(model, "get_output_embeddings", lambda: None)
        self.head = find_head() if hasattr(model, "lm_head") else None
        self.audio = _audio_modules(model)
        config: Any = getattr(model, "config", None)
        vision_type = getattr(getattr(config, "vision_config", None), "model_type", None)
        self.vision_type = None if vision_type == getattr(config, "model_type", None) else vision_type
        self.roots: dict[str, str] = {}  # module name -> part
        self.texts: list[str] = []  # names of the text parts' roots, in the model's order
        self.heads: list[str] = []  # names of heads outside the text parts
        self._split("", model)
        several = len(self.texts) > 1
        for index, name in enumerate(self.texts):
            self.roots[name] = ("encoder" if index == 0 else "decoder") if several else "language"
        for name in self.heads:
            self.roots[name] = "decoder" if several else "language"
        for name, module in model.named_modules():
            if self.part_of(name) == "vision" and type(module).__name__.endswith("PatchMerger"):
                self.roots[name] = "connector"  # Qwen's vision module contains the connector

    def part_of(self, name: str) -> str:
        """The part of a module, by its name; a module under no root belongs to the connector."""
        root = _enclosing(name, self.roots)
        return "connector" if root is None else self.roots[root]

    def _takes_images(self, module: nn.Module) -> bool:
        """Whether a module is a convolution over pixels, or a transformers model of images without text.

        The type in a model's config is compared too: Gemma 4's image encoder has no convolution.
        """
        modalities = getattr(module, "input_modalities", ())
        modalities = (modalities,) if isinstance(modalities, str) else modalities
        model_type = getattr(getattr(module, "config", None), "model_type", None)
        return (
            isinstance(module, (nn.Conv2d, nn.Conv3d))
            or ("image" in modalities and "text" not in modalities)
            or (model_type is not None and model_type == self.vision_type)
        )

    def _split(self, name: str, module: nn.Module) -> None:
        """Make a module a root, or split it into its children if it contains both images and text."""
        has_vision = name not in self.audio and any(map(self._takes_images, module.modules()))
        has_embedding = any(isinstance(child, nn.Embedding) for child in module.modules())
        if getattr(module, "of_part", None) in PARTS:  # a learned prefix, which a recipe has added
            self.roots[name] = module.of_part  # type: ignore[assignment]
        elif has_vision and any(child is self.tokens for child in module.modules()):
            for child_name, child in module.named_children():
                self._split(f"{name}.{child_name}" if name else child_name, child)
        elif has_vision:
            self.roots[name] = "vision"
        elif has_embedding:
            self.texts.append(name)
        elif self.tokens is None:  # a model without token embeddings: everything is one part
            self.roots[name] = "language"
        elif module is self.head or getattr(module, "out_features", None) == self.tokens.num_embeddings:
            self.heads.append(name)
        else:
            self.roots[name] = "connector"


def _token_embedding(model: nn.Module) -> nn.Embedding | None:
    """The token embedding of the (first) text part."""
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # not a transformers model: the largest vocabulary
        embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        embedding = max(embeddings, key=lambda table: table.num_embeddings, default=None)
    return embedding if isinstance(embedding, nn.Embedding) else None


def _audio_modules(model: nn.Module) -> list[str]:
    """Names of the outermost modules for sound, which no task here uses (Gemma 4 E2B)."""
    names = [name for name, _ in model.named_modules() if "audio" in name.rpartition(".")[2]]
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def part_of(model: nn.Module) -> Callable[[str], str]:
    """A function from the name of a module or parameter of `model` to its part.

    The model may contain modules that a recipe has added.
    """
    return _PartFinder(model).part_of


def is_attention(module: nn.Module) -> bool:
    """Whether the module has query, key and value projections as direct children."""
    children = set(module._modules)
    return (
        isinstance(module, nn.MultiheadAttention)
        or bool(children & FUSED_PROJECTIONS)
        or any(split <= children for split in SPLIT_PROJECTIONS)
    )


def _holds_attention(module: nn.Module) -> bool:
    return any(is_attention(child) for child in module.modules())


def layers(model: nn.Module) -> dict[str, tuple[str, int]]:
    """Name of every layer -> (part, index in the part), in the model's order."""
    parts = _PartFinder(model)
    return {name: (parts.part_of(name), index) for name, index in _number_layers(model, parts).items()}


def _number_layers(model: nn.Module, parts: _PartFinder) -> dict[str, int]:
    """Module name of every layer -> its number; each part counts from 0."""
    numbers: dict[str, int] = {}
    counts: Counter[str] = Counter()  # layers of each part so far
    for name in _layer_names("", model):
        part = parts.part_of(name)
        numbers[name] = counts[part]
        counts[part] += 1
    return numbers


def _layer_names(name: str, module: nn.Module) -> Iterator[str]:
    """Names of the elements of lists that contain attentions.

    Of nested lists (stages of layers) these are the inner elements: `encoder.stages.0.blocks.2` is a layer,
    `encoder.stages.0` is not.
    """
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if _is_list(child) and any(_holds_attention(element) for element in child.children()):
            for index, element in child.named_children():
                stacks = [part for part in element.modules() if part is not element and _is_stack(part)]
                inner = list(_layer_names(f"{path}.{index}", element)) if stacks else []
                yield from inner or [f"{path}.{index}"]
        elif _holds_attention(child):
            yield from _layer_names(path, child)


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential))


def _is_stack(module: nn.Module) -> bool:
    """Whether a module is a list of layers: a list in which every element contains an attention.

    T5's list of the sublayers of one layer is not, since the feed-forward has no attention.
    """
    return (
        _is_list(module) and bool(module._modules) and all(_holds_attention(element) for element in module.children())
    )


def _enclosing(name: str, modules: Container[str]) -> str | None:
    """The innermost of some modules that contains the module `name` or is it; None if none does.

    For example, of the modules "vision" and "vision.layers.0", the second contains "vision.layers.0.mlp".
    """
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name if name in modules else None


def _role_in_layer(
    modules: dict[str, nn.Module], layer: str, module_name: str, attribute: str, parameter: Tensor
) -> str:
    """The role of a layer's parameter that does not belong to a norm.

    A direct child of the layer that contains an attention is attention as a whole, so that BERT's
    `attention.output.dense` belongs to it.
    """
    rest = module_name[len(layer) + 1 :]
    child = f"{layer}.{rest.partition('.')[0]}" if rest else layer
    if (rest or is_attention(modules[layer])) and _holds_attention(modules[child]):
        return "attention"
    weight = modules[module_name]._parameters.get("weight")
    # a quantised linear may pack its weight into one dimension
    linear = weight is not None and (weight.ndim >= 2 or hasattr(modules[module_name], "out_features"))
    return "ffn" if linear or parameter.ndim >= 2 else "other"


def parameter_holders(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, list[ParameterHolder]]:
    """Name -> every (module, attribute) that is the parameter; a tied parameter has several."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    holders: dict[str, list[ParameterHolder]] = {name: [] for name in parameters}
    for module in model.modules():
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if (name := names.get(id(parameter))) is not None:
                holders[name].append((module, attribute))
    assert all(holders.values()), "every trained parameter is an attribute of a module of the model"
    return holders


def is_quantized(parameter: Tensor) -> bool:
    """Whether a parameter is quantised: it contains integers, or is a tensor subclass around them."""
    return not parameter.is_floating_point() or type(parameter.data) is not Tensor
