"""The self-test of grouping: may the questions of one image share its forward pass in this type of model?

A model of a type that no family knows is built with few layers, small widths and random weights in fp32. Losses,
gradients and answers of grouped questions are compared with transformers' forward pass and `generate` of each question
alone.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from normtune.data.groups import Group
from normtune.models.types import SelfTest

if TYPE_CHECKING:
    from normtune.models.causal.family import CausalFamily
    from normtune.models.types import Pixels

TOLERANCE = 1e-5  # of losses, in fp32
GRADIENT_TOLERANCE = 1e-4  # of each gradient, relative to its norm; gradients are sums of more numbers than losses
LAYERS = 3  # of each part, in the small model
WINDOW = 8  # tokens; shorter than the rows of the test, so that windows take part in it
HEADS = 2
MAX_INTERMEDIATE = 64  # width of feed-forwards
MAX_PARAMETERS = (
    200_000_000  # of the small model: 0.8 GB, and as much for its gradients; nearly all are token embeddings
)
NEW_TOKENS = 4
SIZES = ((64, 64), (64, 32))  # of the test's images, in pixels; cut into few tiles
# (image, question, answer, the earlier turn)
QUESTIONS: Sequence[tuple[int, str, str, tuple[tuple[str, str], ...]]] = (
    (0, "What is the modality of this image?", "MRI", ()),
    (0, "Is there a fracture of the left rib?", "no", ()),
    (0, "Which organ is abnormal?", "lung, liver and heart", (("What is the modality of this image?", "MRI"),)),
    (1, "Is the heart normal in size?", "Yes.", ()),
)


_results: dict[str, SelfTest] = {}


def run_self_test(family_class: Callable[..., CausalFamily], model: Any, processor: Any) -> SelfTest:
    """Test a model, once a process for each config.

    Args:
        family_class: called with a model, its processor and `grouped`.
        model: the model, of which only config and generation config are used; it may be on the meta device.
    """
    key = f"{model.config.to_json_string()} {type(processor).__name__} {processor.chat_template}"
    if key not in _results:
        _results[key] = _test(family_class, model, processor)
    return _results[key]


def _test(family_class: Callable[..., CausalFamily], model: Any, processor: Any) -> SelfTest:
    kind = model.config.model_type
    with torch.random.fork_rng([]), torch.device("cpu"):
        torch.manual_seed(0)
        try:
            separate = family_class(
                _small_model(model, lambda small: _losses(family_class, small, processor)), processor, grouped=False
            )
        except Exception as error:
            return SelfTest(kind, False, f"no small model of this type could be made: {_line(error)}")
        try:
            grouped = family_class(copy.deepcopy(separate.model), processor, grouped=True)
            return _compare(kind, separate, grouped)
        except Exception as error:
            return SelfTest(kind, False, _line(error))


def _losses(family_class: Callable[..., CausalFamily], model: Any, processor: Any) -> None:
    """Raise an error if a model cannot compute the questions alone."""
    family = family_class(model, processor, grouped=False)
    with torch.no_grad():
        family.loss(family.collate(*_questions(family, answered=True)))


def _compare(kind: str, separate: CausalFamily, grouped: CausalFamily) -> SelfTest:
    losses, gradients = zip(*(_loss_and_gradients(family) for family in (grouped, separate)), strict=True)
    loss_error = float(((losses[0] - losses[1]).abs() / losses[1].abs()).max())
    gradient_error = _gradient_error(*gradients)
    if not (loss_error <= TOLERANCE and gradient_error <= GRADIENT_TOLERANCE):
        reason = f"errors: loss {loss_error:.0e}, gradients {gradient_error:.0e}"
        return SelfTest(kind, False, reason, loss_error, gradient_error)
    answers = [
        family.generate_tokens(*_questions(family, answered=False), max_new_tokens=NEW_TOKENS, beams=1)
        for family in (grouped, separate)
    ]
    same = [first.tokens == second.tokens for first, second in zip(*answers, strict=True)]
    different = None if all(same) else f"{same.count(False)} of {len(same)} answers differ"
    return SelfTest(kind, different is None, different, loss_error, gradient_error)


def _questions(family: CausalFamily, *, answered: bool) -> tuple[list[Group], list[list[Pixels]]]:
    groups, pixels = [], []
    for number, (width, height) in enumerate(SIZES):
        noise = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(number))
        segments = tuple(
            family.tokenize(str(number), question, answer if answered else None, history=history)
            for image, question, answer, history in QUESTIONS
            if image == number
        )
        groups.append(Group((str(number),), segments))
        pixels.append([family.preprocess_image(Image.fromarray(noise.to(torch.uint8).numpy()))])
    return groups, pixels


def _loss_and_gradients(family: CausalFamily) -> tuple[Tensor, dict[str, Tensor]]:
    """The negative log-probability of each answer, and the gradients of their sum."""
    losses = -family.log_probs(family.collate(*_questions(family, answered=True)))
    losses.sum().backward()
    gradients = {name: p.grad for name, p in family.model.named_parameters() if p.grad is not None}
    return losses.detach(), gradients


def _gradient_error(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error of a gradient, relative to its norm; to the largest norm if it is zero apart from rounding."""
    largest = max(float(gradient.norm()) for gradient in expected.values())
    errors = [0.0]
    for name in actual.keys() | expected.keys():
        some = expected.get(name, actual.get(name))
        zero = torch.zeros_like(some)  # type: ignore[arg-type]
        result, reference = actual.get(name, zero), expected.get(name, zero)
        norm = float(reference.norm())
        errors.append(float((result - reference).norm()) / (norm if norm > GRADIENT_TOLERANCE * largest else largest))
    return max(errors)


