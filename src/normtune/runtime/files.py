"""Atomic writes of files and directories: to a temporary name, flushed to disk, then renamed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from normtune.errors import InputError

_log = logging.getLogger(__name__)


def make_directory(path: Path) -> None:
    """Create a directory and its parents if they are missing, or raise an `InputError`."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}. Choose another --out.") from error


@contextmanager
def try_lock(path: Path, *, remove: bool = False) -> Iterator[bool]:
    """Try to lock a file, which is created if it is missing; yield whether this process holds the lock.

    The lock is a `flock`, so the system releases it when the process that holds it ends, however it ends.

    Args:
        remove: delete the file before the lock is released.

    Raises:
        InputError: the file cannot be written.
    """
    make_directory(path.parent)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"cannot write to {path.parent}: {error.strerror}. Choose another --out.") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            _log.warning("%s cannot be locked (%s): no other run may write there", path, error.strerror)
        if not os.fstat(descriptor).st_nlink:  # the process that held the lock has just deleted the file
            yield False
            return
        try:
            yield True
        finally:
            if remove:
                path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)  # closing the file also releases the lock


@contextmanager
def write_errors_as_input_errors(path: Path) -> Iterator[None]:
    """Within the context, an OSError is raised as an `InputError` that names the file or directory `path`."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}. Free some space, or write to another place."
        ) from error


def check_new_directory(path: Path) -> None:
    """Raise an `InputError` if `path` exists and is not an empty directory."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists and is not an empty directory. Choose another one, or remove it.")


@contextmanager
def atomic_write(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path in the same directory; rename it to `path` on success, remove it on failure.

    Raises:
        InputError: the file cannot be written (disk full, no permission); the old file is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with write_errors_as_input_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path | str) -> Iterator[Path]:
    """Yield a temporary directory next to `path`; rename it to `path` on success, remove it on failure.

    Raises:
        InputError: `path` exists and is not an empty directory, or a file cannot be written.
    """
    path = Path(path).absolute()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with write_errors_as_input_errors(path):
            check_new_directory(path)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    _flush(file)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    """Write a file's cached pages to disk: without it, a crash after the rename could leave an empty file."""
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_text(path: Path | str, text: str) -> None:
    """Write text in UTF-8, atomically."""
    with atomic_write(path) as temporary:
        # half a surrogate pair cannot be encoded in UTF-8: it is written as an escape, which JSON decodes
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def json_text(value: Any) -> str:
    """`value` as indented JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json_text(value))


def write_jsonl(path: Path | str, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line, atomically."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path | str) -> Any:
    """Read a JSON file; the `InputError` for one that is missing or damaged names the file and the line."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # a byte order mark is skipped
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing. Check the path.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from error
    except RecursionError as error:
        raise InputError(f"{path}: not valid JSON (nested too deep).") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}).") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}.") from error
