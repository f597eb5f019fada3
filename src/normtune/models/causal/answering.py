"""Generates the answers of groups: one pass over all prompts, then a token of every answer in each step."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from normtune.data.groups import Group
from normtune.models.causal.attention import additive_masks, mask_argument
from normtune.models.causal.checkpoint_settings import BEAM_SETTINGS, ScoreProcessors
from normtune.models.causal.decoding import ColumnCache, Masks, SharedCacheDecoder
from normtune.models.causal.recurrent import PASSES, AnswerStates, RunTree
from normtune.models.causal.shared_prefix import SharedSequence
from normtune.models.causal.step_graph import StepGraph, graph_obstacle, report_fallback
from normtune.models.generation import FIXED_STEPS, Generated, OnTokens, generate
from normtune.models.types import Batch, Pixels

if TYPE_CHECKING:
    from normtune.models.causal.family import CausalFamily


def generate_tokens(
    family: CausalFamily,
    groups: Sequence[Group],
    pixels: Sequence[Sequence[Pixels]],
    *,
    max_new_tokens: int,
    beams: int,
    on_tokens: OnTokens | None = None,
    cuda_graphs: bool | None = None,
) -> list[Generated]:
    """The tokens of each answer, one a segment in the order given; all questions of all groups are one batch.

    Args:
        cuda_graphs: whether steps are captured and replayed; None: on CUDA, in greedy search.

    Other arguments as for `Family.generate_answers`.
    """
    layout, sequence, groups = family.layout(groups, pixels, "pad", keep_states=True)
    batch: Batch = send_to_device(layout, family.device, non_blocking=True)
    if family.recurrent:
        batch[PASSES] = RunTree(batch[PASSES])
    settings = family.generation_settings()
    beam_settings = {name: settings.pop(name) for name in BEAM_SETTINGS if name in settings}
    process = None
    if settings:
        process = ScoreProcessors(
            family.model, _prompts(sequence), end=family.end_tokens, max_new_tokens=max_new_tokens
        )
    answers = beams * max(len(group.segments) for group in groups)  # of a row
    steps = max_new_tokens - 1  # the last token is not fed
    cache = ColumnCache(batch["input_ids"].shape[1] + answers * min(steps, FIXED_STEPS), family.fixed_layers)
    states = family.hidden_states(batch, use_cache=True, **{_cache_argument(family): cache})  # [B, S, width]
    if cuda_graphs is None:
        cuda_graphs = family.device.type == "cuda" and beams == 1
    if cuda_graphs:
        obstacles = (family.step_graph.failure, graph_obstacle(family.decoder), graph_obstacle(family.model.lm_head))
        if obstacle := next(filter(None, obstacles), None):
            report_fallback(obstacle)
            cuda_graphs = False
    graph = family.step_graph if cuda_graphs else None
    decoder, last = _shared_cache_decoder(family, batch, sequence, groups, cache, steps, graph)
    try:
        return generate(
            decoder.head(states[decoder.at[0], last]),  # [segments, vocabulary]
            decoder.step,
            end=family.end_tokens,
            max_new_tokens=max_new_tokens,
            beams=beams,
            on_tokens=on_tokens,
            process=process,
            **beam_settings,
        )
    finally:
        family.step_graph.clear()


def _shared_cache_decoder(
    family: CausalFamily,
    batch: Batch,
    sequence: SharedSequence,
    groups: Sequence[Group],
    cache: ColumnCache,
    steps: int,
    graph: StepGraph | None,
) -> tuple[SharedCacheDecoder, Tensor]:
    """Set decoding up after the prompts' pass, with one answer a segment.

    Returns:
        The decoder, and the column of each segment's last token: [segments] long.
    """
    segments = [segment for group in groups for segment in group.segments]
    assert not any(segment.answer for segment in segments), "segments end where the model is to write"
    rows = [row for row, group in enumerate(groups) for _ in group.segments]  # each segment's row of the cache
    length = sequence.input_ids.shape[1]
    last_columns = [sequence.runs[run].rows[-1] % length for run in sequence.last_runs]
    # [segments] long each; `last` is the column of a segment's last token, or the prefix's if the segment is empty
    row, last = torch.tensor([rows, last_columns]).to(family.device, non_blocking=True)
    # [segments, S]: the columns of the runs that a segment's last run continues, and of that run
    run_of, run_end = batch["segment_of"][row], batch["segment_end"][row]
    last_run = run_of.gather(1, last[:, None])
    visible = (run_of <= last_run) & (last_run <= run_end)
    rotary = batch["position_ids"]
    rotary = rotary if rotary.ndim == 2 else rotary[0]  # with M-RoPE, text has one position on all axes
    cache_argument = _cache_argument(family)
    answer_states = AnswerStates(batch[PASSES].last) if family.recurrent else None

    def decode(input_ids: Tensor, position_ids: Tensor, masks: Masks) -> Tensor:
        arguments = family.token_arguments(input_ids, cache)
        by_kind: dict[str, Any] = additive_masks(masks, family.decoder, arguments["inputs_embeds"].dtype)
        if answer_states is not None:
            answer_states.at = decoder.at
            by_kind |= dict.fromkeys(family.recurrent, answer_states)
        return family.decoder(
            **arguments,
            attention_mask=mask_argument(by_kind),
            position_ids=family.step_positions(position_ids),
            use_cache=True,
            **{cache_argument: cache},
        ).last_hidden_state

    decoder = SharedCacheDecoder(
        cache,
        decode,
        lambda states: family.head(states).float(),
        family.windows,
        steps=steps,
        visible=visible,
        cache_row=rows,
        position=rotary[row, last] + 1,
        token_index=batch["token_index"][row, last] + 1,
        column_token_index=batch["token_index"],
        on_select=None if family.active_text_rows is None else family.active_text_rows.select,
        graph=graph,
        on_continue=None if answer_states is None else answer_states.select,
    )
    return decoder, last


def _cache_argument(family: CausalFamily) -> str:
    """The decoder's argument for the key-value cache, which transformers renamed in 5.24."""
    return "cache" if "cache" in inspect.signature(family.decoder.forward).parameters else "past_key_values"


def _prompts(sequence: SharedSequence) -> list[list[int]]:
    """The tokens of each segment's conversation: the prefix of its group, then the segment."""
    ids = sequence.input_ids.flatten()
    rows = (chain(*sequence.rows_of(segment)) for segment in range(sequence.segment_count))
    return [ids[list(tokens)].tolist() for tokens in rows]
