"""The settings of a checkpoint's generation_config.json, applied as transformers' `generate()` applies them.

Some checkpoints change the logits of their answers: Qwen2.5-VL-Instruct ships a repetition penalty, for example.
`generate()` reads these settings from the model, so that published answers contain their effect. Sampling is
never used.
"""

from __future__ import annotations

import copy
import logging
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

BEAM_SETTINGS = {"length_penalty": 1.0, "early_stopping": False}
SETTINGS: dict[str, Any] = BEAM_SETTINGS | {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "remove_invalid_values": False,
    "sequence_bias": None,
    "bad_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
"""The settings that are applied -> their values without an effect."""
UNSUPPORTED: dict[str, Any] = {
    "guidance_scale": 1.0,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "watermarking_config": None,
    "stop_strings": None,
}
"""Settings that would change answers in `generate()`, but are ignored with a warning."""


def active_settings(generation_config: Any) -> dict[str, Any]:
    """The settings of a generation config that change answers, by name."""
    for name in _active(generation_config, UNSUPPORTED):
        _warn_ignored(name)
    return _active(generation_config, SETTINGS)


def _active(generation_config: Any, neutral: dict[str, Any]) -> dict[str, Any]:
    values = generation_config.to_dict()
    return {name: values[name] for name, value in neutral.items() if values.get(name) not in (None, value)}


@cache
def _warn_ignored(name: str) -> None:
    _log.warning("the checkpoint's generation_config.json sets %s, which is ignored", name)


class ScoreProcessors:
    """Transformers' logits processors for a batch of answers; each answer is processed with its own conversation.

    Args:
        model: has the generation config.
        max_new_tokens: the largest number of new tokens a prompt.
    """

    def __init__(
        self, model: Any, prompts: Sequence[Sequence[int]], *, end: Sequence[int], max_new_tokens: int
    ) -> None:
        self.model, self.prompts = model, prompts
        self.max_new_tokens = max_new_tokens
        self.config = copy.deepcopy(model.generation_config)
        self.config.do_sample, self.config.guidance_scale = False, None
        self.config._eos_token_tensor = torch.tensor(list(end), device=model.device)
        self.owners: list[int] = []
        self.parts: list[tuple[Any, Tensor, Tensor]] = []  # (processors, rows, prompts) for each length of prompts

    def __call__(self, owners: Sequence[int], tokens: Tensor, scores: Tensor) -> Tensor:
        """See `normtune.models.generation.Process`."""
        if self.owners != list(owners):
            self._divide(list(owners))
        results = torch.empty_like(scores)
        for processors, rows, prompts in self.parts:
            results[rows] = processors(torch.cat((prompts, tokens[rows]), 1), scores[rows])
        return results

    def _divide(self, owners: list[int]) -> None:
        """Divide rows by the lengths of their prompts: processors see rows of one length, without padding."""
        rows_of_length: dict[int, list[int]] = defaultdict(list)
        for row, owner in enumerate(owners):
            rows_of_length[len(self.prompts[owner])].append(row)
        device = self.model.device
        self.parts = [
            (
                self._processors(length),
                torch.tensor(rows, device=device),
                torch.tensor([list(self.prompts[owners[row]]) for row in rows], device=device),
            )
            for length, rows in rows_of_length.items()
        ]
        self.owners = owners

    def _processors(self, length: int) -> Any:
        """The processors of prompts of this length, in the order of `generate()`."""
        self.config.max_length = length + self.max_new_tokens
        return self.model._get_logits_processor(
            generation_config=self.config, input_ids_seq_length=length, device=self.model.device, model_kwargs={}
        )


def end_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """The end tokens of the generation config, as transformers' `generate` uses them, or the tokenizer's."""
    end = model.generation_config.eos_token_id
    end = tokenizer.eos_token_id if end is None else end
    return tuple(end) if isinstance(end, (list, tuple)) else (end,)
