"""Reading and writing files: whole or not at all, compressed by suffix, hashed."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from greencode.errors import UserError

_OPENERS = {".gz": gzip.open, ".xz": lzma.open}


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the place of `path`.

    A job killed at any moment leaves the old file or the new one, never half of one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp's 0600 would hide results from others
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
