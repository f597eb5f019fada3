"""One of several processes: does the jobs of a JSON file, one after the other.

    torchrun --nproc-per-node 2 -m tests.support.distributed_worker JOBS

A job is ["train", options], ["evaluate", options], or ["fail", command line]: the last process cannot answer.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from torch.distributed.tensor import DTensor

from normtune import cli
from normtune.errors import InputError
from normtune.evaluation import evaluate
from normtune.evaluation.config import EvaluateConfig
from normtune.evaluation.evaluate import evaluate_config
from normtune.runtime import distributed
from normtune.training import trainer
from normtune.training.config import TrainConfig
from normtune.training.train import train


def train_and_tell(options: dict[str, Any]) -> None:
    """Train, and write beside the delta how many trained tensors were dealt out."""
    dealt = 0
    whole = trainer.gather_full

    def counting(tensor: Any) -> Any:
        nonlocal dealt
        dealt += isinstance(tensor, DTensor)
        return whole(tensor)

    trainer.gather_full = counting  # type: ignore[attr-defined]
    config = TrainConfig.checked(**options)
    train(config)
    if distributed.is_main_process():
        (config.out / "dealt").write_text(str(dealt))


def fail(command: list[str]) -> None:
    def unreadable(*args: Any, **kwargs: Any) -> Any:
        raise InputError("cannot read image 7.")

    if int(os.environ["RANK"]) == distributed.launched_count() - 1:
        evaluate.answer_all = unreadable  # type: ignore[assignment]
    sys.argv = ["normtune", *command]
    cli.main()


if __name__ == "__main__":
    for kind, what in json.loads(Path(sys.argv[1]).read_text()):
        if kind == "train":
            train_and_tell(what)
        elif kind == "evaluate":
            evaluate_config(EvaluateConfig.checked(**what))
        else:
            fail(what)
