"""A worker process of a distributed test: runs the jobs of a JSON file one after the other.

    torchrun --nproc-per-node 2 -m tests.support.distributed_worker JOBS

A job is ["train", options], ["evaluate", options] or ["fail", command line]. In a "fail" job, the process of
the highest rank raises an error.
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


def train_and_count_shards(options: dict[str, Any]) -> None:
    """Train, and write the number of gathered sharded tensors to the file `dealt` in the output folder."""
    sharded = 0
    gather_full = trainer.gather_full

    def gather_and_count(tensor: Any) -> Any:
        nonlocal sharded
        sharded += isinstance(tensor, DTensor)
        return gather_full(tensor)

    trainer.gather_full = gather_and_count  # type: ignore[attr-defined]
    config = TrainConfig.checked(**options)
    train(config)
    if distributed.is_main_process():
        (config.out / "dealt").write_text(str(sharded))


def fail(command: list[str]) -> None:
    """Run the command line; answering fails in the process of the highest rank."""

    def unreadable(*args: Any, **kwargs: Any) -> Any:
        raise InputError("cannot read image 7.")

    if int(os.environ["RANK"]) == distributed.launched_count() - 1:
        evaluate.answer_all = unreadable  # type: ignore[assignment]
    sys.argv = ["normtune", *command]
    cli.main()


if __name__ == "__main__":
    for kind, arguments in json.loads(Path(sys.argv[1]).read_text()):
        if kind == "train":
            train_and_count_shards(arguments)
        elif kind == "evaluate":
            evaluate_config(EvaluateConfig.checked(**arguments))
        else:
            fail(arguments)
