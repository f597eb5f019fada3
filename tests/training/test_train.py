"""Training runs: what they train, what they write, and that a killed run resumes to the same adapter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from peft.tuners.lora import LoraLayer
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from normtune.data.batches import EpochBatches
from normtune.data.groups import Group, Segment
from normtune.data.registry import open_dataset
from normtune.errors import InputError
from normtune.methods.adapt import adapt
from normtune.models.families.miss import MissFamily
from normtune.models.loading import load
from normtune.runtime.files import read_json
from normtune.training.config import TrainConfig
from normtune.training.memory_plan.plan import estimate_memory
from normtune.training.objective import IdentityDataset, Objective
from normtune.training.result import TrainResult
from normtune.training.train import last_checkpoint, train
from tests.support.kill import StopAfterStep
from tests.support.tiny_models import make_tiny
from tests.support.tolerance import MODEL_TERMS, assert_close, differ

STEPS = 10  # about so many steps: the rounding errors of all of them add up

DATA = "phantom-b:6"


def config(base: Path, out: Path, **options: Any) -> TrainConfig:
    values: dict[str, Any] = {"tune": "ln", "epochs": 2, "batch": 16, "device": "cpu"} | options
    return TrainConfig(model=str(base), data=DATA, out=out, **values)


def tensors(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter.safetensors")


def equal_adapters(out: Path, other: Path) -> bool:
    """Whether two folders have bit-identical adapters."""
    first, second = tensors(out), tensors(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, Path]:
    out = tmp_path_factory.mktemp("run") / "ln"
    return train(config(base, out)), out


def test_run_writes_adapter_config_and_result(run: tuple[TrainResult, Path]) -> None:
    result, out = run
    assert {path.name for path in out.iterdir()} >= {
        "adapter.safetensors",
        "adapter.json",
        "train_config.json",
        "train_result.json",
    }
    assert not (out / "checkpoints").exists()
    stored = read_json(out / "train_result.json")
    assert stored["trainable"] == result.trainable == sum(t.numel() for t in tensors(out).values())
    assert stored["changed"] == 1.0 and result.warning is None
    info = read_json(out / "adapter.json")
    assert info["data"]["name"] == "phantom-b" and info["data"]["licence"] == "Apache-2.0 (synthetic)"
    assert "research use" in info["notice"].lower() and "not for diagnosis" in info["notice"]


def test_result_text_shows_what_changed(run: tuple[TrainResult, Path]) -> None:
    text = str(run[0])
    assert "100.0% of the trained values changed" in text
    assert "vision norm: 100.0% of 320 changed, by " in text


def test_only_norms_are_written_in_fp32(run: tuple[TrainResult, Path]) -> None:
    assert all(tensor.dtype == torch.float32 and tensor.ndim == 1 for tensor in tensors(run[1]).values())


def test_every_pair_is_used_once_per_epoch(run: tuple[TrainResult, Path]) -> None:
    from normtune.data.registry import open_dataset

    assert run[0].pairs == 2 * len(open_dataset(DATA).split("train"))


def test_base_on_disk_is_unchanged(base: Path, run: tuple[TrainResult, Path]) -> None:
    before = {name: p.clone() for name, p in load(str(base)).model.named_parameters()}
    train(config(base, run[1].parent / "full", tune="full", epochs=1))
    after = dict(load(str(base)).model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_runs_with_one_seed_are_equal_and_other_seeds_differ(
    base: Path, run: tuple[TrainResult, Path], tmp_path: Path
) -> None:
    train(config(base, tmp_path / "again"))
    train(config(base, tmp_path / "other", seed=1))
    assert equal_adapters(run[1], tmp_path / "again") and not equal_adapters(run[1], tmp_path / "other")


def test_grouping_does_not_change_gradients(base: Path, tmp_path: Path) -> None:
    """One step over all pairs: however they are grouped, the step is the same."""
    everything = {"epochs": 1, "batch": 10_000, "schedule": "constant", "warmup": 0.0}
    train(config(base, tmp_path / "whole", **everything))
    whole = tensors(tmp_path / "whole")
    for cap in (1, 3):
        train(config(base, tmp_path / f"capped-{cap}", cap=cap, **everything))
        capped = tensors(tmp_path / f"capped-{cap}")
        for name in whole:
            assert_close(capped[name], whole[name], terms=STEPS * MODEL_TERMS, msg=f"{name}, cap {cap}")


def test_accumulation_normalises_by_tokens(base: Path, tmp_path: Path) -> None:
    """Several unequal batches that make one step give the same step as one large batch."""
    options = {"epochs": 1, "schedule": "constant", "warmup": 0.0, "max_grad_norm": 1e9}
    train(config(base, tmp_path / "one", batch=10_000, **options))
    accumulated = train(config(base, tmp_path / "many", batch=24, accumulate=100, **options))
    assert accumulated.steps == 1
    single, accumulated_values = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    for name in single:
        assert_close(accumulated_values[name], single[name], terms=STEPS * MODEL_TERMS, msg=name)


def test_frozen_image_encoder_runs_once_per_image(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter equals that of a run that encodes every image in every step."""
    from normtune.models.families.miss import MissFamily
    from normtune.models.miss.vision import VisionTransformer

    images = 0
    forward = VisionTransformer.forward

    def counting(self: VisionTransformer, pixels: torch.Tensor) -> torch.Tensor:
        nonlocal images
        images += len(pixels)
        return forward(self, pixels)

    monkeypatch.setattr("normtune.training.train.estimate_memory", lambda *_: {})  # it encodes images without values
    monkeypatch.setattr(VisionTransformer, "forward", counting)
    train(config(base, tmp_path / "cached", tune="encoder=ln"))
    assert images == 6
    monkeypatch.setattr(MissFamily, "encode_image", lambda self, pixels: pixels)
    train(config(base, tmp_path / "recomputed", tune="encoder=ln"))
    assert images > 6 + 6
    cached, recomputed = tensors(tmp_path / "cached"), tensors(tmp_path / "recomputed")
    for name in cached:
        assert_close(cached[name], recomputed[name], terms=STEPS * MODEL_TERMS, msg=name)


