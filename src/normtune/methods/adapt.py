"""Apply a recipe to a model: `tuned = adapt(model, "vision=ln,language=lora(r=4)")`.

This is the only module that decides which parameters train. Every trained parameter is fp32, because a bf16
value near 1 cannot take an AdamW step of 1e-4 (see `normtune.methods.norms`). A trained norm is replaced by a
`TunedNorm`. Any other trained tensor of a lower-precision base becomes an fp32 parameter that is cast to the
base's dtype at each use. All other parameters are frozen and keep their values and dtype.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from normtune.errors import InputError, did_you_mean
from normtune.methods.norms import TunedNorm
from normtune.methods.recipe import Recipe, parse, resolve
from normtune.methods.registry import ADDED, ALL_LINEAR, INTRINSIC, METHODS, Method, RecipeError
from normtune.methods.sites import AddedLayers, NoTarget, TargetLinear, linears_of_names
from normtune.models.norm_kinds import norms
from normtune.models.parts import (
    ModelParts,
    ParameterHolder,
    ParameterInfo,
    find_parts,
    is_quantized,
    parameter_holders,
    unused_parameters,
)


@dataclass
class TunedModel:
    """A model and the parameters that its recipe trains.

    Attributes:
        model: the adapted model, which trains in any loop.
        recipe: the recipe, with an entry for every part of the model.
        trained: name -> trained parameter; parameters of the base keep the base's names.
        methods: name of a trained parameter -> its method.
    """

    model: nn.Module
    recipe: Recipe
    parts: ModelParts  # of the base, before anything was added
    trained: dict[str, nn.Parameter]
    methods: dict[str, str]
    part_and_role: dict[str, tuple[str, str]]  # trained name -> (part, role), or (part, method) if added
    base_total: int  # parameters of the base
    additions: list[AddedLayers] = field(default_factory=list)
    left_out: int = 0  # values of the base that the recipe names and that the model never uses
    base_norms: dict[str, nn.Module] = field(default_factory=dict)  # the norms that were replaced, by name
    # only with `keep_base`: other trained parameters of the base, by name, and the base's trainable parameters
    base_parameters: dict[str, tuple[list[ParameterHolder], nn.Parameter]] = field(default_factory=dict)
    base_trainable: list[nn.Parameter] = field(default_factory=list)
    base_name: str = ""  # directory or hub name of the base
    base_fingerprint: str = ""  # see `normtune.adapters.fingerprint`; computed before the model was adapted
    active: bool = True  # False after `restore_base`
    is_imported: bool = False  # an adapter of PEFT: the recipe describes it, but does not make it again

    @property
    def trainable(self) -> int:
        """Number of trained parameters."""
        return sum(parameter.numel() for parameter in self.trained.values())

    @property
    def total(self) -> int:
        """Number of parameters of the base and of the added layers."""
        return self.base_total + sum(p.numel() for added in self.additions for p in added.parameters.values())

    @property
    def share(self) -> float:
        """Trained parameters divided by all parameters."""
        return self.trainable / self.total


class Cast(nn.Module):
    """Parametrisation that casts an fp32 parameter to the base's dtype; the gradient is fp32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype)


