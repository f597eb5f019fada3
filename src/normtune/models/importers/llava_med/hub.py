"""The directory of an original checkpoint, downloaded from the hub where it is not local."""

from __future__ import annotations

from pathlib import Path

from normtune.errors import InputError


def local_directory(name: str) -> Path:
    """The directory of a checkpoint; files of a hub name are fetched into the hub's cache.

    Raises:
        InputError: there is no such directory, or nothing of that name can be had.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{name} is no directory. Give a checkpoint's directory or a hub name owner/name.")
    from huggingface_hub import list_repo_files, snapshot_download

    try:
        try:
            weights = (
                "*.safetensors" if any(f.endswith(".safetensors") for f in list_repo_files(name)) else "*.bin"
            )
        except (OSError, ValueError):  # no network: what the cache holds
            weights = "*.safetensors"
        return Path(snapshot_download(name, allow_patterns=["*.json", "tokenizer.model", weights]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(
            f"cannot get {name}: {reason}. Give a directory that holds it, or check the name."
        ) from error
