"""Recurrent layers over a tree of runs: each run continues from the state that its parent leaves, with gradients.

A mask decides what attention sees, but linear attention and convolutions carry a state from token to token, and in a
row of several questions it would pass from one question to the next. Such a layer therefore takes its row apart: it
computes the runs of `normtune.models.causal.shared_prefix` in passes, the prefixes first, and hands the state after
each run to all runs that continue it. Everything around it stays one row: other layers, norms, feed-forwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normtune.errors import InputError
from normtune.models.causal.shared_prefix import SharedSequence

# Example: a prefix of three tokens (i), the questions q q a and r r r b, and the turn s that continues the first.
#
#     pass 0   i i i            from no state; leaves a state
#     pass 1   q q a            from the state of i i i; leaves a state
#     pass 2   s . . .          from the state of q q a
#              r r r b          from the state of i i i
#
# Runs that are continued are computed without padding, since a state would change at padding: each of these passes has
# runs of one length. The others end here, so that they are one pass, padded on the right.

RECURRENT = {"linear_attention": "linear_attn", "conv": "conv"}  # kind of layer -> the attribute that carries a state
PASSES = "passes"  # key of `run_passes` in a batch
MIN_TOKENS = 2  # of the padded pass: kernels for a single token have no backward pass
_CACHE_NAMES = ("cache", "cache_params", "past_key_values")  # names of the cache argument, by version of transformers

State = tuple[Tensor, Tensor | None]
"""The last inputs of the convolution [runs, channels, kernel], and the recurrent state [runs, ...] if there is one."""


def run_passes(sequence: SharedSequence, *, keep_states: bool = False) -> dict[str, Any]:
    """Divide the runs of a layout into passes.

    For the example above, with the row `i i i q q a s r r r b` (rows 0 to 10 of the flattened tokens):

        pass_0   tokens [[0, 1, 2]]                        leaves state 0
        pass_1   tokens [[3, 4, 5]]                        parents [0], leaves state 1
        pass_2   tokens [[6, 6, 6, 6], [7, 8, 9, 10]]      parents [1, 0]; s is repeated as padding
        order    [0, 1, 2, 3, 4, 5, 6, 10, 11, 12, 13]     the outputs of the padding, 7 to 9, are not used

    Args:
        keep_states: compute the state after every segment too, to generate from it.

    Returns:
        order: [B * S] long, for each token its row in the outputs of all passes; padding has the row after the last.
        last: [segments] long, the state after each segment: its index among the states after all unpadded runs.
        pass_0, pass_1, ...: `tokens` [runs, L] long, the rows of the flattened [B * S] tokens; `parents` [runs] long,
            the state from which each run starts (missing in the first passes); `is_continued`, if states are left.
    """
    runs = sequence.runs
    continued = set(range(len(runs))) if keep_states else {run.parent for run in runs}
    depths: list[int] = []  # of each run: how many runs it continues
    passes: dict[tuple[int, int], list[int]] = {}  # (depth, length) -> runs; sorted, parents come first
    last_pass = (len(runs), 0)  # the key of the padded pass, larger than all others
    for index, run in enumerate(runs):
        depths.append(depths[run.parent] + 1 if run.parent >= 0 else 0)
        # a prefix without segments is the start of nothing, but has no parent either
        is_inner = index in continued or run.parent < 0
        passes.setdefault((depths[index], len(run.rows)) if is_inner else last_pass, []).append(index)
    state_of: dict[int, int] = {}  # run -> the number of the state that it leaves
    result: dict[str, Any] = {}
    order = torch.full((sequence.input_ids.numel(),), -1)
    offset = 0  # outputs of the passes so far, padding included
    for number, (key, members) in enumerate(sorted(passes.items())):
        length = max(len(runs[index].rows) for index in members)
        length = max(length, MIN_TOKENS) if key == last_pass else length
        rows = [[*runs[index].rows] + [runs[index].rows[0]] * (length - len(runs[index].rows)) for index in members]
        step: dict[str, Any] = {"tokens": torch.tensor(rows), "is_continued": key != last_pass}
        if runs[members[0]].parent >= 0:
            step["parents"] = torch.tensor([state_of[runs[index].parent] for index in members])
        for place, index in enumerate(members):
            first = offset + place * length
            order[torch.tensor(runs[index].rows)] = torch.arange(first, first + len(runs[index].rows))
            if key != last_pass:
                state_of[index] = len(state_of)
        offset += len(members) * length
        result[f"pass_{number}"] = step
    result["order"] = torch.where(order >= 0, order, offset)
    if keep_states:
        result["last"] = torch.tensor([state_of[run] for run in sequence.last_runs])
    return result


class LayerCache:
    """One layer's states during one pass, in place of transformers' cache: the past is only read.

    Transformers' cache copies new states over the old ones, which autograd does not allow.

    Attributes:
        past: the states from which the runs start; None: there are none.
        new: the states after the runs.
    """

    record_past = True  # otherwise layers write the convolution's inputs in place where there is one token

    def __init__(self, past: State | None) -> None:
        self.past = past
        self.new: list[Tensor | None] = [None, None]

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return None if self.past is None else self.past[0]

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return None if self.past is None else self.past[1]

    def is_recording_past(self, layer_idx: int) -> bool:
        return self.record_past

    # before transformers 5.24, layers read these attributes of `layers[layer_idx]`
    def has_previous_state(self, layer_idx: int = 0, state_idx: int = 0) -> bool:
        return self.past is not None

    @property
    def layers(self) -> Any:
        return _Always(self)

    @property
    def conv_states(self) -> dict[int, Tensor | None]:
        return {0: self.get_conv_state(0)}

    @property
    def recurrent_states(self) -> dict[int, Tensor | None]:
        return {0: self.get_recurrent_state(0)}

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *, conv_kernel_size: int, **_: Any) -> Tensor:
        """Put the past's inputs before the new ones [runs, channels, L]; zeros if there is no past."""
        past = self.get_conv_state(layer_idx)
        whole = F.pad(conv_states, (conv_kernel_size, 0)) if past is None else torch.cat((past, conv_states), -1)
        self.new[0] = whole[..., -conv_kernel_size:]
        return whole

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, **_: Any) -> Tensor:
        self.new[1] = recurrent_states
        return recurrent_states


