"""Transformers' Auto classes load a MISS checkpoint after one import, without trust_remote_code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import sys
import normtune.models.miss.model
from transformers import AutoModel, AutoModelForVisualQuestionAnswering
for auto in (AutoModel, AutoModelForVisualQuestionAnswering):
    print(type(auto.from_pretrained(sys.argv[1])).__name__)
"""


def test_an_import_registers_miss_with_the_auto_classes(base: Path) -> None:
    process = subprocess.run([sys.executable, "-c", CODE, str(base)], capture_output=True, text=True, check=True)
    assert process.stdout.split() == ["MissForQuestionAnswering"] * 2