def test_batches_balanced_by_tokens_use_and_tokenise_every_pair_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: Counter[str] = Counter()
    encode = MissFamily.tokenize

    def counting(self: MissFamily, id: str, *rest: Any, **named: Any) -> Segment:
        encoded[id] += 1
        return encode(self, id, *rest, **named)

    monkeypatch.setattr("normtune.training.train.estimate_memory", lambda *_: {})  # it tokenises rows for itself
    monkeypatch.setattr(MissFamily, "tokenize", counting)
    result = train(config(base, tmp_path / "tokens", balance="tokens"))
    examples = open_dataset(DATA).split("train")
    assert result.pairs == 2 * len(examples)
    assert encoded == Counter(example.id for example in examples)


@pytest.mark.parametrize("ranks", [1, 2])
def test_resumed_epoch_has_its_own_order(ranks: int) -> None:
    """As the Trainer resumes: the batches are sharded, the first ones skipped, and then the epoch is set."""
    examples = open_dataset(DATA).split("train")
    batches = EpochBatches(examples, 4, 4, seed=0, ranks=ranks)
    loader: Any = DataLoader(IdentityDataset(batches), batch_sampler=batches, collate_fn=list)  # type: ignore[arg-type]
    sharded = prepare_data_loader(loader, num_processes=ranks, process_index=ranks - 1, put_on_device=False)
    resumed = skip_first_batches(sharded, 2)
    resumed.set_epoch(1)
    remaining = list(resumed)
    batches.set_epoch(1)
    assert remaining == list(batches)[ranks - 1 :: ranks][2:] and len(remaining) > 2


def test_grouped_training_turns_off_only_the_dropout_of_the_base(base: Path) -> None:
    family = load(str(base))
    adapt(family.model, "encoder=lora(r=2,dropout=0.5),decoder=ln")
    grouped, ungrouped = (Objective(family, 0.0, dropout=dropout) for dropout in (False, True))
    draws = {name for name, module in family.model.named_modules() if isinstance(module, nn.Dropout)}
    lora = {name for name in draws if ".lora_dropout." in name}
    assert lora and draws - lora

    def active() -> set[str]:
        return {name for name, module in family.model.named_modules() if module.training and name in draws}

    grouped.train()
    assert active() == lora
    # attention applies dropout without an nn.Dropout: it reads the `training` of its own module
    assert not family.model.training and not family.model.get_submodule("text_encoder").training
    ungrouped.train()
    assert active() == draws and family.model.training
    grouped.eval()
    assert active() == set()