def adapt(
    model: nn.Module,
    recipe: Recipe | str,
    *,
    seed: int = 0,
    keep_base: bool = False,
    train_unused: bool = False,
    names: Collection[str] | None = None,
) -> TunedModel:
    """Make a model trainable, in place, as a recipe describes.

    Args:
        model: the base, without an adapter.
        recipe: a parsed recipe, or its text (see `normtune.methods.recipe`).
        seed: seeds the initial values of added layers; the caller's random state does not change.
        keep_base: train copies of the base's parameters, so that `restore_base` works for every recipe; this
            takes as much memory as the trained parameters. Norms are restored without it.
        train_unused: do not leave out the parameters that the model never uses (see `unused_parameters`).
        names: of the base's parameters that the recipe trains, only these are trained; None: all.

    Raises:
        InputError: the recipe does not fit the model. The model is then unchanged, but frozen.
    """
    # 1. Look everything up under the base's names, before anything changes. Adding layers renames parameters:
    #    PEFT turns `q_proj.weight` into `q_proj.base_layer.weight`. The holders are module objects, which
    #    stay the same.
    base = find_parts(model)
    resolved = resolve(parse(recipe) if isinstance(recipe, str) else recipe, base.parts)
    method_of = select_parameters(base, resolved)
    unused = frozenset() if train_unused else unused_parameters(model, base)
    left_out = sum(info.numel for info in base.parameters if info.name in method_of and info.name in unused)
    method_of = {name: m for name, m in method_of.items() if name not in unused and (names is None or name in names)}
    trained_of_base = {name: parameter for name, parameter in model.named_parameters() if name in method_of}
    holders_of = parameter_holders(model, trained_of_base)
    for name, holders in holders_of.items():
        parameter = getattr(*holders[0])
        if is_quantized(parameter):
            raise InputError(
                f"{name} is quantised ({type(parameter.data).__name__}, {parameter.dtype}), it can't be trained: "
                "choose ln or lora there, or load the base without --quantize."
            )
    # filled by the steps below
    tuned = TunedModel(model, resolved, base, {}, {}, {}, base.total, left_out=left_out)
    if keep_base:
        tuned.base_trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    # 2. Add layers (LoRA, prefixes, ...). This step may fail, so it comes before the steps that replace
    #    tensors of the base: added layers can be removed again, replaced values cannot be restored.
    # The caller's random state is restored afterwards: fork_rng does so for the CPU and for the GPUs that it is given.
    gpus = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    try:
        with torch.random.fork_rng(sorted(gpus, key=str)):
            torch.manual_seed(seed)
            _add_all_layers(tuned, unused)
        if not method_of and not tuned.additions and any(methods for _, methods in resolved.parts):
            raise RecipeError(f"recipe '{resolved}' finds nothing to train in this model. Change the recipe.")
    except InputError:
        restore_base(tuned)
        raise
    # 3. Make the base's trained tensors fp32: norms by a TunedNorm, all others by a cast at use.
    _replace_norms(tuned, {name: holders_of[name] for name in method_of})
    for name, holders in holders_of.items():
        if name not in tuned.trained:
            if keep_base:
                tuned.base_parameters[name] = holders, getattr(*holders[0])
            tuned.trained[name] = _train_in_fp32(holders, copy=keep_base)
    # 4. List what is trained: first the base's parameters in the base's order, then the added ones.
    tuned.trained = {name: tuned.trained[name] for name in method_of}
    info_of = {info.name: info for info in base.parameters}
    for name, method in method_of.items():
        tuned.methods[name] = method
        tuned.part_and_role[name] = (info_of[name].part, info_of[name].role)
    for addition in tuned.additions:
        tuned.trained |= addition.parameters
    # 5. Set requires_grad last: PEFT and the new modules switch it on for some parameters, which need not be trained.
    model.requires_grad_(False)
    for parameter in tuned.trained.values():
        assert parameter.dtype in (torch.float32, torch.float64), "trained parameters are fp32"
        parameter.requires_grad_(True)
    return tuned


def restore_base(tuned: TunedModel) -> nn.Module:
    """Remove the added layers and put the base's norms back; returns the model.

    Raises:
        InputError: other tensors of the base were trained, and their old values no longer exist.
    """
    restorable = {name for name in tuned.trained if name.rpartition(".")[0] in tuned.base_norms}
    restorable |= tuned.base_parameters.keys()
    restorable |= {name for addition in tuned.additions for name in addition.parameters}
    lost = [name for name in tuned.methods if name not in restorable]
    if lost:
        raise InputError(f"{lost[0]} was trained in place, its old values are not kept. Load the base again.")
    for addition in reversed(tuned.additions):  # in the reverse order of adding
        addition.remove()
    for name, norm in tuned.base_norms.items():
        tuned.model.set_submodule(name, norm)
    for holders, parameter in tuned.base_parameters.values():
        for module, attribute in holders:
            if parametrize.is_parametrized(module, attribute):
                parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
            setattr(module, attribute, parameter)
    for parameter in tuned.base_trainable:
        parameter.requires_grad_(True)
    tuned.active = False
    return tuned.model


def _add_all_layers(tuned: TunedModel, unused: frozenset[str]) -> None:
    """Add the layers of the recipe's added methods."""
    # Find the linears of all methods first: they are looked up by the base's names, which additions change.
    targets = [
        (part, method, _linears_of(tuned, part, method, unused))
        for part, methods in tuned.recipe.parts
        for method in methods
        if method.name in ADDED
    ]
    _check_target_names(targets)
    for part, method, linears in targets:
        # imported by name: PEFT takes a second to import, which the tuning of norms does not need
        module_name, function_name = ADDED[method.name]
        add_layers = getattr(import_module(f"normtune.methods.{module_name}"), function_name)
        try:
            addition: AddedLayers = add_layers(tuned.model, part, method, linears)
        except NoTarget:
            if part in tuned.recipe.optional:
                continue
            raise
        tuned.additions.append(addition)
        for name in addition.parameters:
            tuned.methods[name] = method.name
            tuned.part_and_role[name] = (part, method.name)