class _Always:
    """A sequence with one value at every index."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __getitem__(self, index: int) -> Any:
        return self.value


Forward = Callable[[Tensor, State | None], tuple[Tensor, State]]  # (states, past) -> (outputs, new past)


class RunTree:
    """Computes a recurrent layer over a layout; given in place of its attention mask."""

    def __init__(self, passes: dict[str, Any]) -> None:
        self.passes = [step for name, step in passes.items() if name.startswith("pass_")]
        self.order, self.last_states = passes["order"], passes.get("last")
        self.last: dict[int, State] = {}  # with `keep_states`, layer -> its states after each segment

    def compute(self, layer: int, states: Tensor, forward: Forward) -> Tensor:
        """Compute a layer: states [B, S, width] -> outputs [B, S, width]."""
        flat = states.flatten(0, 1)  # [B * S, width]
        outputs: list[Tensor] = []
        left: list[State] = []  # of all passes so far
        for step in self.passes:
            past = _select(_join(left), step["parents"]) if "parents" in step else None
            output, new = forward(flat.index_select(0, step["tokens"].flatten()).view(*step["tokens"].shape, -1), past)
            outputs.append(output.flatten(0, 1))
            if step["is_continued"]:
                left.append(new)
        if self.last_states is not None:
            self.last[layer] = _select(_join(left), self.last_states)
        outputs.append(torch.zeros_like(outputs[0][:1]))  # for padding
        return torch.cat(outputs).index_select(0, self.order).view(*states.shape[:2], -1)


class AnswerStates:
    """The states of a recurrent layer after each answer so far; given in place of its attention mask.

    Args:
        last: layer -> its states, one an answer.
    """

    def __init__(self, last: dict[int, State]) -> None:
        self.last = last
        self.at: tuple[Tensor, Tensor] | None = None  # the row and the slot of each answer in the states of a step

    def select(self, answers: Tensor) -> None:
        """Continue answer r from answer `answers[r]`."""
        self.last = {layer: _select(state, answers) for layer, state in self.last.items()}

    def compute(self, layer: int, states: Tensor, forward: Forward) -> Tensor:
        """Compute the next token of each answer: states [B, slots, width] -> outputs [B, slots, width]."""
        assert self.at is not None, "answers have slots"
        output, new = forward(states[self.at][:, None], self.last[layer])
        for before, after in zip(self.last[layer], new, strict=True):
            if before is not None and after is not None:
                before.copy_(after)  # in place, so that a captured step finds it
        return torch.zeros_like(states).index_put(self.at, output[:, 0])


def _select(state: State, index: Tensor) -> State:
    convolution, recurrent = state
    return convolution.index_select(0, index), None if recurrent is None else recurrent.index_select(0, index)


def _join(states: list[State]) -> State:
    if len(states) == 1:
        return states[0]
    convolutions, recurrent = zip(*states, strict=True)
    return torch.cat(convolutions), None if recurrent[0] is None else torch.cat(recurrent)


def recurrent_kinds(config: Any) -> tuple[str, ...]:
    """The kinds of layers of a language model that carry a state from token to token."""
    return tuple(sorted({*(getattr(config, "layer_types", None) or ())} & RECURRENT.keys()))


def use_run_passes(decoder: Any) -> None:
    """Let the recurrent layers of a language model compute runs in passes where they get a `RunTree`.

    Raises:
        InputError: a layer is not built like those that are known.
    """
    for index, (layer, kind) in enumerate(zip(decoder.layers, decoder.config.layer_types, strict=True)):
        if kind in RECURRENT:
            module = getattr(layer, RECURRENT[kind], None)
            if module is None or (name := _cache_name(type(module))) is None:
                raise InputError(
                    f"layer {index} of the language model is of kind {kind}, but not built like those of Qwen3.5 or "
                    "LFM2, so that its state cannot be handed on. Use another version of transformers or another model."
                )
            module.forward = partial(_compute, module, index, name)


def _compute(
    module: nn.Module, layer: int, cache_name: str, hidden_states: Tensor, attention_mask: Any = None, **options: Any
) -> Tensor:
    """The forward of a recurrent layer."""
    stock: Any = type(module).forward
    if not isinstance(attention_mask, RunTree | AnswerStates):
        return stock(module, hidden_states, attention_mask=attention_mask, **options)
    options = {key: value for key, value in options.items() if key not in _CACHE_NAMES}

    def forward(states: Tensor, past: State | None) -> tuple[Tensor, State]:
        layer_cache = LayerCache(past)
        output = stock(module, states, **{cache_name: layer_cache}, **options)
        convolution, recurrent = layer_cache.new
        assert convolution is not None, "these layers have a convolution"
        return output, (convolution, recurrent)

    return attention_mask.compute(layer, hidden_states, forward)


def _cache_name(layer_class: type[nn.Module]) -> str | None:
    parameters = inspect.signature(layer_class.forward).parameters
    return next((name for name in _CACHE_NAMES if name in parameters), None)