class FixedDropout(nn.Module):
    """Dropout that looks up the mask of each token in a table, so that two layouts can use the same masks."""

    rows: torch.Tensor  # [batch, seq], the row of the table for each token

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = 2.0 * (torch.rand((4 * 100, 32), generator=generator) < 0.5)  # rate 0.5, width 32

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * self.table[self.rows]


def test_grouping_does_not_change_losses_with_the_same_lora_dropout(tmp_path: Path) -> None:
    """A group shares the mask of its image's tokens; each of its questions has the loss that it has alone."""
    family = load(str(make_tiny("llava", tmp_path)))
    tuned = adapt(family.model, "language=lora(r=4,dropout=0.5)")
    with torch.no_grad():
        for parameter in tuned.trained.values():
            parameter.normal_(std=0.5)
    dropouts = []
    for seed, layer in enumerate(m for m in family.model.modules() if isinstance(m, LoraLayer)):
        dropouts.append(FixedDropout(seed))
        layer.lora_dropout["normtune"] = dropouts[-1]
    pixels = family.preprocess_image(Image.new("RGB", (32, 32), (90, 20, 160)))
    questions = [("What is the modality?", "MRI"), ("Which organ is abnormal?", "left lung"), ("Normal?", "no")]
    segments = [family.tokenize(str(i), *pair) for i, pair in enumerate(questions)]

    def log_probs(groups: list[list[int]]) -> torch.Tensor:
        packed = [Group(("a",), tuple(segments[i] for i in members)) for members in groups]
        batch = family.collate(packed, [[pixels]] * len(groups))
        order = torch.tensor([[-1, *members] + [-1] * (3 - len(members)) for members in groups])
        number = 1 + order.gather(1, batch["segment_of"].clamp(min=0))  # 0 for the prefix, then 1 + question
        for dropout in dropouts:
            dropout.rows = number * 100 + batch["token_index"]
        by_question = torch.empty(3)
        by_question[[i for members in groups for i in members]] = family.log_probs(batch).detach()
        return by_question

    grouped, ungrouped = log_probs([[0, 1, 2]]), log_probs([[1], [2], [0]])
    assert_close(grouped, ungrouped)
    for dropout in dropouts:
        dropout.table = dropout.table.flip(0)
    assert differ(log_probs([[0, 1, 2]]), grouped), "the draw matters"


def test_each_method_has_its_learning_rate(base: Path, tmp_path: Path) -> None:
    result = train(config(base, tmp_path / "both", tune="vision=ln,decoder=lora(r=2)", epochs=1))
    assert {(change.part, change.role) for change in result.changes} == {("vision", "norm"), ("decoder", "lora")}
    assert result.changed > 0.99