def _linears_of(tuned: TunedModel, part: str, method: Method, unused: frozenset[str]) -> list[TargetLinear]:
    """The linears of a part that the model uses, in the layers that the method covers, without the head."""
    layers = method.layer_range(tuned.parts.depth(part))
    get_head = getattr(tuned.model, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    linears = []
    for info in tuned.parts.parameters:
        name, _, attribute = info.name.rpartition(".")
        # a method without a range covers the part's linears outside the layers too
        covered = info.layer in layers if info.layer is not None else method.layers is None
        if info.part != part or not covered or info.name in unused:
            continue
        # a fused tensor of experts or a convolution has no linear to which a method could add
        module = tuned.model.get_submodule(name)
        if attribute == "weight" and isinstance(module, nn.Linear) and module is not head:
            linears.append(TargetLinear(name, info.role, info.layer, module))
    return linears


def _check_target_names(targets: Sequence[tuple[str, Method, list[TargetLinear]]]) -> None:
    """Raise RecipeError if `lora(targets=NAME)` names no linear in any of the parts that have this LoRA."""
    for method in dict.fromkeys(method for _, method, _ in targets if "targets" in METHODS[method.name]):
        linears = [linear for _, other, of_part in targets if other == method for linear in of_part]
        for name in filter(None, str(method.option("targets")).split("+")):
            if name != ALL_LINEAR and not linears_of_names(linears, name):
                names = sorted({linear.leaf for linear in linears if not linear.leaf.isdigit()})
                parts = ", ".join(part for part, other, _ in targets if other == method)
                raise RecipeError(
                    f"'{method}' finds no linear '{name}' in {parts}{did_you_mean(name, names)} "
                    f"(linears: {', '.join([*names, ALL_LINEAR])})"
                )


def _replace_norms(tuned: TunedModel, holders_of: Mapping[str, list[ParameterHolder]]) -> None:
    """Replace every norm that has a trained parameter by a `TunedNorm`."""
    # A trained parameter belongs to a norm if one of its holders is a norm. Other parameters are not handled
    # here; `adapt` makes them fp32 afterwards.
    norm_name_of = {id(module): name for name, module in norms(tuned.model).items()}
    trained_attributes: dict[str, dict[str, str]] = {}  # norm -> attribute -> trained name
    for name, holders in holders_of.items():
        for module, attribute in holders:
            if id(module) in norm_name_of:
                trained_attributes.setdefault(norm_name_of[id(module)], {})[attribute] = name
    for norm_name, attributes in trained_attributes.items():
        norm = tuned.model.get_submodule(norm_name)
        tuned.base_norms[norm_name] = norm
        replacement = TunedNorm.from_norm(norm)
        tuned.model.set_submodule(norm_name, replacement)
        for attribute, name in attributes.items():
            tuned.trained[name] = getattr(replacement, attribute)


def _train_in_fp32(holders: list[ParameterHolder], *, copy: bool) -> nn.Parameter:
    """Return the fp32 parameter that trains for a tensor of the base.

    It is the tensor itself (with `copy` a copy of it) if the tensor is fp32 or wider. Otherwise it is an fp32 copy,
    which the modules cast to the old dtype at each use.
    """
    module, attribute = holders[0]
    old = getattr(module, attribute)
    if old.dtype.itemsize >= torch.float32.itemsize:
        if not copy:
            return old
        new = nn.Parameter(old.detach().clone())
        for module, attribute in holders:
            setattr(module, attribute, new)
        return new
    # The optimiser updates `wide` (fp32). Each use of `module.weight` reads cast(wide), in the base's dtype,
    # so that the forward pass computes as before.
    wide = nn.Parameter(old.detach().float())
    for module, attribute in holders:  # tied tensors (embedding and head) share one fp32 parameter
        setattr(module, attribute, wide)
        parametrize.register_parametrization(module, attribute, Cast(old.dtype), unsafe=True)
    return wide


def select_parameters(base: ModelParts, recipe: Recipe) -> dict[str, str]:
    """The parameters of the base that a resolved recipe trains: name -> method, in the model's order.

    A parameter that several methods of its part select (`ln+full`) belongs to the first of them.

    Raises:
        RecipeError: a method finds nothing in a part that is not optional.
    """
    method_of: dict[str, str] = {}
    for part, methods in recipe.parts:
        for method in methods:
            if method.name not in INTRINSIC:
                continue
            names = [info.name for info in base.parameters if info.part == part and _selects(method, info, base)]
            if not names and part not in recipe.optional:
                raise RecipeError(_nothing_to_train(base, part, method))
            for name in names:
                method_of.setdefault(name, method.name)
    return {info.name: method_of[info.name] for info in base.parameters if info.name in method_of}


def _selects(method: Method, info: ParameterInfo, base: ModelParts) -> bool:
    """Whether a method trains a parameter of its part."""
    if method.layers is not None and info.layer not in method.layer_range(base.depth(info.part)):
        return False
    if method.name == "bias":
        return info.is_bias
    if method.name == "ln":
        return info.role == "norm" and bool(method.option("bias" if info.name.endswith("bias") else "gain"))
    return method.name == "full" or info.role == method.name  # attention and ffn are named after their role


def _nothing_to_train(base: ModelParts, part: str, method: Method) -> str:
    """Error message: which method finds nothing in which part, which parts would fit, and what to do."""
    # the same method without its layer range: does the part have any such parameter in other layers?
    all_layers = Method(method.name, method.options)
    fitting = [
        other
        for other in base.parts
        if any(info.part == other and _selects(all_layers, info, base) for info in base.parameters)
    ]
    if method.layers is not None and part in fitting:
        return f"'{method}' finds nothing: part '{part}' has {base.depth(part)} layers. Change the range"
    hint = f"parts that have some: {', '.join(fitting)}" if fitting else "no part of this model has any"
    return (
        f"'{method}' finds nothing in part '{part}'; {hint}. "
        f"Change the recipe, write '{part}?' to skip it, or run normtune inspect"
    )
