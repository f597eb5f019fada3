"""Finds the directory of an original checkpoint, or downloads it from the hub."""

from __future__ import annotations

from pathlib import Path

from normtune.errors import InputError


def find_or_download(name: str) -> Path:
    """The directory of a checkpoint; that of a hub name is downloaded into the hub's cache.

    Args:
        name: a directory, or a hub name "owner/name".

    Raises:
        InputError: there is no such directory, or the download fails.
    """
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{name} is no directory. Give a checkpoint's directory or a hub name owner/name.")
    from huggingface_hub import list_repo_files, snapshot_download

    try:
        try:  # of the two formats only one is downloaded
            weights = "*.safetensors" if any(f.endswith(".safetensors") for f in list_repo_files(name)) else "*.bin"
        except (OSError, ValueError):  # no network: use what is in the cache
            weights = "*.safetensors"
        return Path(snapshot_download(name, allow_patterns=["*.json", "tokenizer.model", weights]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise InputError(f"cannot get {name}: {reason}. Give a directory that holds it, or check the name.") from error