def test_each_part_can_have_its_learning_rate(base: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tune": "vision=ln,decoder=ln", "max_steps": 2, "limit": 16}
    train(config(base, tmp_path / "a", part_lr="vision=1e-2,decoder=1e-4", **options))
    train(config(base, tmp_path / "b", lr=1e-4, part_lr="vision=1e-2", **options))
    train(config(base, tmp_path / "c", lr=1e-4, **options))
    a, b, c = (tensors(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a if name.startswith("visual_encoder"))
    with pytest.raises(
        InputError, match=r"--part-lr: the recipe trains nothing in encoder\. It trains: decoder, vision"
    ):
        train(config(base, tmp_path / "d", part_lr="encoder=1e-3", **options))
    values = {"model": "nano", "data": "phantom-b:2", "out": tmp_path / "e"}
    for text in ("vison=1e-3", "vision=1e-3,vision=1e-4", "vision=fast", "vision=-1", ""):
        with pytest.raises(InputError, match="--part-lr: "):
            TrainConfig.checked(part_lr=text, **values)


def test_learning_rate_that_moves_nothing_gives_a_warning(base: Path, tmp_path: Path) -> None:
    result = train(config(base, tmp_path / "stuck", lr=1e-12, epochs=1))
    assert result.warning is not None and "Raise the learning rate" in result.warning
    assert "WARNING" in str(result)


def test_trained_norms_move_on_a_bf16_base(base: Path, tmp_path: Path) -> None:
    result = train(config(base, tmp_path / "bf16", dtype="bfloat16", lr=1e-4))
    assert result.changed > 0.99
    assert all(tensor.dtype == torch.float32 for tensor in tensors(tmp_path / "bf16").values())


def test_limit_and_max_steps_bound_a_run(base: Path, tmp_path: Path) -> None:
    assert train(config(base, tmp_path / "limit", limit=20, epochs=1)).pairs == 20
    assert train(config(base, tmp_path / "steps", max_steps=3)).steps == 3


def test_recipe_that_trains_nothing_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="trains nothing"):
        train(config(base, tmp_path / "none", tune="frozen"))


def test_out_that_cannot_be_written_is_refused_before_the_base_is_loaded(base: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for out, reason in ((tmp_path / "notes.txt" / "a", "Not a directory"), (tmp_path / ("n" * 256), "name too long")):
        with pytest.raises(InputError, match=f"cannot write to .*{reason}. Choose another --out"):
            train(config(tmp_path / "no base", out))
    with pytest.raises(InputError, match="no base"):
        train(config(tmp_path / "no base", tmp_path / "good"))


class StubWriter:
    """Appends what TensorBoard's SummaryWriter is given to a file in the folder of the log."""

    def __init__(self, log_dir: str) -> None:
        self.file = Path(log_dir) / "events"
        self.file.parent.mkdir(parents=True, exist_ok=True)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        with self.file.open("a") as file:
            file.write(f"{name} {step}\n")

    def add_text(self, *args: Any) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class EmissionsTracker(TrainerCallback):
    """A tracker that writes to the Trainer's own output folder, as codecarbon does."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (Path(args.output_dir) / "emissions.csv").write_text("a tracker's file")


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=StubWriter))
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)


def test_tensorboard_log_continues_after_a_resume_and_stays(base: Path, tmp_path: Path, tensorboard: None) -> None:
    out = tmp_path / "out"
    run: dict[str, Any] = {"tracker": "tensorboard", "save_every": 3, "max_steps": 6}
    with pytest.raises(KeyboardInterrupt):
        train(config(base, out, **run), progress=StopAfterStep(4))
    (first,) = (out / "runs").iterdir()
    interrupted = (first / "events").read_text()
    train(config(base, out, **run))
    log = (first / "events").read_text()
    assert log.startswith(interrupted) and "train/loss 6" in log
    assert not (out / "checkpoints").exists()
    train(config(base, out, overwrite=True, **run))
    assert (tmp_path / "out.old-1" / "runs" / first.name / "events").read_text() == log
    (second,) = (out / "runs").iterdir()
    assert (second / "events").read_text().count("train/loss 6") == 1


def test_files_of_other_trackers_stay_beside_the_checkpoints(base: Path, tmp_path: Path) -> None:
    for _ in range(2):
        out = tmp_path / "out"
        train(config(base, out, max_steps=2, save_every=1, overwrite=True), progress=EmissionsTracker())
        assert [path.name for path in (out / "checkpoints").iterdir()] == ["emissions.csv"]


def test_killed_run_resumes_to_the_same_adapter(
    base: Path, run: tuple[TrainResult, Path], tmp_path: Path, run_command: Callable[..., tuple[int, str, str]]
) -> None:
    """SIGKILL in the middle of an epoch, just after a checkpoint; then the same command again, in this process."""
    out = tmp_path / "killed"
    command = ["train", str(base), "--data", DATA, "--tune", "ln", "--epochs", "2", "--batch", "16"]
    command += ["--device", "cpu", "--out", str(out), "--save-every", "3"]
    process = subprocess.Popen(
        [sys.executable, "-m", "normtune", *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while last_checkpoint(out) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert last_checkpoint(out) is not None and not (out / "adapter.json").exists()
    status, _, error = run_command(*command)
    assert status == 0, error
    assert equal_adapters(out, run[1])
    killed, straight = (read_json(folder / "train_result.json") for folder in (out, run[1]))
    assert killed["resumed_from_step"] is not None
    assert killed["pairs"] == straight["pairs"] and killed["changed"] == straight["changed"]


def test_loss_log_entry_covers_steps_before_and_after_a_resume(base: Path, tmp_path: Path) -> None:
    """There is an entry every fourth step; the checkpoint is of the third."""
    run: dict[str, Any] = {"batch": 4, "cap": 4, "save_every": 3, "epochs": 1}
    train(config(base, tmp_path / "whole", **run))
    with pytest.raises(KeyboardInterrupt):
        train(config(base, tmp_path / "stopped", **run), progress=StopAfterStep(5))
    train(config(base, tmp_path / "stopped", **run))
    logs = [read_json(tmp_path / name / "adapter.json")["metrics"]["training"]["loss"] for name in ("whole", "stopped")]
    assert logs[0] == logs[1] and [step for step, _ in logs[0]][:2] == [4, 8]


def test_speed_of_a_resumed_run_is_that_of_the_steps_since(base: Path, tmp_path: Path) -> None:
    run: dict[str, Any] = {"save_every": 2, "max_steps": 5, "batch": 8}
    whole = train(config(base, tmp_path / "whole", **run))
    before = train(config(base, tmp_path / "before", **run | {"max_steps": 4}))
    assert whole.resumed_from_step is None and "resumed from" not in str(whole)
    assert whole.pairs_per_second == pytest.approx(whole.pairs / whole.seconds)
    with pytest.raises(KeyboardInterrupt):
        train(config(base, tmp_path / "stopped", **run), progress=StopAfterStep(5))
    resumed = train(config(base, tmp_path / "stopped", **run))
    assert (resumed.pairs, resumed.steps, resumed.resumed_from_step) == (whole.pairs, 5, 4)
    assert resumed.pairs_per_second * resumed.seconds == pytest.approx(whole.pairs - before.pairs)
    assert "resumed from step 4; time, pairs/s and memory are of the steps since" in str(resumed)
    assert read_json(tmp_path / "stopped" / "train_result.json")["resumed_from_step"] == 4


def test_run_killed_after_its_last_checkpoint_reports_no_speed(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("normtune.training.train.build_result", stop)
        train(config(base, tmp_path, epochs=1))
    resumed = train(config(base, tmp_path, epochs=1))
    assert resumed.steps == resumed.resumed_from_step and resumed.pairs_per_second == 0
    assert resumed.pairs > 0


def test_run_killed_after_its_last_step_makes_no_further_step(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step is in the middle of an epoch, where Hugging Face's Trainer would make another one."""

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    run: dict[str, Any] = {"max_steps": 3, "batch": 4, "save_every": 2}
    train(config(base, tmp_path / "whole", **run))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("normtune.training.train.build_result", stop)
        train(config(base, tmp_path / "killed", **run))
    resumed = train(config(base, tmp_path / "killed", **run))
    assert (resumed.steps, resumed.resumed_from_step) == (3, 3)
    assert equal_adapters(tmp_path / "killed", tmp_path / "whole")
    infos = [read_json(tmp_path / name / "adapter.json")["metrics"] for name in ("killed", "whole")]
    assert infos[0] == infos[1]


@pytest.mark.parametrize("data", [DATA, "phantom-a:4:1,phantom-b:6:3"])
def test_sampled_run_resumes_to_the_same_adapter(base: Path, tmp_path: Path, data: str) -> None:
    """Interrupted in the second epoch, which begins where the first one stopped in the pass over a stratum."""
    run: dict[str, Any] = {"save_every": 1, "epochs": 2, "batch": 16, "sample": "balanced", "cap": 4}

    def options(name: str) -> TrainConfig:
        return config(base, tmp_path / name, **run).model_copy(update={"data": data})

    whole = train(options("whole"))
    with pytest.raises(KeyboardInterrupt):
        train(options("stopped"), progress=StopAfterStep(whole.steps - 1))
    resumed = train(options("stopped"))
    assert resumed.resumed_from_step == whole.steps - 2 and resumed.pairs == whole.pairs
    assert equal_adapters(tmp_path / "stopped", tmp_path / "whole")
    info = read_json(tmp_path / "whole" / "adapter.json")
    counts = info["metrics"]["training"]["sampling"]
    assert resumed.sampling == whole.sampling == counts and "sampling, first epoch: " in str(whole)
    assert all(len(stratum["repeated"]) == 2 for stratum in counts.values())
    assert 2 * sum(stratum["questions"] for stratum in counts.values()) == whole.pairs == 2 * info["data"]["pairs"]
    assert "sample: balanced" in (tmp_path / "whole" / "run.yaml").read_text()
    assert f"data: {data}" in (tmp_path / "whole" / "run.yaml").read_text()
    if data != DATA:
        assert info["data"]["mixture"]["phantom-b"] == {"name": "phantom-b", "weight": 3}
        assert {name.partition(":")[0] for name in counts} == {"phantom-a", "phantom-b"}


def test_checkpoint_of_another_run_is_refused(base: Path, tmp_path: Path) -> None:
    mark = tmp_path / "checkpoints" / "checkpoint-3"
    mark.mkdir(parents=True)
    (mark / "run.json").write_text('{"tune": "full"}')
    (mark / "whole").touch()
    with pytest.raises(InputError, match=r"differs in .*tune.* start again with --no-resume"):
        train(config(base, tmp_path))


def test_checkpoint_and_adapter_have_the_mode_of_the_umask(base: Path, tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        with pytest.raises(KeyboardInterrupt):
            train(config(base, tmp_path, save_every=1), progress=StopAfterStep(2))
        checkpoint = last_checkpoint(tmp_path)
        assert checkpoint is not None
        train(config(base, tmp_path / "finished", max_steps=1))
    finally:
        os.umask(previous)
    files = [path for folder in (checkpoint, tmp_path / "finished") for path in folder.iterdir()]
    assert {path.name for path in files} >= {"trained.safetensors", "adapter.safetensors"}
    assert {path.stat().st_mode & 0o777 for path in files} == {0o640}


def test_incomplete_checkpoint_is_ignored(tmp_path: Path) -> None:
    for name in ("checkpoint-3", "checkpoint-12"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert last_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints" / "checkpoint-3" / "whole").touch()
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoints" / "checkpoint-3"


@pytest.mark.parametrize("tier", ["balanced", "tight"])
def test_memory_tiers_give_the_same_adapter(
    tier: str, base: Path, run: tuple[TrainResult, Path], tmp_path: Path
) -> None:
    train(config(base, tmp_path / tier, memory=tier))
    assert equal_adapters(run[1], tmp_path / tier)


def test_out_of_memory_error_names_the_options_to_change(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("normtune.models.families.miss.MissFamily.loss", full)
    with pytest.raises(InputError, match=r"--memory fast\. Resume with --memory tight, or lower --batch"):
        train(config(base, tmp_path / "out"))


def test_preflight_and_model_card_have_the_planned_memory_of_the_run(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A loaded base stays on its device, which is part of the run's identity, whatever devices there are."""
    monkeypatch.setattr("normtune.training.train.estimate_memory", estimate_memory)
    monkeypatch.setattr("normtune.training.memory_plan.plan.available_bytes", lambda device: 1)
    train(config(base, tmp_path / "a", max_steps=1, device=None), family=load(str(base), device="cpu"))
    memory = read_json(tmp_path / "a/preflight.json")["memory"]
    assert memory["recipe"] == "ln" and memory["batch"] == 16 and memory["device"] == "cpu" and not memory["fits"]
    assert "preflight: too little memory, about" in capsys.readouterr().err
    recorded = read_json(tmp_path / "a/adapter.json")["data"]["memory"]
    assert recorded == {name: memory[name] for name in ("batch", "weights", "optimiser", "cached", "step")}
    assert "data: memory" in (tmp_path / "a/README.md").read_text()
    assert read_json(tmp_path / "a/train_config.json")["device"] == "cpu"
