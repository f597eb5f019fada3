"""Every family in a complete run on a small checkpoint: train, evaluate, merge, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from normtune.adapters.export_peft import export_peft
from normtune.adapters.merge import merge_to_disk
from normtune.adapters.storage import load_model
from normtune.data.registry import open_dataset
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import evaluate
from normtune.evaluation.results import read_evaluation
from normtune.models.importers.llava_med.importer import import_llava_med
from normtune.models.miss.model import MissForQuestionAnswering
from normtune.training.config import TrainConfig
from normtune.training.train import train
from tests.models.families.test_families import image
from tests.support.llava_med_original import HEADS, make_original, write_original
from tests.support.tiny_miss import save_tiny_miss
from tests.support.tiny_models import MORE, TINY, make_tiny
from tests.support.tolerance import assert_close, differ

DATA = "phantom-b:2"
QUESTION = "Which organ is abnormal?"
# LLaVA-Med's two versions are imported from their original layouts. The types left out are similar to others.
KINDS = (
    *("miss", "llava-med-1.5", "llava-med-1.0"),
    *(name for name in (*TINY, *MORE) if name not in ("qwen2_vl", "llava_med", "paligemma2")),
)


def write_base(kind: str, directory: Path) -> None:
    if kind == "miss":
        save_tiny_miss(directory)
    elif kind in TINY | MORE:
        make_tiny(kind, directory)
    else:
        original = make_original("1.5" if kind.endswith("1.5") else "1.0")
        import_llava_med(str(write_original(directory.with_name("original"), original)), directory, **HEADS)


def inputs(processor: Any, kind: str) -> dict[str, Any]:
    """An image and a question from the family's own processor, as the arguments of its model."""
    if kind == "miss":
        ids = torch.tensor([processor.tokenizer(QUESTION).input_ids])
        pixels = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(1))
        return {"input_ids": ids, "pixel_values": pixels, "decoder_input_ids": ids}
    if processor.chat_template is None:  # PaliGemma's: torch tensors make it warn
        made = processor(images=[image("b")], text=[processor.image_token + QUESTION])
        return {name: torch.as_tensor(np.array(value)) for name, value in made.items() if name != "labels"}
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(processor(images=[image("b")], text=[text], return_tensors="pt"))


def plain(kind: str, directory: Path) -> nn.Module:
    """The model as plain transformers loads it, with no missing and no unexpected values."""
    from transformers import AutoModelForImageTextToText

    loader: Any = MissForQuestionAnswering if kind == "miss" else AutoModelForImageTextToText
    model, report = loader.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return model.eval()


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT's own
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")  # GLM-4V's
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_family_is_trained_written_evaluated_merged_and_exported(kind: str, tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_base(kind, base)
    result = train(
        TrainConfig(
            model=str(base), data=DATA, out=adapter, tune="ln", limit=4, max_steps=1, batch=4, lr=0.05,
            device="cpu",
        )
    )  # fmt: skip
    assert result.steps == 1 and result.changed > 0.5 and result.warning is None

    tuned = load_model(str(base), adapter, device="cpu")
    options = EvaluateConfig(model=str(base), data=DATA, out=tmp_path / "run", max_new_tokens=2)
    run = evaluate(tuned, open_dataset(DATA).test[:4], options)
    assert {row.id: row.text for row in run.predictions} == read_evaluation(tmp_path / "run").texts
    question = inputs(tuned.processor, kind)

    @torch.no_grad()
    def logits(model: Any) -> Tensor:
        return model(**question).logits

    expected = logits(tuned.model)
    untuned = plain(kind, base)
    assert differ(logits(untuned), expected)
    merge_to_disk(str(base), adapter, tmp_path / "merged")
    assert_close(logits(plain(kind, tmp_path / "merged")), expected)
    export_peft(adapter, tmp_path / "peft")
    loaded = PeftModel.from_pretrained(untuned, tmp_path / "peft").eval()
    assert_close(logits(loaded), expected)
