"""The identity of a run: everything that decides the values of its adapter, and what `--out` holds already.

A run continues or repeats an earlier one in the same folder only if their identities are equal: the options,
the rows and pictures of the training data, and the base. Otherwise it is refused before anything is trained.
`--overwrite` moves the earlier run to another folder first.

The identity is in `run.json` of each checkpoint and of the finished adapter.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from normtune.adapters.storage import INFO_FILE
from normtune.errors import InputError
from normtune.models.loading import resolve_device
from normtune.runtime import distributed
from normtune.runtime.files import read_json, try_lock
from normtune.training.checkpoints import RUN_FILE, last_checkpoint
from normtune.training.config import TrainConfig

LOCK_FILE = "lock"  # in the folder of the checkpoints, while a run trains
# options that change where a run computes and writes, not the values that it computes
_NO_VALUES = {"out", "root", "resume", "overwrite", "tracker", "save_every", "memory", "cache", "workers", "splits"}
# entries besides the options, as messages name them; checkpoints written by version 0.1 lack them
_NAMES = {
    "rows_digest": "the rows or pictures of the training data",
    "validation_digest": "the rows or pictures of the validation split",
    "base_fingerprint": "the values of the base",
    "cached_states": "what is computed once per image",
}

_log = logging.getLogger(__name__)


def option_identity(config: TrainConfig) -> dict[str, Any]:
    """Return the options that decide the values of the adapter, with the resolved device."""
    return config.model_dump(mode="json", exclude=_NO_VALUES) | {"device": resolve_device(config.device).type}


def check_identity(
    config: TrainConfig, identity: Mapping[str, Any]
) -> Literal["new", "unfinished", "finished", "other"]:
    """Compare a run with what is in its output folder; call it again when more of the identity is known.

    Args:
        identity: the run's identity, or what is known of it so far.

    Returns:
        "new": the folder holds no run that the entries of `identity` could be compared with; "unfinished": a
        checkpoint of the same run; "finished": the adapter of the same run; "other": another run, which
        `--overwrite` allows to be moved.

    Raises:
        InputError: the folder holds another run, and `--overwrite` is not given.
    """
    try:
        checkpoint = last_checkpoint(config.out)
        finished = (config.out / INFO_FILE).is_file()
    except OSError as error:  # such as a name that is too long
        raise InputError(f"cannot write to {config.out}: {error.strerror}. Choose another --out.") from error
    if checkpoint is not None and not config.resume:
        if config.overwrite:
            return "other"
        checkpoint = None  # `fit` deletes it
    stored: dict[Path, dict[str, Any]] = {}
    if checkpoint is not None:
        stored[checkpoint] = read_json(checkpoint / RUN_FILE)
    if finished:
        stored[config.out] = _finished_identity(config.out)
    for folder, earlier in stored.items():
        if changed := _changed_entries(config, identity, earlier):
            if config.overwrite:
                return "other"
            advice = "or move the run to another folder with --overwrite"
            advice += "" if finished else ", or start again with --no-resume"
            raise InputError(
                f"{folder} belongs to a run that differs in {', '.join(changed)}. Repeat that run's options and data, "
                f"choose another --out, {advice}."
            )
    if checkpoint is not None:
        return "unfinished"
    if not finished:
        return "new"
    if not config.resume and not config.overwrite:
        raise InputError(
            f"{config.out} holds a finished adapter. Choose another --out, or move it to another folder with "
            "--overwrite."
        )
    return "finished"


def _finished_identity(out: Path) -> dict[str, Any]:
    """The identity of the run that wrote the adapter in `out`; adapters of version 0.1 do not record their rows."""
    if (out / RUN_FILE).is_file():
        return read_json(out / RUN_FILE)
    path = out / "train_config.json"
    options: dict[str, Any] = read_json(path) if path.is_file() else {}
    options.pop("device", None)  # as given, not as resolved
    return options | {"rows_digest": None}


def _changed_entries(config: TrainConfig, identity: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Return the entries of `identity` that differ from the stored ones, as messages name them."""
    # e.g. --batch 8 on 2 processes and --batch 16 on 1 make the same steps
    same_steps = stored.get("pairs_a_step") == config.batch * distributed.world_size()
    changed = []
    for name, value in identity.items():
        if name in stored:
            earlier = stored[name]
        elif name in TrainConfig.model_fields and name != "device":
            earlier = TrainConfig.model_fields[name].default  # the option did not exist when the file was written
        else:
            continue
        if earlier != value and not (name == "batch" and same_steps):
            changed.append(_NAMES.get(name, name))
    return changed


@contextmanager
def locked_folder(out: Path) -> Iterator[None]:
    """Let no other run write to `out` inside the block; the system releases the lock when the process ends.

    Raises:
        InputError: another run is writing there, or the folder cannot be written.
    """
    if not distributed.is_main_process():  # the other processes belong to the run of the first
        yield
        return
    folder = out / "checkpoints"
    try:
        with try_lock(folder / LOCK_FILE, remove=True) as acquired:
            if not acquired:
                raise InputError(f"another run is writing to {out}. Wait until it has ended, or choose another --out.")
            yield
    finally:
        for empty in (folder, out):  # a run that was refused leaves nothing behind
            with suppress(OSError):
                empty.rmdir()


def move_earlier_run(out: Path) -> Path:
    """Move what is in `out` to a new folder beside it, `OUT.old-1`, `OUT.old-2` ...

    Returns:
        The new folder.

    Raises:
        InputError: the files cannot be moved.
    """
    folder = out / "checkpoints"
    # the adapter's description first: without it a folder with the other files is no adapter
    entries = sorted(out.iterdir(), key=lambda path: path.name != INFO_FILE)
    entries = [path for path in entries if path != folder]
    entries += [path for path in folder.glob("*") if path.name != LOCK_FILE]
    target = out.resolve()
    number = 1
    while (destination := target.with_name(f"{target.name}.old-{number}")).exists():
        number += 1
    try:
        (destination / folder.name).mkdir(parents=True)
        for path in entries:
            path.rename(destination / path.relative_to(out))
        with suppress(OSError):
            (destination / folder.name).rmdir()
    except OSError as error:
        raise InputError(f"cannot move {out} to {destination}: {error.strerror}. Choose another --out.") from error
    _log.warning("moved the earlier run in %s to %s", out, destination)
    return destination
