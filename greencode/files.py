"""Reading and writing files: whole or not at all, compressed by suffix, hashed."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from greencode.errors import UserError

_OPENERS = {".gz": gzip.open, ".xz": lzma.open}


@contextlib.contextmanager
def staging(path: str | Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside `path`, this writer's alone, and delete it at the end.

    What a killed writer left in the folder is deleted by the next one of the same path; a lock, which ends
    with its process, tells the killed from the living. A second writer at the same time gets a folder with
    a name of its own, and so does every writer on a file system without locks.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f".{path.name}.partial")
    with contextlib.suppress(FileExistsError):  # mkdir's exist_ok fails if the folder goes meanwhile
        folder.mkdir()
    handle = _lock(folder)
    if handle is None:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.partial-"))
    try:
        for leftover in folder.iterdir():
            leftover.unlink()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def _lock(folder: Path) -> int | None:
    """A handle that holds the folder until it is closed, or None if it cannot be had."""
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A writer that has just finished has deleted the folder that was opened here.
        if os.path.samestat(os.fstat(handle), os.stat(folder)):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:  # no locks here, so the folder is no one's
        with contextlib.suppress(OSError):
            folder.rmdir()
    if handle is not None:
        os.close(handle)
    return None


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path with the name of `path`; on success what was written there takes its place.

    A job killed at any moment leaves the old file or the new one, never half of one. Two writers at once
    do not touch each other's half; the last to finish wins.
    """
    path = Path(path)
    with staging(path) as folder:
        temporary = folder / path.name
        yield temporary
        publish(temporary, path)


def publish(temporary: Path, path: Path) -> None:
    """Put a finished file in its place, readable by others: safetensors writes for the owner only."""
    temporary.chmod(0o644)
    os.replace(temporary, path)


def open_text(path: str | Path, mode: str = "r") -> IO[str]:
    """Open UTF-8 text, decompressing or compressing by suffix (.gz, .xz)."""
    path = Path(path)
    if path.suffix == ".gz" and "w" in mode:
        # No time stamp and no name in the header: same content, same bytes.
        raw = gzip.GzipFile(filename="", mode="wb", fileobj=open(path, "wb"), mtime=0)  # noqa: SIM115
        raw.myfileobj = raw.fileobj  # closed with the stream
        return io.TextIOWrapper(raw, encoding="utf-8", newline="\n")
    opener = _OPENERS.get(path.suffix, open)
    return opener(path, mode if "t" in mode else mode + "t", encoding="utf-8")


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically, compressed by suffix."""
    with atomic(path) as temporary, open_text(temporary, "w") as stream:
        stream.write(text)


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON atomically, readable and with sorted keys."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read JSON; a missing or broken file is a `UserError` that names it."""
    try:
        with open_text(path) as stream:
            return json.load(stream)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (ValueError, OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); delete it and run again.") from None


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
