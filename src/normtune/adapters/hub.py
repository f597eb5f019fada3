"""Adapters on a hub: upload a folder to a repository, and download one by its name.

What is uploaded is a fixed list: the trained tensors, their description, the model card, and the scores of
evaluations as figures. Rows, questions, answers, predictions, hashes of rows and paths never are.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from normtune.adapters.info import NOTICE, AdapterInfo
from normtune.errors import InputError
from normtune.runtime.files import read_json, write_json, write_text
from normtune.runtime.notebook import Result

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # owner/name
# Normtune's files and PEFT's, as storage.py and export_peft.py name them; those modules import torch and PEFT
_TENSORS = ("adapter.safetensors", "adapter_model.safetensors")
_DESCRIPTIONS = ("adapter.json", "adapter_config.json")
_CARD = "README.md"
_SCORES = "scores.json"
# entries of metrics.json that are uploaded: no paths, and no values of the dataset's columns
_FIGURES = (
    *("dataset", "splits", "licence", "rows", "images", "split_hash", "metrics", "intervals", "normalisation"),
    *("settings", "setting", "trained_rows", "versions", "notice"),
)


@dataclass(frozen=True)
class Upload(Result):
    """What was uploaded, or would be."""

    repo: str
    private: bool
    base: str
    files: dict[str, int]  # name -> bytes of each uploaded file
    left_out: list[str]  # files of the folder that are never uploaded
    url: str | None = None  # the address of the commit; None in a dry run

    def __str__(self) -> str:
        lines = [f"{self.repo} ({'private' if self.private else 'public'}), adapter of {self.base}"]
        lines += [f"  {name}  {size:,} bytes" for name, size in self.files.items()]
        lines += [f"  not uploaded: {', '.join(self.left_out)}"] if self.left_out else []
        lines.append("nothing was uploaded (--dry-run)" if self.url is None else f"uploaded: {self.url}")
        return "\n".join(lines)


def local_folder(adapter: Path | str) -> Path:
    """The folder of an adapter that is given as a folder or by its name on the hub, which is downloaded once.

    Raises:
        InputError: the hub has no such adapter, or cannot be reached.
    """
    path, name = Path(adapter), str(adapter)
    # a folder that exists beside the missing one says that a local folder was meant: runs/lm instead of runs/ln
    if path.exists() or path.parent.exists() or not _NAME.fullmatch(name):
        return path
    from huggingface_hub import snapshot_download

    with _hub_errors(f"there is no folder {name}, and the hub's repository of that name cannot be loaded"):
        return Path(snapshot_download(name, allow_patterns=[*_TENSORS, *_DESCRIPTIONS, _CARD]))


def push(
    adapter: Path | str,
    repo: str,
    *,
    scores: Sequence[Path | str] = (),
    public: bool = False,
    dry_run: bool = False,
    announce: Any = None,
) -> Upload:
    """Upload an adapter to a repository of the hub, which is made if it does not exist.

    `HF_ENDPOINT` is the hub's address; the token comes from `HF_TOKEN` or `hf auth login`.

    Args:
        repo: owner/name.
        scores: folders that `normtune evaluate` wrote, for the model card and scores.json.
        public: let everybody read a new repository; without it an existing public repository is refused.
        announce: called with the `Upload` before anything is uploaded.

    Raises:
        InputError: the adapter is damaged, or the hub refuses the upload.
    """
    from normtune.adapters.storage import read_adapter_info

    folder = Path(adapter)
    if not _NAME.fullmatch(repo):
        raise InputError(f"'{repo}' is not a repository. Give owner/name.")
    info = read_adapter_info(folder)
    with TemporaryDirectory() as temporary:
        building = Path(temporary)
        base = _write_files(building, folder, info, [Path(run) for run in scores])
        files = {path.name: path.stat().st_size for path in sorted(building.iterdir())}
        left_out = sorted(path.name for path in folder.iterdir() if path.name not in files)
        upload = Upload(repo, not public, base, files, left_out)
        if announce is not None:
            announce(upload)
        return upload if dry_run else _upload(upload, building)


def _upload(upload: Upload, building: Path) -> Upload:
    from huggingface_hub import HfApi

    api = HfApi()
    with _hub_errors(f"cannot upload to {upload.repo}"):
        api.create_repo(upload.repo, private=upload.private, exist_ok=True)
        private = bool(api.repo_info(upload.repo).private)
        if upload.private and not private:
            raise InputError(f"{upload.repo} exists and is public. Choose another name, or upload it with --public.")
        commit = api.upload_folder(repo_id=upload.repo, folder_path=building, commit_message="Upload an adapter")
    return replace(upload, private=private, url=str(commit.commit_url))


def _write_files(building: Path, folder: Path, info: AdapterInfo, scores: Sequence[Path]) -> str:
    """Write what is uploaded to a new folder; returns the base's name in it: of a local path only its last part."""
    from huggingface_hub import ModelCardData

    is_path = Path(info.base_name).is_absolute() or Path(info.base_name).exists()
    base = Path(info.base_name).name if is_path else info.base_name
    records = {run.name: _figures(run) for run in scores}
    for name in (*_TENSORS, *_DESCRIPTIONS):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, building / name)
    for name, key in (("adapter.json", "base"), ("adapter_config.json", "base_model_name_or_path")):
        if (building / name).is_file():
            values = read_json(building / name)
            write_json(building / name, values | {key: base if key != "base" else {**values["base"], "name": base}})
    if records:
        write_json(building / _SCORES, records)
    head = ModelCardData(
        library_name="normtune" if info.base_fingerprint else "peft",
        base_model=base if _NAME.fullmatch(base) else None,
        tags=["medical", "vision-language", "research-use-only"],
    ).to_yaml()
    write_text(building / _CARD, f"---\n{head}\n---\n{_card(info, base, records)}")
    return base


def _card(info: AdapterInfo, base: str, records: dict[str, dict[str, Any]]) -> str:
    from normtune.adapters.model_card import model_card

    if not info.base_fingerprint:  # an adapter of PEFT
        return f"# An adapter of {base}\n\nFor {NOTICE}.\n"
    scores = {f"{run}: {record.get('dataset')}": record["metrics"] for run, record in records.items()}
    return model_card(replace(info, base_name=base, metrics={**(info.metrics or {}), **scores}))


def _figures(run: Path) -> dict[str, Any]:
    """The entries of an evaluation's metrics.json that are uploaded."""
    record = read_json(run / "metrics.json")
    if not isinstance(record, dict) or "metrics" not in record:
        raise InputError(f"{run} holds no scores. Give a folder that normtune evaluate wrote.")
    return {name: record[name] for name in _FIGURES if name in record}


@contextmanager
def _hub_errors(problem: str) -> Iterator[None]:
    """Turn the many kinds of errors of the hub's client into an InputError of one line."""
    # HTTPError is the error of the HTTP library that the client uses
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except InputError:
        raise
    except (HTTPError, HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"{problem}: {reason.rstrip('.')}. Check the name, HF_TOKEN and HF_ENDPOINT.") from error
