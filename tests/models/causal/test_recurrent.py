"""Recurrent layers over a tree of runs; loss, gradients and answers are compared in `families/test_families.py`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import Lfm2Config, Lfm2Model

from normtune.errors import InputError
from normtune.models.causal.attention import attention_windows
from normtune.models.causal.recurrent import AnswerStates, RunTree, State, recurrent_kinds, run_passes, use_run_passes
from normtune.models.causal.shared_prefix import RowLayout, dense_mask, mask_tokens, shared_sequence
from tests.models.causal.test_shared_prefix import conversation, example
from tests.support.tolerance import assert_close, assert_gradients_close


def running_sum(states: Tensor, past: State | None) -> tuple[Tensor, State]:
    """A recurrent layer: each token's output is the sum of the inputs so far."""
    sums = states.cumsum(1) + (0 if past is None else past[0])
    return sums, (sums[:, -1:], None)


@pytest.mark.parametrize("keep_states", [False, True])
@pytest.mark.parametrize("rows", ["pad", "pack"])
def test_each_run_continues_from_the_state_of_its_parent(rows: RowLayout, keep_states: bool) -> None:
    groups, prefixes = (one + other for one, other in zip(example(), conversation(), strict=True))
    s = shared_sequence(groups, prefixes, 0, rows=rows)
    inputs = s.input_ids.double()[..., None].requires_grad_()  # [B, S, 1]
    tree = RunTree(run_passes(s, keep_states=keep_states))
    outputs = tree.compute(0, inputs, running_sum)
    for segment in range(s.segment_count):
        path = [row for tokens in s.rows_of(segment) for row in tokens]
        expected = inputs.flatten()[path].cumsum(0)
        assert torch.equal(outputs.flatten()[path], expected)
        (gradient,) = torch.autograd.grad(outputs.flatten()[path[-1]], inputs, retain_graph=True)
        assert gradient.flatten().nonzero().flatten().tolist() == sorted(path)
        if keep_states:
            assert float(tree.last[0][0][segment].detach()) == float(expected[-1].detach())
    assert not outputs[s.segment_of < 0].any()


def test_answers_continue_from_the_states_of_others() -> None:
    sums = torch.tensor([[[3.0]], [[5.0]]])
    answers = AnswerStates({0: (sums, None)})
    answers.select(torch.tensor([1, 1, 0]))
    answers.at = (torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0]))
    outputs = answers.compute(0, torch.tensor([[[1.0], [2.0]], [[4.0], [9.0]]]), running_sum)
    assert outputs.tolist() == [[[6.0], [7.0]], [[7.0], [0.0]]]
    assert answers.last[0][0].flatten().tolist() == [6.0, 7.0, 7.0]


def test_layers_that_nothing_controls_are_refused() -> None:
    with pytest.raises(InputError, match="layers of kind mamba, in which questions of one image would see each other"):
        attention_windows(SimpleNamespace(layer_types=["full_attention", "conv", "mamba"]))
    hybrid = SimpleNamespace(layer_types=["conv", "sliding_attention", "linear_attention"], sliding_window=5)
    assert attention_windows(hybrid) == {"sliding_attention": 5}
    assert recurrent_kinds(hybrid) == ("conv", "linear_attention")


def test_a_recurrent_layer_of_another_build_is_refused() -> None:
    layer = nn.Module()
    layer.conv = nn.Conv1d(2, 2, 3)
    decoder = SimpleNamespace(layers=[layer], config=SimpleNamespace(layer_types=["conv"]))
    with pytest.raises(InputError, match="layer 0 of the language model is of kind conv, but not built like those"):
        use_run_passes(decoder)


def test_short_convolutions_equal_single_sequences() -> None:
    """LFM2, whose convolutions have no recurrent state, with turns that share their history."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    layers = ["conv", "full_attention", "conv"]
    config = Lfm2Config(
        vocab_size=64, num_hidden_layers=3, layer_types=layers, conv_L_cache=3, block_auto_adjust_ff_dim=False, **sizes
    )
    model = Lfm2Model(config).double().eval()
    use_run_passes(model)
    groups, prefixes = (one + other for one, other in zip(example(), conversation(), strict=True))
    s = shared_sequence(groups, prefixes, 0)
    mask = dense_mask(mask_tokens(s.group_of, s.segment_of, s.segment_end))
    masks = {
        "full_attention": torch.zeros_like(mask, dtype=torch.float64).masked_fill(~mask, -torch.inf),
        "conv": RunTree(run_passes(s)),
    }
    states = model(inputs_embeds=model.embed_tokens(s.input_ids), attention_mask=masks, position_ids=s.position_ids)
    weights = torch.randn(32, dtype=torch.float64)
    paths = [[row for tokens in s.rows_of(segment) for row in tokens] for segment in range(s.segment_count)]
    flat = states.last_hidden_state.flatten(0, 1) @ weights
    shared = torch.cat([flat[path] for path in paths])
    singles = (model(input_ids=s.input_ids.flatten()[path][None]).last_hidden_state[0] @ weights for path in paths)
    separate = torch.cat([*singles])
    assert_close(shared, separate, dtype=torch.float32)  # the norms compute in fp32
    parameters = dict(model.named_parameters())
    results = (torch.autograd.grad(values.sin().sum(), [*parameters.values()]) for values in (shared, separate))
    gradients = [dict(zip(parameters, result, strict=True)) for result in results]
    assert_gradients_close(*gradients)
