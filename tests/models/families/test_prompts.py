"""The exact prompts of all families: a change of a prompt changes published scores, and must not go unnoticed.

Write `prompts.json` again after an intended change: `python -m tests.models.families.test_prompts`.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from normtune.models.causal.family import CausalFamily
from normtune.models.loading import load
from normtune.runtime.files import write_json
from tests.support.tiny_miss import tiny_miss
from tests.support.tiny_models import MORE, TINY, make_tiny

PROMPTS = Path(__file__).with_name("prompts.json")
NAMES = ("miss", *TINY, *MORE)


def prompt(name: str, directory: Path) -> str:
    """The prompt of a family's tiny model; checks that it is what the model reads."""
    family = tiny_miss() if name == "miss" else load(make_tiny(name, directory))
    if isinstance(family, CausalFamily):
        question = "Is the heart enlarged?"
        read = family.processor.tokenizer.decode(family.tokenize_whole("", question, None).prompt)
        assert family.prompt_template.replace("{question}", question).endswith(read.lstrip())
    return family.prompt_template


@pytest.mark.parametrize("name", NAMES)
def test_the_prompt_is_the_recorded_one(name: str, tmp_path: Path) -> None:
    assert prompt(name, tmp_path / "model") == json.loads(PROMPTS.read_text(encoding="utf-8"))[name]


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        write_json(PROMPTS, {name: prompt(name, Path(folder) / name) for name in NAMES})