def _small_model(model: Any, try_out: Callable[[Any], None]) -> nn.Module:
    """The model with few layers and narrow, with random weights; with all of its width if that does not work."""
    for narrow in (True, False):
        try:
            config = small_config(model.config, narrow=narrow)
            with torch.device("meta"):
                size = sum(p.numel() for p in AutoModelForImageTextToText.from_config(config).parameters())
            if size > MAX_PARAMETERS:
                raise ValueError(f"with {LAYERS} layers it has {size:,} parameters")
            small = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
            _randomise(small)
            small.generation_config = copy.deepcopy(model.generation_config)
            try_out(small)
            return small
        except Exception:
            if not narrow:
                raise
    raise AssertionError("one of both returns or raises")


def small_config(config: Any, *, narrow: bool) -> Any:
    """A copy of a model's config with `LAYERS` layers in each part (one of each kind at least) and short windows.

    Args:
        narrow: make the parts narrow too; see `_narrow`.
    """
    values = copy.deepcopy(config.to_dict())
    text_values = next(
        (
            values[name]
            for name in ("text_config", "llm_config", "language_config")
            if isinstance(values.get(name), dict)
        ),
        values,
    )
    for part in _parts(values):
        _fewer_layers(part)
        for name, value in part.items():
            if re.search("window|attention_chunk", name) and type(value) is int and part is text_values:
                part[name] = min(value, WINDOW)
            elif re.fullmatch(r"(num_|n_routed_|num_local_)?experts", name) and type(value) is int:
                part[name] = min(value, max(2 * HEADS, part.get("num_experts_per_tok") or 0))
    if narrow:
        _narrow(values)
    return type(config).from_dict(values)


def _narrow(values: dict[str, Any]) -> None:
    """Leave two heads of their size in each part, and change the widths of other parts that equal a part's width."""
    widths: dict[int, int] = {}
    for part in _parts(values):
        width_name = "embed_dim" if "embed_dim" in part else "hidden_size"
        heads_name = "num_heads" if "num_heads" in part else "num_attention_heads"
        width, heads = part.get(width_name), part.get(heads_name)
        if width and heads:
            widths[width] = HEADS * (part.get("head_dim") or width // heads)
            if key_heads := part.get("num_key_value_heads"):
                part["num_key_value_heads"] = HEADS if key_heads == heads else 1
            part |= {heads_name: HEADS}
    for part in _parts(values):
        for name, value in part.items():
            if type(value) is int and name.endswith(("hidden_size", "embed_dim", "projection_dim")) and value in widths:
                part[name] = widths[value]
            elif type(value) is int and "intermediate" in name:
                part[name] = min(value, MAX_INTERMEDIATE)


def _parts(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A config and the configs in it."""
    yield values
    for value in values.values():
        if isinstance(value, dict) and "model_type" in value:
            yield from _parts(value)


def _fewer_layers(part: dict[str, Any]) -> None:
    """Keep the first layers of a part, and the first of each further kind."""
    name = next((name for name in ("num_hidden_layers", "depth", "num_layers", "n_layer") if part.get(name)), None)
    if name is None:
        return
    depth = part[name]
    kinds = part.get("layer_types") or [""] * depth
    selected = [layer for layer, kind in enumerate(kinds) if layer < LAYERS - 1 or kind not in kinds[:layer]]
    selected = sorted({*selected, *range(min(depth, LAYERS))})
    for key, value in part.items():
        if isinstance(value, list) and len(value) == depth > LAYERS:
            part[key] = [value[layer] for layer in selected]
    part[name] = len(selected)


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    """Draw weights with which states neither vanish nor explode, so that a wrong mask shows in the loss."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def _line(error: Exception) -> str:
    """The first line of an error, with its kind unless it is one of ours."""
    text = next(iter(str(error).strip().splitlines()), "")
    return text if type(error).__name__ == "InputError" else f"{type(error).__name__}: {text}"
