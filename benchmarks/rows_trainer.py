"""The peer of `rows`: the same file opened by `datasets`, and the same base trained by the Hugging Face Trainer.

Every row is one item, with an image of its own; the model, the trained norms, the batch size and the number of steps
are those of Normtune's side, and so is the code that makes tensors of an image and a text. `datasets` writes an Arrow
file of the rows once, which later runs find: the first run is measured.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from PIL import Image


def trainer_stages(
    path: Path, steps: int, clock: Callable[[], Any], stage: Callable[[str, Any, Any], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Open the training rows of a parquet file and train the embedded base.

    Args:
        steps: of training.
        clock: the time now.
        stage: (name, time before, time after) -> a row of the record.
    """
    import datasets
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from normtune.data.groups import Group
    from normtune.methods.adapt import adapt
    from normtune.models.loading import load

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        started = clock()
        rows = datasets.load_dataset(
            "parquet", data_files=str(path), split="train", cache_dir=folder, filters=[("split", "==", "train")]
        )
        opened = clock()
        yield stage("open (datasets)", started, opened)
        family: Any = load("nano")
        adapt(family.model, "language=ln")
        ends: list[Any] = []

        class Clock(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                ends.append(clock())

        class RowTrainer(Trainer):
            def compute_loss(self, model: Any, inputs: Any, **options: Any) -> Any:
                loss, tokens = family.loss(inputs)
                return loss / tokens

        def collate(items: list[dict[str, Any]]) -> Any:
            groups, pixels = [], []
            for item in items:
                segment = family.tokenize(item["id"], item["question"], item["answer"])
                groups.append(Group((item["image"],), (segment,)))
                pixels.append([family.preprocess_image(Image.open(path.parent / item["image"]).convert("RGB"))])
            return family.collate(groups, pixels)

        arguments = TrainingArguments(
            output_dir=str(Path(folder) / "run"), per_device_train_batch_size=8, max_steps=steps, use_cpu=True,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        trainer = RowTrainer(family.model, arguments, data_collator=collate, train_dataset=rows, callbacks=[Clock()])
        with redirect_stdout(sys.stderr):  # it prints its metrics, and `rows` reads this process's output
            trainer.train()
        yield stage("training: until the first step has ended (Trainer)", started, ends[0])
        yield stage(f"training: {steps - 1} further steps (Trainer)", ends[0], ends[-1])
